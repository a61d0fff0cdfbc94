"""A policy's training: stages, resuming, data parallel gradients, and that it learns."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from policies.network.config import PolicyConfig
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy, score
from policies.serving.checkpoint import Origin, load_policy
from policies.training import decoding_setup
from policies.training import trainer as trainer_module
from policies.training.actors import Explorer, RuleActor
from policies.training.data_parallel import DataParallel
from policies.training.grpo import GrpoStage
from policies.training.recipe import Grpo, PolicyRecipe, load_policy_recipe
from policies.training.rollout import rollout
from policies.training.runs import Runs
from policies.training.speeds import speed_of
from policies.training.trainer import PolicyTrainer
from samplers import AttentionPattern
from samplers.learned.policy import Policy, PolicyParams
from tests.policies.tiny import SMALL, recipe
from tests.policies.toys import LENGTH, LEVELS, ReadySet

COLLECT = {"kind": "collect", "runs": 40}
FIT = {"kind": "fit", "steps": 30, "batch": 8}
SHIFT = {"kind": "shift", "cut": 0.9, "scale": 0.8}
GRPO = {"kind": "grpo", "updates": 4, "prompts": 4, "group": 4, "learning_rate": 1e-3, "clip": 0.3}
RICH_GRPO = GRPO | {
    "alphas": [0.3, 1.0],
    "scale_by_deviation": True,
    "entropy": 0.01,
    "kl": 0.01,
    "experts": [0.75],
    "expert_block_length": 4,
    "micro_batch": 50,
}
TAKES_SPEED = {"policy": SMALL | {"region": False, "takes_speed": True}}


@pytest.fixture(autouse=True)
def ready_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_setup, "get_task", lambda name: ReadySet())


def trainer(run: PolicyRecipe, out: Path, luck: float = 0.5, world: DataParallel | None = None) -> PolicyTrainer:
    origin = Origin(model="toy", model_digest="0" * 64, architecture="Toy", vocab_size=3)
    lines: list[dict[str, Any]] = []
    made = PolicyTrainer(
        run, {"as": "read"}, ReadySet().subject(luck), origin, out, world or DataParallel(), lines.append
    )
    made.lines = lines  # type: ignore[attr-defined]
    return made


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(out / "state.safetensors").items() if k.startswith("network.")}


@pytest.mark.parametrize(
    "run",
    [
        recipe(GRPO, save_every=1),
        recipe(COLLECT, FIT, SHIFT, RICH_GRPO, save_every=1, **TAKES_SPEED),
        recipe(GRPO, save_every=2, policy=SMALL | {"region": False, "action": "dpls"}),
    ],
    ids=["grpo", "all stages", "dpls"],
)
def test_a_resumed_run_is_the_same_to_the_bit(run: PolicyRecipe, tmp_path: Path) -> None:
    whole = trainer(run, tmp_path / "whole")
    whole.run()
    for _ in range(50):
        part = trainer(run, tmp_path / "parts")
        part.resume()
        if part.stage == len(run.stage):
            break
        work = {"left": 3}

        def stop(line: dict[str, Any], part: PolicyTrainer = part, work: dict[str, int] = work) -> None:
            work["left"] -= 1
            part.stopping = work["left"] == 0

        part.report = stop
        part.run()
    else:
        raise AssertionError("the run never ends")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_runs_collected_by_the_policy_itself_survive_an_interruption(tmp_path: Path) -> None:
    """On-policy rounds: later fits see all that was collected, also after a restart."""
    run = recipe(COLLECT, FIT, COLLECT | {"by": "policy", "runs": 20}, FIT)
    whole = trainer(run, tmp_path / "whole")
    whole.run()
    for stage in range(1, 5):
        part = trainer(run, tmp_path / "parts")
        part.resume()

        def stop(line: dict[str, Any], part: PolicyTrainer = part, stage: int = stage) -> None:
            part.stopping = line["stage"] == stage

        part.report = stop
        part.run()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(expected[name].equal(found[name]) for name in expected)
    assert len(whole.training_run.collected.before(4).good) == 60


def test_tasks_and_block_lengths_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {"short": 8, "long": LENGTH}

    def get_task(name: str) -> ReadySet:
        task = ReadySet(lengths[name])
        task.name, task.gen_length = name, lengths[name]  # type: ignore[misc]
        return task

    monkeypatch.setattr(decoding_setup, "get_task", get_task)
    mixed = {"tasks": ["short", "long"], "block_lengths": ["full", 4], "batch": 4, "check": 3, "save_every": 3}
    made = trainer(recipe(COLLECT | {"runs": 64}, FIT, GRPO | {"updates": 4}, **mixed), tmp_path)
    made.run()
    lines: list[dict[str, Any]] = made.lines  # type: ignore[attr-defined]
    forwards = [line["forwards"] for line in lines if line["kind"] == "grpo"]
    assert max(forwards) <= LENGTH and forwards[0] <= 8
    checked = next(line for line in lines if "check/reward" in line)
    assert {name for name in checked if name.startswith("check/") and name.endswith("/1")} == {
        f"check/{setting}/1" for setting in ("short", "long", "short/4", "long/4")
    }
    trained = load_policy(tmp_path)[1].trained_on
    assert trained.gen_lengths == (8, LENGTH) and trained.block_lengths == (None, 4)


def test_runs_of_several_lengths_are_fitted_together(tmp_path: Path) -> None:
    """A line's logits are the same whatever it is padded to."""
    found = []
    for length in (8, LENGTH):
        task = ReadySet(length)
        network = UnmaskingPolicy(PolicyConfig.model_validate(SMALL | {"features": ["confidence", "place"]}))
        chooser = Explorer(6, 0, 0.3)
        problems = task.problems(6, 0, "train")
        settings = {"gen_length": length, "block_length": None, "seeds": range(6), "record": network.config}
        found.append(rollout(task.subject(0.5), task, problems, chooser, **settings))
    runs, short = Runs.of(found), Runs.of(found[:1])
    runs.save(tmp_path / "runs")
    runs = Runs.load(tmp_path / "runs")
    (both, run), (alone, _) = runs.batch(torch.arange(12)), short.batch(torch.arange(6))
    count = len(alone.row)
    with torch.no_grad():
        padded, plain = score(network, both.seen, None)[:count, :8], score(network, alone.seen, None)
    torch.testing.assert_close(padded, plain)
    assert not both.candidates[:count, 8:].any() and not both.seen.valid[:count, 8:].any()
    assert run.max() == 11 and both.committed[run == 11].sum() == LENGTH


