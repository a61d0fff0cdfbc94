"""Model loading: from a folder or a hub id to a model ready to run."""

from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog
import torch
from pydantic import ValidationError

from policies.files.regular import open_regular
from server.backends.contract import Backend, ModelInfo
from server.backends.torch.backend import TorchBackend
from server.backends.vllm.backend import VllmBackend, VllmError, VllmOptions, check_supported
from server.models.checkpoint.compiling import compile_layers
from server.models.checkpoint.packing import pack_linear_layers
from server.models.checkpoint.special_tokens import CONFIG, GENERATION, find_ends, find_mask
from server.models.checkpoint.variants import quantised_by, refuse_growing_canvases
from server.models.checkpoint.weights import SkipInit, draw_weights, find_weights, load_weights
from server.models.families.registry import Family, find_family
from server.models.files import ModelError, is_there, other_forms, read_json, read_optional_json, readable, unchanged
from server.models.network import Network
from server.models.text.codec import TextCodec
from server.runtime.allocator import keep_few_kernels, keep_freed_memory, share_one_heap
from server.runtime.threads import run_in_own_thread

__all__ = ["LoadedModel", "ModelError", "describe", "find_model", "load_model", "load_network"]

log = structlog.get_logger(__name__)

EMBEDDED_NAME = "unmask-tiny"
ENGINES = ("torch", "vllm")
LOAD_FORMATS = ("auto", "dummy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with the name it is served under, and its tokenizer."""

    name: str
    backend: Backend
    text: TextCodec


def load_model(
    model: str | None,
    engine: str = "torch",
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    batch_invariant: bool = False,
    load_format: str = "auto",
    vllm: VllmOptions | None = None,
    compile_for: int | None = None,
) -> LoadedModel:
    """Load a model for inference. Raises ModelError, with one line, for any problem with it.

    Args:
        model: folder, or Hugging Face hub id (`HF_HUB_OFFLINE` is honoured); None is the embedded model.
        engine: name of the backend.
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device computes in it, else float32.
        max_model_len: limit on the canvas, in tokens, below the model's own.
        batch_invariant: compute results that are bitwise independent of the other rows of the batch.
        load_format: "auto" reads safetensors; "dummy" draws random weights of the configured shapes.
        vllm: options of the vllm backend.
        compile_for: compile the layers, for forward passes of at most this many tokens.
    """
    if engine not in ENGINES:
        raise ModelError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"unknown load format {load_format!r}; choose from {', '.join(LOAD_FORMATS)}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise ModelError("the vllm engine needs vLLM, which is not installed: in a checkout, pip install '.[vllm]'")
    name, folder = find_model(model)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    if place.type == "cpu":
        share_one_heap()
    with readable(folder):
        if not is_there(folder / CONFIG):
            raise ModelError(f"{folder / CONFIG}: no such file{other_forms(folder)}")
    with unchanged(folder / CONFIG):  # written last by other programs too, so a change of it reveals a rewritten folder
        text = TextCodec.load(folder)
        architecture, family, network = build_network(folder, text=text)
        if engine == "torch":
            keep_few_kernels()
            run_in_own_thread(lambda: fill_weights(network, folder, place, kind, load_format))
        else:
            _check_for_vllm(folder, architecture, network, load_format)
    config = network.config
    if max_model_len is not None and max_model_len > config.max_length:
        log.warning("--max-model-len is above the model's own context, which stays the limit", limit=config.max_length)
    if text.vocab_size > config.rows:
        raise ModelError(
            f"{folder}: the tokenizer has token ids up to {text.vocab_size - 1}, but the model's vocabulary ends at "
            f"{config.rows - 1}"
        )
    info = replace(
        describe(architecture, network),
        max_length=min(config.max_length, max_model_len or config.max_length),
        length_limit="--max-model-len" if max_model_len and max_model_len < config.max_length else None,
        end_ids=_end_ids(folder, network, family, text),
        device=str(place),
        dtype=str(kind).removeprefix("torch."),
    )
    text.make_special(info.end_ids if info.mask_id is None else {info.mask_id, *info.end_ids})
    if engine == "vllm":
        try:
            return LoadedModel(name, VllmBackend(folder, info, load_format, vllm), text)
        except VllmError as error:
            raise ModelError(str(error)) from None
    if compile_for is None:
        run_in_own_thread(lambda: pack_linear_layers(network))
    else:
        compile_layers(network, compile_for)
    if place.type == "cpu":
        keep_freed_memory()
    backend = TorchBackend(network, info, batch_invariant, static_shapes=compile_for is not None)
    return LoadedModel(name, backend, text)


def _check_for_vllm(folder: Path, architecture: str, network: Network, load_format: str) -> None:
    """Check a checkpoint with our own network, whose error messages are clearer than vLLM's. Raises ModelError."""
    try:
        check_supported(architecture)
    except VllmError as error:
        raise ModelError(str(error)) from None
    _check_all_files(folder)
    # The tensors of a quantised checkpoint differ; vLLM checks these itself.
    if load_format == "auto" and quantised_by(folder) is None:
        with readable(folder):
            find_weights(network, folder)


def _check_all_files(folder: Path) -> None:
    """Refuse a folder that contains a pipe or a device: vLLM reads more files than we do. Raises ModelError."""
    with readable(folder):
        for path in folder.iterdir():
            if not path.is_dir():
                open_regular(path).close()


def describe(architecture: str, network: Network) -> ModelInfo:
    """Model description from the network alone, as if in float32 on the CPU."""
    config = network.config
    return ModelInfo(
        architecture=architecture,
        max_length=config.max_length,
        vocab_size=config.rows,
        mask_id=config.mask_token_id,
        end_ids=config.end_ids,
        block_length=network.block_length,
        device="cpu",
        dtype="float32",
        parameters=sum(p.numel() for p in network.parameters()),
        pattern=network.pattern,
    )


def load_network(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any] | None = None,
    load_format: str = "auto",
    text: TextCodec | None = None,
) -> tuple[str, Family, Network]:
    """Architecture, family and network, built from `config.json` and the weights. Raises ModelError.

    Args:
        settings: entries that override those of `config.json`.
        text: codec that identifies the mask token if `config.json` names none.
    """
    architecture, family, network = build_network(folder, settings, text)
    fill_weights(network, folder, device, dtype, load_format)
    return architecture, family, network


