"""What vLLM loads from our `vllm.general_plugins` entry point, in each of its processes."""

import logging
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

LAST_WORDS = "UNMASK_VLLM_LAST_WORDS"
"""Environment variable: the file into which a process of vLLM's that cannot start writes why."""

GRACE = 5.0
"""Seconds that a process of vLLM's gets to end by itself, and to clean up, once the one that started it is gone."""

MODELS = {
    "LLaDAModelLM": "server.backends.vllm.llada:LLaDA",
    "DreamModel": "server.backends.vllm.dream:Dream",
}
"""Architectures, as `config.json` names them, and the classes that build them from vLLM's layers."""


def register() -> None:
    """Tell vLLM of our models and how their configurations are read. In processes that vLLM starts: log as we do."""
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
    """vLLM's logger, which has no handlers of its own, let through what `VLLM_LOGGING_LEVEL` says."""
    logger = logging.getLogger("vllm")
    logger.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    return logger


def _end_with_the_parent() -> None:
    """Let this process end when the one that started it does, however that ended: no orphan keeps the memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class LastWords(logging.Handler):
    """Writes the first exception that is logged into a file, for the process that waits for this one to start."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._path.exists() and not self._path.stat().st_size:
            self._path.write_text(f"{type(error).__name__}: {error}")
