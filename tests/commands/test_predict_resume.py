"""A prediction that is broken off and gone on with gives the same bytes as one that is not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.cli.main import run as command_line
from vitcli.commands import predict
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

COUNT, BATCH = 14, 4
TABLES = ("t.csv", "t.jsonl", "t.parquet")


@pytest.fixture
def images(here):
    net = create_model("Pico/8", num_classes=5, image_size=16, depth=1)
    torch.nn.init.normal_(net.network.head.weight)
    net.preprocess, net.labels, net.head_trained = Preprocess((16, 16)), tuple("abcde"), True
    save_model("m.safetensors", net)
    rng = np.random.default_rng(0)
    (here / "p").mkdir()
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"p/{i:02}.png")
    (here / "p/05.png").write_bytes(b"no image")
    Path("p/06.png").rename(os.fsdecode(b"p/06\xff\n.png"))
    return here / "p"


def started(names=TABLES, **given):
    files = {f"{name.rpartition('.')[2]}_file": Path(name) for name in names}
    settings = {"model": "m.safetensors", "batch_size": BATCH, "threshold": 0.4, **given}
    return predict.run(["p"], **files, **settings)


def contents(names=TABLES):
    return [Path(name).read_bytes() for name in names]


def broken_off(rows, **given):
    """Take so many rows of a prediction, and drop it."""
    result = iter(started(**given))
    for _ in range(rows):
        next(result)
    del result


def test_any_row_may_have_been_the_last(images):
    whole = list(started())
    expected = contents()
    left = sorted(p.name for p in Path().iterdir())
    assert left == ["m.safetensors", "p", *sorted(TABLES)]
    for rows in range(1, COUNT + 1):
        for name in TABLES:
            Path(name).unlink()
        broken_off(rows)
        assert not any(Path(name).exists() for name in TABLES)
        result = started(resume=True)
        assert list(result) == whole[rows:], rows
        assert contents() == expected, rows
        assert result.counts.count == COUNT and result.failed == 1
        assert sorted(p.name for p in Path().iterdir()) == left


def test_half_a_row_is_cut_off(images):
    list(started())
    expected = contents()
    broken_off(7)
    part = Path("t.csv.part")
    for cut in (1, 20):  # the end of the line; in the middle of it
        part.write_bytes(part.read_bytes()[:-cut])
        assert len(list(started(resume=True))) == COUNT - 6
        assert contents() == expected
        broken_off(7)
    # A line in the middle that is none: what follows it is done again.
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:3], b"\0" * 9 + b"\n", *lines[4:]]))
    assert len(list(started(resume=True))) == COUNT - 2
    assert contents() == expected


def test_killed(images):
    """SIGKILL in the middle of a stream of paths."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    list(started())
    expected = contents()
    for name in TABLES:
        Path(name).unlink()
    command = "predict --from - -m m.safetensors --batch-size 4 --threshold 0.4 --json"
    tables = [a for name in TABLES for a in ("--" + name[2:], name)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitcli", *command.split(), *tables],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    paths = sorted(map(os.fsencode, images.iterdir()))
    paths = [os.path.relpath(path, os.fsencode(Path().resolve())) for path in paths]
    process.stdin.write(b"".join(path + b"\0" for path in paths[:10]))
    process.stdin.flush()  # and no end: the command waits for more
    assert json.loads(process.stdout.readline())["path"] == "p/00.png"
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert not any(Path(name).exists() for name in TABLES) and Path("t.csv.part").exists()
    result = started(resume=True)
    assert 0 < len(list(result)) < COUNT
    assert contents() == expected


def test_a_forgotten_resume_loses_nothing(images):
    broken_off(7)
    with pytest.raises(VitcliError, match=r"has 7 rows of this command") as error:
        list(started())
    assert "--resume" in error.value.hint
    # Another command has no use for these rows.
    assert len(list(started(top=2))) == COUNT


def test_resume_with_other_settings_or_images(images):
    broken_off(7)
    for given, named in (({"top": 2}, "`top`"), ({"batch_size": 2}, "`batch_size`")):
        with pytest.raises(VitcliError, match=named):
            list(started(resume=True, **given))
    net = create_model("Pico/8", num_classes=5, image_size=16, depth=1, seed=1)
    net.preprocess, net.head_trained = Preprocess((16, 16)), True
    with pytest.raises(VitcliError, match="`model`"):
        list(started(resume=True, model=net))
    Image.new("RGB", (20, 20)).save("p/000.png")
    with pytest.raises(
        VitcliError, match=r"row 2 of .* belongs to `p/01.png`, .* now has image `p/000.png`"
    ):
        list(started(resume=True))
    for path in Path("p").iterdir():
        if path.name != "00.png":
            path.unlink()
    with pytest.raises(VitcliError, match="now has no more images at this place"):
        list(started(resume=True))
    Path("t.csv.part").write_text("something else\n")
    with pytest.raises(VitcliError, match="is not a resume log"):
        list(started(resume=True))


def test_nothing_to_resume(images, capfd):
    with pytest.raises(VitcliError, match="none is given"):
        predict.run(["p"], model="m.safetensors", resume=True)
    assert len(list(started(resume=True))) == COUNT  # from the first image
    before = contents()
    result = started(resume=True)
    assert list(result) == [] and result.failed == 0 and contents() == before
    settings = ["--batch-size", str(BATCH), "--threshold", "0.4"]
    line = ["predict", "p", "-m", "m.safetensors", "--csv", "t.csv", "--resume", *settings]
    assert command_line(line) == 0
    assert "already finished" in capfd.readouterr().err


def test_a_finished_table_of_something_else(images):
    list(started())
    before = contents()

    def refused(words, paths=("p",), **given):
        settings = {"model": "m.safetensors", "batch_size": BATCH, "threshold": 0.4, **given}
        with pytest.raises(VitcliError, match=words) as error:
            predict.run(list(paths), csv_file=Path("t.csv"), resume=True, **settings)
        assert error.value.hint and contents() == before

    other = create_model("Pico/8", num_classes=5, image_size=16, depth=1, seed=1)
    other.preprocess, other.head_trained = Preprocess((16, 16)), True
    refused("no such image", paths=["elsewhere"])
    refused("`t.csv` is finished, but .* values of `images`", paths=["p/00.png"])
    refused("other values of `model`", model=other)
    refused("other values of `threshold`, `top`", threshold=0.5, top=1)
    os.utime("p/00.png", (0, 0))
    refused("other values of `images`")


def test_a_finished_table_without_a_record_is_made_again(images, monkeypatch):
    list(started())
    expected = contents()
    Path("t.csv").write_text("path,label\n")  # it is another file now
    assert len(list(started(resume=True))) == COUNT and contents() == expected
    monkeypatch.setenv("VITCLI_CACHE", str(images))  # another cache, in which nothing can be made
    (images / "tables").write_text("")
    assert len(list(started(resume=True))) == COUNT and contents() == expected


def test_one_process_at_a_time(images):
    result = iter(started())
    next(result)
    with pytest.raises(VitcliError, match="another process is writing"):
        list(started())
    assert sum(1 for _ in result) == COUNT - 1


def test_nothing_is_left_where_no_row_was_written(images):
    result = iter(started())
    del result
    with pytest.raises(VitcliError, match="two output files"):
        started(csv_file=Path("t.x"), jsonl_file=Path("t.x"), names=())
    assert sorted(p.name for p in Path().iterdir()) == ["m.safetensors", "p"]


def test_memory_does_not_grow_with_the_list(images, monkeypatch):
    """Paths are taken from a stream a few batches ahead of the rows."""
    taken = 0

    def endless(stream):
        nonlocal taken
        while True:
            taken += 1
            yield "p/00.png"

    monkeypatch.setattr("vitcli.data.image_paths.read_path_list", endless)
    rows = predict.run([], source="-", model="m.safetensors", batch_size=BATCH)
    rows = iter(rows)
    for number in range(1, 30):
        next(rows)
        assert taken <= number + 3 * BATCH
    rows.close()


def test_ctrl_c_says_how_to_go_on(images):
    command = "predict --from - -m m.safetensors --batch-size 2 --csv t.csv --json"
    process = subprocess.Popen(
        [sys.executable, "-m", "vitcli", *command.split()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"p/00.png\np/01.png\np/02.png\np/03.png\np/04.png\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"--resume" in err and b"t.csv.part" in err, err
