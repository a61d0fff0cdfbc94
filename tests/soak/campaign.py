"""A soak of one server: warm it up, look, go on for a while, look again."""

import asyncio
import random
import tempfile
from collections import Counter
from pathlib import Path

import httpx

import server
from tests.fuzz.asking import PATIENCE
from tests.fuzz.families import FAMILIES, POLICY, Subject
from tests.soak.clients import Session, act
from tests.soak.folder import NAMES, ChangingFolder
from tests.soak.judging import Outcome
from tests.soak.reading import Reading, read
from tests.soak.server import Server, soaked

AT_ONCE = 12
"""Clients."""
WARM = 1 / 3
"""Part of the time after which the server counts as warm."""
BETWEEN = 0.7
"""Seconds between two changes of the folder of policies."""
REST = 20.0
"""Seconds that the server has to come to rest."""
EMBEDDED = "embedded"
NAMED = [EMBEDDED, *FAMILIES]


def soak(name: str, seconds: float, seed: int, at_once: int = AT_ONCE) -> Outcome:
    """Ask a server of the embedded model, or of a tiny one of a family, for about this long, by so many clients."""
    with tempfile.TemporaryDirectory(prefix="unmask-soak-") as place:
        folder = Path(place)
        (folder / "policies").mkdir()
        arguments = ["--policy-dir", str(folder / "policies"), "--admin-key", "soak", "--max-queue", "64"]
        if name == EMBEDDED:
            subject = Subject("llada", Path(server.__file__).parent / "models" / "embedded")
        else:
            subject = Subject.make(name, folder / "model")
            arguments += ["--model", str(subject.folder), "--dtype", "float32"]
            if not subject.family.drafts:
                arguments += ["--policy", f"{POLICY.name}={POLICY}"]
        changing = ChangingFolder(folder / "policies", subject.tokenizer.get_vocab_size())
        with soaked(arguments, folder) as running:
            outcome = asyncio.run(_soak(name, subject, running, changing, seconds, seed, at_once))
        outcome.faults += running.faults()
        return outcome


async def _soak(
    name: str, subject: Subject, running: Server, changing: ChangingFolder, seconds: float, seed: int, at_once: int
) -> Outcome:
    chance = random.Random(f"{seed} {name}")
    start = await _at_rest(running)
    cards = httpx.get(f"{running.url}/v1/samplers", trust_env=False).json()["data"]
    requests, statuses, faults = Counter[str](), Counter[int](), list[str]()

    async def phase(seconds: float) -> None:
        limits = httpx.Limits(max_connections=2 * at_once)
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE, limits=limits, trust_env=False) as http:
            session = Session(subject, running.url, http, cards, NAMES, requests, statuses, faults)
            until = asyncio.get_running_loop().time() + seconds
            clients = [_client(session, random.Random(chance.random()), until) for _ in range(at_once)]
            await asyncio.gather(*clients, _changes(changing, random.Random(chance.random()), until))

    await phase(seconds * WARM)
    warm, before = await _at_rest(running), sum(requests.values())
    await phase(seconds * (1 - WARM))
    end = await _at_rest(running)
    return Outcome(
        name, start, warm, end, dict(requests), sum(requests.values()) - before, dict(statuses), list(faults)
    )


async def _client(session: Session, chance: random.Random, until: float) -> None:
    while asyncio.get_running_loop().time() < until:
        await act(session, chance)


async def _changes(changing: ChangingFolder, chance: random.Random, until: float) -> None:
    while asyncio.get_running_loop().time() < until:
        await asyncio.to_thread(changing.change, chance)
        await asyncio.sleep(BETWEEN)


async def _at_rest(running: Server) -> Reading:
    """A reading once nothing runs and closed connections are gone; if that takes too long, one of what is there."""
    until = asyncio.get_running_loop().time() + REST
    reading = read(running.pid, running.url)
    while True:
        await asyncio.sleep(0.5)
        before, reading = reading, read(running.pid, running.url)
        calm = (reading.running, reading.waiting) == (0, 0) and reading.descriptors >= before.descriptors
        if (calm and reading.tasks >= before.tasks) or asyncio.get_running_loop().time() > until:
            return reading
