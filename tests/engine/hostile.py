"""A third party's sampler, and everything that it may do wrong; each fault strikes the rows whose parameters ask."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from samplers import ParameterError, Sampler, SamplerParams, Selection, Step, TokenChoice
from samplers.ranking import best
from tests.samplers.models import MASK, VOCAB

NAME = "hostile"
FAR = 10**12


class Params(SamplerParams):
    fault: bool = False


class Leftmost(Sampler):
    """Commit the leftmost candidate. What it keeps of a generation is whether it is to fail."""

    name = NAME
    Params = Params

    def start(self, params: SamplerParams) -> Any:
        return getattr(params, "fault", False)

    def select(self, step: Step) -> Selection:
        return leftmost(step)


def leftmost(step: Step) -> Selection:
    place = -torch.arange(step.candidate.shape[1]).expand(step.candidate.shape).float()
    return Selection(best(place, step.candidate, torch.ones_like(step.forward)))


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
        faulty = any(each.fault for each in first.params) if name == "select" else getattr(first, "fault", first)
        return do(*arguments) if faulty is True else plain(self, *arguments)

    return type("Hostile", (Leftmost,), {name: method})


def chosen(**parts: Callable[[Step], Any]) -> type[Sampler]:
    """A sampler whose selection has other parts; where these could be any row's, the others keep theirs."""

    def select(step: Step) -> Selection:
        found = leftmost(step)
        usual = {"commit": found.commit, "token": step.token, "confidence": step.confidence}
        faulty = torch.tensor([each.fault for each in step.params])[:, None]  # type: ignore[attr-defined]
        changed = {name: part(step) for name, part in parts.items()}
        for name, value in changed.items():
            if type(value) is Tensor and value.device.type == "cpu" and not value.is_sparse and name in usual:
                plain = usual[name]
                if (value.shape, value.dtype) == (plain.shape, plain.dtype):
                    changed[name] = value.where(faulty, plain)
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


def odd(step: Step) -> Tensor:
    return leftmost(step).commit.as_subclass(Odd)


def like(dtype: torch.dtype, value: float) -> Callable[[Step], Tensor]:
    return lambda step: torch.full(step.candidate.shape, value, dtype=dtype)


def numbers(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def setting(change: Callable[[], Any]) -> Callable[[Step], Selection]:
    """Leave something of torch's changed, which everybody uses."""

    def select(step: Step) -> Selection:
        found = leftmost(step)
        change()
        return found

    return select


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
    "states few": chosen(states=lambda step: []),
    "states many": chosen(states=lambda step: [None] * 99),
    "states none": chosen(states=lambda step: 5),
    "replaces": chosen(replace=like(torch.bool, 0)),
    "is done": chosen(done=lambda step: torch.ones(len(step.params), dtype=torch.bool)),
    "drafts": chosen(draft=like(torch.int64, 2)),
    "waits": chosen(commit=like(torch.bool, 0), waits=lambda step: True),
    "waits much": chosen(waits=lambda step: torch.ones(3)),
}


def wide(state: Any, positions: Tensor) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.int64).expand(len(positions), 1_000_000)


