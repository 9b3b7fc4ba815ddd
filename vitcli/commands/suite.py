"""`vitcli evaluate --suite`: one model on every task of a suite, each task in its own run."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w

from vitcli import distributed as launch
from vitcli.config.recipe import lay_over, nest
from vitcli.config.schema import Settings
from vitcli.errors import VitcliError
from vitcli.evals.intervals import wilson_interval
from vitcli.evals.suite_file import (
    Suite,
    TaskResult,
    TaskSection,
    group_means,
    load_suite,
    published_results,
    task_data,
    task_result,
)
from vitcli.files import exclusive, make_folder, read_json, remove_leftovers, write_text
from vitcli.progress import Quiet, Watcher
from vitcli.run import Run, new_output, run_stem
from vitcli.weights.load import newest_run

RECORD = "suite.json"  # the suite, model and settings that the folder was started with
RESULT = "result.json"
LOCK = ".lock"
# Exit statuses after a signal; negative if the process had not set its handlers yet.
INTERRUPTED = tuple(status for number in launch.FORWARDED for status in (128 + number, -number))


@dataclass(frozen=True)
class SuiteResult:
    """The results of all tasks.

    Attributes:
        results: task -> result, without the failed tasks.
        failed: task -> error message.
        path: folder with one run per task.
    """

    suite: Suite
    model: str
    results: dict[str, TaskResult]
    failed: dict[str, str]
    path: str

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --suite --json`; all accuracies are in 0..1."""
        accuracies = {name: result.accuracy for name, result in self.results.items()}
        published = {
            name: {
                "tasks": {task: value / 100 for task, value in figures.items()},
                "mean": None if mean is None else mean / 100,
            }
            for name, figures, mean in published_results(self.suite)
        }
        return {
            "suite": self.suite.name,
            "method": self.suite.method,
            "model": self.model,
            "tasks": {task.name: self._task_json(task) for task in self.suite.tasks},
            "groups": group_means(self.suite, accuracies),
            "mean": fmean(accuracies.values()) if not self.failed and accuracies else None,
            "failed": self.failed,
            "published": published,
            "run": self.path,
        }

    def _task_json(self, task: TaskSection) -> dict[str, Any]:
        found = self.results.get(task.name)
        interval = found and found.images and wilson_interval(found.accuracy, found.images)
        return {
            "group": task.group,
            "data": task.data or self.suite.data,
            "accuracy": found and found.accuracy,
            "split": found and found.split,
            "interval": list(interval) if interval else None,
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
    device: str | None = None,
    check: bool = True,
    watch: Watcher | None = None,
) -> SuiteResult:
    """Run `finetune` or `fewshot` with a model on every task of a suite, or `pretrain` each task.

    Each task is a command in its own process: its memory is free afterwards, and a task that fails
    does not stop the others. The same command with the same `out` continues: finished tasks are
    skipped and an interrupted fine-tuning resumes exactly.

    Args:
        suite: name of an installed suite, or a suite file.
        model: MODEL; None uses the newest finished run. A suite that pretrains takes none.
        settings: nested settings that override those of the suite and its tasks.
        out: folder of the runs; None makes `runs/MODEL-SUITE`.
        processes: processes of each task.
        precision: precision of each task.
        device: device of each task.
        check: look for near copies in the data of each task.

    Raises:
        VitcliError: no such suite or model, or every task failed.
        KeyboardInterrupt: Ctrl-C; the task has saved its state.
    """
    watch = watch or Quiet()
    if launch.world_size() > 1:
        raise VitcliError(
            "`--suite` starts the processes of its tasks; it cannot run under a launcher",
            "use `vitcli evaluate --suite SUITE --processes N`",
        )
    spec, file = load_suite(suite)
    if spec.method == "pretrain":
        if model is not None:
            raise VitcliError(f"suite `{spec.name}` trains its own models", "remove `--model`")
        model = "random weights"
    elif model is None:
        model = newest_run(classifier=False)
        watch.note(f"no `--model` given: using {model}")
    stem = file.stem if spec.method == "pretrain" else f"{run_stem(model)}-{file.stem}"
    machine = {"--processes": processes, "--precision": precision, "--device": device}
    options = [word for name, value in machine.items() for word in _option(name, value)]
    options += [] if check else ["--no-check"]
    with new_output(out, stem) as path:
        make_folder(path)
        with exclusive(path / LOCK, partial(_busy, path)):
            return _run_tasks(spec, file, model, settings or {}, options, path, watch)


def _busy(path: Path) -> VitcliError:
    return VitcliError(
        f"another process runs a suite in `{path}`", "wait for it, or choose another `--out`"
    )


