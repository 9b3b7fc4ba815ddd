"""Helpers for the words of error messages."""

import os
from pathlib import Path

import pytest

from vitcli.errors import nearest, nearest_path, printable, unknown


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


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("flower/", "flowers/"),
        ("flowers/lables.csv", "flowers/labels.csv"),
        ("flower/lables.csv", "flowers/labels.csv"),
        ("flower/labels.csv", "flowers/labels.csv"),
        ("xyz", None),
        ("xyz/labels.csv", None),
        ("link", None),  # dangling; it is not what the user means
        ("fl\0wers", "flowers/"),
    ],
)
def test_the_nearest_path(typed, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers/labels.csv").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert nearest_path(typed) == meant


def test_an_unknown_name_gets_the_nearest_and_all_known_ones():
    error = unknown("optimizer", "adam", {"adamw": 1, "sgd": 2})
    assert error.message == "unknown optimizer `adam`"
    assert error.hint == "did you mean `adamw`? Available: `adamw`, `sgd`"
    assert unknown("optimizer", "x", ["sgd"]).hint == "available: `sgd`"
