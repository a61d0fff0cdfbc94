"""Memory allocation: available memory, peak use, and how freed memory is kept or returned to the system."""

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
"""Bytes; the largest value glibc accepts. Larger allocations are mapped separately and returned as soon as freed."""
TRIM_THRESHOLD = 1 << 30
"""Bytes of free memory at the end of the heap above which glibc returns it to the system."""
SAMPLING_PERIOD = 0.001
"""Seconds between two samples of the resident memory."""
KERNEL_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables that set the capacity of oneDNN's primitive cache and of torch's cache of its descriptions."""
KERNEL_CACHE_CAPACITY = 128
"""Enough for the shapes of one forward pass and those that recur; each kernel takes up to 0.8 MB."""


def share_one_heap() -> None:
    """Make all threads started later share one heap, so that a step reuses the memory that the last one freed.

    glibc gives each thread its own heap by default. No effect with other C libraries.
    """
    _mallopt(M_ARENA_MAX, 1)


def keep_few_kernels() -> None:
    """Bound oneDNN's caches of matrix product kernels, unless the user sets them. Call before the first product.

    oneDNN generates code for each shape, and nearly every forward pass of a busy server has another number of rows. By
    default each cache keeps 1,024 entries: memory grows by some 700 MB over the first thousands of requests, whatever
    the model's size. Smaller caches cost no measurable time: shapes that recur do so soon.
    """
    if not any(name in os.environ for name in (*KERNEL_CACHE_VARIABLES, "DNNL_PRIMITIVE_CACHE_CAPACITY")):
        os.environ.update(dict.fromkeys(KERNEL_CACHE_VARIABLES, str(KERNEL_CACHE_CAPACITY)))


def keep_freed_memory() -> None:
    """Keep freed memory in the process. No effect without glibc.

    By default glibc returns large blocks to the system when they are freed, and the system zeroes every page again for
    the tensors of the next forward pass: with a small model that takes longer than the computation. The default is
    right while a model is loaded, because no block freed then has a size that is needed again. Call this afterwards.
    """
    _mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    _mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _mallopt(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


def give_back_freed_memory(device: torch.device) -> None:
    """Return unused memory of the process, and of the device's allocator, to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_heap()


def give_back_heap() -> None:
    """Return free heap memory to the system. Takes a while; releases the interpreter lock."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that the process can still allocate: on the GPU, or within the machine and its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(fields["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit: the file is missing or holds the word "max"
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found))


@dataclass
class Peak:
    """Largest growth of the memory in use, in bytes."""

    grown: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the growth of the memory in use during a block of code."""
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.grown = torch.cuda.max_memory_allocated(device) - before
        return
    before, over = _resident(), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLING_PERIOD):
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
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
