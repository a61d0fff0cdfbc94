"""Training: it learns, it resumes bit for bit, and it says what is wrong with a recipe."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from policies.tasks import get_task
from server.training import trainer as trainer_module
from server.training.canvases import CanvasMaker
from server.training.muon import Muon, orthogonalise
from server.training.recipe import MicroBatch, Recipe, load_recipe
from server.training.tokenizer import build_tokenizer, number_ids
from server.training.trainer import Trainer, task_tokenizer

RECIPE = """
seed = 3
steps = 6
save_every = 3

[model]
d_model = 32
n_layers = 1
n_heads = 2
mlp_hidden_size = 48
max_sequence_length = 160

[optimizer]
name = "muon"
learning_rate = 0.02
warmup_steps = 2

[[micro_batch]]
name = "mixed"
rows = { chain = 2, reverse = 3 }
length = 128

[[micro_batch]]
name = "links"
kind = "links"
rows = { chain = 2 }
length = 128
every = [[0.0, 2]]

[[micro_batch]]
name = "drill"
kind = "equations"
rows = { any = 4 }
length = 24
"""


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> object:
    """The tasks' tokenizer, built once: every Trainer asks for it."""
    built = task_tokenizer()
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer_module, "task_tokenizer", lambda: built)
    yield built
    patch.undo()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return load_recipe(path)


def quiet() -> Console:
    return Console(file=io.StringIO())


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_few_steps_reduce_the_loss(recipe: Recipe, tmp_path: Path, optimizer: str) -> None:
    settings = recipe.optimizer.model_copy(update={"name": optimizer})
    trainer = Trainer(recipe.model_copy(update={"steps": 30, "optimizer": settings}), tmp_path / "out")
    same_rows = trainer.canvases.draw(recipe.micro_batch[0], 999)
    before = trainer.loss(same_rows).item()
    trainer.run(quiet())
    assert trainer.step == 30 and trainer.progress == 1
    assert trainer.loss(same_rows).item() < 0.8 * before
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 31))
    assert "mixed" in log[0] and log[-1]["rate"] < log[10]["rate"]


def test_a_resumed_run_ends_with_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    whole = Trainer(recipe, tmp_path / "whole")
    assert not whole.resume()
    whole.run(quiet())
    broken_off = Trainer(recipe, tmp_path / "parts")
    for _ in range(3):
        broken_off.train_step()
    broken_off.save()
    broken_off.train_step()  # lost: not saved
    resumed = Trainer(recipe, tmp_path / "parts")
    assert resumed.resume() and resumed.step == 3
    resumed.run(quiet())
    assert same(state(resumed), state(whole))
    assert not same(state(Trainer(recipe, tmp_path / "new")), state(whole))


def test_the_same_recipe_gives_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        trainer = Trainer(recipe, tmp_path / name)
        trainer.train_step()
        runs.append(state(trainer))
    assert same(*runs)


def test_a_checkpoint_of_another_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    Trainer(recipe, tmp_path / "out").save()
    with pytest.raises(ValueError, match="belongs to another recipe; choose another --out or delete it"):
        Trainer(recipe.model_copy(update={"seed": 4}), tmp_path / "out").resume()


def test_a_save_that_is_killed_leaves_the_old_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe, tmp_path / "out")
    trainer.save()
    old = trainer.checkpoint.read_bytes()

    def killed(handle: int) -> None:
        os.ftruncate(handle, 100)
        raise KeyboardInterrupt

    trainer.train_step()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        trainer.save()
    assert trainer.checkpoint.read_bytes() == old
    assert Trainer(recipe, tmp_path / "out").resume()


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    trainer = Trainer(recipe, tmp_path / "out")
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"not finite at step 0.*lower the learning rate"):
        trainer.train_step()


