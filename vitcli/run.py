"""The run directory. A command creates it once and writes it atomically; others read it."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from vitcli import distributed
from vitcli.config.recipe import check, read_toml
from vitcli.config.schema import DataSection, Recipe
from vitcli.errors import VitcliError
from vitcli.files import (
    claimed,
    is_url,
    make_folder,
    parse_json,
    parse_toml,
    read_json,
    release_claim,
    release_unused,
    replacing,
    seal,
    seal_text,
    take_first,
    unseal,
    write_text,
)

RUNS = Path("runs")
OUTCOMES = "outcomes.safetensors"  # per-image results of the last evaluation
# Keys of provenance.json: changes of the length, and resumes that were not exact.
EXTENSIONS, RESUMES = "extensions", "resumes"
TAIL_BYTES = 2**16  # more than the last line of metrics.jsonl
LIBRARIES = ("torch", "accelerate", "datasets", "numpy", "pillow", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run directory such as `runs/digits`. The names of its files are a public interface."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The complete resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics_file(self) -> Path:
        """One JSON record per line."""
        return self.path / "metrics.jsonl"

    @property
    def weights_file(self) -> Path:
        """The final weights."""
        return self.path / "model.safetensors"

    @property
    def result_file(self) -> Path:
        """The final results; the file exists only if the run has finished."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """The folder that contains `step_000100`, …"""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """True if the run has finished."""
        return self.result_file.is_file()

    def recipe(self) -> Recipe:
        """Return the recipe that the run started with.

        Raises:
            VitcliError: the recipe is damaged, or the run is one of `fewshot`, which has none.
        """
        return check(Recipe, read_toml(self.recipe_file), f"`{self.recipe_file}`")

    def data_section(self) -> DataSection | None:
        """Return the `[data]` settings of the recipe, or None if they cannot be read."""
        try:
            text = self.recipe_file.read_text(encoding="utf-8")
            return DataSection(**parse_toml(text)["data"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def provenance(self) -> dict[str, Any]:
        """Return the recorded facts about machine and data; empty if there are none."""
        hint = "restore the file from a copy, or start a new run with another `--out`"
        return _read_json(self.path / "provenance.json", "data", hint)

    def result(self) -> dict[str, Any]:
        """Return the final results; empty if the run has not finished."""
        hint = "remove the file; a run without result.json counts as unfinished"
        return _read_json(self.result_file, "figures", hint)

    def write_recipe(self, recipe: Recipe | str) -> None:
        """Write recipe.toml, with a checksum that a resume verifies."""
        text = recipe if isinstance(recipe, str) else recipe.to_toml()
        write_text(self.recipe_file, seal_text(text))

    def write_provenance(self, facts: Mapping[str, Any]) -> None:
        """Write `facts`, versions, argv and time to provenance.json."""
        # It decides how a resume continues, so a damaged one must be noticed.
        self._write_json("provenance.json", seal({**describe_environment(), **facts}))

    def update_provenance(self, facts: Mapping[str, Any]) -> None:
        """Replace some facts in provenance.json, such as the number of steps."""
        self._write_json("provenance.json", seal({**self.provenance(), **facts}))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl, or merge it into the last one if the step is the same.

        Each step then has one line with its training and its evaluation metrics.

        Raises:
            VitcliError: the file cannot be written.
        """
        start, before = 0, b""
        try:
            self.metrics_file.touch()
            with self.metrics_file.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - TAIL_BYTES))
                last = (file.read().splitlines(keepends=True) or [b""])[-1]
                same = _record_of(last)
                if same is not None and same.get("step") == record.get("step"):
                    record = {**same, **record}
                    before = last
                start = file.seek(end - len(before))
                file.write(json.dumps(record).encode() + b"\n")
                file.truncate()
        except OSError as error:
            # A part of the new record must not replace the last one: a resume does not repeat it.
            with suppress(OSError), self.metrics_file.open("r+b", buffering=0) as file:
                file.seek(start)
                file.write(before)
                file.truncate()
            raise VitcliError(
                f"cannot write `{self.metrics_file}`: {error.strerror}",
                "free some space and repeat the command with `--resume`",
            ) from error

    def records(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl; an incomplete last line is skipped."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        return [record for line in lines if (record := _record_of(line)) is not None]

    def trained_seconds(self) -> float:
        """Return the time of all training steps; all parts of an interrupted run count."""
        return float(sum(r["seconds"] for r in self.records() if "train/loss" in r))

    def drop_records_after(self, step: int) -> None:
        """Remove the records of the steps that a resume from `step` repeats."""
        lines = [json.dumps(r) + "\n" for r in self.records() if r.get("step", 0) <= step]
        write_text(self.metrics_file, "".join(lines))

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for path in self.path.glob(".*.tmp"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory of a run that has not started."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        self._write_json("result.json", result)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(values, indent=2, default=str) + "\n")


def check_free(path: Path) -> None:
    """Check that `path` does not exist or is an empty folder.

    Raises:
        VitcliError: the path is in use, or its name is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise VitcliError(
            f"the path `{path}` is not UTF-8, and safetensors could not read weights from it",
            "choose another path with `--out`",
        ) from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        release_claim(path)
        unfinished = Run(path).recipe_file.is_file() and not Run(path).finished
        hint = "choose another path with `--out`"
        if unfinished:
            hint = f"add `--resume` to continue this run, or {hint}"
        raise VitcliError(f"`{path}` exists already", hint)


@contextmanager
def new_run(path: Path) -> Iterator[Run]:
    """Yield a run directory under a temporary name, which becomes `path` when the block succeeds.

    Of several processes that create the same path at once, exactly one succeeds.

    Raises:
        VitcliError: the path is in use, or it cannot be written.
    """
    check_free(path)
    make_folder(path.parent)

    def busy() -> VitcliError:
        return VitcliError(f"`{path}` exists already", "choose another path with `--out`")

    with claimed(path, busy), replacing(path) as temporary:
        temporary.mkdir()
        yield Run(temporary)


def create_run(path: Path, recipe: Recipe | str) -> Run:
    """Create a run directory that contains the recipe (an object, or TOML text); see `new_run`."""
    with new_run(path) as run:
        run.write_recipe(recipe)
    return Run(path)


def create_numbered_run(stem: str, recipe: Recipe, runs: Path = RUNS) -> Run:
    """Create a run directory with the first free name of `numbered_paths`.

    Raises:
        VitcliError: it cannot be written.
    """
    path = take_first(numbered_paths(stem, runs))
    run = Run(path)
    run.write_recipe(recipe)
    return run


def numbered_paths(stem: str, runs: Path = RUNS, *, suffix: str = "") -> Iterator[Path]:
    """Yield `runs/STEM`, `runs/STEM-2`, `runs/STEM-3`, …; `suffix` is a file's extension."""
    yield runs / f"{stem}{suffix}"
    for number in count(2):
        yield runs / f"{stem}-{number}{suffix}"


@contextmanager
def new_output(
    out: Path | None, stem: str, *, suffix: str = "", runs: Path = RUNS
) -> Iterator[Path]:
    """Yield the path for the output of a command: `out`, or the first free `numbered_paths`.

    A numbered path is taken at once, as an empty folder (or file, with a `suffix`), so that
    commands that start together get different paths. It is removed if it is empty at the end.
    The processes of one command share one path.

    Raises:
        VitcliError: the path cannot be created.
    """
    if out is not None:
        yield out
        return
    paths = numbered_paths(stem, runs, suffix=suffix)
    path = of_first_process(lambda: take_first(paths, as_file=bool(suffix)))
    try:
        yield path
    finally:
        if distributed.rank() == 0:
            release_unused(path)
            with suppress(OSError):  # unless another command writes there
                runs.rmdir()


def of_first_process(make: Callable[[], Path]) -> Path:
    """Call `make` in the first process of this command, and return its path in all of them."""
    if distributed.world_size() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    from vitcli.devices import join_processes, pick_device

    join_processes(pick_device())
    path: Path = broadcast_object_list([make() if distributed.rank() == 0 else None])[0]
    return path


def run_stem(model: str) -> str:
    """Derive the start of a run's name from a MODEL.

    It is the name of the run, weights file, variant or repository, without its folder or address.
    """
    path = Path(model)
    if model.startswith("hf:"):
        name = model.partition("@")[0].rpartition("/")[2].removeprefix("hf:")
    elif is_url(model):
        name = Path(model.partition("?")[0]).stem
    elif path.is_dir():
        name = path.resolve().name
    elif path.is_file():  # `model` and `timm` are no names, so use the folder's
        name = path.resolve().parent.name if path.stem in ("model", "timm") else path.stem
    else:
        name = model
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def finished_runs(runs: Path = RUNS) -> list[Run]:
    """Return the finished runs under `runs` that have weights, newest first."""
    if not runs.is_dir():
        return []
    found = [Run(p) for p in runs.iterdir() if not p.name.startswith(".")]
    found = [run for run in found if run.finished and run.weights_file.is_file()]
    return sorted(found, key=lambda run: run.result_file.stat().st_mtime_ns, reverse=True)


def describe_environment() -> dict[str, Any]:
    """Return version, commit, argv, time, machine and library versions, for provenance.json."""
    return {
        "vitcli": package_version(),
        "commit": _commit(),
        "argv": list(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "unix_time": time.time(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def package_version() -> str:
    """Return the version of vitcli."""
    from vitcli import __version__

    return __version__


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache  # the code that was imported, even if the files change during a long run
def _commit() -> str | None:
    """Return the git commit of this source tree, with `+` if it has changes; None outside git."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return None

    def git(arguments: Sequence[str]) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        dirty = git(["status", "--porcelain", "--untracked-files=no"])
        return git(["rev-parse", "HEAD"]) + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record on one line of metrics.jsonl; None if the line is incomplete or damaged."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if isinstance(record.get("seconds", 0.0), int | float) else None


def _read_json(path: Path, inner: str, hint: str) -> dict[str, Any]:
    """The values of a record, in which `inner` is an object; {} without the file."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if not isinstance(values.get(inner, {}), dict):
            raise ValueError(f"its `{inner}` is not a JSON object")
        return unseal(values)
    except (OSError, ValueError) as error:
        raise VitcliError(f"`{path}` is damaged: {error}", hint) from None
