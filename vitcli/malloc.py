"""The memory allocator of this process, which decides how long a step waits for memory on a CPU."""

import ctypes
import os
import sys
from pathlib import Path

# The numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# glibc gives blocks from this size back to the system when they are freed (mallopt(3): the most it
# ever keeps on 64 bits). Estimates of memory depend on it.
LARGE_BLOCK = 32 * 2**20
KEEP_ALL = 2**31 - 1  # bytes, the largest int
# A user who sets one of these variables has decided; glibc reads them when the process starts.
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors below 32 MiB for the next step.

    By default it returns the end of its heap after each step, and the next step waits while the
    system clears new pages. The peak is the same. Other C libraries are left as they are.
    """
    if sys.platform != "linux" or malloc_settings():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_TRIM_THRESHOLD, KEEP_ALL)
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def malloc_settings() -> list[str]:
    """The environment variables of malloc that are set."""
    return [name for name in MALLOC_VARIABLES if name in os.environ]


def allocator() -> str:
    """`jemalloc`, `tcmalloc` or `mimalloc` if this process has loaded it, else `system`."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "system"
    return next((name for name in ALLOCATORS if f"lib{name}" in loaded), "system")
