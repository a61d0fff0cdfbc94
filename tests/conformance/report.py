"""What became of a case, and how it is told."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path


class Difference(Exception):
    """Ours and the original's differ; the message says where."""


class NotBuilt(Exception):
    """A case needs something that this project does not have yet: it counts as failed."""


class Status(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    KNOWN = "KNOWN"


@dataclass(frozen=True)
class Result:
    """One case's outcome."""

    family: str
    case: str
    status: Status
    detail: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}/{self.case}"

    def line(self) -> str:
        return f"{self.status} {self.name}" + (f": {self.detail}" if self.detail else "")


def totals(results: Iterable[Result]) -> str:
    """The last line."""
    count = Counter(result.status for result in results)
    return f"{count[Status.PASS]} passed, {count[Status.FAIL]} failed, {count[Status.KNOWN]} known"


def write_json(results: list[Result], path: Path) -> None:
    """All results and the totals, for programs."""
    count = Counter(result.status for result in results)
    path.write_text(
        json.dumps(
            {
                "passed": count[Status.PASS],
                "failed": count[Status.FAIL],
                "known": count[Status.KNOWN],
                "results": [asdict(result) for result in results],
            },
            indent=1,
        )
    )
