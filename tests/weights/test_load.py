import os

import numpy as np
import pytest
import torch

from vitcli.config.schema import ModelSection, PreprocessSection
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.run import create_run
from vitcli.weights.load import load_model, load_settings, newest_run
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model


def make_run(name, *, trained, command="finetune", age=0, labels=("a", "b")):
    net = create_model("Pico/8", num_classes=2, image_size=16, depth=1)
    net.head_trained, net.labels = trained, labels
    from pathlib import Path

    run = create_run(Path("runs") / name, 'command = "finetune"\n')
    save_model(run.weights_file, net)
    run.finish({"command": command})
    os.utime(run.result_file, (1e9 - age, 1e9 - age))
    return run


def test_variants_are_random_but_repeatable():
    one, two = load_model("Ti/16", image_size=32), load_model("Ti/16", image_size=32)
    assert torch.equal(one.network.blocks[0].attn.qkv.weight, two.network.blocks[0].attn.qkv.weight)
    assert one.config.num_classes == 0 and not one.head_trained
    assert one.preprocess.mean == (0.5, 0.5, 0.5)
    assert set(one.load_report.names("new")) == set(one.state_dict())


def test_a_variant_that_cannot_be_built_says_what_to_change():
    with pytest.raises(VitcliError, match="not a multiple of patch size 16") as error:
        load_model("Ti/16", image_size=100)
    assert "variant" not in error.value.hint
    with pytest.raises(VitcliError, match="no model variant") as error:
        load_model("Zz/16")
    assert "`B/16`" in error.value.hint


def test_the_newest_run_that_fits(here):
    with pytest.raises(VitcliError) as error:
        newest_run(classifier=True)
    assert "no run with a trained head" in error.value.message
    assert "finetune" in error.value.hint and "--model" in error.value.hint
    make_run("old", trained=True, age=20)
    make_run("pre", trained=False, command="pretrain", age=10)
    assert newest_run(classifier=True) == "runs/old"
    assert newest_run(classifier=False) == "runs/pre"
    make_run("few", trained=True, command="fewshot")
    assert newest_run(classifier=True) == "runs/few"
    assert newest_run(classifier=False) == "runs/pre"
    (here / "runs/few/model.safetensors").write_bytes(b"cut")
    assert newest_run(classifier=True) == "runs/old"


def test_the_newest_run_that_knows_the_classes(here):
    make_run("flowers", trained=True, age=20, labels=("daisy", "tulip"))
    make_run("letters", trained=True)
    assert newest_run(classifier=True, classes=lambda: ("Daisy", "tulip")) == "runs/flowers"
    assert newest_run(classifier=True, classes=lambda: ("b",)) == "runs/letters"
    # No run knows them: the newest one, and the error of `evaluate` says so.
    assert newest_run(classifier=True, classes=lambda: ("b", "daisy")) == "runs/letters"
    assert newest_run(classifier=True, classes=lambda: ()) == "runs/letters"


def test_labels(here):
    run = make_run("a", trained=True)
    (here / "names.txt").write_text("\ufeffcat\n\n dog \n", encoding="utf-8")
    assert load_model(run.path, labels="names.txt").labels == ("cat", "dog")
    with pytest.raises(VitcliError, match="3 class names for a head with 2 outputs"):
        load_model(run.path, labels=["a", "b", "c"])
    with pytest.raises(VitcliError, match="same name: `a`"):
        load_model(run.path, labels=["a", "a"])
    with pytest.raises(VitcliError, match="cannot read the class names"):
        load_model(run.path, labels="missing.txt")


def test_preprocess_given_whole_or_in_part(here):
    whole = Preprocess(image_size=(16, 16), interpolation="nearest")
    run = make_run("a", trained=True)
    assert load_model(run.path, preprocess=whole).preprocess == whole
    part = load_model(run.path, preprocess={"mean": 0.5, "std": [0.1, 0.2, 0.3]})
    assert part.preprocess.std == (0.1, 0.2, 0.3)
    with pytest.raises(VitcliError, match=r"unknown setting `preprocess\.maen`") as error:
        load_model(run.path, preprocess={"maen": 0.5})
    assert "preprocess.mean" in error.value.hint
    with pytest.raises(VitcliError, match="2 values, the model 3 channels"):
        load_model(run.path, preprocess={"mean": [0.5, 0.5], "std": 1})


def test_image_size_and_head(here):
    run = make_run("a", trained=True)
    model = load_model(run.path, image_size=(24, 32), num_classes=5)
    assert model.config.image_size == (24, 32) and model.config.num_classes == 5
    assert not model.head_trained
    for wrong in ((1, 2, 3), 0, "x", 32.0, True):
        with pytest.raises(VitcliError, match=r"model\.image_size"):
            load_model(run.path, image_size=wrong)
    with pytest.raises(VitcliError, match="position_resize"):
        load_model(run.path, position_resize="cubic")


def test_numbers_of_numpy_can_be_written_again(here):
    save_model("w.safetensors", create_model("Pico/8", image_size=16, depth=1))
    model = load_model("w.safetensors", image_size=np.int64(24), num_heads=np.int32(2))
    save_model("again.safetensors", model)
    assert load_model("again.safetensors").config == model.config
    assert (model.config.image_size, model.config.num_heads) == ((24, 24), 2)
    with pytest.raises(VitcliError, match="`num_classes` is -1"):
        load_model("w.safetensors", num_classes=-1)


def test_settings_of_the_command_line():
    model = ModelSection(num_heads=4, image_size=32)
    preprocess = PreprocessSection(mean=0.5)
    assert load_settings(model, preprocess) == {
        "num_heads": 4,
        "image_size": 32,
        "preprocess": {"mean": 0.5},
    }
    with pytest.raises(VitcliError, match=r"`model\.depth`, `model\.embed_dim`"):
        load_settings(ModelSection(depth=3, embed_dim=4), preprocess)
