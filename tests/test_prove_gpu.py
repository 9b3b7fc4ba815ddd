"""The script that checks a GPU, in tiny sizes on a CPU, so that it works when a GPU is there."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from vitcli.config.choices import Position
from vitcli.vit import parse_variant

SCRIPT = Path(__file__).parents[1] / "recipes/prove_gpu.py"


@pytest.fixture(scope="module")
def prove():
    spec = importlib.util.spec_from_file_location("prove_gpu", SCRIPT)
    module = sys.modules["prove_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["prove_gpu"]


def test_without_a_gpu_it_says_why_and_succeeds(prove, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py"])
    prove.main()
    assert capsys.readouterr().out.startswith(f"skipped: PyTorch {torch.__version__} is built")


def test_a_section_that_takes_too_long_leaves_time_to_the_next(prove, monkeypatch, tmp_path):
    def slow(proof):
        proof.row("before", 1.0)
        proof.side_by_side({"command": lambda: proof.process("-c", "import time; time.sleep(60)")})
        time.sleep(60)

    def fails(proof):
        raise RuntimeError("a check that fails")

    sections = {"slow": (slow, 1.0), "fails": (fails, 1.0), "last": (prove_row, 1.0)}
    monkeypatch.setattr(prove, "SECTIONS", sections)
    monkeypatch.setattr(prove, "draw_photos", lambda folder, number: None)
    words = ["--tiny", "--seconds", "6", "--only", "slow,fails,last", "--out", "gpu.json"]
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", *words])
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        prove.main()
    assert end.value.code == 1 and time.monotonic() - start < 30
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    found = {row["check"]: (row["value"], row["passed"]) for row in rows}
    assert found["before"] == (1.0, None)
    assert found["slow"] == (prove.CUT_SHORT, None)
    assert found["fails"] == ("RuntimeError: a check that fails", False)
    assert found["last"] == ("here", True)


def prove_row(proof):
    proof.row("last", "here", passed=True)


def test_networks_are_those_of_the_schema(prove):
    cases = prove.network_cases()
    names = [name for name, _, _ in cases]
    assert {"Ti/16", "S/16", "B/16", "R+Ti/16", "R50x1"} <= set(names)
    assert {s["position"] for _, _, s in cases if "position" in s} == set(get_args(Position))
    built = 0
    for name, size, settings in cases:
        try:
            parse_variant(name, image_size=(size, size), num_classes=10, **settings)
            built += 1
        except ValueError as error:
            assert settings, f"{name}: {error}"
    assert built > 0.7 * len(cases)


def test_libraries_take_turns(prove, monkeypatch):
    calls = []

    def step(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    monkeypatch.setattr(prove, "ROUND_SECONDS", 0.0)
    steps = {"a": (lambda: step("a", 0.01), 4), "b": (lambda: step("b", 0.03), 4)}
    proof = prove.Proof(Path(), None, None, "", True, 0.0, device=torch.device("cpu"))
    rates = prove.alternate(proof, steps, rounds=3)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert 1.5 < rates["a"] / rates["b"] < 4.5


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    words = [
        "--tiny",
        "--seconds",
        "2000",
        "--out",
        str(tmp_path / "gpu.json"),
        "--cifar10",
        "builtin:digits",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment
    )
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [row["check"] for row in found["rows"]]
    for section in ("numbers", "command", "training", "resume", "speed", "CIFAR-10"):
        assert any(check.startswith(section) for check in checks)
    assert "speed: loader from stored" in " ".join(checks)
    skipped = [row["value"] for row in found["rows"] if str(row["value"]).startswith("skipped")]
    assert len(skipped) == 1 and "distill" in skipped[0]  # the case of TINY_CASES
    assert found["card"] == "none" and found["torch"]