def test_a_run_of_another_recipe_is_not_taken_over(tmp_path: Path) -> None:
    trainer(recipe(GRPO | {"updates": 1}), tmp_path).run()
    with pytest.raises(ValueError, match="another recipe"):
        trainer(recipe(GRPO | {"updates": 2}), tmp_path).resume()


def test_each_stage_reports_and_the_policy_says_what_made_it(tmp_path: Path) -> None:
    run = recipe(COLLECT, FIT, SHIFT, RICH_GRPO, check=10, save_every=2, **TAKES_SPEED)
    made = trainer(run, tmp_path)
    made.run()
    lines: list[dict[str, Any]] = made.lines  # type: ignore[attr-defined]
    assert [line["kind"] for line in lines if line["stage"] == 2] == ["shift", "check"]
    assert {line["kind"] for line in lines} == {"collect", "fit", "shift", "grpo", "check"}
    assert [line["stage"] for line in lines if line["kind"] == "check" and "check/reward" in line] == [1, 2, 3]
    assert sum(line["runs"] for line in lines if line["kind"] == "collect") >= 40
    updates = [line for line in lines if line["kind"] == "grpo"]
    assert len(updates) == 4
    for line in updates:
        assert 0 <= line["reward"] <= 1 and 0 < line["probability"] < 1 and line["gradient"] >= 0
    assert any("check/reward" in line for line in updates)
    network, card = load_policy(tmp_path)
    assert card.config == run.policy == network.config
    assert card.recipe == {"as": "read"}
    assert card.trained_on.gen_lengths == (LENGTH,) and card.trained_on.alphas == (0.3, 1.0)
    json.dumps(lines)


def test_a_shift_moves_the_even_point(tmp_path: Path) -> None:
    made = trainer(recipe(SHIFT | {"cut": 0.9, "scale": 0.5}), tmp_path)
    torch.nn.init.normal_(made.network.head.weight)
    features = torch.rand(1, LENGTH, 1)
    everywhere = torch.ones(1, LENGTH, dtype=torch.bool)
    before = made.network(features, everywhere, everywhere, torch.zeros(1)).detach()
    made.run()
    after = made.network(features, everywhere, everywhere, torch.zeros(1)).detach()
    assert torch.allclose(after, 0.5 * (before - torch.logit(torch.tensor(0.9))), atol=1e-5)


