"""Freed memory stays with the process, so that the next batch finds it mapped."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_REUSED_BYTES = 2**25
"""The most that glibc takes: blocks above it are mapped anew each time."""
LARGEST_KEPT_BYTES = 2**28


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed for the next caller, instead of giving it back to the kernel.

    Every batch takes and frees the same few sizes. Given back, each 4 KB page costs a page fault again: up to 64 per image,
    a quarter of the time of decoding one in a virtual machine.

    Returns: whether this C library could be told; only glibc needs to be.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_REUSED_BYTES) and mallopt(_M_TRIM_THRESHOLD, LARGEST_KEPT_BYTES))
