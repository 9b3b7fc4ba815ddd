"""Suites: files, the choice of settings, tasks that fail, going on, the paper's VTAB-1k."""

import json
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest
from support.tiny import TINY, vitcli

from vitcli.cli import main as cli
from vitcli.commands import suite as command
from vitcli.config.recipe import check, load_recipe
from vitcli.config.schema import Recipe
from vitcli.data.splits import parse_slice
from vitcli.errors import VitcliError
from vitcli.evals.suite_file import group_means, load_suite, published_results, suite_files
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

MODEL = {"image_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random ViT of 8 pixels."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = create_model("Pico/4", num_channels=1, pool="mean", class_token=False, **MODEL)
    model.preprocess = Preprocess(image_size=(8, 8), mean=(0.5,), std=(0.5,), num_channels=1)
    save_model(path, model)
    return str(path)


@pytest.fixture
def inside(monkeypatch):
    """Tasks run in this process: their own start takes longer than they do."""

    def run_command(words, label, watch):
        if cli.run(list(words)) not in (0, 3):
            raise VitcliError(f"{label} failed: {words[1]}")

    monkeypatch.setattr(command, "run_command", run_command)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def finetune_recipe(path, **sections):
    """A recipe of a second that takes the weights as they are."""
    sections["train"]["ema_decay"] = None
    sections = {**TINY, **{k: {**TINY.get(k, {}), **v} for k, v in sections.items()}}
    recipe = check(Recipe, {**sections, "command": "finetune", "model": {}}, "tiny")
    path.write_text(recipe.to_toml())
    return path


FEWSHOT = """
name = "Two"
method = "fewshot"
shots = 2
settings.fewshot.seeds = 2
[[tasks]]
name = "One"
group = "a"
data = "builtin:digits"
published = { "theirs" = 50.0 }
[[tasks]]
name = "Two of them"
group = "b"
data = "builtin:digits"
settings.fewshot.seeds = 1
published = { "theirs" = 70.0 }
"""


def test_the_papers_suite_is_as_its_table_says():
    suite, path = load_suite("vtab1k")
    assert path == suite_files()["vtab1k"] and len(suite.tasks) == 19
    groups = [task.group for task in suite.tasks]
    counts = {name: groups.count(name) for name in groups}
    assert counts == {"natural": 7, "specialized": 4, "structured": 8}
    h14 = [task.published["ViT-H/14, JFT"] for task in suite.tasks]
    # The paper gives the tasks and the mean apart from each other.
    assert fmean(h14) == pytest.approx(suite.published["ViT-H/14, JFT"], abs=0.005)
    recipe = load_recipe(suite.recipe, suite.settings, "finetune")
    assert parse_slice(recipe.data.train_split).bounds(50_000) == (0, 1000)
    assert recipe.data.test_split == "test"
    assert recipe.train.steps == 2500 and recipe.optim.lr == 0.01


def test_a_few_shot_suite_from_the_command_line(here, weights, inside, capfd):
    write(here / "two.toml", FEWSHOT)
    words = ["evaluate", "--suite", "two.toml", "--model", weights, "--out", "out"]
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert facts == json.loads((here / "out/result.json").read_text())
    one, two = facts["tasks"]["One"], facts["tasks"]["Two of them"]
    assert one["images"] == 359 and (here / one["run"] / "model.safetensors").is_file()
    kept = json.loads((here / "out/one/result.json").read_text())
    assert one["accuracy"] == kept["shots"]["2"]["accuracy"]["mean"]
    assert len(kept["shots"]["2"]["accuracy"]["seeds"]) == 2
    other = json.loads((here / "out/two-of-them/result.json").read_text())
    assert len(other["shots"]["2"]["accuracy"]["seeds"]) == 1  # the task's own setting
    assert facts["mean"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
    assert facts["groups"] == {"a": one["accuracy"], "b": two["accuracy"]}
    assert facts["published"]["theirs"]["mean"] == pytest.approx(0.6)
    before = (here / "out/one/result.json").stat().st_mtime_ns
    assert cli.run(words) == 0 and "mean of 2" in capfd.readouterr().out
    assert (here / "out/one/result.json").stat().st_mtime_ns == before  # not done again
    assert cli.run([*words[:-3], "B/16", *words[-2:]]) == 2
    assert "started with another model" in capfd.readouterr().err


SELECTED = """
name = "Chosen"
method = "finetune"
recipe = "{recipe}"
settings.data.train_split = "train[:200]"
settings.data.test_split = "test"
[select]
train = "train[:150]"
validation = "train[150:200]"
grid = {{ "optim.lr" = [1e-9, 0.05] }}
[[tasks]]
name = "Digits"
data = "builtin:digits"
"""


def test_settings_are_chosen_on_training_images_alone(here, weights, inside):
    recipe = finetune_recipe(
        here / "tiny.toml",
        optim={"name": "adamw", "momentum": 0.9, "lr": 1e-3},
        train={"steps": 30},
    )
    suite = write(here / "chosen.toml", SELECTED.format(recipe=recipe))
    result = command.run(suite, model=weights, out=here / "out")
    task = result.to_json()["tasks"]["Digits"]
    assert task["chosen"] == {"optim.lr": 0.05}  # with the other rate nothing is learned
    assert task["images"] == 359
    tried = [json.loads((here / f"out/digits-select-{i}/result.json").read_text()) for i in (0, 1)]
    assert [one["figures"]["images"] for one in tried] == [50, 50]
    assert tried[0]["figures"]["accuracy"] < tried[1]["figures"]["accuracy"]


def test_a_task_that_fails_takes_no_other_with_it(here, weights, inside, capfd):
    text = FEWSHOT.replace('data = "builtin:digits"', 'data = "nowhere"', 1)
    write(here / "two.toml", text)
    assert cli.run(["evaluate", "--suite", "two.toml", "--model", weights, "--json"]) == 3
    said = capfd.readouterr()
    facts = json.loads(said.out.splitlines()[-1])
    assert facts["mean"] is None and "nowhere" in facts["failed"]["One"]
    assert facts["tasks"]["One"]["accuracy"] is None and "b" in facts["groups"]
    assert "error: One: " in said.err


def test_no_task_at_all_is_an_error(here, weights, inside):
    suite = write(here / "two.toml", FEWSHOT.replace("builtin:digits", "nowhere"))
    with pytest.raises(VitcliError, match=r"every task of suite `Two` failed"):
        command.run(suite, model=weights)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 1", "`tasks` is missing"),
        (FEWSHOT.replace("Two of them", "one"), "two tasks have the run name one"),
        (FEWSHOT.replace("shots = 2", "recipe = 'x'"), "`recipe` belongs to the method `finetune`"),
        (FEWSHOT.replace("shots = 2", "shotz = 2"), "no setting `shotz`"),
        ("name =", "is not TOML"),
    ],
)
def test_mistakes_in_a_suite_file(here, text, words):
    with pytest.raises(VitcliError, match="(?s)" + words) as caught:
        load_suite(write(here / "x.toml", text))
    assert "vtab1k.toml" in caught.value.hint


