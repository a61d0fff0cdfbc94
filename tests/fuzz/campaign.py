"""Many requests to one server at once, and all that was wrong with the answers."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fuzz.asking import PATIENCE, Answer, ask, leave
from tests.fuzz.drawing import Case, draw_case
from tests.fuzz.families import Subject
from tests.fuzz.judging import Problem, differences, judge
from tests.fuzz.variants import variants_of

AT_ONCE = 8

Serve = Callable[[Subject], AbstractContextManager[str]]
"""Starts a server of a subject and gives its address."""


@dataclass(frozen=True)
class Failure:
    """A problem, the request that shows it, and the one before it that its answer was held against, if that is another.

    `again` is the command that sends them again.
    """

    problem: Problem
    request: dict[str, Any]
    first: dict[str, Any] | None
    again: str

    @property
    def key(self) -> tuple[str, str]:
        """Failures with the same key are probably the same fault."""
        return self.problem.kind, str(self.request["body"].get("sampler"))

    def lines(self) -> str:
        """The problem, the command, the request."""
        told = [f"{self.problem.kind}: {self.problem.detail}", self.again, json.dumps(self.request)]
        return "\n    ".join(told + ([f"against {json.dumps(self.first)}"] if self.first else []))


@dataclass
class Report:
    """What a campaign came to."""

    failures: list[Failure] = field(default_factory=list)
    sent: int = 0
    answered: int = 0
    refused: int = 0

    def distinct(self) -> dict[tuple[str, str], list[Failure]]:
        """Failures by key, the shortest request first."""
        found: dict[tuple[str, str], list[Failure]] = {}
        for failure in sorted(self.failures, key=lambda failure: len(failure.lines())):
            found.setdefault(failure.key, []).append(failure)
        return found


class EngineDeadError(Exception):
    """The server answers no more."""


class Campaign:
    """Requests to a subject's server, which is started again if one of them ends it.

    Args:
        seed: of the requests; the answers have seeds of their own.
    """

    def __init__(self, subject: Subject, serve: Serve, seed: int) -> None:
        self.report = Report()
        self._subject = subject
        self._serve = serve
        self._seed = seed
        self._cases: dict[int, Case] = {}

    def run(self, indices: Iterable[int]) -> Report:
        """Send these cases of the seed, several at once, and some of them once more alone."""
        left = list(indices)
        while left:
            suspects, left = self._round(left)
            found = [index for index in suspects if self._round([index])[0]]
            for index in found or suspects[:1]:
                kind = "the engine is dead" if found else f"the engine is dead, after one of {suspects}"
                self._note(index, Problem(kind, "/health is not 200"), self._cases[index])
        return self.report

    def _round(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """One server's life. Returns the cases in flight when its engine died, and those not begun by then."""
        with self._serve(self._subject) as url:
            cards = httpx.get(f"{url}/v1/samplers", trust_env=False).json()["data"]
            cases = {index: draw_case(self._subject, cards, self._chance(index)) for index in indices}
            self._cases |= cases
            return asyncio.run(self._send(url, cases))

    async def _send(self, url: str, cases: dict[int, Case]) -> tuple[list[int], list[int]]:
        limits = httpx.Limits(max_connections=4 * AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as http:
            turn, left, suspects = asyncio.Semaphore(AT_ONCE), dict(cases), list[int]()
            firsts: dict[int, Answer] = {}

            async def one(index: int, case: Case) -> None:
                async with turn:
                    if not suspects:
                        del left[index]
                        try:
                            firsts[index] = await self._one(http, index, case)
                        except EngineDeadError:
                            suspects.append(index)

            await asyncio.gather(*(one(index, case) for index, case in cases.items()))
            if not suspects:
                await self._alone(http, firsts)
                await self._idle(http)
            return suspects, list(left)

    async def _one(self, http: httpx.AsyncClient, index: int, case: Case) -> Answer:
        """A case and its variants; the answer to the case itself."""
        chance = self._chance(index)
        first = await self._ask(http, index, case, case.body)
        for problem in self._problems(case, first):
            self._note(index, problem, case)
        for variant in variants_of(self._subject, case, first, chance):
            answer = await self._ask(http, index, case, variant.body)
            if answer.status in (200, 400):
                for problem in variant.compare(first, answer):
                    self._note(index, problem, case, variant.body)
        if chance.random() < 0.1:
            await leave(http, case.path, case.body)
        return first

    def _problems(self, case: Case, answer: Answer) -> Iterator[Problem]:
        """Problems of a case's own answer."""
        named = answer.error.get("param")
        self.report.answered += answer.status == 200
        self.report.refused += answer.status == 400
        if answer.status == 200 and case.refused:
            yield Problem("not refused", case.refused)
        elif answer.status == 200:
            yield from judge(self._subject, case.body, answer)
        elif answer.status == 400 and not named:
            yield Problem("a refusal names no field", str(answer.error))
        elif answer.status == 400 and named not in case.may_refuse | {case.refused}:
            yield Problem("a legal request is refused", f"{named}: {answer.error['message']}")

    async def _ask(self, http: httpx.AsyncClient, index: int, case: Case, body: dict[str, Any]) -> Answer:
        """Send, and note an answer that no request may get. Raises EngineDeadError."""
        self.report.sent += 1
        answer = await ask(http, case.path, body)
        if answer.status not in (200, 400):
            if await self._health(http) != 200:
                raise EngineDeadError
            kind = f"status {answer.status}" if answer.status else "no answer"
            self._note(index, Problem(kind, str(answer.error.get("message"))), case, body)
        return answer

    async def _health(self, http: httpx.AsyncClient) -> int:
        try:
            return (await http.get("/health")).status_code
        except httpx.HTTPError:
            return 0  # a process that has ended

    async def _alone(self, http: httpx.AsyncClient, firsts: dict[int, Answer]) -> None:
        """One in five again, with nobody else about."""
        for index, first in firsts.items():
            if index % 5 == 0 and first.status == 200:
                case = self._cases[index]
                answer = await self._ask(http, index, case, case.body)
                for difference in differences(first, answer):
                    self._note(index, Problem("alone it is not the same", difference), case)

    async def _idle(self, http: httpx.AsyncClient) -> None:
        """With all answered nothing runs or waits."""
        found: dict[str, float] = {}
        for _ in range(100):
            text = (await http.get("/metrics")).text
            gauges = re.findall(r"^(dllm_requests_(?:running|waiting))\{.*\} (\S+)$", text, re.MULTILINE)
            found = {name: float(value) for name, value in gauges}
            if found == {"dllm_requests_running": 0, "dllm_requests_waiting": 0}:
                return
            await asyncio.sleep(0.1)
        last = max(self._cases)
        self._note(last, Problem("gauges do not return to 0", str(found)), self._cases[last])

    def _note(self, index: int, problem: Problem, case: Case, body: dict[str, Any] | None = None) -> None:
        name = self._subject.name
        again = f"python -m tests.fuzz --seed {self._seed} --family {name} --only {index}"
        request = {"family": name, "path": case.path, "body": body or case.body}
        first = case.body if body and body != case.body else None
        self.report.failures.append(Failure(problem, request, first, again))

    def _chance(self, index: int) -> random.Random:
        return random.Random(f"{self._seed} {index}")
