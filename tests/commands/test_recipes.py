"""Every recipe that is shipped: complete, explained, and one that runs or is as its source says."""

import re
from pathlib import Path

import pytest
import torch

from vitcli.commands import finetune, pretrain
from vitcli.commands.recipes import run
from vitcli.config.recipe import check, header, load_recipe, read_toml, recipe_files, recipes_folder
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.train.objectives import objective_class
from vitcli.train.optimizers import build_optimizers
from vitcli.vit import ResNetConfig, from_config, parse_variant
from vitcli.vit.macs import training_flops

NUM_RECIPES = 52
FILES = recipe_files()
# Ours are made for minutes and are trained here; those of the paper and of others are not.
OURS = [name for name, path in FILES.items() if path.parent == recipes_folder()]
THEIRS = [name for name in FILES if name not in OURS]
CLASSES = {"JFT-300M": 18_291, "ImageNet-21k": 21_843, "ImageNet-1k": 1000}  # of pre-training

# Table 3 of the paper: model, data, epochs, base rate, decay, weight decay, dropout.
TABLE_3 = {
    "paper_vit_b16_jft": ("B/16", "JFT-300M", 7, 8e-4, "linear", 0.1, None),
    "paper_vit_l32_jft": ("L/32", "JFT-300M", 7, 6e-4, "linear", 0.1, None),
    "paper_vit_l16_jft": ("L/16", "JFT-300M", 7, 4e-4, "linear", 0.1, None),
    "paper_vit_h14_jft": ("H/14", "JFT-300M", 14, 3e-4, "linear", 0.1, None),
    "paper_r50_jft": ("R50x1", "JFT-300M", 7, 1e-3, "linear", 0.1, None),
    "paper_r101_jft": ("R101x1", "JFT-300M", 7, 8e-4, "linear", 0.1, None),
    "paper_r152_jft": ("R152x1", "JFT-300M", 7, 6e-4, "linear", 0.1, None),
    "paper_r50_b16_jft": ("R50+B/16", "JFT-300M", 7, 8e-4, "linear", 0.1, None),
    "paper_r50_l32_jft": ("R50+L/32", "JFT-300M", 7, 2e-4, "linear", 0.1, None),
    "paper_r50_l16_jft": ("R50+L/16", "JFT-300M", 7, 4e-4, "linear", 0.1, None),
    "paper_vit_b16_i21k": ("B/16", "ImageNet-21k", 90, 1e-3, "linear", 0.03, 0.1),
    "paper_vit_l16_i21k": ("L/16", "ImageNet-21k", 90, 1e-3, "linear", 0.03, 0.1),
    "paper_vit_b16_i1k": ("B/16", "ImageNet-1k", 300, 3e-3, "cosine", 0.3, 0.1),
}
# Rows of Tables 5 and 6 without a row in Table 3: the rate is that of a model beside it.
LARGER = {
    "paper_vit_h14_i21k": ("H/14", "ImageNet-21k", 90, 1e-3, "linear", 0.03, 0.1),
    "paper_r152x2_jft": ("R152x2", "JFT-300M", 14, 6e-4, "linear", 0.1, None),
    "paper_r200x3_jft": ("R200x3", "JFT-300M", 14, 6e-4, "linear", 0.1, None),
}
# Table 4: steps, and the rates that were tried.
SMALL_GRID = (0.001, 0.003, 0.01, 0.03)
TABLE_4 = {
    "paper_finetune_imagenet": (20_000, (0.003, 0.01, 0.03, 0.06)),
    "paper_finetune_cifar10": (10_000, SMALL_GRID),
    "paper_finetune_cifar100": (10_000, SMALL_GRID),
    "paper_finetune_pets": (500, SMALL_GRID),
    "paper_finetune_flowers": (500, SMALL_GRID),
    "paper_finetune_vtab": (2500, (0.01,)),
}


def test_the_glob_found_them_all():
    assert len(FILES) == NUM_RECIPES and len(OURS) >= 7
    rows = run().to_json()
    assert {row["name"] for row in rows} == set(FILES)
    keys = {"name", "command", "data", "model", "description", "made_for", "cost"}
    assert all(keys == set(row) for row in rows)
    assert {p.stem for p in recipes_folder().rglob("*.toml") if p.parent.name != "suites"} == set(
        FILES
    )
    assert set(TABLE_3) | set(TABLE_4) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_header_says_how_to_run_it(name):
    text = FILES[name].read_text()
    assert text.startswith("# ") and "# Run:" in text
    recipe = check(Recipe, read_toml(FILES[name]), name)
    assert recipe.description
    readme = (recipes_folder() / "README.md").read_text()
    assert f"`{name}`" in readme
    assert f"vitcli {recipe.command}" in header(text)["Run"]
    if name in THEIRS:
        assert {"Run", "Data", "Cost", "Expect"} <= set(header(text))
        assert f"--recipe {name}" in text


