"""Files that somebody else made: what is none, or has no end, is refused and never waited for."""

import io
import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from policies.evaluation.card import Card
from policies.evaluation.measure import Measurement
from policies.evaluation.results import Results, ResultsError, add_row, model_digest, open_results
from policies.files.regular import check_safetensors, read_file, read_open
from policies.files.toml import read_toml
from policies.tasks.records import MOST_LINE, Record, read_lines
from policies.training.checkpointing import RunState
from policies.training.recipe import PolicyRecipe
from policies.training.runs import Runs
from server.settings import WrongSettingError, load_settings
from tests.policies.tiny import network, recipe

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_what_is_read_has_a_size(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "a", 5) == read_file(tmp_path / "link", 5) == b"12345"
    for path, why in (
        (tmp_path / "a", "more than 4 bytes"),
        (pipe, "a named pipe"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(OSError, match=why) as caught:
            read_file(path, 4)
        assert caught.value.filename == str(path)
    assert read_file(Path("/proc/self/stat"), 1 << 16), "a file of the system's own, which says that it has no bytes"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_file(Path("/proc/self/stat"), 9)


def test_an_endless_file_that_says_it_is_empty_is_read_so_far(tmp_path: Path) -> None:
    """As the system's own files may be."""
    asked: list[int] = []

    class Endless(io.BytesIO):
        def fileno(self) -> int:
            return handle

        def read(self, size: int | None = -1) -> bytes:
            asked.append(-1 if size is None else size)
            return b"x" * 10

    handle = os.open("/proc/self/stat", os.O_RDONLY)
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_open(Endless(), tmp_path, 9)
    os.close(handle)
    assert asked == [10]


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (b"", "the header is not all there"),
        (struct.pack("<Q", 10**15), "a header of 1000000000000000 bytes in a file of 108"),
        (struct.pack("<Q", 100), None),
        (struct.pack("<Q", 101), "a header of 101 bytes"),
    ],
)
def test_the_length_of_a_header_is_looked_at_first(tmp_path: Path, start: bytes, why: str | None) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + b" " * (100 if start else 0))
    if why is None:
        check_safetensors(path)
        why = "more than 99"
    with pytest.raises(ValueError, match=why):
        check_safetensors(path, 99)


def test_a_pipe_is_no_file_of_any_kind(tmp_path: Path, pipe: Path) -> None:
    why = "a named pipe, not a file"
    with pytest.raises(ValueError, match=why):
        read_toml(pipe, PolicyRecipe)
    with pytest.raises(WrongSettingError, match=why):
        load_settings({}, pipe)
    with pytest.raises(ValueError, match=why):
        list(read_lines(pipe, Record))
    with pytest.raises(OSError, match=why):
        RunState.load(pipe, recipe({"kind": "collect", "runs": 1}), network(), lambda stage: pytest.fail())
    with pytest.raises(OSError, match=why):
        Runs.load(pipe)
    (tmp_path / "README.md").symlink_to("pipe")
    with pytest.raises(ValueError, match=why):
        Card.read(tmp_path)
    fresh = Results(model="m", digest="d", dtype="float32")
    with pytest.raises(ResultsError, match=why):
        open_results(pipe, fresh)
    (tmp_path / "tokenizer.json").symlink_to("pipe")
    with pytest.raises(OSError, match=why):
        model_digest(tmp_path)
    with pytest.raises(ResultsError, match=why):
        add_row(pipe, fresh, Measurement.model_construct())


def test_a_line_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.touch()
    os.truncate(path, 16 * MOST_LINE)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"line 1: more than {MOST_LINE} bytes"):
        list(read_lines(path, Record))
    assert tracemalloc.get_traced_memory()[1] < 8 * MOST_LINE, "it is not read to its end"
    tracemalloc.stop()


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "a = 1" + "0" * 5000, "a = " + "{b = " * 50_000])
def test_toml_that_is_too_deep_or_counts_too_far(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a TOML file") as caught:
        read_toml(path, PolicyRecipe)
    assert "\n" not in str(caught.value)
    with pytest.raises(WrongSettingError, match="not a TOML file"):
        load_settings({}, path)
