"""Device and precision."""

import json

import pytest
import torch
from typer.main import get_command

from vitcli.cli.app import app
from vitcli.cli.main import run
from vitcli.devices import (
    available_devices,
    choose_device,
    has_fast_bf16,
    pick_device,
    resolve_precision,
)
from vitcli.errors import VitcliError

CPU = torch.device("cpu")


def test_auto_follows_the_measurement():
    assert resolve_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "fp32")


def test_the_measurement_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    has_fast_bf16.cache_clear()
    has_fast_bf16(CPU)
    assert torch.get_num_threads() == threads


def test_what_a_device_cannot_do():
    with pytest.raises(VitcliError, match="needs a GPU"):
        resolve_precision("fp16", CPU)
    with pytest.raises(VitcliError, match="unknown precision `int8`"):
        resolve_precision("int8", CPU)


@pytest.fixture
def two_gpus(monkeypatch):
    """PyTorch says that there are two GPUs; the list holds those that became the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    yield current
    choose_device(None)


def test_a_chosen_device(two_gpus):
    assert available_devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    assert pick_device() == torch.device("cuda")
    for name in available_devices():
        choose_device(name)
        assert pick_device() == torch.device(name)
    assert two_gpus == ["cuda:0", "cuda:1"]
    choose_device(None)
    assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda:2", "mps", "gpu", "CPU", "cuda:", ""])
def test_a_device_that_does_not_exist(two_gpus, name):
    with pytest.raises(VitcliError, match=f"no device `{name}`") as error:
        choose_device(name)
    assert error.value.hint == "use one of `cpu`, `cuda`, `cuda:0`, `cuda:1`"


def test_several_processes_do_not_share_a_device(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("cpu", "cuda"):
        choose_device(name)
    with pytest.raises(VitcliError, match="`--device cuda:1` is one device, but there are 2") as e:
        choose_device("cuda:1")
    assert "remove `--processes`" in e.value.hint


COMPUTING = ("pretrain", "finetune", "fewshot", "predict", "evaluate", "inspect", "bench")


@pytest.mark.parametrize("command", COMPUTING)
def test_every_command_that_computes_takes_a_device(command, here, capfd):
    options = [o for p in get_command(app).commands[command].params for o in p.opts]
    assert "--device" in options
    assert run([command, *(["a.png"] if command == "predict" else []), "--device", "cuda:77"]) == 2
    err = capfd.readouterr().err
    assert "no device `cuda:77`" in err and "`cpu`" in err


def test_provenance_names_the_device(here):
    command = [
        "fewshot",
        "builtin:digits",
        "--model",
        "Pico/4",
        "--shots",
        "1",
        "--image-size",
        "8",
    ]
    assert run([*command, "--device", "cpu", "--out", "r"]) == 0
    assert json.loads((here / "r/provenance.json").read_text())["device"] == "cpu"
