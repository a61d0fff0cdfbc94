"""Checkpoints as people have them, on vLLM: read as on our own engine."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import ModelError, load_model
from server.engine import Backend
from tests.backends.test_loading import edit_json, edit_weights
from tests.models.checkpoint.folders import drop, tie
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def illada(folder: Path) -> None:
    """Grouped queries; the head twice, buffers, and special tokens that only other files name."""
    write_tiny_model(folder, n_heads=4, n_kv_heads=2)
    tie(folder, "LLaDA")
    buffer = "model.transformer.blocks.0.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({buffer: torch.ones(4)}))
    drop(folder / "config.json", "mask_token_id", "eos_token_id", "pad_token_id", "rope_theta")
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1]}')


def dream(folder: Path) -> None:
    """A tied head that is stored as such, and no embedding; entries that are null."""
    write_tiny_dream(folder)
    tie(folder, "Dream")
    edit_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    edit_json(folder / "config.json", rms_norm_eps=None, mask_token_id=None, layer_types=["full_attention"] * 2)


@pytest.mark.parametrize("write", [illada, dream])
def test_the_same_tokens_as_on_our_own_engine(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "m")

    def run(backend: Backend) -> tuple[list[int], int, frozenset[int], int | None]:
        sampler, info = get_sampler("threshold"), backend.info
        assert info.mask_id is not None
        row = Row(Canvas.blank([5, 6, 7, 8], 24, info.mask_id, pattern=info.pattern), sampler, sampler.Params())
        finish([row], backend.predict)
        return row.canvas.tokens.tolist(), row.forwards, info.end_ids, info.mask_id

    expected = run(load_model(str(tmp_path / "m"), device="cpu", dtype="float32").backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries that vLLM imports are not ours to mend
        backend = load_model(str(tmp_path / "m"), "vllm", device="cpu", dtype="float32").backend
    try:
        assert run(backend) == expected
    finally:
        backend.close()


def test_a_head_that_differs_is_told_before_vllm_starts(tmp_path: Path) -> None:
    write_tiny_dream(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(str(tmp_path / "m"), "vllm", device="cpu")
