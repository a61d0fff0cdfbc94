"""Names, and samplers of third parties."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samplers import UnknownSamplerError, get_sampler, list_samplers
from samplers.registry import _registry

PLUGIN = """
from samplers import Sampler, Selection

class LeftToRight(Sampler):
    \"\"\"Commit the leftmost candidate.\"\"\"
    name = {name!r}
    def select(self, step):
        first = step.candidate.int().argmax(dim=1, keepdim=True)
        return Selection(step.candidate & (first == first.new_tensor(range(step.candidate.shape[1]))))

not_a_class = LeftToRight()
"""

NAMES = [
    *(
        "random",
        "sequential",
        "topk",
        "threshold",
        "factor",
        "margin",
        "entropy",
        "entropy_bound",
        "dream",
        "hierarchy",
        "hierarchy_remask",
        "credit",
        "edit",
        "diffusion_gemma",
    ),
    "policy",
]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Puts a distribution with one entry point on the path, as an installer would."""

    def installed(entry: str, name: str, attribute: str = "LeftToRight") -> None:
        (tmp_path / "third_party_sampler.py").write_text(PLUGIN.format(name=name))
        info = tmp_path / "third_party-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[unmask.samplers]\n{entry} = third_party_sampler:{attribute}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "third_party_sampler", raising=False)
        _registry.cache_clear()

    yield installed
    monkeypatch.undo()
    _registry.cache_clear()


def test_ours() -> None:
    assert [sampler.name for sampler in list_samplers()] == NAMES
    assert get_sampler("topk") is get_sampler("topk")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UnknownSamplerError) as caught:
        get_sampler("nope")
    assert str(caught.value) == "unknown sampler 'nope'; choose from " + ", ".join(NAMES)


def test_an_entry_point_adds_a_sampler(install: Callable[[str, str], None]) -> None:
    install("left_to_right", "left_to_right")
    assert get_sampler("left_to_right").summary() == "Commit the leftmost candidate."
    assert [sampler.name for sampler in list_samplers()][-1] == "left_to_right"


def test_what_is_no_sampler_class_is_refused(install: Callable[[str, str, str], None]) -> None:
    install("left_to_right", "left_to_right", "not_a_class")
    with pytest.raises(TypeError, match=r"'left_to_right' in group unmask\.samplers is not a Sampler class"):
        list_samplers()


def test_a_name_that_is_not_the_entry_points_is_refused(install: Callable[[str, str], None]) -> None:
    install("left_to_right", "right_to_left")
    with pytest.raises(ValueError, match="names a sampler called 'right_to_left'"):
        list_samplers()


def test_a_name_in_use_is_refused(install: Callable[[str, str], None]) -> None:
    install("topk", "topk")
    with pytest.raises(ValueError, match="already in use"):
        list_samplers()