def model_of(name):
    """(recipe, the configuration of its model with its classes, images of the whole training)."""
    recipe, said = load_recipe(name), header(FILES[name].read_text())
    data, count = re.match(r"(.+), ([\d,]+) training images", said["Data"]).groups()
    images = int(count.replace(",", ""))
    steps = recipe.train.total_steps(images)
    classes = CLASSES.get(data, 1000) if objective_class(recipe.objective.name).supervised else 0
    model = recipe.model.name or "B/16"
    config = parse_variant(model, **recipe.model.architecture() | {"num_classes": classes})
    return recipe, config, steps * recipe.train.batch_size


def slow_to_count(name):
    """Deep ResNets, whose operations take seconds to count."""
    return re.search(r"r\d\d\d|r50x2", name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if slow_to_count(n) else n for n in THEIRS]
)
def test_it_can_be_built_and_costs_what_it_says(name):
    recipe, config, images = model_of(name)
    said = header(FILES[name].read_text())["Cost"]
    number, unit = re.match(r"([\d.,]+) (\w+)", said).groups()
    scale = {"exaFLOPs": 1e18, "petaFLOPs": 1e15}[unit]
    # Rounded to the last figure that is given.
    expected = training_flops(config, images) / scale
    assert float(number.replace(",", "")) == pytest.approx(expected, rel=0.03)
    with torch.device("meta"):
        model = from_config(config)
    optimizers = build_optimizers(model, recipe.optim)
    held = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    assert held == set(model.parameters())


def test_table_7_has_the_hyperparameters_of_bit():
    """Kolesnikov et al. (2020), section 3.1: a tenth after 10, 23, 30 and 37 of 40 epochs."""
    recipe, _, images = model_of("paper_r50_jft_sgd")
    assert (recipe.optim.name, recipe.optim.momentum) == ("sgd", 0.9)
    assert recipe.optim.lr * recipe.optim.rate_factor(4096) == pytest.approx(0.03 * 4096 / 256)
    steps = images / recipe.train.batch_size
    expected = [round(share / 40 * steps) for share in (10, 23, 30, 37)]
    assert recipe.schedule.stair_steps == pytest.approx(expected, abs=1)
    assert recipe.schedule.stair_factors == (0.1, 0.01, 0.001, 0.0001)
    assert recipe.schedule.warmup_steps == 5000
    # Coupled decay of 1e-4 passes through the momentum; so a constant gradient of it adds up to
    # 1e-4 / (1 - 0.9) per step.
    assert recipe.optim.weight_decay == pytest.approx(1e-4 / (1 - recipe.optim.momentum))


@pytest.mark.parametrize("name", {**TABLE_3, **LARGER})
def test_table_3(name):
    model, data, epochs, lr, decay, weight_decay, dropout = {**TABLE_3, **LARGER}[name]
    recipe, config, _ = model_of(name)
    assert recipe.model.name == model and config.image_size == (224, 224)
    assert header(FILES[name].read_text())["Data"].startswith(f"{data}, ")
    optim, schedule, train = recipe.optim, recipe.schedule, recipe.train
    assert (optim.name, optim.lr, optim.weight_decay) == ("adamw", lr, weight_decay)
    assert optim.betas == (0.9, 0.999)
    assert optim.grad_clip == (1.0 if data.startswith("ImageNet") else None)
    assert (schedule.name, schedule.warmup_steps) == (decay, 10_000)
    end = 1e-5 if decay == "linear" else 0.0
    assert schedule.final_lr_fraction * lr == pytest.approx(end, rel=1e-3)
    assert (train.epochs, train.batch_size) == (epochs, 4096)
    assert recipe.model.dropout_rate == dropout
    if not isinstance(config, ResNetConfig):  # the head's hidden layer, section 3.1
        assert config.representation_size == config.embed_dim


