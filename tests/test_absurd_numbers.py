"""Absurd numbers are one error, at once and before memory is taken."""

import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitcli.cli.main import run
from vitcli.config.recipe import parse_overrides
from vitcli.config.schema import DataSection
from vitcli.data.source import open_data
from vitcli.data.splits import expand_braces
from vitcli.decode import ImageError
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit import ViTConfig, create_network
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

HUGE = 10**12


@pytest.fixture
def model(here):
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=1)
    net.preprocess, net.labels, net.head_trained = Preprocess((16, 16)), tuple("abc"), True
    save_model("m.safetensors", net)
    Image.new("RGB", (20, 20)).save("a.png")
    return "m.safetensors"


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("preprocess", {"image_size": [10**6, 10**6]}),
        ("preprocess", {"image_size": [0, 0]}),
        ("preprocess", {"resize_size": 10_000}),
        ("preprocess", {"resize_size": 1.5}),
        ("preprocess", {"resize_size": "a"}),
        ("preprocess", {"crop_fraction": 1e-9}),
        ("preprocess", {"crop_fraction": "a"}),
        ("preprocess", {"border": float("nan")}),
        ("config", {"image_size": [10**6, 10**6]}),
        ("config", {"embed_dim": 999_936}),
        ("config", {"depth": HUGE}),
        ("config", {"num_registers": HUGE}),
        ("config", {"image_size": [{}, []]}),
        ("config", {"norm_eps": "a"}),
    ],
)
def test_a_weights_file_that_asks_for_too_much(model, section, changes):
    with safe_open(model, "pt") as file:
        header = json.loads(file.metadata()["vitcli"])
    header[section] |= changes
    save_file(load_file(model), "x.safetensors", {"vitcli": json.dumps(header)})
    with pytest.raises(VitcliError) as error:
        load_model("x.safetensors")
    assert error.value.hint


def test_a_strip_of_pixels_is_not_made_huge():
    transform = Preprocess((16, 16), resize_size=4000)
    with pytest.raises(ImageError, match="more than 67,108,864 pixels"):
        transform(Image.new("RGB", (1, 60_000)))
    assert transform(Image.new("RGB", (10, 20))).shape == (3, 16, 16)


def test_sizes_that_people_use_are_allowed():
    Preprocess((1024, 1024), crop_fraction=0.875)
    Preprocess((8192, 8192))
    assert replace(ViTConfig(), image_size=(8192, 8192)).grid == (512, 512)


COMMANDS = [
    "predict . -m m.safetensors --batch-size 1000000000000000",
    "predict a.png -m m.safetensors --set preprocess.image_size=1000000",
    "predict a.png -m m.safetensors --set preprocess.crop_fraction=1e-9",
    "evaluate builtin:digits -m m.safetensors --image-size 1000000",
    "evaluate builtin:digits -m m.safetensors --processes 100000",
    "fewshot builtin:digits -m m.safetensors --set fewshot.seeds=1000000000000",
    "pretrain builtin:digits --image-size 1000000 --steps 1",
    "pretrain builtin:digits --batch-size 1000000000000 --steps 1",
    "pretrain builtin:digits --steps 99999999999999999999",
    "pretrain builtin:digits --epochs 1e300",
    "pretrain builtin:digits --budget 99999999999999999999999h",
    "pretrain builtin:digits --steps 1 --set train.seed=99999999999999999999999",
    "pretrain builtin:digits --steps 1 --set data.workers=1000000",
    "pretrain builtin:digits --steps 1 --set model.depth=1000000",
    "pretrain builtin:digits --steps 1 --set model.num_registers=1000000",
    "pretrain builtin:digits --steps 1 --set augment.crop=pad --set augment.crop_padding=1000000",
    "plan pretrain_formula --set model.image_size=1000000",
    "check x-{0..99999}.tar",
    "check x-{0..99999999}.tar",
    "check x-{0..9999}{0..9999}.tar",
    f"check x-{'{a,b}' * 40}.tar",
    "check x-{1..99999999999999999999999999}.tar",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_asks_for_too_much(model, line, capfd):
    before = time.process_time()
    assert run(line.split()) == 2
    errors = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in errors) == 1, errors
    assert errors[-1].startswith("hint: ")
    assert time.process_time() - before < 5


def test_memory_that_torch_cannot_give_is_an_error(model, capfd, monkeypatch):
    def exhausted(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr("vitcli.commands.predict.run", exhausted)
    assert run(["predict", "a.png", "-m", "m.safetensors"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("error: out of memory: you tried to allocate") and len(lines) == 2


def test_a_network_larger_than_the_machine(monkeypatch):
    monkeypatch.setattr("vitcli.vit.variants._machine_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="do not fit into the memory"):
        create_network("Pico/8", image_size=16)


def test_braces():
    assert list(expand_braces("{a,b,c}-{8..10}.tar")) == [
        f"{a}-{n}.tar" for a in "abc" for n in (8, 9, 10)
    ]
    with pytest.raises(VitcliError, match="means more than 300,000 files"):
        list(expand_braces("{0..300000}"))


def test_deep_overrides():
    with pytest.raises(VitcliError):
        open_data(DataSection(), "a" * 5000)
    assert parse_overrides(["data.name=" + "[" * 5000]) == {"data": {"name": "[" * 5000}}
