"""Memory of a training process on a CPU."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
LIMIT = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, since each step asks for the same tensors again.

    By default it gives large blocks back to the system at once, and every step faults its pages in anew: about a tenth
    of a small U-Net's step. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, LIMIT), (M_TRIM_THRESHOLD, LIMIT), (M_TOP_PAD, LIMIT // 8)):
        libc.mallopt(option, value)