def test_the_time_limit_ends_a_run(recipe: Recipe, tmp_path: Path) -> None:
    trainer = Trainer(recipe.model_copy(update={"max_minutes": 1.0}), tmp_path / "out")
    trainer.seconds = 30.0
    assert trainer.progress == 0.5
    trainer.seconds = 61.0
    trainer.run(quiet())
    assert trainer.step == 0 and trainer.rate() == 0


def test_the_rate_rises_and_falls(tmp_path: Path, recipe: Recipe) -> None:
    settings = recipe.optimizer.model_copy(update={"warmup_steps": 2, "decay_share": 0.5})
    trainer = Trainer(recipe.model_copy(update={"optimizer": settings, "steps": 8, "max_minutes": None}), tmp_path)
    rates = []
    for trainer.step in range(9):
        rates.append(trainer.rate() / settings.learning_rate)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("steps = 6", ""), "steps: Field required"),
        (lambda text: text.replace("steps = 6", "steps = 0"), "steps: Input should be greater than 0"),
        (lambda text: text.replace("seed = 3", "sead = 3"), "sead: Extra inputs are not permitted"),
        (lambda text: text.replace("d_model = 32", 'd_model = "wide"'), "model.d_model: "),
        (lambda text: text.replace('"muon"', '"sgd"'), "optimizer.name: "),
        (lambda text: text.replace("chain = 2, reverse", "chess = 2, reverse"), "unknown task 'chess'; choose from"),
        (lambda text: text.replace("[[0.0, 2]]", "[[0.5, 2]]"), "phases must be in order and begin at progress 0.0"),
        (lambda text: text.replace('"links"\nrows', '"rings"\nrows'), "micro_batch.1.kind: "),
        (lambda text: text.partition("[[micro_batch]]")[0], "micro_batch: Field required"),
        (lambda text: text + "\n[[", "not a TOML file"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(change(RECIPE))
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file or directory"):
        load_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a TOML file"):
        load_recipe(tmp_path / "binary.toml")


def test_phases() -> None:
    batch = MicroBatch(name="x", rows={"chain": 1}, length=9, every=((0.0, 2), (0.5, 0), (0.8, 1)))
    assert [batch.takes_part(step, 0.1) for step in range(4)] == [True, False, True, False]
    assert not any(batch.takes_part(step, 0.6) for step in range(4))
    assert all(batch.takes_part(step, 0.9) for step in range(4))


def test_rows_are_clean_outside_the_masks(recipe: Recipe, one_tokenizer: object) -> None:
    """Prompts are never masked, only masked tokens count, and a row's weights are about one in all."""
    maker = CanvasMaker(recipe, one_tokenizer)  # type: ignore[arg-type]
    for step in range(20):
        rows = maker.draw(recipe.micro_batch[0], step)
        assert rows.tokens.shape == rows.masked.shape == rows.weight.shape == (5, 128)
        assert (rows.weight[~rows.masked] == 0).all()
        assert (rows.tokens != maker.mask_id).all()
        for line, masked in zip(rows.tokens.tolist(), rows.masked, strict=True):
            text = maker.tokenizer.decode(line)
            task = get_task("chain" if "have now?" in text else "reverse")
            prompt = text.partition("?")[0] + "?" if task.name == "chain" else text.partition("Reversed")[0]
            clean = len(maker.tokenizer.encode(prompt).ids)
            assert not masked[:clean].any()


def test_every_masking_level_occurs(recipe: Recipe, one_tokenizer: object) -> None:
    maker = CanvasMaker(recipe.model_copy(update={"block_share": 0.0}), one_tokenizer)  # type: ignore[arg-type]
    batch = recipe.micro_batch[0].model_copy(update={"rows": {"reverse": 16}, "length": 64})
    shares = torch.cat([maker.draw(batch, step).masked.float().mean(dim=1) for step in range(10)])
    largest = shares.max()
    assert torch.histc(shares, 5, 0, float(largest)).min() > 8


def test_frontier_rows_are_known_up_to_a_ragged_edge(recipe: Recipe, one_tokenizer: object) -> None:
    """Masks grow with the position, free words are open before the edge, and padding is known if the end is."""
    maker = CanvasMaker(recipe, one_tokenizer)  # type: ignore[arg-type]
    batch = MicroBatch(name="frontier", kind="frontier", rows={"chain": 16}, length=112)
    first, last, free_words, others = [], [], [], []
    for step in range(20):
        rows = maker.draw(batch, step)
        assert (rows.weight[~rows.masked] == 0).all()
        assert torch.allclose(rows.weight.sum(dim=1)[rows.masked.any(dim=1)], torch.tensor(1.0), atol=1e-5)
        for line, masked in zip(rows.tokens, rows.masked, strict=True):
            ids = line.tolist()
            end = ids.index(maker.end_id)
            assert (masked[end:] == masked[end]).all()
            start = ids.index(maker.tokenizer.token_to_id("?")) + 1
            assert not masked[:start].any()
            half = start + (end - start) // 2
            first.append(masked[start:half].float().mean())
            last.append(masked[half:end].float().mean())
            links = [i for i in range(start, end) if maker.tokenizer.id_to_token(ids[i])[1:] in ("Then", "Next", "Now")]
            free_words.append(masked[links].float().mean())
            others.append(masked[[i + 1 for i in links]].float().mean())
    assert torch.stack(first).mean() + 0.2 < torch.stack(last).mean()
    assert torch.stack(others).nanmean() + 0.1 < torch.stack(free_words).nanmean()


def test_links_hide_every_copy_of_a_value(recipe: Recipe, one_tokenizer: object) -> None:
    maker = CanvasMaker(recipe, one_tokenizer)  # type: ignore[arg-type]
    rows = maker.draw(recipe.micro_batch[1], 0)
    assert rows.masked.any(dim=1).all()
    hidden = rows.tokens[rows.masked].unique().tolist()
    numbers = {id for ids in number_ids(maker.tokenizer) for id in ids}
    assert set(hidden) <= numbers, "only numbers are hidden"
    assert torch.allclose(rows.weight.sum(dim=1), torch.ones(len(rows.tokens)))


def test_equations_hide_the_results(recipe: Recipe, one_tokenizer: object) -> None:
    maker = CanvasMaker(recipe, one_tokenizer)  # type: ignore[arg-type]
    rows = maker.draw(recipe.micro_batch[2], 0)
    assert rows.tokens.shape == (4, 24)
    equals = maker.tokenizer.encode(" =").ids[0]
    for line, masked in zip(rows.tokens.tolist(), rows.masked.tolist(), strict=True):
        assert masked == [i > 0 and line[i - 1] == equals for i in range(24)]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 48), (2, 48, 16)])
