"""The script that kills commands, with few kills, and a run on a disk that fills."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import train_tiny, weights

from vitcli.errors import VitcliError
from vitcli.train import checkpoint

SCRIPT = Path(__file__).parents[1] / "recipes/prove_resume.py"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "names"), [("commands", "^check|fewshot"), ("training", "edit")])
def test_killed_commands_end_with_the_same_files(tmp_path, part, names):
    words = ["--part", part, "--only", names, "--kills", "2", "--json", tmp_path / "rows.json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert all(row["kills"] == 2 and row["compared"] for row in rows)
    assert not any(row["differing"] or row["refused"] for row in rows)


def test_a_run_continues_when_a_full_disk_has_space_again(tmp_path, monkeypatch):
    sections = {"train": {"checkpoint_steps": 2}}
    train_tiny(tmp_path / "whole", **sections)
    write = checkpoint.write_shard

    def full(folder, name, *given):
        if "step_000006" in folder.name and name != "module":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, name, *given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shard", full)
        with pytest.raises(VitcliError, match="No space left on device") as caught:
            train_tiny(tmp_path / "run", **sections)
    assert "free some space" in caught.value.hint
    kept = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert kept[-1] == "step_000004" and not any(name.startswith(".") for name in kept)
    train_tiny(tmp_path / "run", resume=True, **sections)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
