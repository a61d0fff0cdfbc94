"""Names, and samplers of third parties."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samplers import (
    UnknownModifierError,
    UnknownSamplerError,
    describe,
    describe_modifier,
    get_modifier,
    get_sampler,
    list_modifiers,
    list_samplers,
    list_unavailable,
)
from samplers import plugins as plugins_module
from tests.installed import SAMPLER, Installed, forget

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
        "local_leap",
        "hierarchy_remask",
        "credit",
        "edit",
        "saber",
        "smc",
        "diffusion_gemma",
    ),
    "policy",
]


def test_ours() -> None:
    assert [sampler.name for sampler in list_samplers()] == NAMES
    assert get_sampler("topk") is get_sampler("topk")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UnknownSamplerError) as caught:
        get_sampler("nope")
    assert str(caught.value) == "unknown sampler 'nope'; choose from " + ", ".join(NAMES)


def test_an_entry_point_adds_a_sampler(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed.sampler()
    assert get_sampler("left_to_right").summary() == "Commit the leftmost candidate."
    assert [sampler.name for sampler in list_samplers()] == [*NAMES, "left_to_right"]
    assert list_unavailable() == [] and caplog.records == []


RENAMED = SAMPLER.replace('"left_to_right"', "{!r}")
PARAMS = "    class Params({base}):\n        k: {kind} = {default}\n"
BROKEN = {
    "no such module": ("import nothing_like_it\n", "ModuleNotFoundError: No module named 'nothing_like_it'"),
    "no python": ("def (", "SyntaxError: "),
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "panics": ("class Panic(BaseException): pass\nraise Panic('native code')", "Panic: native code"),
    "says nothing": (
        "class Wordless(Exception):\n    def __str__(self): raise SystemExit(3)\nraise Wordless",
        "Wordless: (a text that cannot be shown)",
    ),
    "interrupts": ("class Stop(KeyboardInterrupt): pass\nraise Stop", "Stop: "),
    "says too much": ("raise ValueError('x' * 10_000_000)", "x..."),
    "a name of another kind": (
        SAMPLER.replace('"left_to_right"', "type('Text', (str,), {})('left_to_right')"),
        "has the name 'left_to_right', not the entry point's",
    ),
    "a name that is computed": (
        "class Later:\n    def __get__(self, one, cls): return 'left_to_right'\n"
        + SAMPLER.replace('"left_to_right"', "Later()"),
        "name or Params is no plain attribute",
    ),
    "attributes that are computed": (
        SAMPLER + "    def __getattribute__(self, name):\n        return super().__getattribute__(name)\n",
        "its attributes are computed when they are read",
    ),
    "too many numbers": (SAMPLER + "    top = 10 ** 12\n", "top is not a number of probabilities from 0 to"),
    "a flag that is none": (SAMPLER + "    revises = 'yes'\n", "revises is neither True nor False"),
    "half a character": (SAMPLER + "    paper = '\\udc80'\n", "UnicodeEncodeError: "),
    "a long description": (SAMPLER.replace("leftmost", "leftmost " * 20_000), "more than 100000 characters"),
    "no such attribute": ("", "AttributeError: module 'third_party' has no attribute 'LeftToRight'"),
    "no class": ("LeftToRight = 3", "third_party:LeftToRight is not a Sampler class"),
    "another class": ("class LeftToRight: name = 'left_to_right'", "is not a Sampler class"),
    "an object": (SAMPLER + "LeftToRight = LeftToRight()", "is not a Sampler class"),
    "another name": (RENAMED.format("right_to_left"), "has the name 'right_to_left', not the entry point's"),
    "no name": (SAMPLER.replace('    name = "left_to_right"\n', ""), "has the name None"),
    "abstract": (SAMPLER.replace("def select", "def choose"), "TypeError: Can't instantiate abstract class"),
    "raises when made": (
        SAMPLER + "    def __init__(self):\n        raise OSError('no weights')",
        "OSError: no weights",
    ),
    "needs arguments": (SAMPLER + "    def __init__(self, path):\n        self.path = path", "TypeError: "),
    "no parameters": (SAMPLER + "    Params = dict\n", "Params is not a SamplerParams class"),
    "no schema": (
        SAMPLER + PARAMS.format(base="SamplerParams", kind="__import__('typing').Callable", default="print"),
        "InvalidForJsonSchema: ",
    ),
    "no such statistic": (SAMPLER + "    statistics = frozenset({'surprise'})\n", "no statistic 'surprise'"),
    "no number": (SAMPLER + "    top = 'all'\n", "top is not a number"),
    "no text": (SAMPLER + "    paper = 3\n", "paper is not text"),
    "no sentence": (SAMPLER + "    def summary(self):\n        return 3\n", "summary is not text"),
    "a schema of another kind": (SAMPLER + "    def schema(self):\n        return [1]\n", "schema is not an object"),
    "fits by raising": (
        SAMPLER + "    def incompatibility(self, pattern):\n        raise KeyError('x')\n",
        "KeyError: 'x'",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_loaded_is_skipped_with_one_warning(
    installed: Installed, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    source, reason = BROKEN[fault]
    installed.sampler(source)
    for _ in range(2):
        assert [sampler.name for sampler in list_samplers()] == NAMES
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.exc_info is None
    said = record.getMessage()
    assert said.startswith("unmask.samplers 'left_to_right' of third_party 1.0 is skipped: ")
    assert reason in said and "\n" not in said
    (plugin,) = list_unavailable()
    assert (plugin.name, plugin.distribution) == ("left_to_right", "third_party 1.0") and reason in plugin.reason
    with pytest.raises(UnknownSamplerError) as caught:
        get_sampler("left_to_right")
    assert "'left_to_right' of third_party 1.0 could not be loaded" in str(caught.value)
    assert plugin.reason in str(caught.value) and str(caught.value).endswith("choose from " + ", ".join(NAMES))


@pytest.mark.parametrize("name", ["topk", "policy", "oracle", "policy-mine"])
def test_a_name_that_means_something_else_is_not_taken(
    installed: Installed, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    installed.sampler(RENAMED.format(name), entry=name)
    assert [sampler.name for sampler in list_samplers()] == NAMES
    assert len(caplog.records) == 1 and f"'{name}' of third_party 1.0 is skipped" in caplog.text


@pytest.mark.parametrize("name", ["two words", "Ümlaut", "a/b", "-a", "a" * 65])
def test_a_name_that_no_request_could_use_is_refused(
    installed: Installed, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    installed.sampler(RENAMED.format(name), entry=name)
    assert [sampler.name for sampler in list_samplers()] == NAMES
    assert "a name has at most 64 letters" in caplog.text


def test_one_broken_plugin_leaves_the_others(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed.add("broken", "import nothing_like_it", "unmask.samplers", a="A", left_to_right="LeftToRight")
    installed.sampler()
    assert [sampler.name for sampler in list_samplers()] == [*NAMES, "left_to_right"]
    assert [plugin.name for plugin in list_unavailable()] == ["a"]
    assert len(caplog.records) == 2


def test_the_first_of_two_with_one_name_is_taken(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed.add("another", SAMPLER, "unmask.samplers", left_to_right="LeftToRight")
    installed.sampler()
    assert [sampler.name for sampler in list_samplers()] == [*NAMES, "left_to_right"]
    assert list_unavailable() == []
    assert len(caplog.records) == 1 and "the name is already in use" in caplog.text


def test_one_that_is_skipped_does_not_describe_its_namesake(installed: Installed) -> None:
    wrong = SAMPLER.replace("leftmost", "worst") + "    top = -1\n"
    installed.add("another", wrong, "unmask.samplers", left_to_right="LeftToRight")
    installed.sampler()
    list_samplers()
    assert describe("left_to_right").summary == "Commit the leftmost candidate."


def test_entry_points_that_cannot_be_read_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(**_: object) -> None:
        raise TypeError("half a line")

    with monkeypatch.context() as patch:
        patch.setattr(plugins_module, "entry_points", raises)
        forget()
        assert [sampler.name for sampler in list_samplers()] == NAMES
    forget()
    assert "entry points cannot be read: TypeError: half a line" in caplog.text


def test_what_takes_long_to_load_is_named_meanwhile(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins_module, "SLOW", 0.01)
    noted: list[str] = []
    monkeypatch.setattr(plugins_module, "noted", noted, raising=False)
    waiting = "import time\nfrom samplers import plugins\nfor _ in range(500):\n    plugins.noted or time.sleep(0.01)\n"
    monkeypatch.setattr(plugins_module.log, "warning", lambda text, *values: noted.append(text % values))
    installed.sampler(waiting + SAMPLER)
    assert "left_to_right" in [sampler.name for sampler in list_samplers()]
    assert noted == ["unmask.samplers 'left_to_right' of third_party 1.0 takes long to load"]


def test_what_is_installed_is_found_by_the_command_line(installed: Installed) -> None:
    """In a process of its own, where nothing stands between the registry and what Python finds."""
    installed.sampler()
    installed.add("broken", "import nothing_like_it", "unmask.samplers", broken="Broken")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed.folder), *sys.path]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "server.cli", "samplers", "left_to_right"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "Commit the leftmost candidate." in done.stdout
    warnings = [line for line in done.stderr.splitlines() if "broken 1.0 is skipped: ModuleNotFoundError" in line]
    assert len(warnings) == 1 and "Traceback" not in done.stderr


def test_modifiers_are_known_by_name() -> None:
    assert [modifier.name for modifier in list_modifiers()] == ["guidance", "credit", "spacing"]
    assert get_modifier("spacing") is get_modifier("spacing")
    assert describe_modifier("credit").parameters == ["alpha", "gamma", "beta"]
    with pytest.raises(UnknownModifierError) as caught:
        get_modifier("nope")
    assert str(caught.value) == "unknown modifier 'nope'; choose from guidance, credit, spacing"
