"""Backend that runs the model in vLLM's processes. The loop and samplers stay in this process.

Per canvas, its tokens and the requested positions and statistics are sent, and a few numbers per position come back.
"""

import asyncio
import gc
import os
import signal
import tempfile
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch

from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.span import CacheMode
from samplers.forward.statistics import NOTHING
from samplers.forward.summary import summarise
from server.backends.contract import BackendDeadError, ModelInfo
from server.backends.vllm.instructions import INSTRUCTION, TASK, Instruction, read
from server.backends.vllm.names import CONFIG_FORMAT
from server.backends.vllm.plugin import LAST_WORDS, MODELS, limit_log

T = TypeVar("T")

NEEDED = {
    "VLLM_CONFIGURE_LOGGING": "0",  # its log lines go through our logging
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner in which instructions reach the model, see worker.py
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, which make forking unsafe
}
DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; bidirectional attention keeps nothing; the default takes most memory
    "VLLM_LOGGING_LEVEL": "ERROR",  # its normal output is for users of vLLM's own server
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # for imports in its processes
}
"""Environment of vLLM and its processes; `DEFAULTS` apply unless the user has set them."""

OURS = frozenset(
    {
        *("model", "tokenizer", "skip_tokenizer_init", "runner", "config_format", "hf_overrides"),
        *("worker_extension_cls", "dtype", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
        *("enforce_eager", "enable_prefix_caching", "enable_chunked_prefill"),
        *("disable_log_stats", "enable_log_requests"),
    }
)
"""Engine arguments of vLLM that follow from our own settings."""

LOOK_AFTER = 1.0
"""Seconds of a step after which vLLM is checked for being alive."""


class VllmError(Exception):
    """vLLM cannot start. One line with the reason."""


@dataclass(frozen=True)
class VllmOptions:
    """Options for running a model in vLLM.

    Attributes:
        rows, tokens: maximum canvases, and tokens of all of them, in one forward; also bounds the length of a canvas.
        arguments: further engine arguments of vLLM, such as `tensor_parallel_size`.
    """

    rows: int = 16
    tokens: int = 8192
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Library:
    """Names that this process uses of vLLM, imported on demand."""

    AsyncLLM: Any
    AsyncEngineArgs: Any
    PoolingParams: Any

    @classmethod
    def load(cls, device: str) -> "Library":
        """Import vLLM. Raises VllmError if that fails or if it runs on another device."""
        os.environ.update(NEEDED)
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        limit_log()
        try:
            from vllm import PoolingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise VllmError(f"vLLM cannot be imported: {error}") from None
        if current_platform.device_type != device:
            raise VllmError(
                f"this vLLM runs on {current_platform.device_type}, not on device {device!r}; which GPUs it uses, "
                "CUDA_VISIBLE_DEVICES says"
            )
        return cls(AsyncLLM, AsyncEngineArgs, PoolingParams)


def check_supported(architecture: str) -> None:
    """Raise VllmError for an architecture that we have not built from vLLM's layers."""
    if architecture not in MODELS:
        raise VllmError(
            f"architecture {architecture!r} does not run on the vllm engine, {', '.join(MODELS)} do; use --engine torch"
        )


class VllmBackend:
    """One pooling request per canvas and step; those of one query run concurrently, so that vLLM batches them.

    Args:
        folder: folder of the model.
        info: description of the model.
        load_format: "auto" or "dummy".
        options: options for running it.

    Raises VllmError.
    """

    def __init__(
        self, folder: Path, info: ModelInfo, load_format: str = "auto", options: VllmOptions | None = None
    ) -> None:
        options = options or VllmOptions()
        check_supported(info.architecture)
        if taken := OURS & options.arguments.keys():
            raise VllmError(f"vLLM's argument {min(taken)!r} follows from our own settings and cannot be given")
        self._library = Library.load(info.device)
        self.info = replace(info, caches=frozenset({CacheMode.NONE}), resident=False)
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()
        arguments = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "runner": "pooling",
            "config_format": CONFIG_FORMAT,
            "hf_overrides": {"mask_id": info.mask_id},
            "worker_extension_cls": "server.backends.vllm.worker.InstructedWorker",
            "dtype": info.dtype,
            "load_format": load_format,
            "max_model_len": min(info.max_length, options.tokens),
            "max_num_seqs": options.rows,
            "max_num_batched_tokens": max(options.tokens, options.rows),
            "enforce_eager": True,  # the computation of a forward depends on the request
            "enable_prefix_caching": False,
            "disable_log_stats": True,  # it would count each step as a request
            "use_tqdm_on_load": False,
            **options.arguments,
        }
        try:
            self._engine = self._call(self._start(arguments))
        except BaseException:
            self._end_loop()
            raise

    def predict(self, query: Query) -> Prediction:
        """See `Backend`. Raises BackendDeadError if vLLM has ended."""
        parts = [query.part(i, i + 1) for i in range(query.generations)]
        for canvas, span in zip(query.canvases, query.spans, strict=True):
            if span.stop - span.start != canvas.layout.length:
                raise ValueError("the vllm engine computes whole canvases only")
        return Prediction.join(self._call(self._steps(parts)))

    def close(self) -> None:
        """End vLLM's processes; has no effect the second time."""
        if self._thread.is_alive():
            self._call(self._shut_down())
            self._end_loop()

    def _run(self) -> None:
        # Processes inherit blocked signals: only this process handles Ctrl-C and lets running requests finish. Python's
        # tracker of shared memory would unblock it if it were started later.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, arguments: dict[str, Any]) -> Any:
        """Start vLLM's engine."""
        with tempfile.NamedTemporaryFile("r", prefix="unmask-vllm-") as last_words:
            os.environ[LAST_WORDS] = last_words.name
            try:
                engine = self._library.AsyncLLM.from_engine_args(self._library.AsyncEngineArgs(**arguments))
            except Exception as error:
                why = last_words.read() or f"{type(error).__name__}: {error}"
                raise VllmError(f"vLLM does not start: {' '.join(why.split())}") from None
            finally:
                del os.environ[LAST_WORDS]
        try:
            await engine.collective_rpc("show_batches_to_model")
        except Exception as error:
            engine.shutdown()
            raise VllmError(f"vLLM does not start: {type(error).__name__}: {error}") from None
        return engine

    async def _steps(self, parts: list[Query]) -> list[Prediction]:
        # Wait for all before raising the first failure: no part of a failed step may run beside the next one.
        work = asyncio.gather(*(self._step(part) for part in parts), return_exceptions=True)
        while not (await asyncio.wait([work], timeout=LOOK_AFTER))[0]:
            if self._engine.errored:  # requests in flight when its processes were killed never end
                work.cancel()
                raise BackendDeadError("vLLM's processes have ended")
        found: list[Prediction] = []
        for each in work.result():
            if isinstance(each, BaseException):
                raise each
            found.append(each)
        return found

    async def _step(self, part: Query) -> Prediction:
        """One generation's forward, with every view of its canvas."""
        if part.mixture is None:
            return read(await self._told(part.canvases[0], Instruction(part.position, part.wanted)), part.wanted)
        views = [
            self._told(canvas, Instruction(part.position[part.row == i], NOTHING, logits=True))
            for i, canvas in enumerate(part.canvases)
        ]
        found: list[torch.Tensor] = []
        for each in await asyncio.gather(*views, return_exceptions=True):
            if isinstance(each, BaseException):
                raise each
            found.append(each)
        logits = torch.cat(found)
        return Prediction.join(
            [
                summarise(each.mix(logits[each.asked]), self.info.mask_id, part.wanted.part(each.first, each.last))
                for each in part.mixture.parts(len(logits))
            ]
        )

    async def _told(self, canvas: Canvas, instruction: Instruction) -> torch.Tensor:
        """The model's answer for one canvas."""
        params = self._library.PoolingParams(
            task=TASK, use_activation=False, extra_kwargs={INSTRUCTION: instruction.pack()}
        )
        prompt = {"type": "token", "prompt_token_ids": canvas.tokens.tolist()}
        try:
            steps = self._engine.encode(prompt, params, f"step-{next(self._numbers)}")
            (output,) = [output async for output in steps]
        except Exception as error:
            if self._engine.errored:
                raise BackendDeadError(f"vLLM has ended: {type(error).__name__}") from error
            raise
        found: torch.Tensor = output.outputs.data
        return found

    async def _shut_down(self) -> None:
        handler = self._engine.output_handler
        self._engine.shutdown(timeout=20)
        if handler is not None:
            await asyncio.wait([handler], timeout=5)
        del self._engine
        gc.collect()  # its finaliser must not run during interpreter shutdown