def test_speeds_of_alphas() -> None:
    alphas = (3.0, 0.0, 0.1, 10.0, 0.1)
    assert speed_of(torch.tensor([0.0, 0.1, 3.0, 10.0]), alphas).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert speed_of(3.0, alphas).item() == pytest.approx(2 / 3) and speed_of(1.0, (1.0,)).item() == 0


PROCESS = """
import sys, torch
from pathlib import Path
from policies.training import decoding_setup
from policies.training.data_parallel import DataParallel
from policies.training.grpo import GrpoStage
from tests.policies.training.test_trainer import trainer, RICH_GRPO, TAKES_SPEED
from tests.policies.tiny import recipe
from tests.policies.toys import ReadySet
torch.set_num_threads(1)
decoding_setup.get_task = lambda name: ReadySet()
world = DataParallel.join()
made = trainer(recipe(RICH_GRPO | {"updates": 2}, **TAKES_SPEED), Path(sys.argv[1]) / str(world.rank), world=world)
stage = made.recipe.stage[0]
made.grpo.begin(made.network, stage)
torch.manual_seed(9)
for p in made.network.parameters():
    p.data.add_(torch.randn_like(p) * 0.1)
GrpoStage(made.training_run, 0, stage, made.grpo).update()
torch.save([p.grad for p in made.network.parameters()], Path(sys.argv[1]) / f"gradient-{world.rank}.pt")
world.leave()
"""


def test_two_processes_have_the_gradients_of_one_with_the_joint_batch(tmp_path: Path) -> None:
    """With gloo, as `torchrun` starts them."""
    root = Path(__file__).parents[3]
    base = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    alone.mkdir(), pair.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = base | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    runs = [(alone, base), *((pair, shared | {"RANK": str(rank)}) for rank in range(2))]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(folder)], env=each, cwd=root) for folder, each in runs
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    expected = torch.load(alone / "gradient-0.pt")
    for rank in range(2):
        found = torch.load(pair / f"gradient-{rank}.pt")
        assert any(gradient.abs().max() > 1e-4 for gradient in expected)
        for one, two in zip(expected, found, strict=True):
            assert torch.allclose(one, two, atol=1e-6, rtol=1e-4)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(recipe(GRPO | {"entropy": 0.01}), tmp_path)
    update = GrpoStage.update

    def broken(stage: GrpoStage) -> dict[str, Any]:
        if made.update == 2:
            made.network.head.weight.data.fill_(float("nan"))
        return update(stage)

    monkeypatch.setattr(GrpoStage, "update", broken)
    with pytest.raises(FloatingPointError, match=r"stage 0, update 2: .*not finite; lower the learning rate"):
        made.run()


def test_processes_share_prompts_evenly_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 prompts do not share out evenly over 3 processes"):
        trainer(recipe(GRPO), tmp_path, world=DataParallel(0, 3))


@pytest.mark.parametrize(("label", "takes_speed"), [("outcome", True), ("oracle", True), ("imitation", False)])
def test_labels_teach_the_ready_set(tmp_path: Path, label: str, takes_speed: bool) -> None:
    """A level a forward is the optimum: 4 forwards, always right. Outcome labels tell only which runs were right.

    What was fitted holds at any speed; only the push differs.
    """
    run = recipe(
        {"kind": "collect", "runs": 400, "always": 0.2, "thresholds": [0.75]},
        {"kind": "fit", "label": label, "steps": 400, "batch": 32, "learning_rate": 3e-3, "threshold": 0.75},
        {"kind": "shift", "cut": 0.9},
        check=40,
        batch=100,
        policy=SMALL | {"region": False, "temperature": 0.0, "takes_speed": takes_speed},
    )
    made = trainer(run, tmp_path, luck=0.3)
    made.run()
    if takes_speed:
        with torch.no_grad():
            made.network.push.zero_()
    for speed in (0.0, 0.5, 1.0) if takes_speed else (None,):
        chooser = RuleActor(Policy(LoadedPolicy(made.network)), PolicyParams(speed=speed))
        problems = ReadySet().problems(40, 5, "heldout")
        found = made.training_run.rollout(made.training_run.setups[0], problems, chooser, list(range(40)))
        assert found.correct.mean() >= 0.95
        assert found.tokens.sum() / found.forwards.sum() >= 0.9 * LENGTH / LEVELS


