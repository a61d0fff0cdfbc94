"""A third party's sampler, and everything that it may do wrong; each fault strikes the rows whose parameters ask."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from samplers import (
    ParameterError,
    Resampling,
    Sampler,
    SamplerParams,
    Selection,
    Slots,
    StateSpec,
    Step,
    StepContext,
    TokenBonus,
    TokenChoice,
    TokenChoices,
    Window,
)
from samplers.ranking import best
from tests.samplers.models import MASK, VOCAB

NAME = "hostile"
FAR = 10**12


class Params(SamplerParams):
    fault: bool = False


KEEPS = {
    "steps": StateSpec(0, torch.int64, per="position", lives="generation"),
    "seen": StateSpec(0.0, lives="generation"),
}


class Leftmost(Sampler[Params]):
    """Commit the leftmost candidate, and count the steps of each position."""

    name = NAME
    Params = Params
    state = KEEPS

    def select(self, step: Step[Params]) -> Selection:
        return leftmost(step)


def leftmost(step: Step[Any]) -> Selection:
    place = -step.position.minimum(step.layout.gen_length).float()
    state = {"steps": step.state["steps"] + 1, "seen": step.state["seen"] + step.candidate.sum(dim=1, keepdim=True)}
    return Selection(best(place, step.candidate, torch.ones_like(step.forward)), state=state)


def faulty(context: StepContext[Any]) -> Tensor:
    """Rows that are to fail, bool [rows, 1]."""
    return torch.tensor([getattr(each, "fault", False) is True for each in context.params])[:, None]


class Panic(BaseException):
    """What extension modules raise that are written in Rust."""


class Interrupt(KeyboardInterrupt):
    """As if a user had pressed Ctrl-C."""


class Speechless(Exception):
    """An error whose message cannot be made."""

    def __str__(self) -> str:
        raise SystemExit("no message")


class Wordless(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Noted(Exception):
    """An error that cannot be looked at either."""

    @property
    def __notes__(self) -> list[str]:
        raise SystemExit("no notes")


class Shy(type):
    """What an error is that does not even tell what it is."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise SystemExit("no name")


class Nameless(Exception, metaclass=Shy):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise SystemExit("no traceback")


def deep() -> None:
    deeper()


def deeper() -> None:
    deep()  # by turns, which no traceback shortens


def throwing(error: Callable[[], BaseException]) -> Callable[..., Any]:
    def throw(*_: Any) -> Any:
        raise error()

    return throw


THROWN: dict[str, Callable[..., Any]] = {
    "error": throwing(lambda: ZeroDivisionError("by design")),
    "exit": throwing(lambda: SystemExit(3)),
    "interrupt": throwing(KeyboardInterrupt),
    "a kind of interrupt": throwing(Interrupt),
    "panic": throwing(Panic),
    "cancelled": throwing(asyncio.CancelledError),
    "generator exit": throwing(GeneratorExit),
    "stop iteration": throwing(StopIteration),
    "recursion": lambda *_: deep(),
    "memory": throwing(MemoryError),
    "long": throwing(lambda: ValueError("x" * 10_000_000)),
    "speechless": throwing(Speechless),
    "wordless": throwing(Wordless),
    "nameless": throwing(Nameless),
    "noted": throwing(lambda: Noted("by design")),
    "half a character": throwing(lambda: ValueError("\ud800 \x00 \x1b[31m\r\n{}")),
}


def hook(name: str, do: Callable[..., Any]) -> type[Sampler]:
    """A sampler of which one method does something else, with the arguments that it gets, where it is to fail."""
    plain = getattr(Leftmost, name)

    def method(self: Sampler, *arguments: Any) -> Any:
        first = arguments[0]
        asked = bool(faulty(first).any()) if isinstance(first, StepContext) else getattr(first, "fault", False) is True
        return do(*arguments) if asked else plain(self, *arguments)

    return type("Hostile", (Leftmost,), {name: method})


