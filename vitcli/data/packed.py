"""A long list of short byte strings in two pieces of memory."""

from array import array
from collections.abc import Iterable

import numpy as np


class Packed:
    """What was given, by position, at its own length and 8 bytes each; a list takes 60 more."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        joined = bytearray()
        ends = array("q", [0])
        for part in parts:
            joined += part
            ends.append(len(joined))
        self._joined = bytes(joined)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        start, end = self._ends[row : row + 2]
        return self._joined[start:end]
