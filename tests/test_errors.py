"""Helpers for the words of error messages."""

import os
from pathlib import Path

import pytest

from vitcli.errors import nearest, printable, unknown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (Path(os.fsdecode(b"caf\xe9.jpg")), r"caf\xe9.jpg"),
        ("a\udce9b\nc", r"a\xe9b\nc"),
        ("a\ud800b", r"a\ud800b"),
        ("\x1b[31mred\u2028", r"\x1b[31mred\u2028"),
        ("ünïcödé 蚂蚁.jpg", "ünïcödé 蚂蚁.jpg"),
    ],
)
def test_odd_names_are_printable_and_distinct(name, shown):
    assert printable(name) == shown


def test_the_nearest_word():
    assert nearest("bach_size", ["batch_size", "lr"]) == "batch_size"
    assert nearest("colour", ["batch_size", "lr"]) is None


def test_an_unknown_name_gets_the_nearest_and_all_known_ones():
    error = unknown("optimizer", "adam", {"adamw": 1, "sgd": 2})
    assert error.message == "unknown optimizer `adam`"
    assert error.hint == "did you mean `adamw`? Available: `adamw`, `sgd`"
    assert unknown("optimizer", "x", ["sgd"]).hint == "available: `sgd`"
