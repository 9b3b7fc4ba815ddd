"""A stranger's first minutes: the four commands without arguments, in an empty folder."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def offline(tmp_path):
    """An environment in which nothing on the network can be reached, and no cache is warm."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "VITCLI"))}
    # A proxy that nobody listens to: any attempt to reach a host fails at once.
    nowhere = "http://127.0.0.1:9"
    environment |= dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"), nowhere
    )
    environment["VITCLI_CACHE"] = str(tmp_path / "vitcli")
    return environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def vitcli(folder, environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "vitcli", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def photograph(folder):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.jpg")


def journey(folder, environment, *shorter):
    """The four commands; their JSON results and the notes that say what was taken."""
    photograph(folder)
    said, found = {}, {}
    for command in (
        ("pretrain", *shorter),
        ("fewshot", "--shots", "5"),
        ("finetune", *shorter),
        ("predict", "image.jpg"),
    ):
        done = vitcli(folder, environment, *command, "--json")
        said[command[0]] = done.stderr
        found[command[0]] = json.loads(done.stdout)
    assert "no DATA given" in said["pretrain"] and "builtin:formula" in said["pretrain"]
    assert "no `--model` given: using runs/pretrain_formula" in said["fewshot"]
    assert "builtin:digits" in said["fewshot"]
    assert "no `--model` given: using runs/pretrain_formula" in said["finetune"]
    assert "no `--model` given: using runs/finetune_digits" in said["predict"]
    assert found["predict"]["label"] in set("0123456789")
    return found


@pytest.mark.slow
def test_the_four_commands_work_in_an_empty_folder_without_a_network(tmp_path, offline):
    folder = tmp_path / "empty"
    folder.mkdir()
    journey(folder, offline, "--steps", "2", "--batch-size", "16")


@pytest.mark.proof
def test_their_figures_are_those_of_the_readme(tmp_path, offline):
    """The whole of it, at its real length. One seed: a little below the means of three."""
    folder = tmp_path / "empty"
    folder.mkdir()
    found = journey(folder, offline)
    assert found["fewshot"]["shots"]["5"]["accuracy"]["mean"] >= 0.80
    assert found["finetune"]["figures"]["accuracy"] >= 0.98
