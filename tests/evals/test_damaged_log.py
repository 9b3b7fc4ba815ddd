"""A damaged, missing or moved row of an interrupted table is noticed and predicted again."""

import json

import pytest
from support.flipping import flips

from vitcli.errors import VitcliError
from vitcli.evals.resume_log import SETTINGS_KEY, PredictionCounts, open_resume_log

SETTINGS = {"model": "abc", "top": 1}
CLASSES = [
    {"path": f"{i}.jpg", "label": "cat", "probability": i / 7, "top": [], "error": None}
    for i in range(9)
]
NUMBERS = [{"path": f"{i}.jpg", "value": i / 7, "error": None} for i in range(9)]  # a regression


@pytest.fixture(params=[CLASSES, NUMBERS], ids=["classes", "numbers"])
def written(request):
    return request.param


@pytest.fixture
def part(tmp_path, written):
    """The log of a prediction that was killed after nine rows."""
    with open_resume_log(tmp_path / "t.csv", SETTINGS, PredictionCounts(), resume=False) as log:
        for row in written:
            log.add(row)
    return log.path


def resumed(part):
    """The rows that a resume takes over, and how many damaged lines it has cut off."""
    with open_resume_log(part.with_suffix(""), SETTINGS, PredictionCounts(), resume=True) as log:
        return list(log.rows()), log.num_damaged


def test_each_flipped_bit_costs_rows_but_changes_none(part, written):
    whole = part.read_bytes()

    def check(position):
        try:
            rows, damaged = resumed(part)
        except VitcliError as error:  # in the first line, which says what the rows were made of
            assert position < whole.index(b"\n") + 1 and str(part) in error.message + error.hint
        else:
            assert rows == written[: len(rows)] and (damaged or len(rows) >= 8), position

    flips(part, check)
    assert resumed(part) == (written, 0)


def test_a_missing_or_exchanged_row_is_noticed(part, written):
    lines = part.read_bytes().splitlines(keepends=True)
    for damaged in (
        [*lines[:4], *lines[5:]],
        [*lines[:4], lines[5], lines[4], *lines[6:]],
        [*lines[:4], lines[3], *lines[4:]],
    ):
        part.write_bytes(b"".join(damaged))
        rows, count = resumed(part)
        assert rows == written[:3] and count > 0


def test_a_line_that_a_kill_has_cut_off_is_no_damage(part, written):
    part.write_bytes(part.read_bytes()[:-5])
    assert resumed(part) == (written[:8], 0)


def test_a_log_of_an_earlier_version_continues(part, written):
    lines = [{SETTINGS_KEY: SETTINGS}, *written[:4]]
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open_resume_log(part.with_suffix(""), SETTINGS, PredictionCounts(), resume=True) as log:
        log.add(written[4])
    assert resumed(part) == (written[:5], 0)