def chosen(**parts: Callable[[Step[Any]], Any]) -> type[Sampler]:
    """A sampler whose selection has other parts; where these could be any row's, the others keep theirs."""

    def select(step: Step[Any]) -> Selection:
        found = leftmost(step)
        usual = {"commit": found.commit, "token": step.token, "confidence": step.confidence}
        changed = {name: part(step) for name, part in parts.items()}
        for name, value in changed.items():
            if type(value) is Tensor and value.device.type == "cpu" and not value.is_sparse and name in usual:
                plain = usual[name]
                if (value.shape, value.dtype) == (plain.shape, plain.dtype):
                    changed[name] = value.where(faulty(step), plain)
        return replace(found, **changed)

    return hook("select", select)


def answer(name: str, value: Any) -> type[Sampler]:
    return hook(name, lambda *_: value)


class Lazy(Selection):
    """A selection that raises when it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name == "commit":
            raise SystemExit("later")
        return super().__getattribute__(name)


class Odd(Tensor):
    """A kind of tensor that refuses everything."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise SystemExit("no operations")


def odd(step: Step[Any]) -> Tensor:
    return leftmost(step).commit.as_subclass(Odd)


def like(dtype: torch.dtype, value: float) -> Callable[[Step[Any]], Tensor]:
    return lambda step: torch.full(step.candidate.shape, value, dtype=dtype)


def setting(change: Callable[[], Any]) -> Callable[[Step[Any]], Selection]:
    """Leave something of torch's changed, which everybody uses."""

    def select(step: Step[Any]) -> Selection:
        found = leftmost(step)
        change()
        return found

    return select


ONE, FLAT = torch.zeros(1, dtype=torch.int64), torch.zeros(1)


def spread(value: Tensor, *shape: int) -> Tensor:
    """A tensor of any size that needs no memory."""
    return value.expand(*shape)


