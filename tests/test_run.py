"""The run directory."""

import json
import os
import subprocess
import sys

import pytest

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.progress import Logged, Quiet
from vitcli.run import (
    Run,
    create_numbered_run,
    create_run,
    finished_runs,
    new_output,
)
from vitcli.train.resuming import check_resumable, reopen_run


def recipe(**train):
    return check(Recipe, {"command": "pretrain", "train": {"steps": 3, **train}}, "x")


def test_a_run_holds_its_recipe_and_is_not_overwritten(tmp_path):
    run = create_run(tmp_path / "runs/a", recipe())
    assert run.recipe() == recipe()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
    with pytest.raises(VitcliError, match="exists already") as caught:
        create_run(tmp_path / "runs/a", recipe())
    assert "--resume" in caught.value.hint
    run.finish({"a": 1})
    with pytest.raises(VitcliError) as caught:
        create_run(tmp_path / "runs/a", recipe())
    assert "--resume" not in caught.value.hint


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "a").mkdir()
    assert create_run(tmp_path / "a", recipe()).recipe_file.is_file()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(VitcliError, match="exists already"):
        create_run(tmp_path / "a", recipe())
    with pytest.raises(VitcliError, match="cannot create the folder"):
        create_run(tmp_path / "a" / "b", recipe())


def test_resume_names_the_settings_that_differ(tmp_path):
    assert reopen_run(tmp_path / "a", recipe()) is None
    create_run(tmp_path / "a", recipe())
    assert reopen_run(tmp_path / "a", recipe()) == Run(tmp_path / "a")
    with pytest.raises(VitcliError, match=r"these differ: train\.batch_size, train\.seed"):
        reopen_run(tmp_path / "a", recipe(seed=1, batch_size=3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    with pytest.raises(VitcliError, match="is not a run"):
        reopen_run(tmp_path / "b", recipe())


def test_records_survive_a_line_cut_off_and_are_forgotten_after_a_step(tmp_path):
    run = create_run(tmp_path / "a", recipe())
    for step in (1, 2, 3):
        run.log({"step": step, "train/loss": 1.0})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "tra')
    run.drop_records_after(2)
    assert [r["step"] for r in run.records()] == [1, 2]
    run.log({"step": 3})
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_step_has_one_line(tmp_path):
    run = create_run(tmp_path / "a", recipe())
    run.log({"step": 1, "train/loss": 2.0})
    run.log({"step": 2, "train/loss": 1.0, "x": 0.123456789})
    run.log({"step": 2, "x": 1, "test/loss": 3.0})
    run.log({"step": 3, "train/loss": 0.5})
    assert run.metrics_file.read_text().endswith("}\n")
    assert run.records() == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.0, "x": 1, "test/loss": 3.0},
        {"step": 3, "train/loss": 0.5},
    ]


def test_a_line_that_becomes_shorter_leaves_no_rest(tmp_path):
    run = create_run(tmp_path / "a", recipe())
    run.log({"step": 1, "x": 0.123456789})
    run.log({"step": 1, "x": 1})
    assert run.metrics_file.read_text() == '{"step": 1, "x": 1}\n'


def test_a_resume_needs_to_be_told_which(tmp_path):
    check_resumable(tmp_path / "x")
    with pytest.raises(VitcliError, match="`--out` is missing") as caught:
        check_resumable(None, tmp_path / "none")
    assert caught.value.hint == "add `--out RUN`"
    for number, name in enumerate(("a", "b", "c")):
        run = create_run(tmp_path / name, recipe())
        os.utime(run.recipe_file, (number, number))
    Run(tmp_path / "c").finish({})
    with pytest.raises(VitcliError) as caught:
        check_resumable(None, tmp_path)
    assert f"`--out {tmp_path / 'b'}`" in caught.value.hint


def test_the_newest_finished_run_comes_first(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        run = create_run(tmp_path / name, recipe())
        run.weights_file.write_bytes(b"")
        if name != "c":
            run.finish({})
            os.utime(run.result_file, (number, number))
    assert [r.path.name for r in finished_runs(tmp_path)] == ["b", "a"]
    assert finished_runs(tmp_path / "none") == []
    with new_output(None, "a", runs=tmp_path) as path:
        assert path == tmp_path / "a-2" and path.is_dir()
    with new_output(None, "z", runs=tmp_path) as path:
        assert path == tmp_path / "z"
    with new_output(tmp_path / "given", "z", runs=tmp_path) as path:
        assert path == tmp_path / "given" and not path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    assert create_numbered_run("b", recipe(), tmp_path).path == tmp_path / "b-2"


def test_provenance_says_what_a_reader_asks(tmp_path):
    run = create_run(tmp_path / "a", recipe())
    run.write_provenance({"steps": 3})
    facts = run.provenance()
    assert facts["steps"] == 3 and facts["libraries"]["torch"] and facts["argv"]


@pytest.mark.parametrize("text", ["{{{", "[1, 2]"])
def test_a_damaged_result_is_named(text, tmp_path):
    run = create_run(tmp_path / "a", recipe())
    run.result_file.write_text(text)
    with pytest.raises(VitcliError, match=r"result\.json` is damaged") as caught:
        run.result()
    assert "remove the file" in caught.value.hint


def test_a_name_that_is_not_utf8(tmp_path):
    with pytest.raises(VitcliError, match="is not UTF-8"):
        create_run(tmp_path / os.fsdecode(b"caf\xe9"), recipe())


def test_records_that_cannot_be_written(tmp_path):
    run = create_run(tmp_path / "a", recipe())
    run.metrics_file.mkdir()
    with pytest.raises(VitcliError, match=r"cannot write .*metrics\.jsonl") as caught:
        run.log({"step": 1})
    assert "--resume" in caught.value.hint


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from vitcli.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]))
full = run.metrics_file.stat().st_size + 5
resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))
run.log({"step": int(sys.argv[2]), "test/accuracy": 0.5})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
@pytest.mark.parametrize("step", [2, 3])
def test_a_record_that_does_not_fit_on_the_disk_leaves_the_last_one(step, tmp_path):
    """Step 2 is merged into a record that is there, step 3 is appended."""
    run = create_run(tmp_path / "a", recipe())
    known = [{"step": n, "train/loss": 1.0, "seconds": 0.5} for n in (1, 2)]
    for record in known:
        run.log(record)
    code = [sys.executable, "-c", FULL_DISK, str(run.path), str(step)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert "VitcliError: cannot write" in done.stderr and "File too large" in done.stderr
    assert run.records() == known and run.metrics_file.read_bytes().endswith(b"}\n")


def test_a_message_is_one_line_of_the_log(tmp_path):
    Logged(Quiet(), tmp_path / "log.txt").warn("`a\nerror: b\x1b[2J\udcff` is odd")
    (line,) = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert line.endswith(r" warning: `a\nerror: b\x1b[2J\xff` is odd")


def test_a_lock_that_a_killed_command_has_left_beside_its_run_is_removed(tmp_path):
    create_run(tmp_path / "a", recipe())
    (tmp_path / ".a.lock").touch()
    with pytest.raises(VitcliError, match="exists already"):
        create_run(tmp_path / "a", recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
