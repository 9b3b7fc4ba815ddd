"""Default settings from the data: the pure function, the facts, and runs without a recipe."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.watching import Told

from vitcli.commands import finetune, plan, pretrain
from vitcli.config.recipe import flat_keys, load_recipe
from vitcli.data.facts import DataFacts, may_flip, measure_data
from vitcli.data.source import load_data
from vitcli.data.splits import auto_fraction
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.train.defaults import (
    MachineFacts,
    best_metric,
    choose_defaults,
    is_scarce,
    propose_model,
)
from vitcli.train.resolve import finetune_recipe, pretrain_recipe, pretrained_model
from vitcli.vit.variants import parse_variant
from vitcli.weights.loaded import create_model
from vitcli.weights.public import public_models
from vitcli.weights.store import save_model

SIGNS = DataFacts(images=300, size=(100, 100), classes=6)
CIFAR = DataFacts(images=50_000, size=(32, 32), classes=10)
IMAGENET = DataFacts(images=1_281_167, size=(375, 500), classes=1000)
CPU, GPU = MachineFacts("cpu", 2), MachineFacts("cuda", 16)


def chosen(data, machine=CPU, command="pretrain", **given):
    given = {key.replace("__", "."): value for key, value in given.items()}
    return flat_keys(choose_defaults(command, data, machine, given).settings)


@pytest.mark.parametrize(
    ("data", "machine", "expected"),
    [
        (SIGNS, CPU, {"model.name": "Conv+Pico/8", "model.image_size": 64, "train.epochs": 300.0}),
        (CIFAR, CPU, {"model.name": "Conv+Pico/8", "model.image_size": 32, "train.epochs": 10.0}),
        (replace(CIFAR, size=(28, 28)), CPU, {"model.name": "Conv+Pico/8", "model.image_size": 28}),
        (replace(CIFAR, size=(24, 24)), CPU, {"model.name": "Conv+Pico/4"}),
        (replace(SIGNS, size=(8, 8)), CPU, {"model.name": "Conv+Pico/2", "model.image_size": 8}),
        (
            replace(SIGNS, size=(3000, 4000)),
            CPU,
            {"model.name": "Conv+Pico/8", "model.image_size": 64},
        ),
        (SIGNS, GPU, {"model.name": "Ti/8", "model.image_size": 96, "train.batch_size": 64}),
        (CIFAR, GPU, {"model.name": "S/4", "model.image_size": 32, "train.epochs": 100.0}),
        (IMAGENET, GPU, {"model.name": "B/16", "model.image_size": 224, "train.epochs": 60.0}),
        (replace(SIGNS, may_flip=False), CPU, {"augment.flip_rate": 0.0}),
        (replace(SIGNS, numeric=True), CPU, {"augment.flip_rate": 0.0, "augment.crop": "none"}),
    ],
)
def test_settings_by_data_and_machine(data, machine, expected):
    found = chosen(data, machine)
    assert {key: found[key] for key in expected} == expected


def test_cifar_on_a_cpu_gets_the_settings_that_were_measured():
    measured = flat_keys(load_recipe("pretrain_cifar10_small").model_dump(exclude_none=True))
    found = chosen(CIFAR, train__budget="5m")
    assert found["model.pool"] == measured["model.pool"]
    for key in ("model.name", "objective.name", "train.batch_size", "augment.crop"):
        assert found[key] == measured[key], key
    assert "train.smaller_sizes" not in found and not measured["train.smaller_sizes"]


SIDES = (1, 8, 15, 20, 21, 28, 32, 48, 49, 64, 100, 128, 129, 224, 500, 5000)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model.patch_size": 7},
        {"model.name": "Ti/16"},
        {"model.name": "R50x1"},
        {"model.image_size": 30},
        {"model.image_size": [24, 36]},
        {"preprocess.image_size": 40},
    ],
)
def test_every_choice_is_a_model_with_a_moderate_number_of_tokens(side, machine, given):
    found = flat_keys(
        choose_defaults("pretrain", replace(SIGNS, size=(side, side)), machine, given).settings
    )
    assert not found.keys() & given.keys()
    values = {**found, **given}
    size = values.get("preprocess.image_size", values["model.image_size"])
    size = tuple(size) if isinstance(size, list) else (size, size)
    settings = {"pool": values.get("model.pool", "mean"), "class_token": False}
    if "model.patch_size" in values:
        settings["patch_size"] = values["model.patch_size"]
    if values["model.name"].startswith("R50x"):
        settings = {}
    config = parse_variant(values["model.name"], num_classes=6, image_size=size, **settings)
    for small, _ in values.get("train.smaller_sizes", ()):
        replace(config, image_size=(small, small))  # raises for a size that does not fit
    if machine is CPU and not given:
        assert 16 <= config.grid[0] ** 2 <= 144


def test_what_the_user_gives_stays_and_the_rest_adapts():
    assert chosen(SIGNS, model__image_size=96)["model.name"] == "Conv+Pico/8"
    found = chosen(SIGNS, model__name="Ti/16", optim__lr=0.1, train__steps=5)
    assert not found.keys() & {"model.name", "optim.lr", "train.steps", "train.epochs"}
    assert found["model.image_size"] % 16 == 0
    assert "objective.name" not in chosen(SIGNS, objective__name="sigmoid")
    assert "model.pool" not in chosen(SIGNS, objective__name="mae")
    assert "model.pool" not in chosen(SIGNS, train__patch_drop_rate=0.5)
    assert chosen(SIGNS, replace(CPU, processes=3))["train.batch_size"] % 6 == 0
    assert chosen(SIGNS, train__budget="2h")["model.name"] == "Conv+Nano/8"


TI = parse_variant("Ti/16", num_classes=1000, image_size=(224, 224))


def fine_tuned_at(data, machine=CPU, weights=TI, **given):
    """The image size of `finetune`; None: that of the weights."""
    given = {key.replace("__", "."): value for key, value in given.items()}
    found = choose_defaults("finetune", data, machine, given, weights=weights)
    assert ("no time for" in found.summary) == ("model" in found.settings)
    return flat_keys(found.settings).get("model.image_size")


def test_small_images_are_fine_tuned_at_a_smaller_size_where_a_cpu_lacks_time():
    one = replace(CPU, cores=1)
    sizes = [fine_tuned_at(SIGNS, one, train__budget=f"{s}s") or 224 for s in range(10, 900, 10)]
    assert sizes[0] == 112 and sizes[-1] == 224 and sizes == sorted(sizes)
    assert len(set(sizes)) > 4 and all(size % 16 == 0 for size in sizes)
    # Twice the cores have the time of twice the budget.
    assert fine_tuned_at(SIGNS, CPU, train__budget="60s") == fine_tuned_at(
        SIGNS, one, train__budget="120s"
    )
    assert fine_tuned_at(SIGNS) is None  # without a budget there is time enough
    assert fine_tuned_at(CIFAR) == 64  # four patches


@pytest.mark.parametrize(
    ("data", "machine", "given"),
    [
        (replace(CIFAR, size=(375, 500)), CPU, {}),  # photographs are larger than the model's size
        (replace(CIFAR, size=(224, 224)), CPU, {}),
        (replace(CIFAR, size=None), CPU, {}),
        (CIFAR, GPU, {}),
        (CIFAR, CPU, {"model__image_size": 224}),
        (CIFAR, CPU, {"preprocess__image_size": 224}),
        (CIFAR, CPU, {"weights": parse_variant("Ti/4", image_size=(32, 32))}),
        (CIFAR, CPU, {"weights": parse_variant("R50x1", image_size=(224, 224))}),
        (CIFAR, CPU, {"weights": parse_variant("Ti/16", image_size=(224, 192))}),
        (CIFAR, CPU, {"weights": None}),
    ],
)
def test_the_size_of_the_weights_stays(data, machine, given):
    assert fine_tuned_at(data, machine, **given) in (None, given.get("model__image_size"))


def test_a_cpu_gets_a_hybrid_unless_the_user_shapes_the_model_or_patches_are_hidden():
    assert "train.smaller_sizes" not in chosen(CIFAR)
    assert chosen(CIFAR)["objective.name"] == "guided"
    assert chosen(CIFAR, train__budget="5m")["model.name"] == "Conv+Pico/8"
    assert chosen(CIFAR, train__budget="10m")["model.name"] == "Conv+Nano/8"  # of two cores
    for given in (
        {"model__patch_size": 4},
        {"model__depth": 6},
        {"model__pool": "mean"},
        {"model__class_token": True},
        {"objective__name": "mae"},
        {"objective__name": "masked_patch"},
    ):
        assert chosen(CIFAR, **given)["model.name"] == "Pico/4", given
    assert chosen(replace(SIGNS, size=(100, 100)), GPU)["model.name"] == "Ti/8"


def test_finetune_of_few_photographs_of_own_weights_and_of_characters():
    few = chosen(SIGNS, command="finetune")
    assert (few["optim.name"], few["train.batch_size"], few["train.epochs"]) == ("sgd", 32, 10.0)
    assert "model.name" not in few
    assert "optim.name" not in chosen(CIFAR, command="finetune")
    assert "optim.name" not in chosen(SIGNS, command="finetune", lora__rank=8)
    own = flat_keys(choose_defaults("finetune", SIGNS, CPU, {}, own_weights=True).settings)
    assert (own["optim.name"], own["train.epochs"]) == ("muon", 40.0)
    signs = chosen(replace(SIGNS, may_flip=False), command="finetune")
    assert (signs["augment.crop"], signs["augment.flip_rate"]) == ("pad", 0.0)


@pytest.mark.parametrize(
    ("classes", "flips"),
    [
        (("daisy", "rose"), True),
        (tuple("0123456789"), False),
        (tuple("abc"), False),
        (("turn_left", "turn_right", "stop"), False),
        (("leftovers", "bread"), True),  # a word, not a part of one
        (("10", "20", "30"), False),
        (("a", "dog", "cat"), True),
        ((), True),
    ],
)
def test_class_names_that_forbid_a_flip(classes, flips):
    assert may_flip(classes) is flips


def test_the_validation_fraction_of_auto():
    assert auto_fraction(np.repeat(np.arange(6), 50)) == 0.1
    assert auto_fraction(np.repeat(np.arange(20), 1)) == 0.0
    assert auto_fraction(np.repeat(np.arange(100), 10)) == 0.0  # one image per class says little
    assert auto_fraction(np.zeros(1_000_000)) == 0.005
    assert is_scarce(SIGNS)
    assert not is_scarce(CIFAR)


@pytest.mark.parametrize(
    ("data", "images", "metric"),
    [
        (SIGNS, 30, "loss"),
        (SIGNS, 500, "accuracy"),
        (CIFAR, None, "accuracy"),  # a stream has no length
        (replace(SIGNS, multi_label=True), 30, "map"),
        (replace(SIGNS, numeric=True), 30, "rmse"),
    ],
)
def test_the_metric_that_chooses_the_weights(data, images, metric):
    assert best_metric(data, images) == metric


def draw_photos(folder, per_class=40, side=24):
    rng = np.random.default_rng(0)
    for label in ("ash", "oak"):
        place = folder / label
        place.mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 120, (side, side + 4, 3)) + 100 * (label == "oak")
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defaults") / "my photos"
    draw_photos(folder / "train", 120)
    draw_photos(folder / "test", 8)
    return folder


def test_facts_come_from_headers(photos, monkeypatch):
    def decoded(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("vitcli.decode.LazyImage.whole", decoded)
    facts = measure_data(load_data(photos))
    assert facts == DataFacts(images=240, size=(24, 28), classes=2)
    facts = measure_data(load_data("builtin:digits"))
    assert (facts.images, facts.size, facts.may_flip) == (1438, (8, 8), False)


TINY = {"model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64}}


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out, watch = tmp_path_factory.mktemp("defaults") / "run", Told()
    settings = {**TINY, "train": {"steps": 2, "precision": "fp32"}}
    result = pretrain.run(str(photos), settings=settings, out=out, watch=watch)
    return out, result, watch


def test_a_run_without_a_recipe_says_records_and_repeats_its_choice(run, photos, tmp_path):
    out, result, watch = run
    said = " ".join(watch.notes)
    assert "defaults for 216 training images of about 28x24 px, 2 classes: Pico/4 at 24 px" in said
    assert "--recipe pretrain" in said
    assert any(f"vitcli finetune '{photos}' --model " in text for text in watch.warnings)
    assert result.validation["split"] == "validation"
    assert result.figures["split"] == "test"
    assert result.figures["weights"] == result.weights["name"]
    facts = json.loads((out / "provenance.json").read_text())["defaults"]
    assert facts["data"]["images"] == 216
    assert facts["settings"]["model"]["image_size"] == 24
    recipe = load_recipe(str(out / "recipe.toml"))
    assert recipe.data.validation_fraction == 0.1
    assert recipe.train.best_metric == "loss"  # 24 validation images
    again = pretrain.run(recipe=str(out / "recipe.toml"), out=tmp_path / "again", watch=Told())
    assert again.figures == result.figures
    same = (tmp_path / "again/model.safetensors").read_bytes()
    assert same == (out / "model.safetensors").read_bytes()


def test_a_resume_does_not_look_at_the_data_again(run, photos, monkeypatch):
    out, _, _ = run

    def measured(*_, **__):
        raise AssertionError("the defaults were chosen again")

    monkeypatch.setattr("vitcli.train.resolve.choose_defaults", measured)
    assert pretrain.run(str(photos), out=out, resume=True).already_finished


def test_no_validation_images_if_the_user_says_so(photos, tmp_path):
    settings = {**TINY, "train": {"steps": 1}, "data": {"validation_fraction": 0.0}}
    result = pretrain.run(str(photos), settings=settings, out=tmp_path / "run")
    assert (result.validation, result.best) == (None, None)
    assert result.figures["split"] == "test"


def test_finetune_without_a_recipe(run, photos, tmp_path):
    watch = Told()
    result = finetune.run(
        str(photos),
        model=str(run[0]),
        settings={"train": {"steps": 1}},
        out=tmp_path / "run",
        watch=watch,
    )
    assert result.validation["split"] == "validation"
    assert load_recipe(str(tmp_path / "run/recipe.toml")).optim.name == "muon"  # as the run
    assert f"2 classes: {run[0]}, batch 32, 1 step" in " ".join(watch.notes)


def test_finetune_takes_the_smaller_size(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("vitcli.train.resolve.this_machine", lambda: CPU)
    weights = tmp_path / "model.safetensors"
    net = create_model("Pico/4", num_classes=3, image_size=64)
    net.preprocess = Preprocess(image_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    save_model(weights, net)
    for budget, size in (("1s", 24), ("9h", 64)):
        watch = Told()
        found = finetune_recipe(
            str(photos), str(weights), None, {"train": {"budget": budget}}, watch
        )
        assert any("no time for 3 epochs" in line for line in watch.notes) == (size == 24)
        model = pretrained_model(found.recipe, found.source, watch)
        assert model.config.image_size == model.preprocess.image_size == (size, size)


def test_finetune_without_weights_names_the_command(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitcliError, match="no finished `pretrain` run") as error:
        finetune.run(str(photos))
    model = "vit-ti16-augreg"
    assert propose_model(240, CPU) == model
    assert f"`vitcli finetune '{photos}' --model vit-" in error.value.hint
    assert propose_model(240, GPU) != propose_model(10**5, GPU) != model
    listed = public_models()
    assert {propose_model(n, m) for n in (240, 10**5) for m in (CPU, GPU)} <= set(listed)


def test_a_wrong_model_is_reported_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitcliError, match="no such model: `vit_tiny`") as error:
        finetune.run("missing", model="vit_tiny")
    assert "`vit-ti16-augreg`" in error.value.hint


def test_a_plan_shows_the_same_choice(photos):
    estimate = plan.run(None, str(photos), command="pretrain", probing=False, compare=False)
    recipe = estimate.planned.recipe
    assert (recipe.model.name, recipe.model.image_size) == ("Conv+Pico/4", 24)
    assert recipe.train.epochs == 300.0


@pytest.mark.parametrize("data", [None, "builtin:formula"])
def test_the_formula_images_have_a_recipe(data):
    settings = {"data": {"name": data}} if data else {}
    chosen = pretrain_recipe(data, None, None, Quiet()).recipe
    assert chosen == load_recipe("pretrain_formula", settings)


def test_pretraining_on_the_digits_takes_a_model_for_images_of_8_px():
    chosen = pretrain_recipe("builtin:digits", None, None, Quiet()).recipe
    assert (chosen.model.name, chosen.model.image_size) == ("Conv+Pico/2", 8)
    assert chosen.augment.flip_rate == 0.0