SELECTS: dict[str, type[Sampler]] = {
    "sets the type of numbers": hook("select", setting(lambda: torch.set_default_dtype(torch.float64))),
    "sets the device": hook("select", setting(lambda: torch.set_default_device("meta"))),
    "sets gradients": hook("select", setting(lambda: torch.set_grad_enabled(not torch.is_grad_enabled()))),
    "sets threads": hook("select", setting(lambda: torch.set_num_threads(torch.get_num_threads() + 1))),
    "sets precision": hook("select", setting(lambda: torch.set_float32_matmul_precision("medium"))),
    "none": answer("select", None),
    "no selection": answer("select", (1, 2)),
    "lazy": hook("select", lambda step: Lazy(leftmost(step).commit)),
    "no commit": chosen(commit=lambda step: None),
    "commit numbers": chosen(commit=lambda step: leftmost(step).commit.long()),
    "commit floats": chosen(commit=like(torch.float32, torch.nan)),
    "commit list": chosen(commit=lambda step: leftmost(step).commit.tolist()),
    "commit array": chosen(commit=lambda step: leftmost(step).commit.numpy()),
    "commit narrow": chosen(commit=lambda step: leftmost(step).commit[:, 1:]),
    "commit deep": chosen(commit=lambda step: leftmost(step).commit[..., None]),
    "commit flat": chosen(commit=lambda step: torch.tensor(True)),
    "commit sparse": chosen(commit=lambda step: leftmost(step).commit.to_sparse()),
    "commit meta": chosen(commit=lambda step: leftmost(step).commit.to("meta")),
    "commit odd": chosen(commit=odd),
    "commit too much": chosen(commit=lambda step: ~step.candidate),
    "token negative": chosen(token=like(torch.int64, -1)),
    "token far": chosen(token=like(torch.int64, FAR)),
    "token next": chosen(token=like(torch.int64, VOCAB)),
    "token mask": chosen(token=like(torch.int64, MASK)),
    "token float": chosen(token=like(torch.float32, 2)),
    "token bool": chosen(token=like(torch.bool, 1)),
    "token shape": chosen(token=lambda step: step.token[:, :1]),
    "token meta": chosen(token=lambda step: step.token.to("meta")),
    "confidence nan": chosen(confidence=like(torch.float32, torch.nan)),
    "confidence infinite": chosen(confidence=like(torch.float32, torch.inf)),
    "confidence above one": chosen(confidence=like(torch.float32, 7.0)),
    "confidence negative": chosen(confidence=like(torch.float32, -0.5)),
    "confidence number": chosen(confidence=like(torch.int64, 1)),
    "confidence complex": chosen(confidence=like(torch.complex64, 1)),
    "confidence shape": chosen(confidence=lambda step: step.confidence[:1, :1]),
    "state a number": chosen(state=lambda step: 5),
    "state a list": chosen(state=lambda step: [step.state["seen"]]),
    "state of another name": chosen(state=lambda step: {"others": step.state["seen"]}),
    "state of no name": chosen(state=lambda step: {7: step.state["seen"]}),
    "state no tensor": chosen(state=lambda step: {"seen": 5.0}),
    "state lists": chosen(state=lambda step: {"seen": step.state["seen"].tolist()}),
    "state of numbers": chosen(state=lambda step: {"seen": step.state["seen"].long()}),
    "state of many numbers": chosen(state=lambda step: {"seen": step.state["seen"].double()}),
    "state wide": chosen(state=lambda step: {"seen": step.state["seen"].expand(-1, 5)}),
    "state deep": chosen(state=lambda step: {"seen": step.state["seen"][..., None]}),
    "state flat": chosen(state=lambda step: {"seen": torch.tensor(1.0)}),
    "state of many": chosen(state=lambda step: {"seen": spread(FLAT, len(step.params), 10**10)}),
    "state for other rows": chosen(state=lambda step: {"seen": step.state["seen"].new_zeros(99, 1)}),
    "state narrow": chosen(state=lambda step: {"steps": step.state["steps"][:, 1:]}),
    "state meta": chosen(state=lambda step: {"seen": step.state["seen"].to("meta")}),
    "state sparse": chosen(state=lambda step: {"seen": step.state["seen"].to_sparse()}),
    "state odd": chosen(state=lambda step: {"seen": step.state["seen"].as_subclass(Odd)}),
    "replaces": chosen(replace=like(torch.bool, 0)),
    "is done": chosen(done=lambda step: torch.ones(len(step.params), dtype=torch.bool)),
    "drafts": chosen(draft=like(torch.int64, 2)),
    "waits": chosen(commit=like(torch.bool, 0), waits=lambda step: True),
    "waits much": chosen(waits=lambda step: torch.ones(3)),
}


def shape_of(context: StepContext[Any]) -> tuple[int, int]:
    rows, width = context.candidate.shape
    return rows, width


def naming(value: int, dtype: torch.dtype = torch.int64) -> type[Sampler]:
    return hook("name_tokens", lambda context: torch.full((*shape_of(context), 1), value, dtype=dtype))


def adding(token: int, value: float) -> type[Sampler]:
    """One whose bonus is this at every position of its own."""

    def bonus(context: StepContext[Any]) -> TokenBonus:
        tokens = torch.full((*shape_of(context), 1), token).where(faulty(context)[..., None], -1)
        return TokenBonus(tokens, torch.full(tokens.shape, value).where(faulty(context)[..., None], 0.0))

    return hook("bonus", bonus)


def bonus_of(
    tokens: tuple[int, ...], values: tuple[int, ...], token: Tensor | None = None, value: Tensor | None = None
) -> type[Sampler]:
    """One whose bonus has these further dimensions."""

    def bonus(context: StepContext[Any]) -> TokenBonus:
        shape, (of, much) = shape_of(context), (ONE if token is None else token, FLAT if value is None else value)
        return TokenBonus(spread(of, *shape, *tokens), spread(much, *shape, *values))

    return hook("bonus", bonus)


def against_all(context: StepContext[Any]) -> TokenBonus:
    """Ban every token there is."""
    token = torch.arange(VOCAB).expand(*shape_of(context), VOCAB).where(faulty(context)[..., None], -1)
    return TokenBonus(token, torch.full(token.shape, -torch.inf))


