"""All cases of a fixtures folder, one after the other."""

import json
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import safe_open

from tests.conformance.diffusion_gemma import GemmaFamily
from tests.conformance.dinfer import InferFamily
from tests.conformance.dream import DreamFamily
from tests.conformance.fast_dllm_v2 import FastDLLMFamily
from tests.conformance.generation import Check, Family
from tests.conformance.llada2 import LLaDA2Family
from tests.conformance.report import Difference, NotBuilt, Result, Status
from tests.conformance.sampler_only import SamplerOnly
from tests.conformance.sdar import SDARFamily

FAMILIES: dict[str, type[Family] | type[SamplerOnly]] = {
    "diffusion_gemma": GemmaFamily,
    "dinfer": InferFamily,
    "dream": DreamFamily,
    "fast_dllm_v2": FastDLLMFamily,
    "llada": Family,
    "llada_moe": Family,
    "llada2": LLaDA2Family,
    "sampler_only": SamplerOnly,
    "sdar": SDARFamily,
}
NOT_BUILT = "not built yet: "
KNOWN_DIFFERENCES = Path(__file__).with_name("known_differences.toml")


def find_families(folder: Path) -> list[Path]:
    """The family folders under `folder`, or itself if it is one. Raises FileNotFoundError if there is none."""
    if (folder / "cases.json").is_file():
        return [folder.resolve()]
    found = sorted(path.parent.resolve() for path in folder.glob("*/cases.json"))
    if not found:
        raise FileNotFoundError(f"{folder}: no cases.json in it or in a folder of it")
    return found


def run(folder: Path, engine: str = "torch", known: Path = KNOWN_DIFFERENCES) -> Iterator[Result]:
    """Replay every case of every family."""
    reasons: dict[str, str] = tomllib.loads(known.read_text())
    for family in find_families(folder):
        for case, detail in _outcomes(family, engine):
            name = f"{family.name}/{case}"
            listed = next((pattern for pattern in reasons if fnmatchcase(name, pattern)), None)
            if listed is None or detail.startswith(NOT_BUILT):
                yield Result(family.name, case, Status.FAIL if detail else Status.PASS, detail)
            elif detail:
                yield Result(family.name, case, Status.KNOWN, reasons[listed])
            elif "*" in listed:
                yield Result(family.name, case, Status.PASS)
            else:
                yield Result(family.name, case, Status.FAIL, "listed as a known difference, but does not differ")


def _names(folder: Path) -> Iterator[str]:
    """The cases of a family that nobody can run yet."""
    forwards = folder / "forward.safetensors"
    if forwards.exists():
        with safe_open(forwards, framework="pt") as file:
            yield from dict.fromkeys(f"forward.{name.partition('.')[0]}" for name in file.keys())  # noqa: SIM118
    yield from (case["name"] for case in json.loads((folder / "cases.json").read_text())["cases"])


def _outcomes(folder: Path, engine: str) -> Iterator[tuple[str, str]]:
    """Each case of a family and what differs; an empty text if nothing does."""
    if folder.name not in FAMILIES:
        for case in _names(folder):
            yield case, f"{NOT_BUILT}the {folder.name} family"
        return
    family = FAMILIES[folder.name](folder, engine)
    try:
        for case, check in family.checks():
            yield case, _outcome(check)
    finally:
        family.close()


def _outcome(check: Check) -> str:
    try:
        check()
    except Difference as difference:
        return str(difference)
    except NotBuilt as missing:
        return f"{NOT_BUILT}{missing}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
