"""Suites: files, the choice of settings, tasks that fail, going on, the paper's VTAB-1k."""

import json
import signal
import subprocess
import sys
import time
from statistics import fmean

import numpy as np
import pytest
from PIL import Image
from support.tiny import TINY, vitcli

from vitcli.cli import main as cli
from vitcli.commands import suite as command
from vitcli.config.recipe import check, lay_over, load_recipe
from vitcli.config.schema import Recipe
from vitcli.data.augment.transform import TrainTransform
from vitcli.data.splits import parse_slice
from vitcli.errors import VitcliError
from vitcli.evals.suite_file import group_means, load_suite, published_results, suite_files
from vitcli.files import exclusive
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet
from vitcli.vit import parse_variant
from vitcli.weights.load import load_model
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
    # The paper gives the tasks (Table 9, one digit) and the mean (Table 2) apart from each other.
    for publication, mean in suite.published.items():
        assert fmean(t.published[publication] for t in suite.tasks) == pytest.approx(mean, abs=0.02)
    assert len(suite.published) == 3
    recipe = load_recipe(suite.recipe, suite.settings, "finetune")
    assert parse_slice(recipe.data.train_split).bounds(50_000) == (0, 1000)
    assert recipe.data.test_split == "test"
    assert recipe.train.steps == 2500 and recipe.optim.lr == 0.01


def dot(column):
    """A white square of two pixels in one of eight columns."""
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[15:17, 4 * column + 1 : 4 * column + 3] = 255
    return Image.fromarray(pixels)


def test_no_view_of_a_task_of_the_paper_s_suite_destroys_its_labels():
    """BiT's rule: orientation, position and count are the same in every view of an image."""
    suite, _ = load_suite("vtab1k")
    keeps = {"Clevr-Count", "dSpr-Loc", "dSpr-Ori", "sNORB-Azim", "sNORB-Elev"}
    distance = {"Clevr-Dist", "DMLab", "KITTI-Dist"}
    preprocess = Preprocess((32, 32), num_channels=1, interpolation="bilinear", antialias=False)
    for task in suite.tasks:
        settings = {}
        lay_over(settings, suite.settings)
        lay_over(settings, task.settings)
        augment = load_recipe(suite.recipe, settings, "finetune").augment
        transform = TrainTransform(preprocess, augment)
        views = {
            column: {
                transform(dot(column), np.random.default_rng(seed)).numpy().tobytes()
                for seed in range(8)
            }
            for column in (1, 5)
        }
        one_view = all(len(found) == 1 for found in views.values())
        assert one_view == (task.name in keeps), task.name
        assert (augment.crop == "none") == (task.name in keeps | distance), task.name
        if task.name in distance:  # mirrored, but never larger or smaller
            assert len(views[1]) == 2


def model_of(suite, task):
    """(recipe of a task that trains, the configuration of its model)."""
    settings = {}
    for layer in (suite.settings, task.settings):
        lay_over(settings, layer)
    recipe = load_recipe(suite.recipe, settings, "pretrain")
    return recipe, parse_variant(recipe.model.name, **recipe.model.architecture())


def test_the_suites_of_the_paper_s_ablations_are_as_its_text_says():
    positions, classes, shapes = (
        load_suite(name)[0] for name in ("positions", "class_token", "shapes")
    )
    table = {}
    for task in positions.tasks:
        _, config = model_of(positions, task)
        assert (config.embed_dim, config.depth, config.patch_size) == (768, 12, 16)
        table[config.position, config.position_at] = task.published["the paper"]
    assert table == {  # Table 8
        ("none", "stem"): 61.382,
        ("learned", "stem"): 64.206,
        ("learned", "every"): 63.964,
        ("learned", "shared"): 64.292,
        ("learned2d", "stem"): 64.001,
        ("learned2d", "every"): 64.046,
        ("learned2d", "shared"): 64.022,
        ("relative", "stem"): 64.032,
    }
    rates = [
        (model_of(classes, t)[1].pool, model_of(classes, t)[0].optim.lr) for t in classes.tasks
    ]
    assert rates[:2] == [("token", 8e-4), ("mean", 3e-4)]  # Figure 9
    base, *others = (model_of(shapes, task)[1] for task in shapes.tasks)
    sizes = (base.depth, base.embed_dim, base.mlp_dim, base.patch_size)
    assert sizes == (8, 1024, 2048, 32)  # Figure 8
    keys = ("depth", "embed_dim", "mlp_dim", "patch_size")
    for task, config in zip(shapes.tasks[1:], others, strict=True):
        changed = [key for key in keys if getattr(config, key) != getattr(base, key)]
        assert len(changed) == (3 if task.group == "all" else 1), task.name
        assert config.embed_dim == 64 * config.num_heads == config.representation_size
    assert max(config.depth for config in others) == 64


def test_a_suite_that_pretrains(here, inside, capfd):
    """Each task trains its model, which is then few-shot evaluated; a second start does nothing."""
    recipe = check(Recipe, {**TINY, "train": {**TINY["train"], "steps": 2}}, "tiny")
    (here / "tiny.toml").write_text(recipe.to_toml())
    write(
        here / "two.toml",
        """
name = "Two"
method = "pretrain"
recipe = "tiny.toml"
data = "builtin:digits"
shots = 2
[[tasks]]
name = "one"
published = { "theirs" = 50.0 }
[[tasks]]
name = "two"
settings = { model = { position = "none" } }
""",
    )
    words = ["evaluate", "--suite", "two.toml", "--out", "out"]
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert facts["method"] == "pretrain" and facts["tasks"]["two"]["data"] == "builtin:digits"
    for name, position in (("one", "learned"), ("two", "none")):
        shots = json.loads((here / f"out/{name}-fewshot/result.json").read_text())
        assert facts["tasks"][name]["accuracy"] == shots["shots"]["2"]["accuracy"]["mean"]
        assert load_model(here / "out" / name).config.position == position
    before = (here / "out/one-fewshot/model.safetensors").stat().st_mtime_ns
    assert cli.run(words) == 0
    assert "few-shot after pretraining" in capfd.readouterr().out
    assert (here / "out/one-fewshot/model.safetensors").stat().st_mtime_ns == before
    assert cli.run([*words, "--model", "B/16"]) == 2
    assert "trains its own models" in capfd.readouterr().err


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


def test_two_suites_in_one_folder(here, weights):
    recipe = finetune_recipe(here / "tiny.toml", train={"steps": 1})
    task = '[[tasks]]\nname = "Digits"\ndata = "builtin:digits"\n'
    write(here / "one.toml", f'name = "One"\nrecipe = "{recipe}"\n{task}')
    out = here / "out"
    out.mkdir()
    (here / "link").symlink_to(out)
    with exclusive(out / command.LOCK, lambda: VitcliError("held")):
        for place in (out, here / "link"):
            with pytest.raises(VitcliError, match="another process runs a suite in"):
                command.run("one.toml", model=weights, out=place)
    assert not list(out.iterdir())


def test_killed_before_its_first_file_it_starts(here, weights, inside):
    write(here / "two.toml", FEWSHOT)
    (here / "out").mkdir()
    for name in (command.LOCK, f".{command.RECORD}.0123456789ab.tmp"):
        (here / "out" / name).touch()
    command.run("two.toml", model=weights, out=here / "out")
    assert not list((here / "out").glob(".*"))


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