def against_all_but_one(context: StepContext[Any]) -> TokenBonus:
    token = torch.arange(1, VOCAB).expand(*shape_of(context), VOCAB - 1).where(faulty(context)[..., None], -1)
    return TokenBonus(token, torch.full(token.shape, -50.0))


def choosing(temperature: Any = 1.0, top_p: Any = 1.0, top_k: Any = 0) -> type[Sampler]:
    def choice(context: StepContext[Any]) -> TokenChoices:
        each = [torch.full((len(context.params), 1), value) for value in (temperature, top_p, top_k)]
        return TokenChoices(*each)

    return hook("choice", choice)


def opening(start: Any, stop: Any) -> type[Sampler]:
    return hook("window", lambda context: Window(start(context), stop(context)))


def bound_of(context: StepContext[Any]) -> Tensor:
    return torch.zeros(len(context.params), 1, dtype=torch.int64)


BESIDE: dict[str, type[Sampler]] = {
    "names a list": answer("name_tokens", [[1]]),
    "names flat": hook("name_tokens", lambda context: torch.ones_like(context.position)),
    "names floats": naming(1, torch.float32),
    "names truths": naming(1, torch.bool),
    "names few": hook("name_tokens", lambda context: context.position[:, 1:, None] * 0),
    "names for other rows": hook("name_tokens", lambda context: torch.ones(99, *shape_of(context), dtype=torch.int64)),
    "names far": naming(FAR),
    "names negative": naming(-2),
    "names meta": hook("name_tokens", lambda context: context.position[..., None].to("meta")),
    "names widely": hook("name_tokens", lambda context: spread(ONE, *shape_of(context), 1_000_000)),
    "names for too many": hook("name_tokens", lambda context: spread(ONE, FAR, shape_of(context)[1], 2)),
    "bonus alone": answer("bonus", ONE),
    "bonus of two": answer("bonus", (ONE, FLAT)),
    "bonus of lists": answer("bonus", TokenBonus([[[0]]], [[[1.0]]])),  # type: ignore[arg-type]
    "bonus of nothing": answer("bonus", TokenBonus(None, None)),  # type: ignore[arg-type]
    "bonus of lengths": bonus_of((1,), (2,)),
    "bonus flat": answer("bonus", TokenBonus(ONE, FLAT)),
    "bonus deep": bonus_of((1, 1), (1, 1)),
    "bonus of no token": adding(VOCAB, 1.0),
    "bonus far": adding(FAR, 1.0),
    "bonus of a negative token": adding(-2, 1.0),
    "bonus nan": adding(0, torch.nan),
    "bonus infinite": adding(0, torch.inf),
    "bonus too large": bonus_of((1,), (1,), value=torch.tensor([1e300], dtype=torch.float64)),
    "bonus against all": hook("bonus", against_all),
    "bonus of floats": bonus_of((1,), (1,), token=FLAT),
    "bonus of integers": bonus_of((1,), (1,), value=ONE),
    "bonus meta": bonus_of((1,), (1,), token=ONE.to("meta")),
    "bonus of many": bonus_of((10_000_000,), (10_000_000,)),
    "chooses in words": answer("choice", "greedily"),
    "chooses for one": answer("choice", TokenChoice(1.0)),
    "chooses hot": answer("choice", TokenChoices("hot", 1.0, 0)),  # type: ignore[arg-type]
    "chooses nan": choosing(torch.nan),
    "chooses infinity": choosing(torch.inf),
    "chooses below": choosing(-1.0),
    "chooses nothing": choosing(top_p=0.0),
    "chooses too much": choosing(top_p=1.5),
    "chooses few": choosing(top_k=-1),
    "chooses many": choosing(top_k=FAR),
    "chooses halves": choosing(top_k=1.5),
    "chooses whole": choosing(temperature=1),
    "chooses for others": answer(
        "choice", TokenChoices(torch.ones(99, 1), torch.ones(99, 1), torch.ones(99, 1).long())
    ),
    "window in words": answer("window", "all"),
    "window of numbers": answer("window", (0, 4)),
    "window of floats": opening(lambda context: bound_of(context).float(), bound_of),
    "window of integers": opening(lambda context: 0, lambda context: 4),
    "window flat": opening(lambda context: bound_of(context)[:, 0], bound_of),
    "window for others": opening(bound_of, lambda context: torch.zeros(99, 1, dtype=torch.int64)),
    "window meta": opening(lambda context: bound_of(context).to("meta"), bound_of),
}


