"""Recipes: layers, checks with every mistake at once, and the way back to TOML."""

import pytest

from vitcli.config.recipe import (
    check,
    differing_keys,
    flat_keys,
    lay_over,
    load_inference,
    load_recipe,
    nest,
    parse_overrides,
    read_toml,
)
from vitcli.config.schema import SECTIONS, Inference, Recipe, parse_duration
from vitcli.errors import VitcliError

SMALL = {"command": "pretrain", "train": {"steps": 10}}


def recipe(**sections):
    return check(Recipe, {**SMALL, **sections}, "recipe `x`")


def test_all_mistakes_are_reported_together_with_the_nearest_names():
    with pytest.raises(VitcliError) as caught:
        check(
            Recipe,
            {
                "command": "pretrain",
                "modle": {},
                "model": {"patchsize": 4, "name": 3},
                "train": {"steps": 1, "bach_size": 2, "seed": -1},
                "optim": {"lr_scaling": "cubic"},
            },
            "recipe `x`",
        )
    message = caught.value.message
    assert "no setting `modle` (did you mean `model`?)" in message
    assert "no setting `model.patchsize` (did you mean `model.patch_size`?)" in message
    assert "no setting `train.bach_size` (did you mean `train.batch_size`?)" in message
    assert "`model.name` = 3" in message
    assert "`train.seed` = -1" in message
    assert "`optim.lr_scaling` = 'cubic'" in message and "'linear'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "`optim.lr`"),
        ("epoch", "`train.epochs`"),
        ("train.lr", "`optim.lr`"),
        ("patch_size", "`model.patch_size`"),
        ("name", "`model.name` or"),
    ],
)
def test_an_unknown_setting_may_be_the_last_part_of_a_known_one(name, meant):
    with pytest.raises(VitcliError, match=rf"\(did you mean {meant}"):
        load_recipe("pretrain_formula", nest(name, 1))


@pytest.mark.parametrize("train", [{}, {"steps": 1, "epochs": 2}, {"epochs": 1, "images": 5}])
def test_exactly_one_duration(train):
    with pytest.raises(VitcliError, match=r"exactly one of `steps`, `epochs`, `images`, `budget`"):
        check(Recipe, {"command": "pretrain", "train": train}, "recipe `x`")


def test_one_warmup():
    with pytest.raises(VitcliError, match="not both"):
        recipe(schedule={"warmup_steps": 3, "warmup_fraction": 0.1})


def test_strict_types_but_integers_for_floats():
    assert recipe(optim={"lr": 1}).optim.lr == 1.0
    with pytest.raises(VitcliError, match=r"`optim\.lr` = '1e-3'"):
        recipe(optim={"lr": "1e-3"})


def test_overrides_are_toml_or_plain_strings():
    assert parse_overrides(
        [
            "train.epochs=3",
            "preprocess.mean=[0.5,0.5,0.5]",
            "model.name=B/16",
            "data.strict=true",
            'data.name="a=b"',
        ]
    ) == {
        "train": {"epochs": 3},
        "preprocess": {"mean": [0.5, 0.5, 0.5]},
        "model": {"name": "B/16"},
        "data": {"strict": True, "name": "a=b"},
    }


TEXTS = [
    f"{section}.{name}"
    for section, kind in SECTIONS.items()
    for name, field in kind.model_fields.items()
    if field.annotation in (str, str | None)
]


@pytest.mark.parametrize("key", [*TEXTS, "description"])
def test_a_string_setting_takes_any_literal(key):
    """A label column `1`, a container `0`, a folder `2026-01-31`: none needs quotes."""
    for value in ("1", "1.50", "true", "2026-01-31", "[1, 2]", "inf", "{}", "1e3"):
        assert flat_keys(parse_overrides([f"{key}={value}"])) == {key: value}
    assert flat_keys(parse_overrides([f'{key}="1"'])) == {key: "1"}


def test_a_number_as_a_name_reaches_the_recipe():
    settings = {"command": "finetune", "train": {"steps": 1}}
    lay_over(settings, parse_overrides(["model.checkpoint_key=1", "data.label_column=0"]))
    made = check(Recipe, settings, "recipe `x`")
    assert (made.model.checkpoint_key, made.data.label_column) == ("1", "0")
    assert len(TEXTS) > 15


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train.=3"])
def test_malformed_overrides(text):
    with pytest.raises(VitcliError, match=r"section\.key=value"):
        parse_overrides([text])


def test_a_duration_above_replaces_the_one_below():
    lower = {"train": {"epochs": 3, "seed": 1}, "schedule": {"warmup_fraction": 0.1}}
    lay_over(lower, {"train": {"steps": 5}, "schedule": {"warmup_steps": 2}})
    assert lower == {"train": {"steps": 5, "seed": 1}, "schedule": {"warmup_steps": 2}}


