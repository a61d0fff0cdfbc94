"""vLLM plugin, loaded by each of vLLM's processes through our `vllm.general_plugins` entry point."""

import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

LAST_WORDS = "UNMASK_VLLM_LAST_WORDS"
"""Environment variable with the file to which a vLLM process that cannot start writes the reason."""

GRACE = 5.0
"""Seconds that a vLLM process gets to end and clean up by itself once its parent is gone."""

MODELS = {
    "LLaDAModelLM": "server.backends.vllm.llada:LLaDA",
    "DreamModel": "server.backends.vllm.dream:Dream",
}
"""Architectures, as named in `config.json`, and the classes that build them from vLLM's layers."""


def register() -> None:
    """Register our models and configuration parser with vLLM. In vLLM's own processes, also set up logging."""
    from vllm import ModelRegistry

    # Importing the module registers what it defines.
    import server.backends.vllm.config  # noqa: F401

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
    if multiprocessing.parent_process() is not None:
        _log_like_the_server()
        _end_with_the_parent()


def _log_like_the_server() -> None:
    from server.runtime.logging import configure_logging

    configure_logging("json" if os.environ.get("UNMASK_LOG_FORMAT") == "json" else "text")
    logger = limit_log()
    if path := os.environ.get(LAST_WORDS):
        logger.addHandler(LastWords(Path(path)))


def limit_log() -> logging.Logger:
    """vLLM's logger, which has no handlers of its own, with its level set to `VLLM_LOGGING_LEVEL`."""
    logger = logging.getLogger("vllm")
    logger.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    return logger


def _end_with_the_parent() -> None:
    """End this process when its parent does, for any reason: no orphan may keep the memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class LastWords(logging.Handler):
    """Writes the first logged exception to a file, for the parent process that waits for this one to start."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._path.exists() and not self._path.stat().st_size:
            self._path.write_text(f"{type(error).__name__}: {error}")
