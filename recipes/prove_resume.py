"""SIGKILL at random moments, repeat the command, and compare the outputs with an uninterrupted run.

Part 1, training: the weights of runs in several configurations, among them other numbers of threads
and data that are edited between a kill and its resume. Part 2, commands: all files of each command
that writes. Half of the kills of part 2 come at a random time, the others before a random change of
the file system (a rename, a new or removed file), so that the moments between two writes are hit.

Runs are forks of this process, so that a hundred kills take minutes.

    OMP_NUM_THREADS=1 python recipes/prove_resume.py --kills 16
    OMP_NUM_THREADS=1 python recipes/prove_resume.py --part commands --only predict --kills 20
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.progress import Quiet
from vitcli.train.resolve import random_model
from vitcli.train.session import train

BASE: dict[str, dict[str, Any]] = {
    "data": {"name": "builtin:digits"},
    "model": {
        "name": "Pico/4",
        "image_size": 8,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
        "dropout_rate": 0.1,
        "drop_path_rate": 0.1,
    },
    "augment": {"crop": "pad", "crop_padding": 1, "flip_rate": 0.0},
    "optim": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "linear", "warmup_fraction": 0.1},
    "train": {
        "steps": 120,
        "batch_size": 32,
        "precision": "fp32",
        "log_steps": 1,
        "checkpoint_steps": 3,
        "eval_steps": 40,
    },
}
PHOTOS = {"data": {"name": "photos"}}
# Wide enough that sums are cut at other places with another number of threads.
WIDE = {
    "model": {"embed_dim": 256, "num_heads": 4, "mlp_dim": 512, "image_size": 16},
    "train": {"steps": 12, "batch_size": 64, "checkpoint_steps": 2, "eval_steps": 6},
}
WHOLE, OTHERS = 2, (1, 3, 4)  # threads of the uninterrupted run, and of resumes


@dataclass(frozen=True)
class Training:
    """One configuration of part 1."""

    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: int = 1
    other_threads: bool = False
    edits: bool = False


TRAININGS = {
    "one process": Training(),
    "two processes": Training(processes=2),
    "accumulation": Training({"train": {"micro_batch_size": 8}}),
    "averaged weights": Training({"train": {"ema_decay": 0.99}}),
    "mixup and cutmix": Training({"augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}}),
    "Muon, smaller sizes": Training(
        {"optim": {"name": "muon"}, "train": {"smaller_sizes": [[4, 0.5]]}}
    ),
    "masked patches": Training({"objective": {"name": "masked_patch"}}),
    "other threads": Training(WIDE, other_threads=True),
    "edited data": Training(PHOTOS, edits=True),
}

WORK, OWN = Path("work"), "own.safetensors"
TUNED = "--model ../tuned"
COMMANDS = {
    "pretrain": "pretrain ../photos --recipe ../pretrain.toml --out run --resume",
    "finetune": "finetune ../photos --model ../base --recipe ../finetune.toml --out run --resume",
    "fewshot": "fewshot ../photos --model ../base --shots 2 --out run",
    "evaluate": f"evaluate ../photos {TUNED} --out report",
    "evaluate --calibrate": f"evaluate ../photos --model {OWN} --calibrate --out report",
    "evaluate --suite": "evaluate --suite ../suite.toml --model ../base --out suite",
    "predict": f"predict ../photos/test {TUNED} --batch-size 4 --csv rows.csv --jsonl rows.jsonl "
    "--parquet rows.parquet --resume",
    "patchify (dataset)": "patchify ../photos --image-size 16 --patch-size 4 --out stored",
    "patchify (tokens)": "patchify ../photos --image-size 16 --patch-size 4 --out all.safetensors",
    "patchify (image)": "patchify ../photos/test/a/0.png --image-size 16 --patch-size 4 "
    "--out one.safetensors --compare sizes.png --reconstruct again.png",
    "export --to timm": f"export {TUNED} --to timm --out timm",
    "export --to huggingface": f"export {TUNED} --to huggingface --out hf",
    "export --to google": f"export {TUNED} --to google --set model.gelu=tanh --out g.npz",
    "export --to onnx": f"export {TUNED} --to onnx --out o.onnx",
    "check": "check ../photos --out samples.png",
    "inspect": f"inspect ../photos/test {TUNED} --no-bias --out look",
}
# Imported before the forks, so that one kill and its repeat take a second.
IMPORTED = [
    *(f"vitcli.commands.{name}" for name in dict.fromkeys(c.split()[0] for c in COMMANDS.values())),
    *(f"vitcli.cli.{name}" for name in ("main", "show.training", "show.evaluation")),
    "vitcli.commands.suite", "matplotlib.figure", "pyarrow.parquet", "onnxruntime", "torch.onnx",
    "sklearn.linear_model",
]  # fmt: skip
# Keys of time stamps and measurements. Everything else is compared.
TIMES = {
    "time",
    "unix_time",
    "seconds",
    "images_per_second",
    "memory_mb",
    "mfu",
    "data/wait_fraction",
}
SEALED = {"provenance.json": "checksum"}  # of a file whose times were removed
# They hold times and say that the run was resumed. All other figures are in other files, too.
LOGS = {"log.txt", "report.html"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


@dataclass
class Row:
    """The result of one configuration or command."""

    name: str
    kills: int = 0
    compared: int = 0
    differing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    note: str = ""

    def line(self) -> str:
        """The row as text."""
        wrong = "; ".join([*self.differing, *self.refused]) or "0 differing bits"
        note = f" ({self.note})" if self.note else ""
        return f"{self.name:24} {self.kills:3} kills, {self.compared:3} compared: {wrong}{note}"


def main() -> None:
    """Print a line for each configuration; end with 1 where bits differ or a command stops."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=15, help="of each configuration or command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("training", "commands"))
    parser.add_argument("--only", default="", help="regular expression: names to run")
    parser.add_argument("--json", type=Path, help="append a line of JSON per name to this file")
    given = parser.parse_args()
    rng, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITCLI_CACHE"] = f"{folder}/cache"
        write_photos(Path(folder, "photos"))
        os.chdir(folder)
        for name, make in chosen(given.part, given.only):
            row = make(Row(name), given.kills, rng)
            rows.append(row)
            sys.stdout.write(row.line() + "\n")
            sys.stdout.flush()
            if given.json:
                with given.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        os.chdir("/")
    wrong = sum(bool(row.differing or row.refused) for row in rows)
    sys.stdout.write(f"{sum(row.kills for row in rows)} kills, {wrong} of {len(rows)} wrong\n")
    raise SystemExit(1 if wrong else 0)


