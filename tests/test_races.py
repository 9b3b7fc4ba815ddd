"""Commands that start together: names on disk belong to one of them, and no file is lost."""

import json
import time

import numpy as np
import pytest
from support.racing import race

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.evals import feature_table
from vitcli.evals.feature_table import FeatureTable, evict
from vitcli.files import exclusive, replacing, take_first, write_text
from vitcli.progress import Quiet
from vitcli.run import Run, create_numbered_run, create_run, new_output
from vitcli.weights.google.npz import write_npz

RECIPE = check(Recipe, {"command": "finetune", "train": {"steps": 1}}, "x")


def test_runs_started_together_each_get_their_own_number(tmp_path):
    def start(number, process):
        run = create_numbered_run("a", RECIPE, tmp_path / str(number))
        run.finish({"process": process})
        return run.path.name

    for number, names in enumerate(race(start)):
        assert sorted(names) == ["a", "a-2", "a-3", "a-4"]
        for process, name in enumerate(names):
            run = Run(tmp_path / str(number) / name)
            assert run.result() == {"process": process} and run.recipe() == RECIPE


def test_one_of_several_runs_gets_the_path_that_was_given(tmp_path):
    def start(number, process):
        run = create_run(tmp_path / str(number), RECIPE)
        run.finish({"process": process})
        return "created"

    for number, found in enumerate(race(start)):
        assert found.count("created") == 1
        assert found.count(f"error: `{tmp_path / str(number)}` exists already") == 3
        assert Run(tmp_path / str(number)).result() == {"process": found.index("created")}


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_outputs_of_commands_started_together_differ(suffix, tmp_path):
    def write(number, process):
        with new_output(None, "m", suffix=suffix, runs=tmp_path / str(number)) as path:
            file = path if suffix else path / "result"
            file.write_text(str(process))
        return file

    for files in race(write):
        assert [file.read_text() for file in files] == ["0", "1", "2", "3"]


def test_a_name_that_a_failed_command_took_is_free_again(tmp_path):
    def fail(number, process):
        with new_output(None, "m", runs=tmp_path / "runs"):
            raise VitcliError("bad data", "")

    assert race(fail, rounds=40) == [["error: bad data"] * 4] * 40
    assert not (tmp_path / "runs").exists()


def test_an_export_file_is_written_by_one_command(tmp_path):
    def export(number, process):
        path = take_first([tmp_path / f"{number}.npz"], as_file=True)
        write_npz(path, {"a": np.full(3, process)}, {})
        return "written"

    for number, found in enumerate(race(export)):
        assert found.count("written") == 1
        with np.load(tmp_path / f"{number}.npz") as arrays:
            assert (arrays["a"] == found.index("written")).all()


def test_a_folder_that_is_renamed_to_its_name_removes_no_other(tmp_path):
    def write(number, process):
        with replacing(tmp_path / str(number)) as temporary:
            temporary.mkdir()
            (temporary / str(process)).write_text("")
        return "written"

    for number, found in enumerate(race(write)):
        assert found.count("written") == 1
        (file,) = (tmp_path / str(number)).iterdir()
        assert file.name == str(found.index("written"))
    assert len(list(tmp_path.iterdir())) == 20  # and no temporary file stays


def test_a_file_is_always_one_of_those_that_were_written(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "[0]")

    def write(number, process):
        write_text(path, json.dumps([process] * 5000))
        return len(set(json.loads(path.read_text())))

    assert race(write) == [[1] * 4] * 20
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_lock_has_one_holder(tmp_path):
    """The holder removes the file, while others have opened it and wait for it."""
    taken = tmp_path / "taken"

    def hold(number, process):
        held = 0
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            try:
                with exclusive(tmp_path / ".lock", lambda: VitcliError("busy", "")):
                    taken.mkdir()  # fails if another process is inside
                    taken.rmdir()
                    held += 1
            except VitcliError:
                continue
        return held

    ((*counts,),) = race(hold, rounds=1)
    assert all(isinstance(count, int) for count in counts) and sum(counts) > 4
    assert list(tmp_path.iterdir()) == []


def test_a_decoded_dataset_belongs_to_one_source(tmp_path):
    source = load_data("builtin:digits")

    def store(number, process):
        stored = write_decoded(source, tmp_path / str(number), side=8 + process, workers=1)
        return sum(stored.images.values())

    for number, found in enumerate(race(store, processes=3, rounds=3)):
        done = [process for process, count in enumerate(found) if count == 1797]
        assert len(done) == 1 and all(
            isinstance(e, str) for p, e in enumerate(found) if p not in done
        )
        description = json.loads((tmp_path / str(number) / "stored.json").read_text())
        assert description["side"] == 8 + done[0]


def test_a_feature_table_is_never_removed_while_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_table, "feature_cache_folder", lambda: tmp_path)
    rows = np.arange(50)
    stamps = np.ones(50, dtype=np.uint32)

    def use(number, process):
        if process == 0:
            evict([], max_bytes=0)
            return True
        table = FeatureTable(tmp_path / "t", 50, 8, {})
        with table.locked(Quiet()):
            table.create()
            missing = ~table.find_valid(rows, stamps)[0]
            if missing.any():
                values = np.full((missing.sum(), 8), 7.0, np.float32)
                table.write(rows[missing], values, stamps[missing])
            assert table.find_valid(rows, stamps)[0].all()
            return bool((table.read(rows) == 7.0).all())

    assert race(use, rounds=40) == [[True] * 4] * 40
