"""Device and precision."""

import json
import warnings

import pytest
import torch
from typer.main import get_command

from vitcli import devices
from vitcli.cli import main as cli
from vitcli.cli.app import app
from vitcli.cli.main import run
from vitcli.commands import doctor
from vitcli.devices import (
    UnusedGpuWarning,
    available_devices,
    choose_device,
    has_fast_bf16,
    join_processes,
    pick_device,
    resolve_precision,
)
from vitcli.errors import VitcliError
from vitcli.evals.features import autocast

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


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com"
)


@pytest.fixture
def old_driver(monkeypatch):
    """A PyTorch with CUDA beside a driver that is too old for it, on a machine with a GPU."""

    def is_available():
        warnings.warn(f"CUDA initialization: {OLD_DRIVER}", UserWarning, stacklevel=1)
        return False

    def init():
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    choose_device(None)
    devices.warn_of_unused_gpu.cache_clear()
    yield
    devices.warn_of_unused_gpu.cache_clear()


def test_a_driver_that_is_too_old_is_named(old_driver):
    with pytest.raises(VitcliError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own warning says the same
        choose_device("cuda")
    assert error.value.message == (
        "this machine has no device `cuda`: The NVIDIA driver on your system is too old (found "
        "version 11040)"
    )
    assert error.value.hint == "use one of `cpu`"


def test_a_gpu_that_cannot_be_used_is_one_warning(old_driver, capfd):
    with pytest.warns(UnusedGpuWarning, match="too old .* so the CPU computes") as found:
        assert pick_device() == pick_device() == CPU
    assert len(found) == 1
    cli._show_warning(found[0].message, found[0].category, "file", 1)
    assert capfd.readouterr().err.startswith("warning: The NVIDIA driver on your system")


def test_a_gpu_that_the_user_hid_is_no_warning(old_driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_device() == CPU


@pytest.mark.parametrize(("name", "reason"), [("cuda", "built without CUDA"), ("mps", "MPS|Apple")])
def test_the_error_says_why_there_is_no_device(name, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(VitcliError, match=f"no device `{name}`: .*({reason})"):
        choose_device(name)


def test_fewer_gpus_than_named(two_gpus):
    with pytest.raises(VitcliError, match="no device `cuda:7`: PyTorch sees 2 GPUs"):
        choose_device("cuda:7")


def test_several_gpus_need_nccl(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(VitcliError, match="has no NCCL, which connects the processes"):
        join_processes(torch.device("cuda"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nmore",
            "no kernels",
        ),
        (OLD_DRIVER, "update the NVIDIA driver"),
        ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", "update the"),
        ("CUDA error: uncorrectable ECC error encountered", "`nvidia-smi`"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "another program"),
        ("NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error", "NCCL_DEBUG=WARN"),
    ],
)
def test_a_fault_of_the_gpu_is_an_error_in_words(text, hint, monkeypatch, capfd):
    def fails(*arguments, **words):
        raise RuntimeError(text)

    monkeypatch.setattr(doctor, "run", fails)
    assert run(["doctor"]) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert f"error: {text.splitlines()[0]}" in err and hint in err and "more" not in err


def test_a_bug_in_a_kernel_is_no_fault_of_the_gpu():
    assert devices.device_fault(RuntimeError("CUDA error: device-side assert triggered")) is None
    assert devices.device_fault(ValueError("NCCL")) is None


def test_cublas_says_out_of_memory_in_its_way():
    status = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert devices.is_out_of_memory(RuntimeError(status))
    assert not devices.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_forward_pass_continues_in_parts_that_fit():
    sizes = []

    def forward(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    compute, x = devices.FittingForward(forward), torch.randn(13, 2)
    assert torch.equal(compute(x), 2 * x)
    assert sizes == [13, 6, 3, 3, 3, 3, 1]
    assert torch.equal(compute(x[:4]), 2 * x[:4]) and sizes[7:] == [3, 1]  # it remembers


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("x")])
def test_what_no_smaller_part_cures_is_raised(error):
    def forward(x):
        raise error

    with pytest.raises(type(error)):
        devices.FittingForward(forward)(torch.zeros(4, 1))


def test_tf32_is_off_in_convolutions_too(monkeypatch):
    """torch allows it there by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    devices.allow_tf32(True)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    autocast("auto", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 is False
    torch.set_float32_matmul_precision(before)
