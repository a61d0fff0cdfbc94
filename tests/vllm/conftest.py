"""vLLM behind our backend, in this process; a model of it takes a quarter of a minute to start."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.backends.loading import load_model
from server.backends.vllm.backend import VllmBackend


@pytest.fixture(scope="session")
def vllm_tiny(tiny_model: Path) -> Iterator[VllmBackend]:
    """The tiny model on vLLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries that vLLM imports are not ours to mend
        backend = load_model(str(tiny_model), "vllm", device="cpu", dtype="float32").backend
    assert isinstance(backend, VllmBackend)
    yield backend
    backend.close()
    backend.close()  # has no effect the second time


@pytest.fixture(scope="session")
def torch_tiny(tiny_model: Path) -> Iterator[object]:
    """The same on our own code."""
    torch.set_num_threads(1)
    yield load_model(str(tiny_model), device="cpu", dtype="float32").backend