@pytest.mark.parametrize("name", THEIRS)
def test_images_are_those_of_the_official_code(name):
    """TensorFlow's crop and no smoothing, except where a recipe follows another code."""
    recipe, text = load_recipe(name), FILES[name].read_text()
    if name.startswith("paper_"):
        assert re.search(r"the paper's text", header(text)["Follows"])
        assert "official code" in text
    if name.startswith("deit3"):
        assert recipe.augment.crop == "inception" and recipe.optim.grad_clip == 1.0
        return
    assert recipe.augment.crop == ("resize" if name == "paper_finetune_vtab" else "inception_tf")
    assert (recipe.preprocess.interpolation, recipe.preprocess.antialias) == ("bilinear", False)
    squashes = recipe.preprocess.resize_mode == "squash"
    assert squashes == (recipe.command == "finetune")
    assert squashes or recipe.preprocess.crop_fraction == 224 / 256
    if name.startswith("paper_finetune"):
        assert not recipe.train.ema_warmup  # for Table 2


@pytest.mark.parametrize("name", TABLE_4)
def test_table_4(name):
    steps, grid = TABLE_4[name]
    recipe = load_recipe(name)
    optim = recipe.optim
    assert (optim.name, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 0.0)
    assert optim.grad_clip == 1.0 and optim.lr in grid
    if len(grid) > 1:
        assert ", ".join(f"{lr:g}" for lr in grid) in FILES[name].read_text()
    assert recipe.schedule.name == "cosine"
    assert (recipe.train.steps, recipe.train.batch_size) == (steps, 512)
    assert recipe.model.image_size == 384


# README of the official code: rate and steps of a data set.
@pytest.mark.parametrize(
    ("name", "preset", "lr"),
    [
        ("official_finetune_cifar10", "cifar10", 0.01),
        ("official_finetune_cifar100", "cifar100", 0.03),
        ("official_finetune_imagenet", "imagenet2012", 0.03),
    ],
)
def test_the_official_reruns(name, preset, lr, shared):
    import json

    facts = json.loads((shared / "reference/facts.json").read_text())
    given, common = facts["dataset_presets"][preset], facts["finetune_defaults_common_py"]
    recipe = load_recipe(name)
    assert recipe.train.steps == given["total_steps"]
    assert recipe.model.image_size == given["pp"]["crop"]
    assert recipe.data.train_split == given["pp"]["train"]
    assert recipe.train.batch_size == common["batch"]
    assert recipe.train.micro_batch_size == common["batch"] // common["accum_steps"]
    assert recipe.schedule.warmup_steps == common["warmup_steps"]
    assert recipe.optim.grad_clip == common["grad_norm_clip"]
    assert (recipe.optim.momentum_dtype, recipe.optim.lr) == ("bf16", lr)
    text = FILES[name].read_text()
    for row in facts["readme_replication_imagenet21k"]:
        if row["dataset"] == preset:
            for which in ("dropout_0", "dropout_0p1"):
                assert row[which]["top1"].removesuffix("%") in text


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What `vitcli pretrain` leaves after a step."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain.run(settings={"train": {"steps": 1, "batch_size": 8}}, out=out)
    return str(out)


@pytest.mark.parametrize("name", OURS)
def test_it_runs(name, pretrained, here):
    """Two steps of the recipe as it is, on digits where it names no data."""
    recipe = load_recipe(name)
    data = recipe.data.name or "builtin:digits"
    few = {"train": {"steps": 2, "batch_size": 8}}
    if data == "builtin:digits":
        few["data"] = {"test_split": "test[:5%]"}
    if recipe.objective.name == "distill":  # it names no teacher: any MODEL will do
        few["objective"] = {"teacher": pretrained}
        few["data"]["train_split"] = "train[:32]"
    if recipe.command == "pretrain":
        if recipe.model.image_size == 224:
            few["model"] = {"image_size": 32, "depth": 1}
        result = pretrain.run(data, recipe=name, settings=few)
    else:
        if recipe.train.freeze != "none":  # for twelve blocks; there are fewer here
            few["train"]["freeze"] = "blocks:1"
        result = finetune.run(data, model=pretrained, recipe=name, settings=few)
    assert result.steps == 2
    assert Path(result.run, "model.safetensors").is_file()


def test_a_recipe_without_a_teacher_asks_for_one(here):
    with pytest.raises(VitcliError, match="needs a teacher") as caught:
        pretrain.run("builtin:digits", recipe="distill_features")
    assert "--set objective.teacher=MODEL" in caught.value.hint
    assert not Path("runs").exists()
