"""The C library's allocator, told to keep what a forward frees for the next."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD = 32 << 20
"""Bytes; the most that glibc takes. Larger pieces are the system's, and go back to it at once."""
KEPT = 1 << 30
"""Bytes; free memory at the heap's end goes back to the system when there is more than this."""


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, in one heap for all threads. Does nothing but on glibc.

    By default glibc gives large pieces back when they are freed, and the system clears each page of the next forward's
    tensors anew: for a small model that takes longer than what is computed on them. Threads that begin later share the
    heap too, so that a step takes its memory where the last one left it.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_TRIM_THRESHOLD, KEPT), (M_ARENA_MAX, 1)):
        libc.mallopt(option, value)
