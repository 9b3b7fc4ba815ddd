"""Damage to files: one bit that is not what was written."""

import random


def flip(path, position, bit=0):
    """Flip one bit of a file in place, and return its content before."""
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    path.write_bytes(bytes(damaged))
    return content


def flips(path, check, places=50, seed=0):
    """Flip one bit at so many random places, one after the other; `check(position)` after each."""
    rng, size = random.Random(f"{seed} {path.name}"), path.stat().st_size
    for _ in range(places):
        position = rng.randrange(size)
        content = flip(path, position, rng.randrange(8))
        check(position)
        path.write_bytes(content)
