"""Shell completion, through the protocol of Typer's scripts."""

import os
import subprocess
import sys

import pytest

from vitcli.cli.app import app
from vitcli.cli.main import COMPLETION, run
from vitcli.config.recipe import recipe_files
from vitcli.config.schema import SECTIONS

KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


@pytest.fixture
def complete(here, monkeypatch, capfd):
    """What bash offers for the last word of a command line."""
    (here / "runs/photos").mkdir(parents=True)
    (here / "runs/photos/recipe.toml").touch()

    def offered(*words):
        monkeypatch.setenv(COMPLETION, "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["vitcli", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit):
            app(prog_name="vitcli")
        return capfd.readouterr().out.split()

    return offered


def test_commands_and_flags(complete):
    assert complete("fin") == ["finetune"]
    assert complete("finetune", "--devi") == ["--device"]


def test_names(complete):
    some = [name for name in recipe_files() if name.startswith("finetune")]
    assert sorted(complete("pretrain", "--recipe", "finetune")) == sorted(some)
    assert sorted(complete("plan", "finetune")) == sorted(some)
    assert complete("compare", "ru") == ["runs/photos"]
    assert complete("recipes", "finetune_d") == ["finetune_digits"]
    assert complete("models", "fet") == ["fetch"]


@pytest.mark.parametrize("command", ["finetune", "fewshot", "predict", "evaluate", "inspect"])
def test_models(complete, command):
    assert complete(command, "--model", "dinov2-s") == ["dinov2-s14", "dinov2-s14-reg"]
    assert complete(command, "--model", "runs/") == ["runs/photos"]
    assert complete(command, "--model", "vit_tiny_patch16_3") == [
        "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    ]
    assert complete(command, "-m", "nothing-like-this") == []  # the shell offers files


def test_keys(complete):
    assert complete("finetune", "--set", "optim.lr_s") == ["optim.lr_scaling="]
    assert len(complete("finetune", "--set", "")) == len(KEYS)
    assert complete("settings", "optim.lr_s") == ["optim.lr_scaling"]


def test_a_completion_starts_no_processes(complete):
    assert complete("finetune", "--processes", "2", "--device", "cuda:9", "--recipe", "finetune_d")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, monkeypatch, capfd, here):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    assert run(["--show-completion"]) == 0
    assert COMPLETION in capfd.readouterr().out


def test_it_is_as_light_as_the_help(here):
    """The program itself answers, and without torch."""
    code = (
        "import sys\n"
        "from vitcli.cli.main import main\n"
        "import atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "main()"
    )
    words = {"COMP_WORDS": "vitcli finetune --model dinov2-s", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, COMPLETION: "complete_bash", **words},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["dinov2-s14", "dinov2-s14-reg"]
    assert done.stderr.split() == ["False"]
