"""Print the results of pretrain, finetune and recipes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import percent, print_facts
from vitcli.errors import counted
from vitcli.report.page import REPORT_FILE

NO_SHARES = ("loss", "mae", "rmse", "r2")  # metrics that are not shown in percent


def with_interval(share: float, interval: Sequence[float] | None) -> str:
    """72.40 % (68.40 to 76.20): the 95 % interval is in parentheses."""
    if interval is None:
        return percent(share)
    return f"{percent(share)} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


def number_rows(figures: Mapping[str, Any], intervals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """MAE, RMSE and R2 of a regression with their 95 % intervals."""
    rows = []
    for key in ("mae", "rmse", "r2"):
        value, interval = figures.get(key), intervals.get(key)
        shown = "undefined: all numbers are equal" if value is None else f"{value:.4g}"
        if interval is not None:
            shown += f" ({interval[0]:.4g} to {interval[1]:.4g})"
        rows.append((key.upper(), shown))
    return rows


def accuracy_interval(figures: Mapping[str, float]) -> tuple[float, float]:
    """The 95 % interval of the accuracy in the result of a run."""
    from vitcli.evals.intervals import wilson_interval

    return wilson_interval(figures["accuracy"], int(figures["images"]))


def show_trained(result: Any) -> None:
    """Print the result of `pretrain` or `finetune`."""
    figures = result.figures
    rows: list[tuple[str, Any]] = [
        ("model", f"{result.model}, {result.parameters:,} parameters"),
        ("data", result.data),
        ("steps", f"{result.steps:,} ({result.images:,} images)"),
        ("training time", f"{result.seconds:.0f} s, {result.images_per_second:.0f} images/s"),
    ]
    for found in filter(None, (result.validation, figures)):
        split = found.get("split", "test")  # runs of earlier versions do not name it
        if "accuracy" in found and "images" in found:
            shown = with_interval(found["accuracy"], accuracy_interval(found))
            rows.append((f"{split} accuracy", f"{shown} of {found['images']:,.0f} images"))
        if "balanced_accuracy" in found:
            rows.append((f"{split} balanced accuracy", percent(found["balanced_accuracy"])))
        if "mae" in found:
            errors = number_rows(found, found.get("intervals", {}))
            rows += [(f"{split} {name}", text) for name, text in errors]
        if "map" in found:
            share = f"{percent(found['map'])} of {found['images']:,.0f} images"
            rows.append((f"{split} mean average precision", share))
            rows.append((f"{split} micro F1 at 0.5", percent(found["micro_f1"])))
    if result.best is not None:
        name, value = result.best["metric"], result.best["value"]
        shown = f"{value:.4g}" if name in NO_SHARES else percent(value)
        rows.append((f"best validation {name}", f"{shown} at step {result.best['step']:,}"))
        rows.append(("weights", _which_weights(result)))
    if "best_fewshot_accuracy" in figures:
        best = f"{percent(figures['best_fewshot_accuracy'])} at step "
        last = percent(figures["fewshot_accuracy"])
        split = figures.get("fewshot_split", "")  # runs of earlier versions do not name it
        name = f"{split} few-shot accuracy".strip()
        rows.append((name, f"{last}; best {best}{figures['best_fewshot_step']:,}"))
    held_out = figures.get("split", "test")
    rows += [
        (
            f"{held_out} loss" if name == "loss" else name.replace("/", " "),
            f"{value:.4g}" if "mae" in name else f"{value:.4f}",
        )
        for name, value in figures.items()
        if name == "loss" or name.startswith("train/")
    ]
    if result.broken:
        rows.append(("unreadable", f"{counted(len(result.broken), 'image', 'images')}, not used"))
    if (page := Path(result.run) / REPORT_FILE).is_file():
        rows.append(("report", page))
    print_facts(f"{result.command}: {result.run}", rows)


def _which_weights(result: Any) -> str:
    """Which weights were evaluated, and where they are."""
    if result.weights is None:  # a run of an earlier version
        return f"the last in model.safetensors, the best in best.safetensors of {result.run}"
    step = f"step {result.weights['step']:,}"
    if result.weights["name"] == "best":
        return f"{result.run}/model.safetensors: the best ({step}); last.safetensors: the last step"
    return f"{result.run}/model.safetensors: the last step ({step}), which is the best"


def show_found_rate(result: Any) -> None:
    """Print the learning rate to try, and where the curve is."""
    rows: list[tuple[str, Any]] = [("steepest descent at lr", f"{result.lr:.2g}")]
    if result.matrix_lr is not None:
        rows.append(("Muon's matrix_lr", f"{result.matrix_lr:.2g}"))
    rows += [
        ("lowest loss at lr", f"{result.lowest:.2g}"),
        ("lr of the recipe", f"{result.given:g}"),
        ("steps", f"{len(result.rates)}, in {result.seconds:.0f} s"),
        ("curve", f"{result.folder}/lr.png"),
    ]
    print_facts("learning-rate finder", rows)


def show_recipes(result: Any) -> None:
    """Print two lines per recipe: its data, model and cost, and its description."""
    for row in result.rows:
        takes = f"{row.command} {row.data or 'DATA'} {row.model or '--model MODEL'}"
        takes += f", {row.cost}" if row.cost else ""
        report.out.print(Text.assemble((row.name, "bold"), "  ", takes), soft_wrap=True)
        report.out.print(Text(f"    {row.description}", style="dim"), soft_wrap=True)