def _run_tasks(
    spec: Suite,
    file: Path,
    model: str,
    changes: Settings,
    options: Sequence[str],
    path: Path,
    watch: Watcher,
) -> SuiteResult:
    """Run every task that has no result yet, and write the results."""
    for name in (RECORD, RESULT):
        remove_leftovers(path / name)  # of a killed process; a folder with nothing else is new
    _start_or_continue(path, spec, model, changes)
    watch.note(f"suite `{spec.name}`: {len(spec.tasks)} tasks in `{path}`")
    results: dict[str, TaskResult] = {}
    failed: dict[str, str] = {}
    with watch.progress("tasks", len(spec.tasks)) as bar:
        for task in spec.tasks:
            runner = TaskRunner(spec, task, file, model, changes, options, path, watch)
            try:
                results[task.name] = runner.run()
            except VitcliError as error:
                failed[task.name] = error.message
                watch.warn(f"{task.name}: {error.message}")
            bar.advance(1)
    if not results:
        raise VitcliError(
            f"every task of suite `{spec.name}` failed; the first: {next(iter(failed.values()))}",
            "see the warnings above for each task",
        )
    result = SuiteResult(spec, model, results, failed, str(path))
    write_text(path / RESULT, json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _start_or_continue(path: Path, suite: Suite, model: str, settings: Settings) -> None:
    """Write the record, or check that it has the same suite, model and settings."""
    wanted = {"suite": suite.model_dump(mode="json"), "model": model, "settings": settings}
    wanted = json.loads(json.dumps(wanted, default=str))
    record = path / RECORD
    if any(entry.name != LOCK for entry in path.iterdir()):
        try:
            known = dict(read_json(record))
        except (OSError, ValueError, TypeError):
            raise VitcliError(f"`{path}` exists already", "choose another `--out`") from None
        if known != wanted:
            differing = ", ".join(key for key in wanted if known.get(key) != wanted[key])
            raise VitcliError(
                f"`{path}` was started with another {differing}",
                "choose another folder with `--out`",
            )
        return
    write_text(record, json.dumps(wanted, indent=2) + "\n")


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


@dataclass(frozen=True)
class TaskRunner:
    """Runs one task of a suite with one model."""

    suite: Suite
    task: TaskSection
    file: Path
    model: str
    changes: Settings
    options: Sequence[str]
    folder: Path
    watch: Watcher

    def run(self) -> TaskResult:
        """The result of the task, from existing or new runs.

        Raises:
            VitcliError: a run fails.
        """
        chosen = self._select_settings()
        run = self._finished_run(self.task.folder, chosen)
        if self.suite.method == "pretrain":
            run = self._finished_fewshot(run)
        return task_result(run.result(), str(run.path), chosen)

    def _select_settings(self) -> dict[str, Any]:
        """The combination of `select` with the best validation accuracy; the first of equals."""
        select = self.suite.select
        if select is None:
            return {}
        splits = {"data.train_split": select.train, "data.test_split": select.validation}
        best, chosen = -1.0, {}
        for number, candidate in enumerate(select.combinations()):
            run = self._finished_run(f"{self.task.folder}-select-{number}", {**candidate, **splits})
            accuracy = task_result(run.result(), str(run.path), {}).accuracy
            if accuracy > best:
                best, chosen = accuracy, candidate
        return chosen

    def _finished_run(self, name: str, given: Mapping[str, Any]) -> Run:
        """The run `name`; it is run now unless it is finished."""
        run = Run(self.folder / name)
        if not run.finished:
            if self.suite.method == "fewshot":  # has no checkpoints to resume from
                run.remove()
            self._start(run.path, given)
        return run

    def _finished_fewshot(self, pretrained: Run) -> Run:
        """The few-shot evaluation of a model that the suite has trained."""
        run = Run(self.folder / f"{self.task.folder}-fewshot")
        if not run.finished:
            run.remove()
            data = task_data(self.suite.fewshot_data or self._data, self.file)
            command = ["fewshot", data, "--model", str(pretrained.path), "--out", str(run.path)]
            command += [word for word in self.options if word == "--no-check"]
            run_command([*command, "--shots", str(self.suite.shots)], self.task.name, self.watch)
        return run

    @property
    def _data(self) -> str:
        data = self.task.data or self.suite.data
        assert data is not None  # the suite file was checked
        return data

    def _start(self, path: Path, given: Mapping[str, Any]) -> None:
        settings: Settings = {}
        for layer in (self.suite.settings, self.task.settings):
            lay_over(settings, layer)
        for key, value in given.items():
            lay_over(settings, nest(key, value))
        lay_over(settings, self.changes)
        method = self.suite.method
        command = [method, task_data(self._data, self.file), "--out", str(path), *self.options]
        if method != "pretrain":
            command += ["--model", self.model]
        if method == "fewshot":
            command += ["--shots", str(self.suite.shots)]
        else:
            command += [*_option("--recipe", self.suite.recipe), "--resume"]
        for assignment in assignments(settings):
            command += ["--set", assignment]
        run_command(command, self.task.name, self.watch)
        if not Run(path).finished:
            raise VitcliError(f"`{path}` has no result")


def assignments(settings: Settings, prefix: str = "") -> list[str]:
    """Nested settings as `section.key=value`, with values in TOML."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += assignments(dict(value), f"{prefix}{key}.")
        else:
            text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
            found.append(f"{prefix}{key}={text}")
    return found


def run_command(command: Sequence[str], label: str, watch: Watcher) -> None:
    """Run one command line of this program, and pass on its messages.

    Raises:
        VitcliError: it failed; status 3 (some unreadable images) is not a failure.
        KeyboardInterrupt: it was interrupted and has saved its state.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "vitcli", *command],
        # The child watches its stdin: if this process is killed, the pipe closes and it stops.
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
    if status in INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (0, 3):
        raise VitcliError(re.sub(r"^error: ", "", reason) or f"it ended with status {status}")
