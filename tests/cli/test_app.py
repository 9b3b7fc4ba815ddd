"""The command line: exit statuses, what goes to which stream, errors with hints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import write_tiny

from vitcli import __version__
from vitcli.cli.main import run
from vitcli.commands import pretrain
from vitcli.data.readers import READERS
from vitcli.weights.store import load_weights

COMMANDS = (
    "patchify",
    "pretrain",
    "finetune",
    "fewshot",
    "predict",
    "evaluate",
    "export",
    "recipes",
    "models",
    "settings",
    "plan",
    "bench",
    "inspect",
    "check",
    "compare",
    "doctor",
)

SLOW_TO_LOAD = {
    *("torch", "numpy", "scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "PIL"),
    *("accelerate", "datasets", "transformers", "huggingface_hub"),
    *("psutil", "asyncio", "http", "ssl", "jinja2", "yaml"),
}
FATES = ("loaded ", "resampled ", "new ", "dropped ")


def call(capfd, *arguments):
    """Status, stdout and stderr of a command line."""
    status = run([str(a) for a in arguments])
    streams = capfd.readouterr()
    return status, streams.out, streams.err


def pictures(folder, classes=("cat", "dog"), count=4, size=16):
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 128, (size, size, 3)) + 100 * (c % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a finished tiny run, a classifier of digits, and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_tiny(folder / "tiny.toml")
    pretrain.run(recipe=str(recipe), out=folder / "runs/tiny")
    pictures(folder / "photos")
    return folder


@pytest.fixture
def trained(original, here):
    """A copy of that folder, as the current folder."""
    shutil.copytree(original, here, dirs_exist_ok=True)
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_worked_example(command, capfd):
    status, out, _ = call(capfd, command, "--help")
    assert status == 0
    assert f"Example: vitcli {command}" in " ".join(out.split())


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)])
def test_help_shows_no_type_beside_a_switch_and_not_its_own_name(words, capfd):
    status, out, _ = call(capfd, *words, "--help")
    assert status == 0
    assert "bool" not in out
    assert not any(f"({word})" in out for word in words)


def test_help_names_the_formats_and_the_report(capfd):
    for command in ("evaluate", "check", "inspect"):
        text = " ".join(call(capfd, command, "--help")[1].replace("│", " ").split())
        assert "Folder for report.html" in text
        named = [reader.example in text for reader in READERS.values()]
        assert all(named) or command == "inspect"


def test_version(capfd):
    assert call(capfd, "--version") == (0, f"vitcli {__version__}\n", "")


def test_help_answers_at_once():
    """It loads no package that takes longer to load than the 0.3 s in which help has to answer."""
    code = (
        "import sys; from vitcli.cli.main import run; status = run(sys.argv[1:])\n"
        "print(*sorted(m for m in sys.modules if '.' not in m), file=sys.stderr); sys.exit(status)"
    )
    for words in (["--help"], ["--version"], ["pretrain", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        # Typer itself loads pydantic where it converts a value.
        unneeded = {"pydantic", "email", "socket"} if words == ["--help"] else set()
        assert not (SLOW_TO_LOAD | unneeded) & set(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["pretrain", "--epoch", "3"], "No such option: --epoch", "see `vitcli pretrain --help`"),
        (["train"], "No such command 'train'", "see `vitcli --help`"),
        (
            ["finetune", "data", "model=weights", "batch_size=3", "train.seed=1"],
            "(model=weights batch_size=3 train.seed=1)",
            "write `--model weights --batch-size 3 --set train.seed=1`",
        ),
        (["evaluate", "data", "--json", "true"], "(true)", "takes no value: remove `true`"),
        (["finetune", "data", "--budget", "3"], "'3' is not a duration", "train.budget` explains"),
        (["predict"], "Missing argument", "see `vitcli predict --help`"),
        (
            ["pretrain", "--recipe", "pretrain_formla"],
            "unknown recipe",
            "did you mean `pretrain_formula`?",
        ),
        (["pretrain", "--set", "train.bach_size=3"], "`train.batch_size`", "vitcli recipes"),
        (
            ["pretrain", "--recipe", "finetune"],
            "is for `vitcli finetune`",
            "vitcli finetune --recipe",
        ),
        (["pretrain", "--image-size", "30"], "not a multiple of patch size 8", "must divide"),
        (["finetune"], "no finished `pretrain` run", "run `vitcli pretrain` first"),
        (
            ["finetune", "builtin:digits", "-m", "Pico/4", "--set", "objective.name=mae"],
            "`mae` trains no head for the classes",
            "vitcli pretrain builtin:digits --set objective.name=mae",
        ),
        (["pretrain", "--lr", "0"], "`optim.lr` = 0.0 must be greater than 0", ""),
        (["pretrain", "--steps", "0"], "`train.steps` = 0 must be greater than 0", ""),
        (["pretrain", "--find-lr", "--dry-run"], "two different commands", "remove one"),
        (["fewshot", "--shots", "a"], "not a list of numbers", "--shots 1,5,10"),
        (["fewshot", "--shots", "0"], "`fewshot.shots` = 0", ""),
        (["fewshot", "--l2", "some"], "`--l2 some` is not a number", "`auto`"),
        (["fewshot", "--l2", "-1"], "`fewshot.l2` = -1.0", ""),
        (["fewshot", "--method", "svm"], "unknown few-shot method `svm`", "`ridge`"),
        (["fewshot", "--method", "knn", "--l2", "auto"], "`l2` belongs to the methods", "`--l2`"),
        (
            ["fewshot", "-m", "Pico/4", "--method", "knn", "--out", "x"],
            "no classifier that",
            "--out",
        ),
        (
            ["fewshot", "-m", "Pico/4", "--representation", "cl"],
            "unknown representation `cl`",
            "`cls`",
        ),
        (["export"], "Missing option '--to'", "see `vitcli export --help`"),
        (
            ["export", "--to", "onx", "--model", "Pico/4"],
            "unknown format `onx`",
            "did you mean `onnx`",
        ),
        (["export", "--to", "timm"], "there is no finished run", "vitcli pretrain"),
        (["predict", "no.jpg", "--model", "B/16"], "no such image: `no.jpg`", "globs"),
        (["evaluate", "nowhere/", "--model", "B/16"], "", ""),
        (["fewshot"], "no ", "vitcli pretrain"),
    ],
)
def test_mistakes_are_one_error_and_one_hint(arguments, error, hint, here, capfd):
    status, out, err = call(capfd, *arguments)
    assert status == 2
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert error in lines[0] and hint in lines[1]
    assert not (here / "runs").exists()


def test_a_run_directory_that_exists_is_not_overwritten(trained, capfd):
    before = (trained / "runs/tiny/model.safetensors").read_bytes()
    status, _, err = call(capfd, "pretrain", "--recipe", "tiny.toml", "--out", "runs/tiny")
    assert status == 2 and "`runs/tiny` exists already" in err and "hint: " in err
    assert (trained / "runs/tiny/model.safetensors").read_bytes() == before


def test_resume_names_the_keys_that_differ_and_leaves_a_finished_run(trained, capfd):
    common = ("pretrain", "--recipe", "tiny.toml", "--out", "runs/tiny", "--resume")
    status, _, err = call(capfd, *common, "--lr", "0.5")
    assert status == 2 and "these differ: optim.lr" in err
    status, _, err = call(capfd, *common)
    assert status == 0 and "already finished" in err


def test_a_recipe_as_json_and_an_argument_that_wins_over_set(here, capfd):
    assert run(["recipes", "finetune_digits", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["data"]["name"] == "builtin:digits"
    plan = ["--dry-run", "--json", "--set", "model.name=Pico/4", "--set", "model.image_size=8"]
    assert run(["finetune", "builtin:digits", "--model", "mu/4", *plan]) == 0
    assert json.loads(capfd.readouterr().out)["model"] == "mu/4"


def test_json_is_the_only_thing_on_stdout(trained, capfd):
    for arguments in (
        ("pretrain", "--recipe", "tiny.toml", "--out", "runs/second", "--json"),
        ("evaluate", "--model", "runs/tiny", "--json"),
        ("fewshot", "--model", "runs/tiny", "--shots", "1,2", "--json"),
        ("patchify", "photos", "--patch-size", "8", "--json"),
        ("recipes", "--json"),
    ):
        status, out, err = call(capfd, *arguments)
        assert status == 0, err
        json.loads(out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--model", "runs/tiny", "--json"),
        ("predict", "photos/cat/0.png", "--model", "runs/tiny", "--json"),
        ("fewshot", "--model", "runs/tiny", "--json"),
        ("finetune", "--model", "runs/tiny", "--steps", "1", "--batch-size", "4", "--json"),
        ("export", "--model", "runs/tiny", "--to", "timm", "--json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_one_line_about_the_weights_or_with_verbose_one_for_each_tensor(arguments, trained, capfd):
    names = load_weights("runs/tiny/model.safetensors")
    for more in ((), ("--verbose",)):
        status, out, err = call(capfd, *arguments, *more)
        assert status == 0, err
        json.loads(out)
        assert sum(" tensors loaded (vitcli)" in line for line in err.splitlines()) == 1
        told = [line.split()[1] for line in err.splitlines() if line.startswith(FATES)]
        assert sorted(told) == (sorted(names) if more else [])


def test_fewshot_json_is_the_contracts(trained, capfd):
    status, out, _ = call(capfd, "fewshot", "--model", "runs/tiny", "--shots", "1,5", "--json")
    result = json.loads(out)
    assert status == 0 and set(result["shots"]) == {"1", "5"}
    assert {"model", "data", "shots", "dim", "classes", "test_images"} <= set(result)
    five = result["shots"]["5"]
    assert five["l2"] == 1024.0 and len(five["accuracy"]["seeds"]) == 3
    assert five["accuracy"]["mean"] == pytest.approx(np.mean(five["accuracy"]["seeds"]))


def test_predict_goes_on_past_what_cannot_be_read(trained, capfd):
    (trained / "photos/cat/broken.jpg").write_bytes(b"not a picture")
    status, out, err = call(capfd, "predict", "photos", "missing.png", "--top", "2", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 3 and len(rows) == 10
    bad = [row for row in rows if row["error"]]
    assert {Path(row["path"]).name for row in bad} == {"broken.jpg", "missing.png"}
    assert all(row["label"] is None for row in bad)
    good = next(row for row in rows if not row["error"])
    assert set(good) == {"path", "label", "probability", "top", "error"} and len(good["top"]) == 2
    assert err.count("error: ") == 2


def test_predict_takes_the_newest_classifier_and_writes_tables(trained, capfd):
    status, _, err = call(capfd, "predict", "photos", "--csv", "a.csv", "--parquet", "a.parquet")
    assert status == 0 and "runs/tiny" in err
    assert len((trained / "a.csv").read_text().splitlines()) == 9
    assert (trained / "a.parquet").stat().st_size > 0


def test_predict_refuses_a_model_without_a_trained_head(trained, capfd):
    status, _, err = call(capfd, "predict", "photos", "--model", "Ti/16")
    assert status == 2 and "no trained head" in err and "vitcli fewshot" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x80\x04\x95junk", "pickle"), (b"PK\x03\x04junk", "pickle"), (b"short", "truncated")],
)
def test_weights_that_are_not_ours_to_open(content, words, trained, capfd):
    (trained / "x.safetensors").write_bytes(content)
    status, _, err = call(capfd, "predict", "photos", "--model", "x.safetensors")
    assert status == 2 and words in err and "hint: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f.mkdir(), "image"),
        (lambda f: pictures(f, classes=("cat",)), "class"),
        (lambda f: (pictures(f / "train"), pictures(f / "test", ("cat", "dog", "owl"))), "owl"),
    ],
)
def test_folders_that_cannot_be_learned_from(make, words, trained, capfd):
    make(trained / "data")
    status, _, err = call(capfd, "pretrain", "data", "--recipe", "tiny.toml", "--out", "runs/x")
    assert status == 2 and words in err and "hint: " in err
    assert not (trained / "runs/x").exists()


def test_a_label_column_that_is_not_there(trained, capfd):
    (trained / "labels.csv").write_text("path,kind\nphotos/cat/0.png,cat\nphotos/dog/0.png,dog\n")
    status, _, err = call(
        capfd, "pretrain", "labels.csv", "--recipe", "tiny.toml", "--set", "data.label_column=breed"
    )
    assert status == 2 and "breed" in err and "kind" in err


def test_a_bug_of_ours_is_a_traceback(monkeypatch, here):
    import vitcli.commands.recipes as command

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(command, "run", broken)
    with pytest.raises(ZeroDivisionError):
        run(["recipes"])


def test_colour_is_left_out_where_it_is_not_wanted(trained):
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vitcli", "patchify", "photos/cat/0.png"],
        cwd=trained,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b[" not in done.stdout + done.stderr
    assert "196 tokens" in done.stdout


@pytest.mark.parametrize("split", ["train", "test"])
def test_training_goes_on_past_a_broken_image_and_says_so(split, trained, capfd):
    for name in ("train", "test"):
        pictures(trained / "animals" / name)
    (trained / "animals" / split / "dog/broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    common = ("pretrain", "animals", "--recipe", "tiny.toml", "--out")
    status, out, err = call(capfd, *common, "runs/some", "--json")
    assert status == 3, err
    assert any("broken.jpg" in name for name in json.loads(out)["broken"])
    assert "error: " in err and "broken.jpg" in err
    if split == "train":
        status, _, err = call(capfd, *common, "runs/strict", "--strict")
        assert status == 2 and "broken.jpg" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pretrain", ""), "DATA is an empty string"),
        (("pretrain", "--recipe", ""), "unknown recipe ``"),
        (("finetune", "photos", "--model", ""), "the MODEL is empty"),
        (("finetune", "--recipe", ""), "unknown recipe ``"),
        (("fewshot", "", "--model", "runs/tiny"), "DATA is an empty string"),
        (("evaluate", "", "--model", "runs/tiny"), "DATA is an empty string"),
        (("predict", "photos", "--model", ""), "the MODEL is empty"),
        (("patchify", ""), "DATA is an empty string"),
        (("patchify", "a" * 300), "File name too long"),
    ],
)
def test_a_shell_variable_that_is_not_set(arguments, words, trained, capfd):
    status, _, err = call(capfd, *arguments)
    assert status == 2 and words in err and "hint: " in err


def test_a_damaged_result_does_not_stand_in_the_way(trained, capfd):
    shutil.copytree("runs/tiny", "runs/newer")
    result = trained / "runs/newer/result.json"
    result.write_text("{")
    later = (trained / "runs/tiny/result.json").stat().st_mtime + 10
    os.utime(result, (later, later))
    status, _, err = call(capfd, "finetune", "photos", "--steps", "1", "--batch-size", "4")
    assert status == 0 and "runs/tiny" in err
    again = ("pretrain", "--recipe", "tiny.toml", "--out", "runs/newer", "--resume")
    for text, words in (("{", "is damaged"), ('{"a": 1}', "not the result of a training run")):
        result.write_text(text)
        status, _, err = call(capfd, *again)
        assert status == 2 and words in err and "remove the file" in err


@pytest.mark.slow
def test_streams_that_are_closed_full_or_of_few_letters(trained):
    command = f"{sys.executable} -m vitcli predict 'photos/猫' --model runs/tiny"
    shutil.copytree("photos/cat", "photos/猫")

    def shell(text, **environment):
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {text}"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    closed = shell(f"{command} --json >&-")
    assert (closed.returncode, closed.stdout) == (0, "") and "Traceback" not in closed.stderr
    assert shell(f"{command} --json | head -1").returncode == 0
    few = shell(command, PYTHONIOENCODING="ascii")
    assert few.returncode == 0 and r"photos/\u732b/0.png" in few.stdout
    if Path("/dev/full").exists():
        full = shell(f"{command} --json > /dev/full")
        assert full.returncode == 2 and "No space left on device" in full.stderr
        assert "hint: free some disk space" in full.stderr


def test_a_signal_is_128_and_its_number_and_one_word(trained):
    words = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "stopped by SIGTERM\n"}
    for seconds, number in ((1.0, signal.SIGINT), (2.0, signal.SIGTERM)):
        process = subprocess.Popen(
            [sys.executable, "-m", "vitcli", "predict", *["photos"] * 2000, "--model", "runs/tiny"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(seconds)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode != -number:  # Python itself was still starting
            assert process.returncode == 128 + number and "Traceback" not in err
            assert err.endswith(words[number])


@pytest.mark.parametrize(
    "given",
    [
        ("--steps", "3", "--epochs", "2"),
        ("--budget", "1m", "--set", "train.steps=3"),
        ("--set", "train.images=9", "--set", "train.epochs=1"),
    ],
)
def test_two_lengths_of_a_run_are_a_mistake(given, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capfd, "pretrain", *given)
    assert status == 2 and "the length of the run is set by" in err
    assert not (tmp_path / "runs").exists()
