"""`vitcli evaluate --suite`: one model on every task of a suite, each task a run of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w

from vitcli import distributed as launch
from vitcli.config.recipe import lay_over, nest
from vitcli.config.schema import Settings
from vitcli.errors import VitcliError
from vitcli.evals.suite import (
    Outcome,
    Suite,
    TaskSection,
    data_of,
    group_means,
    load_suite,
    outcome_of,
    published,
)
from vitcli.files import write_text
from vitcli.progress import Quiet, Watcher
from vitcli.run import Run, new_path, run_stem
from vitcli.weights.load import newest_run

RECORD = "suite.json"  # in the folder: what it was begun with
RESULT = "result.json"
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class SuiteResult:
    """What became of each task.

    Attributes:
        outcomes: task -> its accuracy; those that failed are not in it.
        failed: task -> why.
        path: the folder that holds a run for each task.
    """

    suite: Suite
    model: str
    outcomes: dict[str, Outcome]
    failed: dict[str, str]
    path: str

    @property
    def exit_code(self) -> int:
        """3 when some tasks have no figure."""
        return 3 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --suite --json`; accuracies in 0..1, those of others too."""
        accuracies = {name: outcome.accuracy for name, outcome in self.outcomes.items()}
        others = {
            name: {
                "tasks": {task: value / 100 for task, value in figures.items()},
                "mean": None if mean is None else mean / 100,
            }
            for name, figures, mean in published(self.suite)
        }
        return {
            "suite": self.suite.name,
            "method": self.suite.method,
            "model": self.model,
            "tasks": {task.name: self._task(task) for task in self.suite.tasks},
            "groups": group_means(self.suite, accuracies),
            "mean": fmean(accuracies.values()) if not self.failed and accuracies else None,
            "failed": self.failed,
            "published": others,
            "run": self.path,
        }

    def _task(self, task: TaskSection) -> dict[str, Any]:
        found = self.outcomes.get(task.name)
        return {
            "group": task.group,
            "data": task.data,
            "accuracy": found and found.accuracy,
            "images": found and found.images,
            "run": found and found.run,
            "chosen": dict(found.chosen) if found else {},
        }


