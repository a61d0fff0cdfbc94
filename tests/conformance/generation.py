"""Families that `generate` like LLaDA: a checkpoint, forwards, and token cases."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from samplers import CacheMode, Canvas, Sampler, get_modifier, get_sampler
from samplers.forward.query import Predict
from samplers.loop.row import Row
from server.engine import Backend
from tests.conformance.forwards import CHECKS, ForwardCheck
from tests.conformance.models import check_cache, fed_logits, open_backend
from tests.conformance.originals import Original, ReleasedFactor, stream_of
from tests.conformance.replay import compare_states, replay
from tests.conformance.report import Difference, NotBuilt

FUNCTIONS = {
    "generate": CacheMode.NONE,
    "generate_with_prefix_cache": CacheMode.PREFIX,
    "generate_with_dual_cache": CacheMode.DUAL,
}
PARAMETERS = {
    *("steps", "gen_length", "block_length", "temperature", "mask_id", "remasking", "cfg_scale", "threshold", "factor"),
    *("logits_eos_inf", "confidence_eos_eot_inf"),
}

Check = Callable[[], None]


def feeds_twice(case: dict[str, Any]) -> bool:
    """Whether a block is fed once more after its first forward, finished or not: Fast-dLLM's first cached variants."""
    return FUNCTIONS[case["function"]] is not CacheMode.NONE and bool(case["name"].endswith("2025-06"))


class Family:
    """One folder: `checkpoint/`, `cases.json`, `forward.safetensors`.

    Attributes:
        forwards: how to check each of the recorded forwards, by name.
    """

    forwards: ClassVar[dict[str, ForwardCheck]] = CHECKS

    def __init__(self, folder: Path, engine: str = "torch") -> None:
        self.cases: dict[str, Any] = json.loads((folder / "cases.json").read_text())
        self._folder = folder
        self._engine = engine
        self._backend: Backend | None = None

    def checks(self) -> Iterator[tuple[str, Check]]:
        """Name and check of every case."""
        tensors = load_file(self._folder / "forward.safetensors")
        for name in dict.fromkeys(name.partition(".")[0] for name in tensors):
            yield f"forward.{name}", lambda name=name: self._forward(name, tensors)  # type: ignore[misc]
        for case in self.cases["cases"]:
            yield case["name"], lambda case=case: self._generate(case)  # type: ignore[misc]

    def backend(self) -> Backend:
        """Our model of the checkpoint. Raises NotBuilt if its architecture is not built."""
        if self._backend is None:
            # Some tiny checkpoints leave out the mask token, whose published default they have no row for.
            settings = {"mask_token_id": self.cases["mask_id"]} if "mask_id" in self.cases else {}
            self._backend = open_backend(self._folder / "checkpoint", self._engine, settings)
        return self._backend

    def close(self) -> None:
        """Give the model back."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _forward(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Logits at all positions that are not padding."""
        with torch.inference_mode():
            self.forwards[name](self.backend(), name, tensors)

    def _generate(self, case: dict[str, Any]) -> None:
        """Tokens after every forward, and the number of forwards."""
        backend = self.backend()
        function, params = case["function"], case["params"]
        if function not in FUNCTIONS:
            raise NotBuilt(function)
        check_cache(backend, FUNCTIONS[function])
        if unknown := set(params) - PARAMETERS:
            raise NotBuilt(f"sampler with {', '.join(sorted(unknown))}")
        sampler: Sampler
        if "threshold" in params:
            sampler, chosen = get_sampler("threshold"), {"threshold": params["threshold"]}
        elif "factor" in params:
            sampler, chosen = ReleasedFactor(), {"factor": params["factor"]}
        else:
            sampler, chosen = get_sampler("topk"), {"steps": params["steps"]}
        # Our canvases have no padding: what the original pads at the left is cut off, here and from its record.
        cuts = [row.index(1) for row in case.get("attention_mask") or [[1]] * len(case["prompt"])]
        guidance, scale = get_modifier("guidance"), params.get("cfg_scale", 0.0)
        rows = [
            Row(
                Canvas.blank(prompt[cut:], params["gen_length"], params["mask_id"], params["block_length"]),
                sampler,
                sampler.Params(**chosen),
                fill_after_end=False,
                cache=FUNCTIONS[function],
                modifiers=[(guidance, guidance.Params(scale=scale))] if scale else [],
            )
            for prompt, cut in zip(case["prompt"], cuts, strict=True)
        ]
        recording = replay(rows, self._predict(case, backend))
        for i, (states, cut) in enumerate(zip(recording.states, cuts, strict=True)):
            compare_states(states, [canvas[i][cut:] for canvas in case["trajectory"]], i)
            compare_states(states[-1:], [case["output"][i][cut:]], i)
        forwards = recording.lockstep_forwards(least=1 + feeds_twice(case))
        for key in ("model_calls", "nfe"):
            if case.get(key) is not None and forwards != case[key]:
                raise Difference(f"{forwards} forwards, the original's {key} is {case[key]}")

    def _predict(self, case: dict[str, Any], backend: Backend) -> Predict:
        """What serves requests where that is enough, else the same model behind the original's quirks."""
        params = case["params"]
        quirks = ("logits_eos_inf", "confidence_eos_eot_inf")
        if case["manual_seed"] is None and not any(params.get(name) for name in quirks):
            return backend.predict

        return Original(
            partial(fed_logits, backend),
            backend.info.vocab_size,
            *self._ends(params),
            params,
            stream_of(case["manual_seed"]),
            torch.float64 if case["name"].endswith("2026-01") else torch.float32,
            FUNCTIONS[case["function"]],
            feeds_twice(case),
        )

    def _ends(self, params: dict[str, Any]) -> tuple[int, int]:
        """Ids of end-of-text and end-of-turn, which matter only to some of the original's options."""
        if params.get("logits_eos_inf") or params.get("confidence_eos_eot_inf"):
            return self.cases["eos_id"], self.cases["eot_id"]
        return self.cases.get("eos_id", -1), self.cases.get("eot_id", -1)
