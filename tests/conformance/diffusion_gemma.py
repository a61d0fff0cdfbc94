"""DiffusionGemma as transformers runs it: batches in lockstep, one stream of random numbers, padding after an end.

Forwards are told of left padding, which ours never have: it is cut off, here and from the record. What is settled is
encoded in a forward of its own, which our loop saves: the numbers are the same but for their last bits, yet at low
temperatures a canvas tells itself of those in every step, and amplifies them.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samplers import CacheMode, Canvas, Prediction, Selection, Step, get_sampler
from samplers.canvas import Layout
from samplers.drafting.diffusion_gemma import DiffusionGemma
from samplers.forward.span import ForwardSpan, KVSlot
from samplers.forward.statistics import NOTHING, StatisticsRequest
from samplers.loop.row import Row
from samplers.loop.run import run
from server.backends.torch.backend import TorchBackend
from server.models.ragged_batch import RaggedBatch, Segment
from tests.conformance.forwards import compare
from tests.conformance.generation import Family
from tests.conformance.models import fed_logits
from tests.conformance.originals import stream_of
from tests.conformance.replay import Tokens
from tests.conformance.report import Difference, NotBuilt

OURS = ("t_min", "t_max", "max_denoising_steps", "stability_threshold", "confidence_threshold")
KNOWN = {*OURS, "sampler_config", "max_new_tokens", "eos_token_id", "pad_token_id"}


class OriginalDraws(TorchBackend):
    """Tokens drawn by `torch.multinomial`, for all rows of a batch, whether they are still of interest or not.

    Attributes:
        stream: the random numbers.
        batch, places: rows of the original's batch, and which of them a query's canvases are.
    """

    stream: torch.Generator
    batch: int = 0
    places: list[int]

    def say(self, logits: Tensor, wanted: StatisticsRequest) -> Prediction:
        found = super().say(logits, wanted)
        assert wanted.choices is not None
        temperature = wanted.choices.temperature.float()
        p = (logits / temperature[:, None]).softmax(dim=-1).unflatten(0, (len(self.places), -1))
        everyone = p.new_ones(self.batch, *p.shape[1:]).index_copy(0, torch.tensor(self.places), p)
        drawn = torch.multinomial(everyone.flatten(0, 1), 1, generator=self.stream).view(self.batch, -1)
        found.token[:] = drawn[self.places].flatten()
        return found


class OriginalNoise(DiffusionGemma):
    """Our rule, with noise of the original's stream; remembers what it wrote and would commit, by row of a step."""

    def __init__(self, backend: OriginalDraws) -> None:
        self._backend = backend
        self.likeliest: list[Tokens] = []
        self.drafted: list[Tokens] = []

    def select(self, step: Step) -> Selection:
        chosen = super().select(step)
        assert chosen.token is not None and chosen.draft is not None
        self.likeliest = [row[at].tolist() for row, at in zip(chosen.token, step.candidate, strict=True)]
        self.drafted = [row[at].tolist() for row, at in zip(chosen.draft, step.candidate, strict=True)]
        return chosen

    def noise(self, step: Step) -> Tensor:
        size = (self._backend.batch, int(step.block_masks[0]))
        fresh = torch.randint(0, self._backend.info.vocab_size, size, generator=self._backend.stream)
        return torch.zeros_like(step.token).masked_scatter(step.candidate, fresh[self._backend.places])


class Encoded(Row):
    """A generation whose forwards feed the draft alone, since what is before it was encoded."""

    def span(self) -> ForwardSpan:
        whole = super().span()
        assert whole.draft is not None
        return replace(whole, start=whole.draft)

    def unencoded(self) -> ForwardSpan:
        """What is to be encoded before the block's first step."""
        whole = super().span()
        assert whole.draft is not None
        return replace(whole, stop=whole.draft, visible=whole.draft)