class Reviser(Leftmost):
    """Revises, and is never done."""

    revises = True

    def select(self, step: Step[Any]) -> Selection:
        done = torch.zeros(len(step.params), dtype=torch.bool)
        return replace(leftmost(step), done=done)


def revising(**parts: Callable[[Step[Any]], Any]) -> type[Sampler]:
    """One that revises as another would not, whoever asks."""

    def select(self: Sampler, step: Step[Any]) -> Selection:
        done = torch.ones(len(step.params), dtype=torch.bool)
        changed = {name: part(step) for name, part in parts.items()}
        return replace(leftmost(step), **{"done": done, **changed})

    return type("Hostile", (Leftmost,), {"revises": True, "select": select})


def several(**methods: Callable[..., Any]) -> type[Sampler]:
    """One that is to fail with two canvases, which wait for each other after every step."""

    def slots(self: Sampler, params: Any) -> int:
        return 2 if getattr(params, "fault", False) is True else 1

    return type("Hostile", (Leftmost,), {"slots": slots, "barrier": "step", **methods})


def resampling(**parts: Callable[[Slots[Any]], Any]) -> type[Sampler]:
    def resample(self: Sampler, slots: Slots[Any]) -> Resampling:
        usual = Resampling(torch.zeros(len(slots.finished), dtype=torch.int64))
        return replace(usual, **{name: part(slots) for name, part in parts.items()})

    return several(resample=resample)


SLOTS: dict[str, type[Sampler]] = {
    "canvases: none": hook("slots", lambda params: 0),
    "canvases: far": hook("slots", lambda params: FAR),
    "canvases: in words": hook("slots", lambda params: "two"),
    "canvases: raise": hook("slots", THROWN["exit"]),
    "winner negative": several(winner=lambda self, slots: -1),
    "winner far": several(winner=lambda self, slots: 2),
    "winner a tensor of two": several(winner=lambda self, slots: torch.ones(2)),
    "winner none": several(winner=lambda self, slots: None),
    "winner raises": several(winner=THROWN["error"]),
    "resample raises": several(resample=THROWN["interrupt"]),
    "resample numbers": several(resample=lambda self, slots: [0, 0]),
    "ancestors a list": resampling(ancestors=lambda slots: [0, 0]),
    "ancestors floats": resampling(ancestors=lambda slots: torch.zeros(2)),
    "ancestors many": resampling(ancestors=lambda slots: torch.zeros(3, dtype=torch.int64)),
    "ancestors far": resampling(ancestors=lambda slots: torch.tensor([0, 2])),
    "ancestors negative": resampling(ancestors=lambda slots: torch.tensor([0, -1])),
    "ancestors meta": resampling(ancestors=lambda slots: torch.zeros(2, dtype=torch.int64, device="meta")),
    "ancestors with another state": resampling(state=lambda slots: {"others": slots.state["seen"]}),
    "ancestors with a state a position": resampling(
        state=lambda slots: {"steps": torch.zeros(2, 4, dtype=torch.int64)}
    ),
    "ancestors with a wide state": resampling(state=lambda slots: {"seen": torch.zeros(2, 9)}),
    "ancestors with a state of numbers": resampling(state=lambda slots: {"seen": torch.zeros(2, 1).long()}),
    "ancestors with a number": resampling(state=lambda slots: 5),
}
"""Faults with several canvases of a generation."""


