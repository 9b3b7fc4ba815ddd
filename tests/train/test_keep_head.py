"""`finetune --keep-head`: the same classes in any order go on, others are an error."""

import numpy as np
import pytest
import torch
from support.tiny import TINY, train_tiny, weights

from vitcli.commands import finetune
from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.source import Source, open_data
from vitcli.errors import VitcliError
from vitcli.progress import Quiet
from vitcli.train.loop import Loop
from vitcli.train.resolve import pretrained_model
from vitcli.train.signals import Stopped
from vitcli.weights.load import load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the digits with a head that is trained."""
    out = tmp_path_factory.mktemp("head") / "run"
    train_tiny(out)
    return out


def recipe_of(model, **sections):
    settings = {**TINY, "command": "finetune", "model": {"name": str(model)}}
    sections = {"train": {}, **sections}
    sections["train"] = {"keep_head": True, **sections["train"]}
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return check(Recipe, settings, "test")


def source_of(*classes):
    labels = np.arange(2 * len(classes)) % len(classes)
    store = ArrayStore("memory", np.zeros((len(labels), 8, 8), np.uint8))
    return Source("memory", {"train": ImageSet("train", classes, labels, store)}, classes, "")


def start(recipe, source):
    return pretrained_model(recipe, source, Quiet())


def test_the_outputs_follow_the_names_of_the_classes(trained):
    images = torch.randn(3, 3, 8, 8)
    before = load_model(trained)
    order = [3, 0, 9, 1, 2, 8, 7, 5, 6, 4]
    model = start(recipe_of(trained), source_of(*map(str, order)))
    with torch.no_grad():
        wanted = before.network.eval()(images)[:, order]
        torch.testing.assert_close(model.network.eval()(images), wanted)
    assert model.labels == tuple(map(str, order)) and model.head_trained
    assert wanted.abs().max() > 0.01
    assert (
        not start(recipe_of(trained, train={"keep_head": False}), source_of("0", "1"))
        .network(images)
        .any()
    )


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("0123456789x", "the data has `x`$"),
        ("01234567", "only the model has `8`, `9`$"),
        ("01234567xy", "the data has `x`, `y`, and only the model has `8`, `9`$"),
        ("abcdefghij", "the data has `a`, `b`, `c`, `d`, `e` and 5 more, and only"),
    ],
)
def test_other_classes_are_one_error_that_names_them(trained, classes, words):
    with pytest.raises(VitcliError, match=words) as caught:
        start(recipe_of(trained), source_of(*classes))
    assert "leave out `--keep-head`" in caught.value.hint


def test_a_head_that_means_something_else_is_an_error(trained, tmp_path):
    sigmoid = recipe_of(trained, objective={"name": "sigmoid"})
    with pytest.raises(VitcliError, match="trained with `softmax` outputs, and the objective `sig"):
        start(sigmoid, source_of(*"0123456789"))
    train_tiny(tmp_path / "mae", objective={"name": "mae"}, train={"steps": 1})
    with pytest.raises(VitcliError, match="this model has no trained head"):
        start(recipe_of(tmp_path / "mae"), source_of(*"0123456789"))
    with pytest.raises(VitcliError, match="needs pretrained weights; use `vitcli finetune`"):
        train_tiny(tmp_path / "run", train={"keep_head": True})


def test_the_head_of_a_regression_keeps_its_scale(tmp_path):
    train_tiny(tmp_path / "run", objective={"name": "mse"}, train={"steps": 2})
    recipe = recipe_of(tmp_path / "run", objective={"name": "mse"})
    source, before = open_data(recipe.data, numeric=True), load_model(tmp_path / "run")
    model = start(recipe, source)
    assert model.target_scale == before.target_scale
    assert torch.equal(model.network.head.weight, before.network.head.weight)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"lora": {"rank": 2}},
        {"train": {"freeze": "backbone"}},
        {"train": {"freeze": "blocks:1"}},
    ],
)
def test_a_run_goes_on_from_the_head_and_resumes_exactly(trained, tmp_path, sections):
    train = {"steps": 4, "freeze": "none", **sections.get("train", {})}
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_of(trained, **{**sections, "train": train}).to_toml())
    finetune.run(recipe=str(path), out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 2 else None)
        with pytest.raises(Stopped):
            finetune.run(recipe=str(path), out=tmp_path / "parts")
    finetune.run(recipe=str(path), out=tmp_path / "parts", resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    # Four small steps from the old head, not from zeros: the heads are close.
    old, new = (load_model(run).network.head.weight for run in (trained, tmp_path / "whole"))
    assert torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0) > 0.7
