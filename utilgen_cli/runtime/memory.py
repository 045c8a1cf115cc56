"""Freed memory is kept for what is allocated next."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_FROM = 32 << 20  # bytes: the most that glibc's own rule comes to
KEPT = 1 << 30  # bytes at the heap's end that are not given back


def keep_freed_memory() -> None:
    """Let glibc hand freed tensors to the next ones instead of back to the kernel, which clears
    every page anew (a fault each); elsewhere nothing is done. For a process of our own."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
    mallopt(M_TRIM_THRESHOLD, KEPT)
