"""Lines of the log: nothing that a client sends makes two of one, or reaches the terminal as a command."""

import json
import logging
from collections.abc import Iterator
from io import StringIO
from typing import Literal

import pytest
import structlog

from server.runtime.logging import configure_logging

EVIL = [
    "/a\x1b[2J",
    "/b\n2026-01-01T00:00:00Z [info     ] forged",
    "/c\r2026",
    "/d\u2028e",
    "/f\u2029g",
    "/h\x85i",
    "/j\x0b\x0c\x1c\x1d\x1ek",
    "/l\x7fm",
    "/n\x9b31m",
    "/o\u202eevil",
    "/p\x00",
    "/with space\x1b[31m",
    "\x1b]0;title\x07",
]


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What others have configured comes back."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    logging.basicConfig(handlers=handlers, level=level, force=True)


def check(written: str, lines: int) -> None:
    assert written.endswith("\n") and written.count("\n") == lines
    assert all(character.isprintable() for character in written if character != "\n"), repr(written)


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str], form: Literal["text", "json"], evil: str) -> None:
    configure_logging(form)
    log = structlog.get_logger("test")
    log.info("request", path=evil, several=[evil], mapping={evil: evil})
    log.info(evil)
    with structlog.contextvars.bound_contextvars(request_id=evil):
        log.error("failed", error=ValueError(evil))
    logging.getLogger("library").warning("said %s", evil)
    written = capsys.readouterr().err
    check(written, 4)
    if form == "json":
        assert json.loads(written.splitlines()[0])["path"] == evil


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_no_line_of_a_traceback_looks_like_one_of_the_log(capsys: pytest.CaptureFixture[str], evil: str) -> None:
    configure_logging("text")
    try:
        raise ValueError(evil)
    except ValueError:
        structlog.get_logger("test").exception("failed", path=evil)
    written = capsys.readouterr().err
    first, *rest = written.rstrip("\n").split("\n")
    assert "failed" in first and any("ValueError" in line for line in rest)
    assert all(line.startswith("  ") for line in rest)
    check(written, 1 + len(rest))


class Panic(BaseException):
    """Of a kind that hardly anything catches."""


class Panics:
    def __repr__(self) -> str:
        raise Panic


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_that_cannot_be_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, form: Literal["text", "json"]
) -> None:
    said = StringIO()
    monkeypatch.setattr("sys.stderr", said)
    configure_logging(form)
    log = structlog.get_logger("test")
    log.error("failed", value=Panics())
    log.info("still there")
    assert "still there" in said.getvalue()
    said.close()
    log.error("failed", exc_info=ValueError("by design"))
    logging.getLogger("library").warning("said")


def test_plain_text_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text")
    structlog.get_logger("test").info("request", path="/v1/gr\u00fc\u00dfe\u4f60\u597d", status=200)
    assert "path=/v1/gr\u00fc\u00dfe\u4f60\u597d status=200" in capsys.readouterr().err
