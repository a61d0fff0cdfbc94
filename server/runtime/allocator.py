"""The memory that tensors are in: what is free, what is taken, and who keeps what was freed."""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD = 32 << 20
"""Bytes; the most that glibc takes. Larger pieces are the system's, and go back to it at once."""
KEPT = 1 << 30
"""Bytes; free memory at the heap's end goes back to the system when there is more than this."""
PAUSE = 0.001
"""Seconds between two looks at a processor's memory."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that say how many matrix products oneDNN keeps code for, and torch's own layer on it descriptions."""
KERNELS = 128
"""Enough for the shapes of a forward and those that come again; each takes up to 0.8 MB."""


def share_one_heap() -> None:
    """One heap for all threads that begin later: a step takes its memory where the last one left it.

    Does nothing but on glibc, where each thread has one of its own by default.
    """
    _tell_glibc(M_ARENA_MAX, 1)


def keep_few_kernels() -> None:
    """Bound what oneDNN keeps of matrix products, unless the user does. To be called before the first one.

    It generates code for each shape, and nearly every forward of a busy server has another number of rows. By default
    1,024 are kept in either cache: memory that grows by some 700 MB over the first thousands of requests, whatever the
    model's size. Fewer cost no time that could be measured: what comes again comes again soon.
    """
    if not any(name in os.environ for name in (*KERNEL_CACHES, "DNNL_PRIMITIVE_CACHE_CAPACITY")):
        os.environ.update(dict.fromkeys(KERNEL_CACHES, str(KERNELS)))


def keep_freed_memory() -> None:
    """Let freed memory stay with the process. Does nothing but on glibc.

    By default glibc gives large pieces back when they are freed, and the system clears each page of the next forward's
    tensors anew: for a small model that takes longer than what is computed on them. While a model is loaded that is
    right, since nothing of what is freed then is of a size that is needed again.
    """
    _tell_glibc(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    _tell_glibc(M_TRIM_THRESHOLD, KEPT)


def _tell_glibc(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


def give_back_freed_memory(device: torch.device) -> None:
    """Give the system what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_heap()


def give_back_heap() -> None:
    """Give the system what is free of the heap. Takes a while, without the interpreter's lock."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that the process can still take: of the GPU, or of the machine and the container it is in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(fields["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit: no such file, or the word "max"
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found))


@dataclass
class Peak:
    """Bytes by which the memory in use has grown at most."""

    grown: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory in use while something runs."""
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.grown = torch.cuda.max_memory_allocated(device) - before
        return
    before, over = _resident(), threading.Event()

    def watch() -> None:
        while not over.wait(PAUSE):
            peak.grown = max(peak.grown, _resident() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.grown = max(peak.grown, _resident() - before)
        over.set()
        thread.join()


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
