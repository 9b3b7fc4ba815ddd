"""`vitcli settings`: all keys, and examples that the schema accepts."""

import json

import pytest
from pydantic import ValidationError

from vitcli.cli.main import run
from vitcli.commands.settings import setting_rows
from vitcli.config.recipe import parse_overrides
from vitcli.config.schema import SECTIONS

ROWS = {row.key: row for row in setting_rows()}


def test_every_key_of_the_schema_is_listed():
    keys = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    assert list(ROWS) == keys


@pytest.mark.parametrize("name", SECTIONS)
def test_examples_and_defaults_are_accepted(name):
    """As a user types them after `--set`. A section may want another setting beside this one."""
    for row in (row for row in ROWS.values() if row.key.startswith(f"{name}.")):
        default = [f"{row.key}={row.default}"] if row.default is not None else []
        for text in (row.example, *default):
            values = parse_overrides([text])[name]
            try:
                section = SECTIONS[name].model_validate_json(json.dumps(values))
            except ValidationError as error:  # `loc` is empty for a check across settings
                assert [e["loc"] for e in error.errors()] == [()], text
            else:
                assert getattr(section, row.key.partition(".")[2]) is not None, text


@pytest.mark.parametrize(
    ("key", "kind", "choices"),
    [
        ("optim.lr", "float above 0", ()),
        ("train.seed", "int from 0 below 4,294,967,296", ()),
        ("train.patch_drop_until", "float from 0 to 1", ()),
        (
            "train.precision",
            "`auto` or `fp32` or `bf16` or `fp16`",
            ("auto", "fp32", "bf16", "fp16"),
        ),
        ("model.num_channels", "`1` or `3`", (1, 3)),
        ("model.class_token", "bool", ()),
    ],
)
def test_types_in_words(key, kind, choices):
    assert (ROWS[key].type, ROWS[key].choices) == (kind, choices)
    assert "adamw" in ROWS["optim.name"].choices  # a registry's names
    assert ROWS["objective.name"].example == "objective.name=softmax"


def test_bounds_are_written_as_ranges():
    for row in ROWS.values():
        assert ".0" not in row.type
        assert not ("from" in row.type and "up to" in row.type)


def test_words_and_one_key(capfd):
    assert run(["settings", "WARMUP", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {"schedule.warmup_steps", "schedule.warmup_fraction"} <= {row["key"] for row in found}
    assert run(["settings", "optim.lr"]) == 0
    out = capfd.readouterr().out
    assert (
        "--set optim.lr=0.001" in out and "float above 0" in out and "optim.layer_decay" not in out
    )
    assert run(["settings", "optim.lrr"]) == 2
    assert "did you mean `optim.lr`?" in capfd.readouterr().err
