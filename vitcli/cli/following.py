"""The `next:` line of a result: one command that runs as printed, with the data, the model and the
options of the command that made the result."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vitcli.weights.formats import FORMATS

# Settings that say how DATA are read. The weights record the split, so it is not repeated.
READING = (
    "image_column",
    "label_column",
    "image_root",
    "image_suffix",
    "multi_label",
    "label_separator",
    "split_column",
    "test_fold",
    "class_level",
    "train_split",
    "test_split",
    "streaming",
    "classes",
)
# The options of `plan` that the training commands have with the same meaning.
PLANNED = (
    "epochs",
    "steps",
    "budget",
    "batch_size",
    "image_size",
    "precision",
    "processes",
    "set_",
)


def command_line(words: Sequence[Any]) -> str:
    """The words of a command as a shell reads them."""
    return shlex.join(["vitcli", *map(str, words)])


def typed_options(
    context: Any, *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> list[str]:
    """The options on the command line of `context`, as words.

    Args:
        only: names of the parameters to keep; None keeps all of them.
        without: names of parameters to leave out.
    """
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name
        typed = context.get_parameter_source(name).name == "COMMANDLINE"
        if parameter.param_type_name != "option" or not typed or name in without:
            continue
        if only is not None and name not in only:
            continue
        value = context.params[name]
        if getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if parameter.multiple else [value]:
            words += [parameter.opts[0], str(one)]
    return words


def repeated(context: Any, without: Collection[str], *more: str) -> str:
    """The command of `context` again, without some of its options, and with `more`."""
    data = context.params.get("data")
    options = typed_options(context, without=(*without, "json"))
    return command_line([context.command.name, *([data] if data else []), *options, *more])


def after_find_lr(context: Any, found: Any) -> str:
    """The training command with the rate that was found. `--out` holds the curve, so it is free."""
    more = ["--lr", f"{found.lr:.2g}"]
    if found.matrix_lr is not None:
        more += ["--set", f"optim.matrix_lr={found.matrix_lr:.2g}"]
    return repeated(context, ("find_lr", "lr", "out"), *more)


def after_plan(context: Any, estimate: Any) -> str | None:
    """The training command that was planned; None without DATA, which `plan` does not need."""
    recipe, typed = estimate.planned.recipe, context.params["recipe"]
    if recipe.data.name is None:
        return None
    words = [recipe.command]
    if data := context.params["data"]:
        words.append(data)
    if typed and (Path(typed) / "recipe.toml").is_file():
        typed = str(Path(typed) / "recipe.toml")
    if typed:
        words += ["--recipe", typed]
    if recipe.command == "finetune":
        words += ["--model", recipe.model.name]
    elif model := context.params["model"]:
        words += ["--set", f"model.name={model}"]
    return command_line([*words, *typed_options(context, only=PLANNED)])


def after_training(result: Any) -> str:
    """Evaluate a classifier or a regression; look at the features of a run without a head."""
    run = Path(result.run)
    if result.labels:
        return _evaluation(result.data, run, run, result.run)
    if result.data == "builtin:formula":
        return command_line(["fewshot", "builtin:digits", "--model", run, "--shots", 5])
    settings = _reading_settings(run)
    if _has_one_class_each(run):
        return command_line(["fewshot", result.data, "--model", run, "--shots", 5, *settings])
    return command_line(["inspect", result.data, "--model", run, *settings])


def after_fewshot(result: Any) -> str | None:
    """Evaluate the stored classifier; None if there is none."""
    run = result.run
    return _evaluation(result.data, run, Path(run), run) if run else None


def after_export(result: Any) -> str | None:
    """Evaluate the exported classifier; None if data or class names are unknown.

    Formats that are one file hold no class names.
    """
    from vitcli.run import Run

    section = Run(Path(result.model)).data_section()
    named = result.facts["class_names"] and FORMATS[result.format].suffix is None
    if section is None or section.name is None or not (named and result.head_trained):
        return None
    return _evaluation(section.name, result.path, Path(result.model), result.path)


def _evaluation(data: str, model: Any, run: Path | None, out: Any) -> str:
    """`evaluate` with the settings that read the data of `run`, and a folder for the report."""
    report = f"reports/{Path(out).name}"  # not among the runs, which `compare runs/*` reads
    settings = [] if run is None else _reading_settings(run)
    return command_line(["evaluate", data, "--model", model, "--out", report, *settings])


def _reading_settings(run: Path) -> list[str]:
    """`--set data.KEY=VALUE` for each setting in `READING` that the run does not leave out."""
    from vitcli.config.schema import DataSection
    from vitcli.run import Run

    section = Run(run).data_section()
    if section is None:
        return []
    usual, words = DataSection(), []
    for key in READING:
        value = getattr(section, key)
        if value != getattr(usual, key):
            text = str(value).lower() if isinstance(value, bool) else value
            words += ["--set", f"data.{key}={text}"]
    return words


def _has_one_class_each(run: Path) -> bool:
    """Whether `fewshot` takes the images of a run: several labels per image are joined by `; `."""
    from vitcli.train.recorded_images import ROWS_FILE, read_rows

    labels = {row.label for row in read_rows(run / ROWS_FILE)}
    return len(labels) > 1 and not any("; " in name or name == "(none)" for name in labels)
