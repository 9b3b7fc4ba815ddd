"""The script that checks a GPU, in tiny sizes on a CPU, so that it works when a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes/prove_gpu.py"


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    words = [
        "--tiny",
        "--seconds",
        "1000",
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
    assert found["card"] == "none" and found["torch"]
