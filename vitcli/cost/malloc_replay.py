"""How much more than its tensors a process occupies: their life replayed by the machine's malloc.

glibc keeps what was freed, and cannot give an aligned block the place of an equal one that was
freed before when a small one has taken the bytes beside it: with activation checkpointing a process
grows to twice its tensors. Which holes arise depends on the order of all sizes, so that order is
played again, without touching the memory, and the length of the heap is read off.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

ALIGNMENT = 64  # of torch's blocks on a CPU
# Bytes of the small objects that come and go with each of them: storage, tensor, version counter,
# and what autograd and Python add. They take the odd bytes between blocks. Which holes they make
# hangs on their exact sizes, which differ from operation to operation, so several patterns are
# played and the median counts (recipes/LOG.md has how far they lie apart).
COMPANIONS = ((104, 200, 24), (104, 200, 40), (48,), (72, 200, 48), (40, 72, 96, 112, 216))
# Blocks from here on glibc maps by themselves, once such a large one was freed.
LARGEST = 32 * 2**20
SECONDS = 60.0

Event = tuple[int, int]  # (number, bytes) allocated, (-number, 0) freed


INFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free top"


class _Info(ctypes.Structure):
    """`struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in INFO.split(" "))


def heap_peak(events: Sequence[Event]) -> int | None:
    """Bytes that the heap of a process grows to under these events; None without glibc.

    They are replayed in processes of their own, whose heap is empty.
    """
    code = "from vitcli.cost.malloc_replay import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(list(events)),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        peaks = [int(line) for line in done.stdout.split()]
        return int(median(peaks)) if len(peaks) == len(COMPANIONS) else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def replay(events: Sequence[Event], companions: Sequence[int]) -> int:
    """The peak in this process.

    Args:
        companions: sizes of the small blocks beside each of torch's.

    Raises:
        AttributeError: its C library is not glibc 2.33 or newer.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = ctypes.c_size_t
    libc.posix_memalign.argtypes = [ctypes.c_void_p, size, size]
    place = ctypes.c_void_p()

    def aligned(count: int) -> int | None:
        if libc.posix_memalign(ctypes.byref(place), ALIGNMENT, max(count, 1)):
            raise MemoryError
        return place.value

    libc.free(aligned(LARGEST - 2**16))  # as any program has done that has started up
    libc.malloc_trim(0)
    before = libc.mallinfo2()
    base = before.arena + before.hblkhd - before.free
    held: dict[int, list[int | None]] = {}
    peak = 0
    for number, count in events:
        if number > 0:
            held[number] = [aligned(count), *(libc.malloc(small) for small in companions)]
            now = libc.mallinfo2()
            peak = max(peak, now.arena + now.hblkhd - base)
        else:
            for block in held.pop(-number):
                libc.free(block)
    return int(peak)


def main() -> None:
    """Events as JSON on stdin -> a peak a line on stdout, each from a fork of its own."""
    events = json.load(sys.stdin)
    for companions in COMPANIONS:
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        try:
            os.write(1, f"{replay(events, companions)}\n".encode())
        finally:
            os._exit(0)