def test_names_that_are_not_there():
    with pytest.raises(VitcliError, match="unknown suite `vtab`") as caught:
        load_suite("vtab")
    assert "vtab1k" in caught.value.hint
    with pytest.raises(VitcliError, match=r"no suite file `lost\.toml`"):
        load_suite("lost.toml")


def test_what_a_suite_settles_is_refused_beside_it(here, capfd):
    words = ["evaluate", "builtin:digits", "--suite", "vtab1k", "--image-size", "8"]
    assert cli.run([*words, "--seed", "3"]) == 2
    assert "DATA, --image-size, --seed cannot be combined with `--suite`" in capfd.readouterr().err


def test_a_task_is_a_process_whose_error_is_its_reason():
    command.run_command(["--version"], "task", Quiet())
    with pytest.raises(VitcliError, match="unknown recipe `lost`"):
        command.run_command(["recipes", "lost"], "task", Quiet())


def test_means_of_groups_and_of_others(here):
    suite, _ = load_suite(write(here / "two.toml", FEWSHOT))
    assert group_means(suite, {"One": 0.5}) == {"a": 0.5}  # b is not complete
    assert list(published_results(suite)) == [("theirs", {"One": 50.0, "Two of them": 70.0}, 60.0)]


def test_settings_as_assignments():
    nested = {"data": {"train_split": "train[:5]"}, "model": {"image_size": [8, 16]}, "x": True}
    found = command.assignments(nested)
    from vitcli.config.recipe import parse_overrides

    assert found[0] == 'data.train_split="train[:5]"'
    assert parse_overrides(found[:2]) == {k: nested[k] for k in ("data", "model")}


@pytest.mark.slow
def test_interrupted_it_goes_on(here, weights):
    recipe = finetune_recipe(here / "tiny.toml", train={"steps": 4000, "log_steps": 5})
    task = '[[tasks]]\nname = "Digits"\ndata = "builtin:digits"\n'
    write(here / "long.toml", f'name = "Long"\nrecipe = "{recipe}"\n{task}')
    words = ["evaluate", "--suite", "long.toml", "--model", weights, "--out", "out"]
    child = subprocess.Popen(
        [sys.executable, "-m", "vitcli", *words], cwd=here, stderr=subprocess.PIPE, text=True
    )
    metrics = here / "out/digits/metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert list((here / "out/digits/checkpoints").iterdir())
    done = vitcli(*words, "--set", "train.steps=4000", cwd=here)
    assert done.returncode == 2  # other settings
    done = vitcli(*words, cwd=here)
    assert done.returncode == 0 and "resuming from step" in done.stderr, done.stderr