def run(
    suite: str,
    *,
    model: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    processes: int | None = None,
    precision: str | None = None,
    watch: Watcher | None = None,
) -> SuiteResult:
    """Fine-tune or few-shot a model on every task of a suite, and put the accuracies together.

    Each task is a command of its own in a process of its own, so that memory is free again and a
    task that fails takes no other with it. With the same `out` the same command goes on: finished
    tasks are not done again, an interrupted fine-tuning resumes exactly.

    Args:
        suite: the name of one that is shipped, or a file.
        model: MODEL; None takes the newest finished run.
        settings: nested settings laid over those of the suite and its tasks.
        out: the folder of the runs; None makes `runs/MODEL-SUITE`.
        processes: processes of each task.
        precision: of each task.

    Raises:
        VitcliError: no such suite or model, or not one task could be done.
        KeyboardInterrupt: Ctrl-C; the task has saved its state.
    """
    watch = watch or Quiet()
    if launch.world_size() > 1:
        raise VitcliError(
            "a suite starts the processes of its tasks itself", "`vitcli evaluate --processes N`"
        )
    spec, file = load_suite(suite)
    if model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: {model}")
    path = out or new_path(f"{run_stem(model)}-{file.stem}")
    changes = settings or {}
    _begin(path, spec, model, changes)
    watch.note(f"suite `{spec.name}`: {len(spec.tasks)} tasks, in `{path}`")
    options = [*_option("--processes", processes), *_option("--precision", precision)]
    outcomes: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    with watch.progress("tasks", len(spec.tasks)) as bar:
        for task in spec.tasks:
            work = Work(spec, task, file, model, changes, options, path, watch)
            try:
                outcomes[task.name] = work.outcome()
            except VitcliError as error:
                failed[task.name] = error.message
                watch.warn(f"{task.name}: {error.message}")
            bar.advance(1)
    if not outcomes:
        raise VitcliError(
            f"no task of suite `{spec.name}` could be done; {next(iter(failed.values()))}",
            "the lines above say why of each",
        )
    result = SuiteResult(spec, model, outcomes, failed, str(path))
    write_text(path / RESULT, json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _begin(path: Path, suite: Suite, model: str, settings: Settings) -> None:
    """Make the folder, or see that it was begun with the same suite, model and settings."""
    wanted = {"suite": suite.model_dump(mode="json"), "model": model, "settings": settings}
    wanted = json.loads(json.dumps(wanted, default=str))
    record = path / RECORD
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise VitcliError(f"`{path}` exists already", "choose another `--out`") from None
        if known != wanted:
            differs = ", ".join(key for key in wanted if known.get(key) != wanted[key])
            raise VitcliError(
                f"`{path}` was begun with another {differs}", "choose another place with `--out`"
            )
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(f"cannot make `{path}`: {error.strerror}", "another `--out`") from None
    write_text(record, json.dumps(wanted, indent=2) + "\n")


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


@dataclass(frozen=True)
class Work:
    """One task of a suite on one model."""

    suite: Suite
    task: TaskSection
    file: Path
    model: str
    changes: Settings
    options: Sequence[str]
    folder: Path
    watch: Watcher

    def outcome(self) -> Outcome:
        """The accuracy, from the runs that are there or new ones.

        Raises:
            VitcliError: a run fails.
        """
        chosen = self._choose()
        run = self._finished(self.task.folder, chosen)
        return outcome_of(run.result(), str(run.path), chosen)

    def _choose(self) -> dict[str, Any]:
        """The settings of `select` that do best on its validation images; of equals the first."""
        select = self.suite.select
        if select is None:
            return {}
        cut = {"data.train_split": select.train, "data.test_split": select.validation}
        best, found = -1.0, {}
        for number, choice in enumerate(select.choices()):
            run = self._finished(f"{self.task.folder}-select-{number}", {**choice, **cut})
            accuracy = outcome_of(run.result(), str(run.path), {}).accuracy
            if accuracy > best:
                best, found = accuracy, choice
        return found

    def _finished(self, name: str, given: Mapping[str, Any]) -> Run:
        """The run called `name`, done now if it is not there yet."""
        run = Run(self.folder / name)
        if not run.finished:
            if self.suite.method == "fewshot":  # which leaves nothing to go on from
                run.remove()
            self._do(run.path, given)
        return run

    def _do(self, path: Path, given: Mapping[str, Any]) -> None:
        settings: Settings = {}
        for layer in (self.suite.settings, self.task.settings):
            lay_over(settings, layer)
        for key, value in given.items():
            lay_over(settings, nest(key, value))
        lay_over(settings, self.changes)
        command = [self.suite.method, data_of(self.task, self.file), "--model", self.model]
        command += ["--out", str(path), *self.options]
        if self.suite.method == "finetune":
            command += [*_option("--recipe", self.suite.recipe), "--resume"]
        else:
            command += ["--shots", str(self.suite.shots)]
        for assignment in assignments(settings):
            command += ["--set", assignment]
        follow(command, self.task.name, self.watch)
        if not Run(path).finished:
            raise VitcliError(f"`{path}` has no result")


def assignments(settings: Settings, prefix: str = "") -> list[str]:
    """Nested settings as `section.key=value`, values in TOML."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += assignments(dict(value), f"{prefix}{key}.")
        else:
            text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
            found.append(f"{prefix}{key}={text}")
    return found


def follow(command: Sequence[str], label: str, watch: Watcher) -> None:
    """Run one command line of this program to its end, passing on what it says.

    Raises:
        VitcliError: it ended with an error; some unreadable images (status 3) are none.
        KeyboardInterrupt: it was interrupted, and has saved its state.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "vitcli", *command],
        env={**os.environ, launch.LIFELINE: "stdin", "NO_COLOR": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    assert child.stderr is not None and child.stdin is not None
    reason = ""
    try:
        for line in child.stderr:
            reason = line.strip() if line.startswith("error: ") else reason
            watch.note(f"{label}: {line.rstrip()}")
        status = child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    finally:
        child.stdin.close()
        child.stderr.close()
    if status in STOPPED:
        raise KeyboardInterrupt
    if status not in (0, 3):
        raise VitcliError(re.sub(r"^error: ", "", reason) or f"it ended with status {status}")
