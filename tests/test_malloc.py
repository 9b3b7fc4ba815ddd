"""Freed memory stays with the process, so that the next training step does not wait for it."""

import os
import platform
import subprocess
import sys

import pytest

from vitcli.malloc import MALLOC_VARIABLES, allocator

ROUNDS = """
import resource, sys
from vitcli import malloc
if {keep}:
    malloc.keep_freed_memory()

def blocks():
    return [bytearray(8 * 2**20) for _ in range(12)]  # 96 MiB in blocks like activations

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

blocks(), blocks()
before = faults()
blocks()
print(faults() - before)
"""
PAGES = 12 * 8 * 2**20 // 4096


def new_pages(keep, **variables):
    """Pages that a process asks the system for when it allocates 96 MiB for the third time."""
    base = {name: value for name, value in os.environ.items() if name not in MALLOC_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS.format(keep=keep)],
        env={**base, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_blocks_are_used_again_without_new_pages():
    assert new_pages(keep=False) > PAGES / 2  # huge pages may serve a part
    assert new_pages(keep=True) < PAGES / 20
    # A user who has set malloc keeps the setting.
    assert new_pages(keep=True, MALLOC_TRIM_THRESHOLD_=str(2**20)) > PAGES / 2


def test_the_allocator_of_this_process_is_named():
    assert allocator() in ("system", "jemalloc", "tcmalloc", "mimalloc")
