"""What the doctor sees, and what it makes of it."""

import copy
import json

import psutil
import pytest
import torch

from vitcli.cli import main as cli
from vitcli.commands import doctor
from vitcli.cost import machine
from vitcli.devices import has_fast_bf16

HEALTHY = {
    "versions": {"torch": "2.13.0+cpu", "torchvision": None},
    "devices": {
        "device": "cpu",
        "precision": "bf16",
        "gpu_without_torch": False,
        "gpu_fault": "PyTorch sees no GPU",
        "instructions": "AVX512",
        "cores": 2.0,
        "memory_free_bytes": 16 * doctor.GIB,
    },
    "threads": {
        "threads": 2,
        "bf16": 400e9,
        "bf16_one_thread": 210e9,
        "load": 0.5,
        "wait_policy": "PASSIVE",
    },
    "malloc": {"allocator": "system", "variables": []},
    "attention": {"precision": "bf16", "explicit": 1.0, "fused": 1.6, "chosen": 1.0},
    "images": {"libjpeg_turbo": True, "webp": True, "avif": True},
    "disk": {"folder": "runs", "free_bytes": 100 * doctor.GIB, "write": 4e8, "read": 1e9},
}

ILL = [
    ("devices.gpu_without_torch", True, "does not see the NVIDIA GPU"),
    ("versions.torchvision_imports", False, "cannot be imported"),
    ("versions.torch", "2.14.0", "is not tested"),
    ("versions.torch", "2.8.1", "is not tested"),
    ("threads.bf16", 215e9, "only 1.02 times as fast as one"),
    ("threads.load", 4.0, "4.0 processes share 2 cores"),
    ("devices.cores", 1.0, "2 threads share 1 usable cores"),
    ("threads.wait_policy", "active", "spin"),
    ("malloc.variables", ["GLIBC_TUNABLES"], "with GLIBC_TUNABLES vitcli does not let malloc"),
    ("devices.instructions", "DEFAULT", "does not use AVX2"),
    ("devices.memory_free_bytes", doctor.GIB, "only 1.0 GiB of memory"),
    ("disk.free_bytes", doctor.GIB, "1.0 GiB are free on the disk of `runs`"),
    ("disk.write", None, "cannot write to `runs`"),
    ("disk.read", 10e6, "reads 10 MB/s"),
    ("attention.chosen", 1.6, "1.6 times as long"),
    ("images.libjpeg_turbo", False, "without libjpeg-turbo"),
    ("images.avif", False, "cannot read AVIF"),
]


def test_of_a_healthy_set_up_nothing_is_said():
    assert not list(doctor.find_problems(HEALTHY))


@pytest.mark.parametrize(("where", "value", "words"), ILL, ids=[f"{w}={v}" for w, v, _ in ILL])
def test_each_illness_is_named_alone_with_a_remedy(where, value, words):
    facts = copy.deepcopy(HEALTHY)
    topic, key = where.split(".")
    facts[topic][key] = value
    (found,) = doctor.find_problems(facts)
    assert words in found.what and found.remedy


def test_on_a_gpu_the_threads_do_not_matter():
    facts = copy.deepcopy(HEALTHY)
    facts["devices"]["device"] = "cuda"
    facts["threads"]["bf16"] = 215e9
    assert not list(doctor.find_problems(facts))


def test_the_command_says_it_all(here, capfd, monkeypatch):
    monkeypatch.setattr(machine, "DISK_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX_SIDE", 128)
    monkeypatch.setattr(machine, "ATTENTION_SHAPE", (1, 2, 17, 8))
    monkeypatch.setattr(machine, "JPEG_SIZE", (160, 120))
    assert cli.run(["doctor", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["precision"] == (
        "bf16" if has_fast_bf16(torch.device(facts["devices"]["device"])) else "fp32"
    )
    for topic, keys in {
        "threads": ("fp32", "bf16", "fp32_one_thread", "bf16_one_thread"),
        "attention": ("explicit", "fused", "chosen"),
        "disk": ("write", "read", "free_bytes"),
        "images": ("jpegs_per_second",),
        "devices": ("cores", "memory_bytes", "memory_free_bytes"),
    }.items():
        assert all(facts[topic][key] > 0 for key in keys), topic
    assert not list(here.iterdir())  # nothing is left behind
    assert cli.run(["doctor"]) == 0
    shown = capfd.readouterr().out
    assert "processor" in shown and "on one thread" in shown


def test_threads_are_as_before():
    before = torch.get_num_threads()
    machine.matmul_flops(torch.float32, 1)
    assert torch.get_num_threads() == before


def test_no_such_folder(capfd):
    assert cli.run(["doctor", "--out", "lost"]) == 2
    assert "the folder `lost` does not exist" in capfd.readouterr().err


def test_memory_is_what_the_system_says():
    total, available = machine.system_memory()
    assert 0 < available <= total <= psutil.virtual_memory().total
