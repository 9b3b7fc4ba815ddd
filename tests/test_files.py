"""Writing whole or not at all."""

import errno
import json
import os
import stat
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from vitcli import files
from vitcli.errors import VitcliError
from vitcli.files import (
    exclusive,
    make_folder,
    parse_json,
    parse_toml,
    read_json,
    replacing,
    write_text,
    writing,
)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_output_removes_what_a_killed_command_has_left(tmp_path):
    path, left = tmp_path / "a.txt", tmp_path / ".a.txt.0123456789ab.tmp"
    for file in (left, tmp_path / ".a.txt.lock", tmp_path / ".b.txt.0123456789ab.tmp"):
        file.touch()
    with writing(path) as temporary:
        temporary.write_text("new")
        with pytest.raises(VitcliError, match="another command is writing"), writing(path):
            pass
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", ".b.txt.0123456789ab.tmp"}
    with pytest.raises(VitcliError, match="is not a folder"), writing(tmp_path / "no/a.txt"):
        pass


def test_a_folder_replaces_an_empty_folder_only(tmp_path):
    path = tmp_path / "d"
    path.mkdir()

    def write(content):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)

    write("one")
    with pytest.raises(VitcliError, match="exists already"):
        write("two")
    assert [p.name for p in path.iterdir()] == ["one"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(VitcliError, match="No space left on device") as caught:  # noqa: SIM117
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "free some space" in caught.value.hint
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VitcliError, match="cannot write"):
        write_text(tmp_path / "file" / "x", "y")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(VitcliError, match="is not a folder") as caught:
        write_text(tmp_path / "nowhere" / "x", "y")
    assert caught.value.hint == "create the folder first"


def test_who_may_read_is_the_users_choice(tmp_path):
    """safetensors writes files that only their owner can read."""
    mask = os.umask(0o022)
    try:
        with replacing(tmp_path / "d") as temporary:
            temporary.mkdir()
            save_file({"a": torch.ones(1)}, temporary / "a.safetensors")
        os.umask(0o077)
        write_text(tmp_path / "own", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "d/a.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600


def test_a_second_holder_of_a_lock_gets_the_given_error(tmp_path):
    lock = tmp_path / ".lock"
    taken = exclusive(lock, lambda: VitcliError("busy"))
    with FileLock(lock), pytest.raises(VitcliError, match="busy"), taken:
        pass
    with exclusive(lock, lambda: VitcliError("busy")):
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_file_that_its_last_holder_removes_is_not_held(tmp_path, monkeypatch):
    lock, acquire = tmp_path / ".lock", FileLock.acquire

    def acquire_late(self, timeout):
        acquire(self, timeout=timeout)
        monkeypatch.undo()
        lock.unlink()  # as the last holder does, after this process has opened the file

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    with exclusive(lock, lambda: VitcliError("busy")):
        assert lock.exists()
        with pytest.raises(VitcliError, match="busy"), exclusive(lock, lambda: VitcliError("busy")):
            pass


def test_a_folder_that_cannot_be_created(tmp_path):
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(VitcliError, match="cannot create the folder"):
        make_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 101 + "]" * 101, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500),
        *("", "x", b"\xff", "9" * 5000, '{"a": [' + "9" * 400 + "]}", "[1", b'"\xe9"'),
    ],
)
def test_json_has_limits(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError):
        read_json(file)


def test_json_of_any_type_is_read(tmp_path, monkeypatch):
    for value in (None, 5, "x", [], {}, {"a": [1, {"b": [None, True]}]}):
        assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 100 + "]" * 100) is not None
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "x.json").write_text(" " * (1 << 20) + "1")
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text",
    [
        *("a." * 200 + "b = 1", "[" + "a." * 200_000 + "b]\nx = 1", "x = " + "[" * 101 + "]" * 101),
        *("x = " + "[" * 50_000, "x = {" + "a . " * 300 + "b = 1}", "x = ", "\0"),
    ],
)
def test_toml_has_limits(text):
    began = time.monotonic()
    with pytest.raises(ValueError):
        parse_toml(text)
    assert time.monotonic() - began < 1


def test_toml_is_read():
    text = 'mean = [0.5, 0.5]\n[a.b]\nc.d = "x.y.z"\n'
    assert parse_toml(text) == {"mean": [0.5, 0.5], "a": {"b": {"c": {"d": "x.y.z"}}}}