def many(params: SamplerParams, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.zeros(1, dtype=torch.int64).expand(10_000_000)
    return index, index, torch.zeros(1).expand(10_000_000)


def against_all(params: SamplerParams, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ban every token there is."""
    return torch.zeros(VOCAB, dtype=torch.int64), torch.arange(VOCAB), torch.full((VOCAB,), -torch.inf)


def tall(state: Any, positions: Tensor) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.int64).expand(FAR, 2)


ONE, FLAT = numbers([0]), torch.zeros(1)
BESIDE: dict[str, type[Sampler]] = {
    "names a list": answer("name_tokens", [[1]]),
    "names flat": hook("name_tokens", lambda state, at: torch.ones_like(at)),
    "names floats": hook("name_tokens", lambda state, at: torch.ones(len(at), 1)),
    "names few": hook("name_tokens", lambda state, at: at[1:, None] * 0),
    "names far": hook("name_tokens", lambda state, at: torch.full((len(at), 1), FAR)),
    "names negative": hook("name_tokens", lambda state, at: torch.full((len(at), 1), -2)),
    "names meta": hook("name_tokens", lambda state, at: torch.zeros(len(at), 1, dtype=torch.int64, device="meta")),
    "names widely": hook("name_tokens", wide),
    "names for too many": hook("name_tokens", tall),
    "bonus alone": answer("bonus", ONE),
    "bonus of two": answer("bonus", (ONE, ONE)),
    "bonus of lists": answer("bonus", ([0], [1], [1.0])),
    "bonus of lengths": answer("bonus", (ONE, numbers([1, 2]), FLAT)),
    "bonus deep": answer("bonus", (ONE[None], ONE[None], FLAT[None])),
    "bonus outside": hook("bonus", lambda params, tokens, places: (numbers([len(places)]), ONE, FLAT)),
    "bonus far": answer("bonus", (numbers([FAR]), ONE, FLAT)),
    "bonus before": answer("bonus", (numbers([-1]), ONE, FLAT)),
    "bonus of no token": answer("bonus", (ONE, numbers([VOCAB]), FLAT)),
    "bonus of a negative token": answer("bonus", (ONE, numbers([-1]), FLAT)),
    "bonus nan": answer("bonus", (ONE, ONE, FLAT * torch.nan)),
    "bonus infinite": answer("bonus", (ONE, ONE, FLAT + torch.inf)),
    "bonus too large": answer("bonus", (ONE, ONE, FLAT.double() + 1e300)),
    "bonus against all": hook("bonus", against_all),
    "bonus of floats": answer("bonus", (FLAT, FLAT, FLAT)),
    "bonus of integers": answer("bonus", (ONE, ONE, ONE)),
    "bonus meta": answer("bonus", (ONE.to("meta"), ONE, FLAT)),
    "bonus of many": hook("bonus", many),
    "chooses in words": answer("choice", "greedily"),
    "chooses hot": answer("choice", TokenChoice("hot")),  # type: ignore[arg-type]
    "chooses nan": answer("choice", TokenChoice(torch.nan)),
    "chooses infinity": answer("choice", TokenChoice(torch.inf)),
    "chooses below": answer("choice", TokenChoice(-1.0)),
    "chooses nothing": answer("choice", TokenChoice(1.0, top_p=0.0)),
    "chooses few": answer("choice", TokenChoice(1.0, top_k=-1)),
    "chooses many": answer("choice", TokenChoice(1.0, top_k=FAR)),
    "chooses none": answer("choice", TokenChoice(1.0, top_k=None)),  # type: ignore[arg-type]
}


class Reviser(Leftmost):
    """Revises, and is never done."""

    revises = True

    def select(self, step: Step) -> Selection:
        done = torch.zeros(len(step.params), dtype=torch.bool)
        return replace(leftmost(step), done=done)


def revising(**parts: Callable[[Step], Any]) -> type[Sampler]:
    """One that revises as another would not, whoever asks."""

    def select(self: Sampler, step: Step) -> Selection:
        done = torch.ones(len(step.params), dtype=torch.bool)
        changed = {name: part(step) for name, part in parts.items()}
        return replace(leftmost(step), **{"done": done, **changed})

    return type("Hostile", (Leftmost,), {"revises": True, "select": select})


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
    "region maybe": attributes(region="maybe"),
    "region raises": attributes(region=property(THROWN["interrupt"])),
    "revises raises": attributes(revises=property(THROWN["error"])),
    "greedy tensor": attributes(greedy=torch.ones(2)),
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
    "never says done": revising(done=lambda step: None),
    "done for all": revising(done=lambda step: torch.ones(99, dtype=torch.bool)),
    "done in numbers": revising(done=lambda step: torch.ones(len(step.params))),
    "masks what is masked": revising(remask=lambda step: step.masked),
    "replaces all": revising(replace=like(torch.bool, 1)),
    "replaces in numbers": revising(replace=like(torch.int64, 0)),
}
"""Faults of the sampler as such, of which no row is spared."""


def spoil(step: Step) -> Selection:
    """Overwrite all that it is given."""
    found = leftmost(step)
    for value in [*vars(step).values(), *step.extra.values()]:
        if isinstance(value, Tensor):
            value.fill_(torch.nan if value.is_floating_point() else True)
    for each in step.params:
        each.__dict__["fault"] = "spoilt"
    step.extra.clear()
    for part in (step.params, step.layouts, step.states):
        part.clear()  # type: ignore[attr-defined]
    return found


def rewrite(*found: object) -> None:
    """Change all attributes of what is frozen."""
    for each in found:
        for name in list(vars(each)):
            object.__setattr__(each, name, FAR)


def rewriting(step: Step) -> Selection:
    rewrite(*(layout.pattern for layout in step.layouts), *step.layouts)
    return leftmost(step)


class Keeper(Leftmost):
    """Keeps what it was given and what it gave, and overwrites it at its next turn."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def select(self, step: Step) -> Selection:
        for value in self.kept:
            value.fill_(True)
        found = leftmost(step)
        self.kept += [found.commit, *(value for value in vars(step).values() if isinstance(value, Tensor))]
        return found


def overwriting(params: SamplerParams, tokens: Tensor, places: Tensor) -> None:
    tokens.fill_(FAR)
    places.fill_(FAR)


def overwriting_positions(state: Any, positions: Tensor) -> None:
    positions.fill_(FAR)


HARMLESS: dict[str, type[Sampler]] = {
    "spoils its step": hook("select", spoil),
    "keeps and changes": Keeper,
    "rewrites layouts": hook("select", rewriting),
    "rewrites the layout it checks": hook("check", lambda params, layout: rewrite(layout.pattern, layout)),
    "rewrites the layout it counts by": hook(
        "most_forwards", lambda params, layout: (rewrite(layout.pattern, layout), 1)[1]
    ),
    "rewrites the pattern": attributes(incompatibility=lambda self, pattern: rewrite(pattern)),
    "overwrites the canvas": hook("bonus", overwriting),
    "overwrites positions": hook("name_tokens", overwriting_positions),
    "changes its mind": attributes(Reviser, region=changing(), drafts=changing(), greedy=changing()),
    "is never done": Reviser,
    "confidence with a gradient": chosen(confidence=lambda step: torch.full(step.token.shape, 0.5, requires_grad=True)),
    "prints": hook("select", lambda step: (print("noise"), leftmost(step))[1]),  # noqa: T201
    "bans every token but one": hook(
        "bonus",
        lambda params, tokens, places: (ONE.expand(VOCAB - 1), torch.arange(1, VOCAB), torch.full((VOCAB - 1,), -50.0)),
    ),
}
"""What a sampler may try, and its generation ends all the same as it would, or with an error of its own."""

SINGLE: dict[str, type[Sampler]] = {
    **{f"{name} raises": hook(name, THROWN["error"]) for name in ("check", "start", "choice", "bonus", "name_tokens")},
    **{f"{name} interrupts": hook(name, THROWN["interrupt"]) for name in ("start", "choice", "bonus", "name_tokens")},
    **{f"select: {name}": hook("select", do) for name, do in THROWN.items()},
    "bonus: speechless": hook("bonus", THROWN["speechless"]),
    "start: speechless": hook("start", THROWN["speechless"]),
    **SELECTS,
    **BESIDE,
}
"""Faults for which a generation fails, in which others of the same sampler have no part."""
