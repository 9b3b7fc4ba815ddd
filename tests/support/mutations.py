"""Hypothesis strategies that damage files: bytes, text, and the values of JSON."""

import json
from copy import deepcopy

from hypothesis import strategies as st

# What a damaged or hostile file may hold where another value is expected.
HOSTILE = (
    None, True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), 10**30, "", "x", "\ud800",
    "../../x", "a\nerror: b", "http://[::1/x", [], {}, [[]], [None], [1, "a", {}], {"a": 1},
    "@digits@", "@deep@",
)  # fmt: skip
BYTES = (b"\0", b"\xff" * 8, b"\x7f" * 4, b"9" * 5000, b"[" * 3000, b"\n", b'"', b"\xed\xa0\x80")


def json_text(value) -> str:
    """The text of a value, with integers of 5,000 digits and 3,000 levels where it says so."""
    text = json.dumps(value)
    deep = "[" * 3000 + "]" * 3000
    return text.replace('"@digits@"', "9" * 5000).replace('"@deep@"', deep)


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """`whole` with one to three changes, more of them at the start and the end."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        near = draw(st.sampled_from(("start", "end", "anywhere")))
        low = max(0, size - 600) if near == "end" else 0
        high = min(size, 600) if near == "start" else size
        place = draw(st.integers(low, max(low, high)))
        length = draw(st.sampled_from((1, 2, 4, 8, 64, 512)))
        kind = draw(st.sampled_from(("flip", "cut", "insert", "write", "remove", "repeat")))
        if kind == "flip" and place < size:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.sampled_from(BYTES))
        elif kind == "write":
            piece = draw(st.one_of(st.sampled_from(BYTES[:3]), st.binary(min_size=1, max_size=8)))
            data[place : place + len(piece)] = piece
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length]
    return bytes(data)


def _places(value, place=()):
    yield place
    if not isinstance(value, dict | list):
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _places(child, (*place, key))


@st.composite
def damaged_json(draw, value) -> str:
    """The text of `value` with one or two values replaced by others, or removed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        *before, last = draw(st.sampled_from(list(_places(value)))) or (None,)
        if last is None:
            value = deepcopy(draw(st.sampled_from(HOSTILE)))
            break
        inner = value
        for key in before:
            inner = inner[key]
        if draw(st.integers(0, 4)) == 0:
            del inner[last]
        else:
            inner[last] = deepcopy(draw(st.sampled_from(HOSTILE)))
        if not isinstance(value, dict | list) or not value:
            break
    return json_text(value)


@st.composite
def damaged_text(draw, whole: str) -> bytes:
    """`whole` with one to three of its words replaced, or damaged as bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(whole.encode()))
    words = whole.replace(",", " , ").replace("\n", " \n ").split(" ")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(words) - 1))
        words[place] = json_text(deepcopy(draw(st.sampled_from(HOSTILE))))
    return " ".join(words).replace(" , ", ",").replace(" \n ", "\n").encode("utf-8", "replace")