def test_the_written_recipe_reads_back_equal(tmp_path):
    full = recipe(
        model={"name": "Pico/4", "image_size": [32, 48]},
        preprocess={"mean": [0.1, 0.2, 0.3], "std": 0.5},
        schedule={"warmup_steps": 3},
        optim={"grad_clip": 1.0},
    )
    path = tmp_path / "r.toml"
    path.write_text(full.to_toml())
    again = check(Recipe, read_toml(path), "it")
    assert again == full and again.fingerprint() == full.fingerprint()


def test_differing_keys_are_dotted_names():
    a = recipe(optim={"lr": 0.1}, description="one")
    b = recipe(optim={"lr": 0.2}, model={"name": "B/16"}, description="two")
    assert differing_keys(a, b) == ["model.name", "optim.lr"]
    assert differing_keys(a, a) == []


def test_total_steps_round_up():
    assert recipe(train={"epochs": 2.0, "batch_size": 128}).train.total_steps(100) == 2
    assert recipe(train={"images": 129, "batch_size": 128}).train.total_steps(5) == 2
    assert recipe(train={"steps": 7}).train.total_steps(5) == 7


def test_budgets_are_durations():
    assert [parse_duration(t) for t in ("90s", "10m", "1h30m", "2h", "1m5s")] == [
        90,
        600,
        5400,
        7200,
        65,
    ]
    spelled = ("3min", "3 min", "3 minutes", "180 sec", "180S", "1 h 30 min", "1hour30minutes")
    assert [parse_duration(text) for text in spelled] == [180] * 5 + [5400] * 2
    with pytest.raises(ValueError, match="write for example `3m` for minutes"):
        parse_duration("3")
    for text in ("", "10", "m", "1.5h", "-3m", "0s"):
        with pytest.raises(ValueError, match="is not a duration"):
            parse_duration(text)
    with pytest.raises(
        VitcliError, match=r"^recipe `x`: `train.budget` = 'soon' is not a duration"
    ):
        recipe(train={"steps": None, "budget": "soon"})
    assert recipe(train={"steps": None, "budget": "5m"}).train.total_steps(100) is None


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ({"optim": {"lr": -1.0}}, "`optim.lr` = -1.0 must be greater than 0"),
        ({"train": {"freeze": "foo"}}, "`train.freeze` = 'foo' must be `none`, `backbone` or"),
        ({"train": {"budget": "10"}}, "`train.budget` = '10' is not a duration"),
    ],
)
def test_an_error_in_a_typed_setting_does_not_blame_the_recipe(typed, text):
    with pytest.raises(VitcliError) as caught:
        load_recipe("pretrain_formula", typed)
    assert caught.value.message.startswith(text)
    assert caught.value.hint == f"`vitcli settings {text.split('`')[1]}` explains it"


def test_smaller_sizes_by_share_of_the_run():
    train = recipe(train={"steps": 10, "smaller_sizes": [[16, 0.4], [24, 0.7]]}).train
    assert [train.side_at(s, 10) for s in (0, 3, 4, 6, 7, 9)] == [16, 16, 24, 24, None, None]


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(VitcliError) as caught:
        load_recipe("pretrain_formul")
    assert caught.value.hint.startswith("did you mean `pretrain_formula`? Available: `")


def test_broken_toml_names_the_line(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("command = \n")
    with pytest.raises(VitcliError, match=r"is not TOML.*line 1"):
        load_recipe(str(path))


def test_settings_of_inference():
    assert load_inference({"model": {"num_heads": 4}}).model.num_heads == 4
    assert load_inference() == Inference()
    with pytest.raises(VitcliError, match=r"did you mean `model\.num_heads`"):
        load_inference({"model": {"numheads": 4}})


def test_a_key_is_complained_of_once():
    with pytest.raises(VitcliError) as caught:
        load_inference({"model": {"image_size": 0}})
    assert caught.value.message.count("`model.image_size`") == 1
    assert "`fewshot`" in caught.value.hint


def test_a_name_that_no_recipe_can_hold():
    with pytest.raises(VitcliError, match="is not UTF-8") as caught:
        load_recipe("pretrain", {"data": {"name": "caf\udce9"}})
    assert "rename the file" in caught.value.hint


def test_gradient_clipping_can_be_turned_off():
    def clip(value):
        name = "finetune_photos_small"  # it clips at 1.0
        return load_recipe(name, parse_overrides([f"optim.grad_clip={value}"])).optim.grad_clip

    assert clip("none") is None
    assert clip("0.5") == 0.5
    for wrong in ("0", "-1"):
        with pytest.raises(VitcliError, match=r"greater than 0; `none` turns clipping off"):
            clip(wrong)