def test_orthogonalised_matrices_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3 and values.max() < 1.3
    assert 0.7 < values.median() < 1.2
    # The directions are those of the nearest orthogonal matrix.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1)).min() > 0.95


def test_matrices_of_a_stack_do_not_touch_each_other() -> None:
    matrices = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalise(matrices)[2], orthogonalise(matrices[2:3])[0], atol=1e-5)


def test_muon_takes_steps_of_adamws_size_and_decays() -> None:
    p = torch.nn.Parameter(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))
    before = p.detach().clone()
    p.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    Muon([p], lr=0.1, weight_decay=0.5).step()
    update = p.detach() - before * (1 - 0.1 * 0.5)
    assert 0.1 * 0.2 * 0.6 < update.pow(2).mean().sqrt() < 0.1 * 0.2 * 1.3
    untouched = torch.nn.Parameter(torch.ones(3, 3))
    Muon([untouched], lr=0.1, weight_decay=0.5).step()
    assert untouched.equal(torch.ones(3, 3))


def test_numbers_are_single_tokens() -> None:
    tokenizer = build_tokenizer(["a b"])
    spaced, bare = number_ids(tokenizer)
    assert len(set(spaced)) == len(set(bare)) == 100
    assert tokenizer.decode([spaced[42], bare[7]]) == " 427"
