"""Memory of a training process on a CPU."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # numbers of the options in glibc's malloc.h
LIMIT = 2**30
"""Bytes: blocks below this size are not mapped one by one, and this much free memory is kept."""


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, because each training step allocates the same tensors again.

    By default glibc returns large blocks to the operating system at once. Then every step causes page faults for them
    again, which took about a tenth of the step of a small U-Net. With another C library this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, LIMIT), (M_TRIM_THRESHOLD, LIMIT), (M_TOP_PAD, LIMIT // 8)):
        libc.mallopt(option, value)