def test_grpo_alone_solves_the_ready_set(tmp_path: Path) -> None:
    """From scratch, as the paper trains: near the optimum, which is (16 - 4 + 1) / 16 at alpha 1, in 90 updates."""
    grpo = {"kind": "grpo", "updates": 90, "prompts": 16, "group": 8, "learning_rate": 1e-3, "clip": 0.5}
    run = recipe(
        grpo | {"schedule": "constant", "allow_empty": True},
        batch=128,
        policy=SMALL | {"region": False, "output_bias": -2.0, "hidden": 32, "feedforward": 128},
    )
    made = trainer(run, tmp_path, luck=0.9)
    optimum = (LENGTH - LEVELS + 1) / LENGTH
    lines: list[dict[str, Any]] = []

    def mean(name: str) -> float:
        return float(sum(line[name] for line in lines[-5:])) / 5

    def stop_when_solved(line: dict[str, Any]) -> None:
        lines.append(line)
        made.stopping = mean("reward") > 0.8 * optimum and mean("right") > 0.95

    made.report = stop_when_solved
    made.run()
    assert lines[0]["reward"] < 0.3
    assert mean("reward") > 0.8 * optimum and mean("right") > 0.95


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ([FIT], {}, "nothing to fit to"),
        ([COLLECT, FIT], {"policy": SMALL | {"action": "dpls"}}, "fit is for bernoulli"),
        ([GRPO | {"alphas": [1.0, 2.0]}], {}, "takes_speed"),
        ([GRPO | {"alphas": [-1.0]}], {}, "negative"),
        ([GRPO | {"experts": [0.9]}], {"policy": SMALL | {"action": "dpls"}}, "order of draws"),
        ([{"kind": "dance"}], {}, "kind"),
        ([], {}, "at least 1 item"),
    ],
)
def test_recipes_that_make_no_sense(stages: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(*stages, **changes)


def test_the_recipes_that_ship_are_valid() -> None:
    folder = Path(trainer_module.__file__).parents[1] / "recipes"
    names = sorted(path.stem for path in folder.glob("*.toml"))
    assert "paper-llada-8b" in names and "embedded-chain" in names
    for name in names:
        _, content = load_policy_recipe(folder / f"{name}.toml")
        assert content["stage"]
    paper, _ = load_policy_recipe(folder / "paper-llada-8b.toml")
    (stage,) = paper.stage
    assert isinstance(stage, Grpo)
    assert (stage.group, stage.clip, stage.learning_rate, stage.inner) == (8, 0.5, 3e-5, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("tasks = 3", "recipe.toml: tasks"), ("= =", "not a TOML file"), ("", "recipe.toml: tasks: Field required")],
)
def test_a_malformed_recipe_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_policy_recipe(path)
    assert "\n" not in str(error.value)


def test_runs_that_are_gone_are_missed_before_the_stages_in_between(tmp_path: Path) -> None:
    run = recipe(COLLECT, FIT, GRPO, COLLECT | {"by": "policy"}, FIT)
    first = trainer(run, tmp_path)

    def stop(line: dict[str, Any]) -> None:
        first.stopping = line["stage"] == 2

    first.report = stop
    first.run()
    assert trainer(run, tmp_path).resume()
    (tmp_path / "runs-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"runs-0.safetensors is gone, and stage 4 fits to it"):
        trainer(run, tmp_path).resume()


def test_what_the_model_cannot_do_is_found_when_the_run_is_made(tmp_path: Path) -> None:
    origin = Origin(model="toy", model_digest="0" * 64, architecture="Toy", vocab_size=3)
    subject = ReadySet().subject(0.5)
    for changes, lengths, said in (
        (
            {"pattern": AttentionPattern(causal_block=4, fixed=True)},
            (3,),
            "block_lengths: block_length 3 does not divide",
        ),
        ({"pattern": AttentionPattern(noise=3)}, ("full",), "this model has no mask token"),
        ({"max_length": LENGTH}, ("full",), f"a prompt of task ready-set has 1 tokens, .* {LENGTH}"),
    ):
        run = recipe(COLLECT, FIT, block_lengths=lengths)
        with pytest.raises(ValueError, match=said):
            PolicyTrainer(run, {}, replace(subject, **changes), origin, tmp_path / "out")
        assert not (tmp_path / "out").exists()