Prove = Callable[[Row, int, random.Random], Row]


def chosen(part: str | None, only: str) -> Iterator[tuple[str, Prove]]:
    """The configurations and commands to run."""
    if part != "commands":
        for name, case in TRAININGS.items():
            if re.search(only, name):
                yield name, lambda row, kills, rng, case=case: prove_training(row, case, kills, rng)
    if part == "training":
        return
    names = [name for name in COMMANDS if re.search(only, name)]
    if names:
        prepare_commands()
    for name in names:
        yield name, lambda row, kills, rng: prove_command(row, COMMANDS[row.name], kills, rng)


# Part 1: training


def prove_training(row: Row, case: Training, kills: int, rng: random.Random) -> Row:
    """Kill the training of one configuration, and resume it, until it was killed `kills` times."""
    sections = {k: {**BASE.get(k, {}), **case.changes.get(k, {})} for k in BASE | case.changes}
    recipe = check(Recipe, {"command": "pretrain", **sections}, row.name)
    shutil.rmtree("runs", ignore_errors=True)
    folder = Path("runs")
    folder.mkdir()
    began = time.monotonic()
    finish(start(recipe, folder / "whole", case))
    length = time.monotonic() - began
    if case.other_threads:
        finish(start(recipe, folder / "control", case, OTHERS[0]))
        if not weights_differ(folder, "control"):
            raise RuntimeError("other threads give the same bits, so this shows nothing")
        row.note = f"{OTHERS[0]} thread from the start: other bits"
    killed, refusals = folder / "killed", 0
    while row.kills < kills:
        team = start(recipe, killed, case, next_threads(case, killed, rng))
        # Now and then in the first moments, mostly somewhere in the next stretch.
        time.sleep(rng.random() * length * (0.1 if rng.random() < 0.3 else 0.5))
        if (killed / "result.json").exists():
            finish(team)
            compare_weights(row, killed.rename(folder / f"done-{row.kills}"))
            continue
        for process in team:
            os.kill(process, signal.SIGKILL)
        for process in team:
            os.waitpid(process, 0)
        row.kills += 1
        if case.edits and (killed / "provenance.json").exists():
            refusals += refuses_edit(row, recipe, killed, case, rng)
    finish(start(recipe, killed, case, next_threads(case, killed, rng)))
    compare_weights(row, killed)
    if case.edits:
        row.note = f"{refusals} resumes with edited data refused"
    return row


