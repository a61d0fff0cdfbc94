"""The policies that ship: whole, small, documented, and faster than a threshold where they say so."""

from pathlib import Path

import pytest
import torch

from policies.evaluation.measure import Measurement, Trial, evaluate
from policies.evaluation.sampler_spec import SamplerSpec
from policies.serving.checkpoint import load_policy
from policies.serving.resources import resources_of
from policies.serving.store import ZOO, PolicyStore, ServedModel
from policies.tasks import get_task
from server.backends.loading import LoadedModel, load_model
from server.commands.options import model_under_test

FOLDERS = sorted(folder for folder in ZOO.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model(None, device="cpu", dtype="float32")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_policy_says_what_made_it_and_what_it_reached(folder: Path, embedded: LoadedModel) -> None:
    _, card = load_policy(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_500_000
    info = embedded.backend.info
    assert (card.trained_on.architecture, card.trained_on.vocab_size) == (info.architecture, info.vocab_size)
    assert card.trained_on.seconds > 0 and card.recipe["seed"] == card.trained_on.seed
    assert card.measured and all(row.count >= 500 and row.params["policy"] == folder.name for row in card.measured)
    said = (folder / "README.md").read_text()
    assert "unmask train-policy policies/recipes/" in said and "unmask evaluate" in said


def test_the_whole_zoo_loads_beside_the_embedded_model(embedded: LoadedModel) -> None:
    info = embedded.backend.info
    store = PolicyStore(ServedModel(info.architecture, info.vocab_size))
    store.load_zoo()
    assert [stored.name for stored in store.list()] == [folder.name for folder in FOLDERS]


def test_word_problems_in_full_diffusion_take_less_than_half_a_thresholds_forwards(embedded: LoadedModel) -> None:
    """Problems of a seed of their own; the published figures stand on 500."""
    torch.set_num_threads(2)
    info, task = embedded.backend.info, get_task("chain")
    store = PolicyStore(ServedModel(info.architecture, info.vocab_size))
    store.load_zoo()

    def measure(spec: str) -> Measurement:
        trial = Trial(task, SamplerSpec.parse(spec), None, task.gen_length, 40, 4321)
        return evaluate(model_under_test(embedded, False), trial, 40, resources=resources_of(store))

    threshold, policy = measure("threshold:threshold=0.9"), measure("policy:policy=chain,speed=0.25")
    assert policy.correct >= threshold.correct - 2
    assert policy.tpf > 2 * threshold.tpf
