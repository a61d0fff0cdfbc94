"""What clients do: ask, leave, read slowly, send nonsense, change policies, look at the metrics."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fuzz.asking import PATIENCE, ask
from tests.fuzz.drawing import WORDS, Case, draw_case
from tests.fuzz.families import Subject

ADMIN = {"Authorization": "Bearer soak"}
FINE = {200, 400, 429}
"""What an answer to a drawn request may be: the queue may be full, and a policy that it names may be gone."""
MOST_SECONDS = 3.0
"""How long a slow reader reads, before it reads the rest or goes away."""


@dataclass
class Session:
    """One server and those who use it.

    Attributes:
        names: of policies that may be there or not.
        requests: how many were sent, by what they were for.
        statuses: of their answers; 0: none came.
        faults: what no client may see.
    """

    subject: Subject
    url: str
    http: httpx.AsyncClient
    cards: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def check(self, what: str, status: int, expected: set[int], detail: object = "") -> None:
        """Count an answer, and note one that should not be."""
        self.statuses[status] += 1
        if status not in expected:
            self.faults.append(f"{what}: status {status}, not one of {sorted(expected)}: {str(detail)[:500]}")

    def draw(self, chance: random.Random) -> Case:
        """A request that can be answered, mostly; some of them by a policy that comes and goes."""
        case = draw_case(self.subject, self.cards, chance)
        body = {
            name: value for name, value in case.body.items() if name != "return_trajectory" or chance.random() < 0.3
        }
        if body.get("sampler") == "policy" and self.names and chance.random() < 0.7:
            body["sampler_params"] = {"policy": chance.choice(self.names)}
        return Case(case.path, body)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


Action = Callable[[Session, random.Random], Awaitable[None]]


async def whole(session: Session, chance: random.Random) -> None:
    """Ask, and read the answer to its end."""
    case = session.draw(chance)
    answer = await ask(session.http, case.path, case.body)
    session.check("a request", answer.status, FINE, (case.body, answer.error))


async def stream(session: Session, chance: random.Random) -> None:
    case = session.draw(chance)
    answer = await ask(session.http, case.path, case.body | {"stream": True})
    session.check("a stream", answer.status, FINE, (case.body, answer.error))


async def chat(session: Session, chance: random.Random) -> None:
    """A conversation of several turns, each with the answers before it."""
    said: list[dict[str, str]] = []
    for _ in range(chance.randint(1, 3)):
        said.append({"role": "user", "content": "".join(chance.choices(WORDS, k=chance.randint(1, 3)))})
        answer = await ask(
            session.http, "/v1/chat/completions", {"messages": said, "max_tokens": chance.randint(1, 24)}
        )
        session.check("a chat", answer.status, FINE, (said, answer.error))
        if answer.status != 200:
            break
        said.append({"role": "assistant", "content": answer.choices[0].text})


async def leave(session: Session, chance: random.Random) -> None:
    """Go away at any moment: before the request is whole, while it waits or runs, in the midst of the answer."""
    case = session.draw(chance)
    request = post(case.path, case.body | ({"stream": True} if chance.random() < 0.6 else {}))
    reader, writer = await asyncio.open_connection("127.0.0.1", session.port)
    try:
        writer.write(request[: chance.randrange(len(request))] if chance.random() < 0.2 else request)
        await asyncio.sleep(chance.expovariate(20))
        if chance.random() < 0.5:
            await asyncio.wait_for(reader.read(chance.choice((1, 100, 5000))), chance.expovariate(5))
    except (TimeoutError, OSError):
        pass
    finally:
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()


async def read_slowly(session: Session, chance: random.Random) -> None:
    """Take a stream byte by byte for a while, then the rest or nothing more."""
    case = session.draw(chance)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    with connection:
        await loop.sock_connect(connection, ("127.0.0.1", session.port))
        await loop.sock_sendall(connection, post(case.path, case.body | {"stream": True}, "connection: close"))
        began, seconds = loop.time(), chance.uniform(0, MOST_SECONDS)
        try:
            while loop.time() - began < seconds and await asyncio.wait_for(loop.sock_recv(connection, 1), PATIENCE):
                await asyncio.sleep(0.02)
            while chance.random() < 0.999 and await asyncio.wait_for(loop.sock_recv(connection, 4096), PATIENCE):
                pass
        except TimeoutError:
            session.check("a slow reader", 0, FINE, f"nothing came in {PATIENCE:.0f} s")
        except OSError:
            pass  # the server may end what takes too long


BROKEN: tuple[bytes, ...] = (
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: nine\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\n",
)
WRONG: tuple[tuple[str, str, bytes], ...] = (
    ("GET", "/v1/nothing", b""),
    ("DELETE", "/v1/completions", b""),
    ("POST", "/v1/completions", b"{"),
    ("POST", "/v1/completions", b"[" * 5000),
    ("POST", "/v1/completions", b"\xff\xfe"),
    ("POST", "/v1/completions", b'{"prompt": "a", "temprature": 1}'),
    ("POST", "/v1/completions", b'{"prompt": "a", "n": 1e400}'),
    ("POST", "/v1/chat/completions", b'{"messages": []}'),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": {"a": 1}}]}'),
    ("POST", "/tokenize", b'{"prompt": 3}'),
    ("POST", "/detokenize", b'{"tokens": [-1]}'),
    ("GET", "/v1/samplers/../policies/%00", b""),
)


async def send_nonsense(session: Session, chance: random.Random) -> None:
    """What is no HTTP, and what is HTTP and wrong."""
    if chance.random() < 0.4:
        reader, writer = await asyncio.open_connection("127.0.0.1", session.port)
        try:
            writer.write(chance.choice((*BROKEN, chance.randbytes(chance.randint(1, 2000)))))
            answer = await asyncio.wait_for(reader.read(1000), 0.3)
            if answer:
                session.check("nonsense", int(answer.split()[1]), set(range(400, 500)), answer)
        except (TimeoutError, OSError):
            pass
        finally:
            writer.close()
        return
    method, path, content = chance.choice(WRONG)
    answer = await session.http.request(method, path, content=content, headers={"content-type": "application/json"})
    session.check(f"wrong: {method} {path}", answer.status_code, set(range(400, 500)), content)


async def look(session: Session, chance: random.Random) -> None:
    """Read what a client, a probe, Prometheus and a person read."""
    path = chance.choice(
        ("/health", "/ready", "/version", "/v1/models", "/v1/samplers", "/v1/policies", "/docs", "/openapi.json")
        + ("/metrics",) * 4
    )
    answer = await session.http.get(path)
    session.check(f"GET {path}", answer.status_code, {200})


async def count_tokens(session: Session, chance: random.Random) -> None:
    """Texts of words that nobody has written before, short and now and then long."""
    words = (
        "".join(chance.choices("aeiou bcdlmnrst", k=chance.randint(2, 9))) for _ in range(chance.choice((5, 50, 5000)))
    )
    answer = await session.http.post("/tokenize", json={"prompt": " ".join(words)})
    session.check("/tokenize", answer.status_code, {200})
    if answer.status_code == 200:
        answer = await session.http.post("/detokenize", json={"tokens": answer.json()["tokens"]})
        session.check("/detokenize", answer.status_code, {200})


async def change_policies(session: Session, chance: random.Random) -> None:
    """Load one under some name, take one out, try to without the key."""
    name = chance.choice(session.names)
    headers = ADMIN if chance.random() < 0.8 else {"Authorization": "Bearer wrong"}
    expected = {200, 400, 404} if headers is ADMIN else {403}
    if chance.random() < 0.7:
        body = {"name": chance.choice((name, f"{name}-too")), "path": name}
        answer = await session.http.post("/v1/policies", json=body, headers=headers)
    else:
        answer = await session.http.delete(f"/v1/policies/{name}", headers=headers)
    session.check("/v1/policies", answer.status_code, expected, answer.text)


ACTIONS: dict[Action, int] = {
    whole: 30,
    stream: 20,
    chat: 8,
    leave: 15,
    read_slowly: 3,
    send_nonsense: 10,
    look: 10,
    count_tokens: 4,
    change_policies: 3,
}
"""What is done, and how often."""


async def act(session: Session, chance: random.Random) -> None:
    """Do one of the things."""
    (action,) = chance.choices(list(ACTIONS), weights=list(ACTIONS.values()))
    session.requests[action.__name__] += 1
    try:
        await action(session, chance)
    except httpx.HTTPError as error:
        session.check(action.__name__, 0, FINE, repr(error))


def post(path: str, body: Mapping[str, Any], *headers: str) -> bytes:
    """A request as it is on the wire."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content