@dataclass(eq=False)
class Sequence:
    """One row of the original's batch.

    Attributes:
        row: our generation; once that has ended, and others have not, one that continues its padded text for nothing.
        written: all canvases so far, padded after an end-of-text.
        forwards: that count.
        input, likeliest: tokens of the canvas, and the draft that would be committed, as last seen.
    """

    prompt: Tokens
    row: Encoded
    written: Tokens = field(default_factory=list)
    forwards: int = 0
    ended: bool = False
    input: Tokens = field(default_factory=list)
    likeliest: Tokens = field(default_factory=list)


class GemmaFamily(Family):
    """The folder."""

    def _forward(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Logits of the canvas, and the encoder's last states."""
        part = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        prompts, canvases = part["input_ids"], part["decoder_input_ids"]
        valid = part.get("attention_mask", torch.ones_like(prompts)).bool()
        said = part.get("self_conditioning_logits")
        with torch.inference_mode():
            for i in range(len(prompts)):
                prompt = prompts[i][valid[i]]
                expected = part["encoder_last_hidden_state"][i][valid[i]]
                compare("the encoder's states", self._encoded(prompt), expected)
                logits = self._logits(prompt, canvases[i], None if said is None else said[i])
                compare("logits", logits, part["logits"][i])

    def _encoded(self, prompt: Tensor) -> Tensor:
        count = len(prompt)
        row = Segment(0, count, count, count, draft=count)
        return self.backend().network.packed(RaggedBatch([row], prompt, torch.arange(count)))

    def _logits(self, prompt: Tensor, draft: Tensor, said: Tensor | None) -> Tensor:
        backend = self.backend()
        first, length = len(prompt), len(prompt) + len(draft)
        canvas = Canvas(Layout(first, len(draft), len(draft)), torch.cat([prompt, draft]), draft == draft)
        memory = KVSlot(backend.network.new_kv_cache(length, torch.float32, torch.device("cpu")))
        if said is not None:
            memory.content.self_conditioning = first, backend.network.self_conditioning(said, NOTHING)  # type: ignore[attr-defined]
        return fed_logits(backend, [canvas], [ForwardSpan(0, length, memory, length, draft=first)])[0][first:]

    @torch.inference_mode()
    def _generate(self, case: dict[str, Any]) -> None:
        """Canvases fed and drafted in every step, the texts, and the number of forwards."""
        params = case["params"]
        if unknown := set(params) - KNOWN:
            raise NotBuilt(f"generate with {', '.join(sorted(unknown))}")
        model = self.backend()
        backend = OriginalDraws(model.network, model.info)
        backend.stream = stream_of(case["manual_seed"]) or torch.Generator()
        backend.batch = len(case["prompt"])
        sampler = OriginalNoise(backend)
        defaults = json.loads((self._folder / "checkpoint" / "generation_config.json").read_text()) | params
        ends, pad = defaults.get("eos_token_id"), defaults.get("pad_token_id")
        end_ids = frozenset(() if ends is None else ends if isinstance(ends, list) else [ends])
        length = self.cases["canvas_length"]
        count = -(-params["max_new_tokens"] // length)
        chosen = {name: params[name] for name in OURS if params.get(name) is not None}
        if params.get("sampler_config"):
            chosen["entropy_bound"] = float(params["sampler_config"]["entropy_bound"])
        rule = get_sampler("diffusion_gemma").Params(**chosen)

        def begin(prompt: Tokens, text_length: int) -> Encoded:
            canvas = Canvas.blank(prompt, text_length, None, pattern=backend.info.pattern)
            return Encoded(canvas, sampler, rule, end_ids=end_ids, cache=CacheMode.PREFIX)

        cuts = [row.index(1) for row in case["attention_mask"] or [[1]] * backend.batch]
        prompts = [prompt[cut:] for prompt, cut in zip(case["prompt"], cuts, strict=True)]
        everyone = [Sequence(prompt, begin(prompt, params["max_new_tokens"])) for prompt in prompts]
        record = Record(case)
        for _ in range(count):
            for each in everyone:
                if each.ended:
                    each.row = begin(each.prompt + each.written, length)
            self._denoise(everyone, backend, sampler, record)
            for each in everyone:
                self._settle(each, end_ids, pad, length)
            if all(each.ended for each in everyone):
                break
        record.check_end(everyone, cuts, pad)

    def _denoise(
        self, everyone: list[Sequence], backend: OriginalDraws, sampler: OriginalNoise, record: "Record"
    ) -> None:
        """One canvas of every row, each step for those that have not finished it."""
        length = self.cases["canvas_length"]
        first = torch.randint(0, backend.info.vocab_size, (backend.batch, length), generator=backend.stream)
        fed_logits(backend, [each.row.canvas for each in everyone], [each.row.unencoded() for each in everyone])
        blocks = [each.row.block for each in everyone]
        for each, noise in zip(everyone, first, strict=True):
            each.row.canvas.generated[each.row.candidates()] = noise
            each.input = noise.tolist()

        def running() -> list[Encoded]:
            """Rows of the next step, which have not finished the canvas."""
            places = [i for i, each in enumerate(everyone) if not each.row.finished and each.row.block == blocks[i]]
            backend.places = places
            if places:
                record.feed([each.input for each in everyone])
            return [everyone[i].row for i in places]

        for turn in run(running, backend.predict):
            told = zip(backend.places, turn, sampler.drafted, sampler.likeliest, strict=True)
            for i, (_, event), drafted, likeliest in told:
                if event.error is not None:
                    raise event.error
                everyone[i].forwards += not everyone[i].ended
                everyone[i].input, everyone[i].likeliest = drafted, likeliest
            record.draft([each.likeliest for each in everyone])

    def _settle(self, each: Sequence, end_ids: frozenset[int], pad: int | None, length: int) -> None:
        """Append the canvas as the original does: padding after an end, and nothing but padding after that."""
        row = each.row
        done = len(each.written)
        canvas = row.canvas.generated[-length:] if each.ended else row.canvas.generated[done : done + length]
        tokens: Tokens = canvas.tolist()
        ends = [i for i, token in enumerate(tokens) if token in end_ids]
        if pad is not None and each.ended:
            tokens = [pad] * length
        elif pad is not None and ends:
            tokens[ends[0] + 1 :] = [pad] * (length - ends[0] - 1)
        if not each.ended and bool(ends) != (row.end is not None):
            raise Difference("our loop and the original do not end at the same canvas")
        each.ended = each.ended or bool(ends)
        each.written += tokens


class Record:
    """What the original wrote down, against which ours is held as it goes along."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._case = case
        self._steps = 0

    def feed(self, canvases: list[Tokens]) -> None:
        self._compare("the canvas fed", "decoder_input_canvas_per_step", canvases)

    def draft(self, canvases: list[Tokens]) -> None:
        self._compare("the draft", "argmax_canvas_per_step", canvases)
        self._steps += 1

    def _compare(self, what: str, key: str, ours: list[Tokens]) -> None:
        if self._steps >= len(self._case[key]):
            raise Difference(f"more than the original's {len(self._case[key])} forwards")
        for row, (got, want) in enumerate(zip(ours, self._case[key][self._steps], strict=True)):
            for position, (a, b) in enumerate(zip(got, want, strict=True)):
                if a != b:
                    raise Difference(
                        f"{what} of row {row} in forward {self._steps + 1}, position {position}: {a}, not {b}"
                    )

    def check_end(self, everyone: list[Sequence], cuts: list[int], pad: int | None) -> None:
        """The texts, and how many forwards they took."""
        if self._steps != self._case["nfe_decoder"]:
            raise Difference(f"{self._steps} forwards, the original's nfe is {self._case['nfe_decoder']}")
        for row, (each, cut) in enumerate(zip(everyone, cuts, strict=True)):
            if each.prompt + each.written != self._case["output"][row][cut:]:
                raise Difference(f"row {row}: {each.written}, not {self._case['output'][row][cut:]}")
            rate = sum(token != pad for token in each.written) / each.forwards
            if abs(rate - self._case["tokens_per_forward"][row]) > 1e-5:
                raise Difference(
                    f"row {row}: {rate} tokens per forward, the original has {self._case['tokens_per_forward'][row]}"
                )
