"""Helpers for the words of error messages."""

import os
import re
from pathlib import Path

import pytest

import vitcli
from vitcli.errors import counted, nearest, nearest_path, printable, quoted, unknown


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


def test_a_count_and_its_word_agree():
    assert counted(1, "row is", "rows are") == "1 row is"
    assert counted(1234, "row is", "rows are") == "1,234 rows are"
    assert counted(1, "rows is", "rows are", of=9) == "1 of 9 rows is"


def test_a_list_that_is_cut_says_how_many_are_left():
    assert quoted("abc", 3) == "`a`, `b`, `c`"
    assert quoted("abcd", 3) == "`a`, `b`, `c` and 1 more"


# A number that may be 1, its noun in the plural, and a verb in the plural; or a list that is cut.
COUNT = r"\{[^{}]*(?::,|len\([^{}]*\))\}(?: of (?:the )?\{[^{}]*\})?"
NEVER_AGREES = re.compile(COUNT + r"(?: [a-z-]+){1,3} (?:are|were|have|do|look|end|contain)\b")
CUT = re.compile(r"join\(\(?\w+\)?\[:\w+\]\)\}|quoted\([^()]*\[:\w+\]\)")
# These numbers are above 1: images of a set, parameters of a model, rows of a table.
LARGE = (
    "images of {chosen.data.classes:,} classes are few",
    "training images have the same",
    "of {k:,} classes that are confused most",
    "held-out images are too few for an OOD",
    "images are not compared at the start",
    "parameters are too many for this machine",
)


def test_messages_agree_with_their_counts_and_do_not_cut_lists_silently():
    for file in sorted(Path(vitcli.__file__).parent.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if any(text in line for text in LARGE):
                continue
            assert not NEVER_AGREES.search(line), f"{file}:{number}: use `counted`: {line.strip()}"
            assert not CUT.search(line), f"{file}:{number}: use `quoted`: {line.strip()}"
