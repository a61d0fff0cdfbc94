"""Store of loaded policies, by name. Any thread may change it while generations run."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from policies.block_length import within
from policies.network.policy_network import LoadedPolicy, parameters
from policies.serving.checkpoint import NAME, PolicyCard, PolicyError, load_policy
from samplers import ParameterError
from samplers.learned.policy import Policy

ZOO = Path(__file__).parents[1] / "zoo"
"""Policies that ship with the project: one folder each."""

FEW = 8
"""Most lengths that a warning names, and policies that an error names."""


class UnknownPolicyError(KeyError):
    """No policy of that name is loaded; the message lists those that are."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ServedModel:
    """Architecture and vocabulary of the model that policies run with."""

    architecture: str
    vocab_size: int


@dataclass(frozen=True)
class Stored:
    """A loaded policy. Generations hold its `sampler`, so replacing the policy does not affect running ones."""

    name: str
    folder: Path
    card: PolicyCard
    sampler: Policy
    parameters: int

    def warnings(self, host: ServedModel, block_length: int | None, gen_length: int) -> list[str]:
        """Differences from the policy's training that may cost accuracy or speed, one sentence each."""
        trained, found = self.card.trained_on, []
        if trained.architecture != host.architecture or trained.vocab_size != host.vocab_size:
            found.append(f"policy {self.name} was trained on {trained.model} ({trained.architecture}), another model")
        known = {within(block, length) for block in trained.block_lengths for length in trained.gen_lengths}
        if (ours := within(block_length, gen_length)) not in known:
            theirs = _few(list(map(_say, trained.block_lengths)), " and ")
            found.append(f"policy {self.name} was trained in {theirs}, and runs in {_say(ours)}")
        if gen_length not in trained.gen_lengths:
            lengths = _few(list(map(str, trained.gen_lengths)), ", ")
            found.append(f"policy {self.name} was trained on {lengths} positions, and runs on {gen_length}")
        return found


def _say(block_length: int | None) -> str:
    return "full diffusion" if block_length is None else f"blocks of {block_length}"


def _few(said: list[str], joint: str) -> str:
    """The first few entries of a list, and the number of the others."""
    return joint.join(said[:FEW]) + (f" and {len(said) - FEW} more" if len(said) > FEW else "")


class PolicyStore:
    """Loads policies for one model, and hands out their samplers.

    Args:
        host: the served model; policies that do not fit it are refused.
        device: where the networks run; the samplers' device.
    """

    def __init__(self, host: ServedModel, device: str = "cpu") -> None:
        self.host = host
        self._device = device
        self._lock = threading.Lock()
        self._stored: dict[str, Stored] = {}

    def load(self, name: str, folder: Path, within: Path | None = None) -> Stored:
        """Load a policy, replacing one of the same name. Raises PolicyError; nothing has changed then.

        Args:
            within: refuse files that are outside this folder once links are followed.
        """
        if NAME.fullmatch(name) is None:
            raise PolicyError(
                f"{name[:60]!r} is no name for a policy: use letters, digits, '.', '_' and '-', at most 100"
            )
        network, card = load_policy(folder, self._device, within)
        tokens = card.config.tokens
        if tokens and tokens != self.host.vocab_size:
            raise PolicyError(
                f"{folder}: reads tokens of a vocabulary of {tokens}, but the model has {self.host.vocab_size}: "
                "it cannot serve this model"
            )
        stored = Stored(
            name,
            folder,
            card,
            Policy(LoadedPolicy(network, longest=max(card.trained_on.gen_lengths))),
            parameters(network),
        )
        with self._lock:
            self._stored[name] = stored
        return stored

    def load_zoo(self) -> None:
        """Load the policies that ship with the project. Raises PolicyError."""
        for folder in sorted(ZOO.iterdir()) if ZOO.is_dir() else ():
            if (folder / "policy.json").is_file():
                self.load(folder.name, folder)

    def remove(self, name: str) -> Stored:
        """Remove a policy; generations that use it go on. Raises UnknownPolicyError."""
        with self._lock:
            stored = self._stored.pop(name, None)
        if stored is None:
            raise self._unknown(name)
        return stored

    def list(self) -> list[Stored]:
        """All loaded policies, sorted by name."""
        with self._lock:
            return [self._stored[name] for name in sorted(self._stored)]

    def get(self, name: str | None) -> Stored:
        """The policy of that name, or the only one if no name is given. Raises UnknownPolicyError."""
        with self._lock:
            if name is None and len(self._stored) == 1:
                return next(iter(self._stored.values()))
            stored = self._stored.get(name) if name is not None else None
        if stored is None:
            raise self._unknown(name)
        return stored

    def find(self, name: str | None) -> Policy:
        """The sampler of a policy, as `Resources.find` has it. Raises ParameterError."""
        try:
            return self.get(name).sampler
        except UnknownPolicyError as error:
            raise ParameterError("policy", str(error), "unknown_policy") from None

    def missing(self) -> str | None:
        """Why there is no policy at the moment; None if one is loaded."""
        return None if self.list() else "no policy is loaded"

    def only(self) -> str | None:
        """The name of the only policy; None if there are several or none."""
        with self._lock:
            return next(iter(self._stored)) if len(self._stored) == 1 else None

    def warnings(self, name: str, block_length: int | None, gen_length: int) -> Sequence[str]:
        """See `Stored.warnings`. None of a policy that was removed meanwhile: what runs by it goes on."""
        with self._lock:
            stored = self._stored.get(name)
        return [] if stored is None else stored.warnings(self.host, block_length, gen_length)

    def _unknown(self, name: str | None) -> UnknownPolicyError:
        names = _few([stored.name for stored in self.list()], ", ") or "none"
        if name is None:
            return UnknownPolicyError(f"name a policy: loaded are {names}")
        return UnknownPolicyError(f"no policy {name[:60]!r} is loaded; loaded are {names}")