def attributes(base: type[Sampler] = Leftmost, **values: Any) -> type[Sampler]:
    return type("Hostile", (base,), values)


def changing() -> Any:
    """An attribute that is one thing when it is asked for first, and raises after that."""
    asked: Iterator[bool] = iter([False])
    return property(lambda self: next(asked))


class Uncopied(Params):
    def __deepcopy__(self, memo: Any = None) -> Any:
        raise SystemExit("only one")


WHOLE: dict[str, type[Sampler]] = {
    "statistics number": attributes(statistics=5),
    "statistics unknown": attributes(statistics=frozenset({"surprise"})),
    "statistics raise": attributes(statistics=property(THROWN["exit"])),
    "top all": attributes(top="all"),
    "top far": attributes(top=FAR),
    "top negative": attributes(top=-1),
    "top nan": attributes(top=torch.nan),
    "region maybe": attributes(whole_region="maybe"),
    "region raises": attributes(whole_region=property(THROWN["interrupt"])),
    "revises raises": attributes(revises=property(THROWN["error"])),
    "chooses tokens maybe": attributes(chooses_tokens=torch.ones(2)),
    "drafts here": attributes(drafts=True),
    "nameless": attributes(name=property(THROWN["exit"]), select=THROWN["exit"]),
    "incompatibility number": attributes(incompatibility=lambda self, pattern: 5),
    "incompatibility raises": attributes(incompatibility=THROWN["exit"]),
    "incompatibility at length": attributes(incompatibility=lambda self, pattern: "x" * 10_000_000),
    "checks oddly": attributes(check=throwing(lambda: ParameterError(Speechless(), "y" * 10_000_000))),  # type: ignore[arg-type]
    "post steps far": attributes(Reviser, post_steps=lambda self, params: FAR),
    "post steps negative": attributes(Reviser, post_steps=lambda self, params: -1),
    "post steps nan": attributes(Reviser, post_steps=lambda self, params: torch.nan),
    "post steps in words": attributes(Reviser, post_steps=lambda self, params: "many"),
    "post steps raise": attributes(Reviser, post_steps=THROWN["error"]),
    "parameters uncopied": attributes(Params=Uncopied),
    "keeps a number": attributes(state=5),
    "keeps what is no state": attributes(state={"steps": 3}),
    "keeps for others": attributes(state={"steps": StateSpec(per="batch")}),  # type: ignore[arg-type]
    "keeps for ever": attributes(state={"steps": StateSpec(lives="server")}),  # type: ignore[arg-type]
    "keeps too much": attributes(state={"steps": StateSpec(shape=(10**6,))}),
    "keeps less than nothing": attributes(state={"steps": StateSpec(shape=(-1,))}),
    "keeps words": attributes(state={"steps": StateSpec(fill="many")}),  # type: ignore[arg-type]
    "keeps of a type in words": attributes(state={"steps": StateSpec(dtype="float")}),  # type: ignore[arg-type]
    "keeps under a number": attributes(state={3: StateSpec()}),
    "state raises": attributes(state=property(THROWN["exit"])),
    "waits at no barrier": attributes(several(), barrier="never"),
    "done for all": revising(done=lambda step: torch.ones(99, dtype=torch.bool)),
    "done in numbers": revising(done=lambda step: torch.ones(len(step.params))),
    "masks what is masked": revising(remask=lambda step: step.masked),
    "replaces all": revising(replace=like(torch.bool, 1)),
    "replaces in numbers": revising(replace=like(torch.int64, 0)),
}
"""Faults of the sampler as such, of which no row is spared."""


def overwrite(context: StepContext[Any]) -> None:
    """Overwrite all that it is given."""
    for value in [*vars(context).values(), *context.state.values(), *vars(context.layout).values()]:
        if isinstance(value, Tensor):
            value.fill_(torch.nan if value.is_floating_point() else True)
    context.columns.values.fill_(torch.nan)
    for each in context.params:
        each.__dict__["fault"] = "spoilt"
    context.state.clear()  # type: ignore[attr-defined]
    context.params.clear()  # type: ignore[attr-defined]