def next_threads(case: Training, run: Path, rng: random.Random) -> int | None:
    """Another number of threads for each resume; a run that has not started begins with `WHOLE`."""
    if not case.other_threads:
        return None
    return rng.choice(OTHERS) if (run / "provenance.json").exists() else WHOLE


def compare_weights(row: Row, run: Path) -> None:
    """Compare a finished run with the one that was never stopped."""
    row.compared += 1
    if weights_differ(run.parent, run.name):
        row.differing.append(f"other weights after {row.kills} kills")


def weights_differ(folder: Path, name: str) -> bool:
    """True if the weights are not those of the run that was never stopped."""
    a, b = ((folder / run / "model.safetensors").read_bytes() for run in ("whole", name))
    return a != b


@contextmanager
def edited(kind: str) -> Iterator[None]:
    """Change the data inside the block, and restore it."""
    file, other = Path("photos/train/a/0.png"), Path("photos/train/b/moved.png")
    before, times = file.read_bytes(), file.stat()
    try:
        if kind == "edited":
            Image.new("RGB", (16, 16), "red").save(file)
        elif kind == "added":
            shutil.copy(file, other)
        elif kind == "removed":
            file.unlink()
        else:
            file.rename(other)
        yield
    finally:
        other.unlink(missing_ok=True)
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def refuses_edit(row: Row, recipe: Recipe, run: Path, case: Training, rng: random.Random) -> int:
    """Resume with edited data, which must end with an error; returns 1."""
    kind = rng.choice(("edited", "added", "removed", "moved"))
    with edited(kind):
        (process,) = start(recipe, run, case)
        _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) != 2:
        row.refused.append(f"a resume with an image {kind} ended with {status}, not with an error")
    return 1


def start(recipe: Recipe, out: Path, case: Training, threads: int | None = None) -> list[int]:
    """Fork the processes of one run, which goes on from whatever is at `out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = threads or (WHOLE if case.other_threads else None)

    def run(rank: int) -> int:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        if case.processes > 1:
            os.environ |= {
                "WORLD_SIZE": str(case.processes),
                "LOCAL_WORLD_SIZE": str(case.processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        try:
            train(
                recipe,
                lambda source: random_model(recipe, source),
                out=out,
                resume=True,
                watch=Quiet(),
            )
        except VitcliError:
            return 2
        return 0

    return [fork(lambda rank=rank: run(rank)) for rank in range(case.processes)]


def finish(team: list[int]) -> None:
    """Wait for the end of a run, which must be a good one."""
    for process in team:
        _, status = os.waitpid(process, 0)
        if status:
            raise RuntimeError(f"a run that was not killed ended with {status}")


def fork(work: Callable[[], int]) -> int:
    """A child process that ends with the status that `work` returns."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        status = work()
    finally:
        os._exit(status)


# Part 2: commands