def fill_weights(
    network: Network, folder: Path, device: torch.device, dtype: torch.dtype, load_format: str = "auto"
) -> None:
    """Load a network's weights from the folder, or draw random ones. Raises ModelError."""
    if method := quantised_by(folder):
        raise ModelError(f"{folder}: the checkpoint is quantised ({method}), which the torch engine does not support")
    try:
        if load_format == "dummy":
            draw_weights(network, device, dtype)
        else:
            with readable(folder):
                load_weights(network, folder, device, dtype)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ModelError(f"{folder}: the weights do not fit into the memory of {device}") from None


def build_network(
    folder: Path, settings: dict[str, Any] | None = None, text: TextCodec | None = None
) -> tuple[str, Family, Network]:
    """Architecture, family and the network without weights; arguments as of `load_network`. Raises ModelError."""
    path = folder / CONFIG
    config, generation = read_json(path) | (settings or {}), read_optional_json(folder / GENERATION)
    refuse_growing_canvases(folder, (config, generation), text)
    try:
        architecture, family = find_family(config)
        mask = find_mask(folder, config, generation, family, text)
        parsed = family.network.Config.model_validate(config if mask is None else config | {"mask_token_id": mask})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"{path}: {f'{field}: ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
    try:
        with torch.device("meta"), SkipInit():
            network = family.network(parsed)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product overflows
        raise ModelError(f"{path}: {str(error).splitlines()[0]}") from None
    return architecture, family, network


def choose_device(device: str) -> torch.device:
    """Torch device of this name, or the default for "auto". Raises ModelError if it does not exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}; choose auto, cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return place


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Torch dtype of this name, or the default for "auto". Raises ModelError."""
    if dtype == "auto":
        # A CPU without bfloat16 units emulates it, some thirty times slower than float32.
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bfloat16() else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def find_model(model: str | None) -> tuple[str, Path]:
    """Name and folder of a model; downloads a hub id that is not in the cache. Raises ModelError."""
    if model is None:
        folder = Path(str(files("server.models"))) / "embedded"
        if not folder.is_dir():
            raise ModelError(f"{folder}: the embedded model is not there; name another one with --model")
        return EMBEDDED_NAME, folder
    try:
        folder = Path(model).expanduser()
        with readable(folder):
            is_folder, exists = folder.is_dir(), is_there(folder)
            if is_folder:
                next(folder.iterdir(), None)  # an unreadable folder fails here, not once for each file
                return folder.resolve().name, folder
    except (RuntimeError, ValueError) as error:  # unknown home directory, or a name with a null character
        raise ModelError(f"{model!r}: {error}") from None
    if exists and folder.exists():
        raise ModelError(
            f"{folder}: not a folder; a model is a folder with config.json, tokenizer.json and safetensors"
        )
    if exists:
        raise ModelError(f"{folder}: a link that leads nowhere")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"{folder}: no such folder")
    return model, _download(model)


def _download(name: str) -> Path:
    """Folder of a hub model, downloaded unless it is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        # No code, no pickles, no second copies in sub-folders.
        return Path(
            snapshot_download(
                name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "merges.txt"], ignore_patterns=["*/*"]
            )
        )
    except HFValidationError:
        raise ModelError(f"{name}: neither a folder nor the id of a model on the Hugging Face hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ModelError(
            f"{name}: no such folder, and the Hugging Face hub cannot be asked (offline) for what is not in its cache"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: no such folder, and the Hugging Face hub says: {why[0]}") from None


def _end_ids(folder: Path, network: Network, family: Family, text: TextCodec) -> frozenset[int]:
    """Tokens that end a text. Raises ModelError if the mask token is one of them."""
    config, generation = network.config, read_optional_json(folder / GENERATION)
    ends = find_ends(folder, config.end_ids, generation, family, text, config.rows)
    if config.mask_token_id in ends:
        raise ModelError(f"{folder / CONFIG}: token {config.mask_token_id} is both mask and end-of-text")
    return ends