def spoil(step: Step[Any]) -> Selection:
    found = leftmost(step)
    for value in step.extra.values():
        value.fill_(torch.nan)
    overwrite(step)
    step.extra.clear()  # type: ignore[attr-defined]
    return found


def rewrite(*found: object) -> None:
    """Change all attributes of what is frozen."""
    for each in found:
        for name in list(vars(each)):
            object.__setattr__(each, name, FAR)


def rewriting(step: Step[Any]) -> Selection:
    found = leftmost(step)
    rewrite(step.layout, step.columns, step)
    return found


def spoiling_slots(self: Sampler, slots: Slots[Any]) -> None:
    for value in (slots.finished, *slots.state.values()):
        value.fill_(True)
    rewrite(slots.params, slots)


class Keeper(Leftmost):
    """Keeps what it was given and what it gave, and overwrites it at its next turn."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def select(self, step: Step[Params]) -> Selection:
        for value in self.kept:
            value.fill_(True)
        found = leftmost(step)
        self.kept += [found.commit, *(value for value in vars(step).values() if isinstance(value, Tensor))]
        self.kept += [*step.state.values(), *(found.state or {}).values()]
        return found


HARMLESS: dict[str, type[Sampler]] = {
    "spoils its step": hook("select", spoil),
    "keeps and changes": Keeper,
    "rewrites layouts": hook("select", rewriting),
    "rewrites the layout it checks": hook("check", lambda params, layout: rewrite(layout.pattern, layout)),
    "rewrites the layout it counts by": hook(
        "most_forwards", lambda params, layout: (rewrite(layout.pattern, layout), 1)[1]
    ),
    "rewrites the pattern": attributes(incompatibility=lambda self, pattern: rewrite(pattern)),
    **{f"overwrites all in {name}": hook(name, overwrite) for name in ("bonus", "name_tokens", "choice", "window")},
    "changes its mind": attributes(Reviser, whole_region=changing(), drafts=changing(), chooses_tokens=changing()),
    "is never done": Reviser,
    "never says done": revising(done=lambda step: None),
    "keeps what is no number": chosen(state=lambda step: {"seen": step.state["seen"] * torch.nan}),
    "keeps without end": chosen(state=lambda step: {"seen": step.state["seen"] + torch.inf}),
    "opens a window that is empty": opening(bound_of, bound_of),
    "opens a window the wrong way": opening(
        lambda context: bound_of(context) + 9, lambda context: bound_of(context) - 9
    ),
    "opens a window without end": opening(
        lambda context: bound_of(context) - FAR, lambda context: bound_of(context) + FAR
    ),
    "overwrites its canvases": several(resample=spoiling_slots),
    "overwrites its canvases in the end": several(winner=lambda self, slots: (spoiling_slots(self, slots), 1)[1]),
    "draws its canvases anew": resampling(ancestors=lambda slots: torch.tensor([1, 1])),
    "confidence with a gradient": chosen(confidence=lambda step: torch.full(step.token.shape, 0.5, requires_grad=True)),
    "prints": hook("select", lambda step: (print("noise"), leftmost(step))[1]),  # noqa: T201
    "bans every token but one": hook("bonus", against_all_but_one),
}
"""What a sampler may try, and its generation ends all the same as it would, or with an error of its own."""

HOOKS = ("choice", "bonus", "name_tokens", "window")
SINGLE: dict[str, type[Sampler]] = {
    **{f"{name} raises": hook(name, THROWN["error"]) for name in ("check", *HOOKS)},
    **{f"{name} interrupts": hook(name, THROWN["interrupt"]) for name in HOOKS},
    **{f"select: {name}": hook("select", do) for name, do in THROWN.items()},
    "bonus: speechless": hook("bonus", THROWN["speechless"]),
    "window: speechless": hook("window", THROWN["speechless"]),
    **SELECTS,
    **BESIDE,
    **SLOTS,
}
"""Faults for which a generation fails, in which others of the same sampler have no part."""