def write_photos(folder: Path) -> None:
    """A small dataset: two classes, 8 training and 4 test images each, of noise and a colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        for channel, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def prepare_commands() -> None:
    """The models, recipes and imports that the commands share."""
    for module in IMPORTED:
        import_module(module)
    length = {"steps": 12, "batch_size": 8, "checkpoint_steps": 3, "eval_steps": 4}
    for command in ("pretrain", "finetune"):
        sections: dict[str, Any] = {**BASE, "train": {**BASE["train"], **length}}
        # Fine-tuning takes the shape of the pretrained model.
        sections["model"] = {**BASE["model"], "image_size": 16} if command == "pretrain" else {}
        recipe = check(Recipe, {"command": command, **sections, "data": {}}, command)
        Path(f"{command}.toml").write_text(recipe.to_toml(), encoding="utf-8")
    task = '[[tasks]]\nname = "{}"\ndata = "photos"\nsettings = {{ train = {{ seed = {} }} }}\n'
    text = f'name = "two"\nrecipe = "{Path("finetune.toml").resolve()}"\n'
    Path("suite.toml").write_text(text + task.format("first", 1) + task.format("second", 2))
    for line in (
        "pretrain ../photos --recipe ../pretrain.toml --out ../base",
        "finetune ../photos --model ../base --recipe ../finetune.toml --out ../tuned",
    ):
        fresh(line)
        finish_command(line)


def finish_command(line: str) -> None:
    """Run a command that nobody kills; it must succeed."""
    status, said = ended(start_command(line))
    if status:
        raise RuntimeError(f"`vitcli {line}` ended with {status}: {said}")


def prove_command(row: Row, line: str, kills: int, rng: random.Random) -> Row:
    """Kill one command and repeat it, until it was killed `kills` times."""
    fresh(line)
    began = time.monotonic()
    finish_command(line)
    length, changes = time.monotonic() - began, int(Path("changes").read_text())
    shutil.rmtree("whole", ignore_errors=True)
    WORK.rename("whole")  # all commands run at one path, so that recorded paths are equal
    fresh(line)
    at_change, since = 0, 0
    while row.kills < kills or since:
        if since and (row.kills >= kills or rng.random() < 0.5):
            row.compared += 1
            found = different_files(Path("whole"), WORK)
            # A repeat changes such weights a second time, so it makes sense before their change.
            status, said = (0, "") if OWN in line and not found else ended(start_command(line))
            found = different_files(Path("whole"), WORK)
            # A command that was killed after its last write may say that there is nothing to do.
            if status and (found or "exists already" not in said):
                row.refused.append(f"status {status} after {since} kills: {said.strip()}")
            row.differing += [f"{name} after {since} kills" for name in found]
            fresh(line)
            since = 0
            continue
        by_time = row.kills % 2 == 0
        process = start_command(line, None if by_time else rng.randint(1, changes))
        if by_time:
            time.sleep(rng.random() * length)
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        if ended(process)[0] == -signal.SIGKILL:
            row.kills, since, at_change = row.kills + 1, since + 1, at_change + (not by_time)
        else:  # it was faster
            fresh(line)
            since = 0
    row.note = f"{row.kills - at_change} at a random time, {at_change} before a change of a file"
    return row


def different_files(whole: Path, folder: Path) -> list[str]:
    """The names of the files that exist on one side only, or have another content."""
    names = [{str(path.relative_to(side)) for path in side.rglob("*")} for side in (whole, folder)]
    found = sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        before, now = content(whole, name), content(folder, name)
        if before != now:
            found.append(f"{name}: {first_difference(before, now)}")
    return found


def first_difference(before: Any, now: Any) -> str:
    """The first place at which two contents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        return f"{key}: {first_difference(before.get(key), now.get(key))}"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return next(first_difference(a, b) for a, b in zip(before, now, strict=True) if a != b)
    if isinstance(before, bytes):
        return f"{len(before)} and {len(now)} bytes"
    return f"{str(before)[:80]} and {str(now)[:80]}"


def content(side: Path, name: str) -> Any:
    """The content of a file without `TIMES`; None for a folder and for `LOGS`."""
    file = side / name
    if file.is_dir() or file.name in LOGS:
        return None
    if file.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in file.read_text().splitlines()]
    if file.suffix == ".json":
        values = without_times(json.loads(file.read_text()))
        return {k: v for k, v in values.items() if k != SEALED.get(file.name)}
    return file.read_bytes()


def without_times(value: Any) -> Any:
    """A JSON value without the keys in `TIMES`."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def fresh(line: str) -> None:
    """Empty the folder in which commands run, and the cache."""
    for folder in (WORK, Path(os.environ["VITCLI_CACHE"])):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if OWN in line:  # weights that the command changes
        shutil.copy("tuned/model.safetensors", WORK / OWN)


def start_command(line: str, die: int | None = None) -> int:
    """Fork a command line in `WORK`; with `die`, SIGKILL comes before that change of a file.

    What it says goes to the file `said`, the number of changes to the file `changes`.
    """
    said, made = Path("said").resolve(), Path("changes").resolve()
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in CHANGES or (event == "open" and writes(arguments[2])):
            changes += 1
            if changes == die:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> int:
        with said.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(WORK)
        sys.argv = ["vitcli", *line.split()]
        sys.addaudithook(count)
        status: int = import_module("vitcli.cli.main").run(sys.argv[1:])
        total = changes
        made.write_text(str(total), encoding="utf-8")
        return status

    process = fork(run)
    with suppress(OSError):  # it has ended already
        os.setpgid(process, process)  # so that a kill takes its own children along
    return process


def writes(flags: Any) -> bool:
    """True if the flags of `open` may change a file."""
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def ended(process: int) -> tuple[int, str]:
    """Wait for a command; returns its status (negative for a signal) and what it said."""
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), Path("said").read_text(errors="replace")


if __name__ == "__main__":
    main()
