"""The run directory: made once, written atomically, readable by every other command."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vitcli.config.recipe import check, differing_keys, read_toml
from vitcli.config.schema import DataSection, Recipe
from vitcli.errors import VitcliError
from vitcli.files import replacing, write_text

RUNS = Path("runs")
OUTCOMES = "outcomes.safetensors"  # of the last evaluation, image by image
TAIL = 2**16  # bytes at the end of metrics.jsonl, which hold its last line
LIBRARIES = ("torch", "accelerate", "datasets", "numpy", "pillow", "safetensors")


@dataclass(frozen=True)
class Run:
    """A directory such as `runs/digits`, with the names that INTERFACE gives its files."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The complete resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics_file(self) -> Path:
        """One JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def weights_file(self) -> Path:
        """The final weights."""
        return self.path / "model.safetensors"

    @property
    def result_file(self) -> Path:
        """Final figures; exists only when the run has finished."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step_000100` folders."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.result_file.is_file()

    def recipe(self) -> Recipe:
        """The recipe that was written down at the start."""
        return check(Recipe, read_toml(self.recipe_file), f"`{self.recipe_file}`")

    def data_section(self) -> DataSection | None:
        """The `[data]` settings of any command's recipe; None where there are none to read."""
        try:
            text = self.recipe_file.read_text(encoding="utf-8")
            return DataSection(**tomllib.loads(text)["data"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def provenance(self) -> dict[str, Any]:
        """What was written down about the machine and the data; empty when there is none."""
        return _read_json(self.path / "provenance.json")

    def result(self) -> dict[str, Any]:
        """The final figures; empty when the run has not finished."""
        return _read_json(self.result_file)

    def write_provenance(self, facts: Mapping[str, Any]) -> None:
        """Note `facts` beside versions, argv and time."""
        self._write_json("provenance.json", {**describe_here(), **facts})

    def amend_provenance(self, facts: Mapping[str, Any]) -> None:
        """Change single facts of it, such as how many steps it became."""
        self._write_json("provenance.json", {**self.provenance(), **facts})

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl, or add it to the last one where that has its step.

        So each step has one line, with the figures of training and of an evaluation after it.

        Raises:
            VitcliError: it cannot be written.
        """
        try:
            self.metrics_file.touch()
            with self.metrics_file.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - TAIL))
                last = (file.read().splitlines(keepends=True) or [b""])[-1]
                same = _record_of(last)
                if same is not None and same.get("step") == record.get("step"):
                    record = {**same, **record}
                    file.seek(end - len(last))
                file.write(json.dumps(record).encode() + b"\n")
                file.truncate()
        except OSError as error:
            raise VitcliError(
                f"cannot write `{self.metrics_file}`: {error.strerror}",
                "free some space, then the same command with `--resume`",
            ) from error

    def records(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl; a line cut off by a kill is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        return [record for line in lines if (record := _record_of(line)) is not None]

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that a resume from `step` will do again."""
        kept = [json.dumps(r) + "\n" for r in self.records() if r.get("step", 0) <= step]
        write_text(self.metrics_file, "".join(kept))

    def sweep(self) -> None:
        """Remove what a process that was killed while writing left half-written."""
        for left in self.path.glob(".*.tmp"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the directory of a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the last thing that a run does."""
        self._write_json("result.json", result)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(values, indent=2, default=str) + "\n")


def check_free(path: Path) -> None:
    """Nothing is at `path`, or an empty folder.

    Raises:
        VitcliError: something is there, or the name is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise VitcliError(
            f"`{path}` is not UTF-8, and no weights could be read from it", "choose another `--out`"
        ) from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        unfinished = Run(path).recipe_file.is_file() and not Run(path).finished
        way = "continue it with `--resume`, or c" if unfinished else "c"
        raise VitcliError(f"`{path}` exists already", f"{way}hoose another place with `--out`")


def create_run(path: Path, recipe: Recipe | str) -> Run:
    """A new run directory that holds its recipe (as an object, or as TOML text).

    Raises:
        VitcliError: something is there already, or the place cannot be written to.
    """
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{path.parent}`: {error.strerror}", "choose another place with `--out`"
        ) from None
    text = recipe if isinstance(recipe, str) else recipe.to_toml()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "recipe.toml").write_text(text, encoding="utf-8")
    return Run(path)


def reopen_run(path: Path, recipe: Recipe) -> Run | None:
    """The run at `path`, which must be one of the same recipe; None when nothing is there.

    Raises:
        VitcliError: its recipe differs (the differing keys are named), or it is something else.
    """
    run = Run(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not run.recipe_file.is_file():
        raise VitcliError(f"`{path}` is not a run: it has no recipe.toml", "give another `--out`")
    if keys := differing_keys(run.recipe(), recipe):
        raise VitcliError(
            f"`{path}` was started with another recipe; these differ: {', '.join(keys)}",
            "give the first command again with `--resume` added, or choose another `--out`",
        )
    return run


def place_of(out: Path | None, stem: str, resume: bool, runs: Path = RUNS) -> Path:
    """The directory of a run that trains: `out`, or a new one named after `stem`.

    Raises:
        VitcliError: it is to be resumed, and `out` is not given.
    """
    if out is not None:
        return out
    if not resume:
        return new_path(stem, runs)
    begun = [Run(p) for p in runs.iterdir()] if runs.is_dir() else []
    begun = [run for run in begun if run.recipe_file.is_file() and not run.finished]
    newest = max(begun, key=lambda run: run.recipe_file.stat().st_mtime_ns, default=None)
    hint = f"the newest that has not finished: `--out {newest.path}`" if newest else "`--out RUN`"
    raise VitcliError("`--resume` goes on with the run at `--out`, which is not given", hint)


def new_path(stem: str, runs: Path = RUNS, *, suffix: str = "") -> Path:
    """`runs/STEM`, or the first of `runs/STEM-2`, `-3`, … that is free; `suffix` ends a file's."""
    path, number = runs / f"{stem}{suffix}", 1
    while path.exists():
        number += 1
        path = runs / f"{stem}-{number}{suffix}"
    return path


def run_stem(model: str) -> str:
    """A name for the run that a command makes of `model`: a run, a weights file or a variant.

    Of what lies elsewhere it is the repository's or the file's name, without its address.
    """
    path = Path(model)
    if model.startswith("hf:"):
        name = model.partition("@")[0].rpartition("/")[2].removeprefix("hf:")
    elif model.startswith(("https:", "http:", "gs:")):
        name = Path(model.partition("?")[0]).stem
    elif path.is_dir():
        name = path.resolve().name
    elif path.is_file():  # `model` and `timm` say nothing, the folder does
        name = path.resolve().parent.name if path.stem in ("model", "timm") else path.stem
    else:
        name = model
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def finished_runs(runs: Path = RUNS) -> list[Run]:
    """All runs under `runs` that have weights and a result, newest first."""
    if not runs.is_dir():
        return []
    found = [Run(p) for p in runs.iterdir() if not p.name.startswith(".")]
    found = [run for run in found if run.finished and run.weights_file.is_file()]
    return sorted(found, key=lambda run: run.result_file.stat().st_mtime_ns, reverse=True)


def describe_here() -> dict[str, Any]:
    """Version, commit, argv, libraries, machine and time: what a reader of a result asks for."""
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
    """The version of vitcli."""
    from vitcli import __version__

    return __version__


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, with `+` when it was changed; None outside of git."""
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
    """A line of metrics.jsonl; None of one that is cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise VitcliError(
            f"`{path}` is damaged: {error}",
            f"remove it: without its result.json the run `{path.parent}` counts as not finished",
        ) from None
    return values
