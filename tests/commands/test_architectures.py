"""Whole runs of models that are no plain ViT: trained, written, read, used by every command."""

import itertools

import pytest
from PIL import Image
from support.tiny import tiny_recipe, train_recipe

from vitcli import predict
from vitcli.commands import evaluate, fewshot, finetune, pretrain
from vitcli.errors import VitcliError
from vitcli.progress import Quiet
from vitcli.run import Run
from vitcli.train import loop
from vitcli.train.resolve import with_dropout
from vitcli.train.signals import Stopped
from vitcli.vit import ResNet, VisionTransformer
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import read_header

SMALL = {"embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "depth": 1, "image_size": 8}
MODELS = {
    "resnet": {"name": "R26x1", "layers": (1, 1), "width": 0.5, "image_size": 8},
    "hybrid": {"name": "R26+Pico/16", "stem": (1,), "stem_width": 0.5, **SMALL},
    "root alone": {"name": "R+Pico/16", "patch_size": 2, "stem_width": 0.5, **SMALL},
    "axial": {"name": "Axial-Pico/4", **SMALL},
}


def recipe_of(kind, **changes):
    recipe = tiny_recipe(optim={"name": "adamw"}, train={"steps": 4, "batch_size": 8, **changes})
    model = type(recipe.model)(**MODELS[kind])
    return recipe.model_copy(update={"model": model})


@pytest.mark.parametrize("kind", MODELS)
def test_from_training_to_predictions(kind, here):
    train_recipe(here / "run", recipe_of(kind))
    assert ("kind" in read_header("run/model.safetensors")["config"]) == (kind == "resnet")
    model = load_model("run")
    kinds = ResNet if kind == "resnet" else VisionTransformer
    assert isinstance(model.network, kinds)
    assert model.head_trained and model.labels == tuple("0123456789")
    assert all(p.any() for p in model.network.head.parameters())  # it began at zero

    Image.new("L", (9, 12), 100).save("x.png")
    (row,) = predict("x.png", model="run")
    assert row["label"] in model.labels and 0.1 <= row["probability"] <= 1

    result = evaluate.run("builtin:digits", model="run")
    assert result.metrics.images == 359

    few = {"fewshot": {"shots": [1]}}
    shots = fewshot.run("builtin:digits", model="run", settings=few, out=here / "few")
    assert shots.dim == model.config.feature_dim
    assert type(load_model("few").network) is type(model.network)

    settings = {"train": {"steps": 1, "batch_size": 8}, "model": {"image_size": 16}}
    finetune.run("builtin:digits", model="run", settings=settings, out=here / "tuned")
    assert load_model("tuned").config.image_size == (16, 16)


@pytest.mark.parametrize("again", [False, True])
def test_a_resnet_stopped_and_resumed_is_never_stopped(again, tmp_path, monkeypatch):
    recipe = recipe_of("resnet", activation_checkpointing=again)
    train_recipe(tmp_path / "whole", recipe)
    calls = itertools.count(1)
    # Two questions a step: this is a signal within step 3.
    asked = lambda _, value: 15 if next(calls) == 5 else value  # noqa: E731
    monkeypatch.setattr(loop, "max_over_processes", asked)
    with pytest.raises(Stopped):
        train_recipe(tmp_path / "parts", recipe)
    monkeypatch.undo()
    train_recipe(tmp_path / "parts", recipe, resume=True)
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_resnet_in_the_place_of_a_recipes_vit(here):
    """One setting is enough: what the recipe says of a ViT goes, and a note says so."""
    heard = []

    class Watch(Quiet):
        def note(self, message):
            heard.append(message)

    for name in ("cat", "dog"):
        (here / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(here / "photos" / name / f"{i}.png")
    model = {"name": "R26x1", "layers": [1, 1], "width": 0.5, "image_size": 8}
    settings = {"model": model, "train": {"steps": 1, "batch_size": 4}}
    for resume in (False, True):
        pretrain.run("photos", settings=settings, out=here / "run", resume=resume, watch=Watch())
    assert load_model("run").config.layers == (1, 1)
    assert "`R26x1` is a ResNet: the recipe's class_token, pool, position do not apply" in heard
    written = Run(here / "run").recipe().model.model_dump(exclude_none=True)
    assert written == {**model, "layers": (1, 1)}
    with pytest.raises(VitcliError, match="unknown settings of a ResNet: pool"):
        wrong = {"model": {**model, "pool": "mean"}}
        pretrain.run("photos", settings=wrong, out=here / "other")


def test_what_a_resnet_has_not_is_said(tmp_path):
    recipe = recipe_of("resnet")
    for section, values, words in (
        ("model", {"depth": 3}, "unknown settings of a ResNet: depth"),
        ("model", {"pool": "mean"}, "unknown settings of a ResNet: pool"),
        ("objective", {"name": "guided"}, "pools quadrants of patches"),
    ):
        changed = getattr(recipe, section).model_copy(update=values)
        with pytest.raises(VitcliError, match=words):
            train_recipe(tmp_path / section, recipe.model_copy(update={section: changed}))
    net = create_model("R26x1", layers=(1,), width=0.5, image_size=8)
    with pytest.raises(VitcliError, match=r"a ResNet has no dropout: model\.dropout_rate"):
        with_dropout(net, {"dropout_rate": 0.1})
