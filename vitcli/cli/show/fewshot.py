"""The result of `vitcli fewshot` as tables."""

from collections.abc import Mapping
from typing import Any

from vitcli.cli.console import print_table, show_path
from vitcli.evals.fewshot.methods import METHODS


def show_fewshot(result: Any) -> None:
    """Show the accuracy for each number of shots, beside that of raw pixels."""

    facts = result.to_json()
    columns = ["shots", "this model", f"95 % interval over {result.split} images"]
    if facts["raw_pixels"]:
        size = facts["raw_pixels_size"]
        columns.append(f"raw pixels ({size[0]}x{size[1]})")
    if chosen := isinstance(result.l2, str):
        columns.append("l2 of each seed")
    rows = []
    for shots, found in facts["shots"].items():
        low, high = found["accuracy"]["interval"]
        row = [_shots_text(shots), _accuracy_text(found["accuracy"])]
        row.append(f"{100 * low:.1f} to {100 * high:.1f} %")
        if facts["raw_pixels"]:
            row.append(_accuracy_text(facts["raw_pixels"][shots]["accuracy"]))
        if chosen:
            row.append(", ".join(f"{l2:g}" for l2 in found["l2"]))
        rows.append(row)
    features = facts["representation"]
    features = "" if features == "pre-logits" else f" ({features})"
    title = (
        f"{METHODS[facts['method']].title} accuracy of {result.model}{features} on {result.data}: "
        f"{result.classes} classes, {result.test_images:,} {result.split} images, "
        f"{result.dim} features"
    )
    print_table(title, columns, rows)
    if result.run:
        show_path("classifier of seed 0 and the most shots, stored in", result.run)
    for shots, found in facts["shots"].items():
        if found.get("path", {}).get("accuracy"):
            _show_path(shots, found["path"], result.split)


def _show_path(shots: str, path: Mapping[str, Any], split: str) -> None:
    """Show the accuracy of each l2 on images left out, which decides, and on those of `split`."""
    rows = []
    for i, l2 in enumerate(path["l2"]):
        left_out = [100 * seed[i] for seed in path["left_out_accuracy"] if seed]
        mean = f"{sum(left_out) / len(left_out):.1f} %" if left_out else "-"
        rows.append([f"{l2:g}", mean, _accuracy_text(path["accuracy"][i])])
    print_table(f"{_shots_text(shots)}, by l2", ["l2", "left-out images", f"{split} images"], rows)


def _shots_text(shots: str) -> str:
    return "all images" if shots == "all" else f"{shots} per class"


def _accuracy_text(accuracy: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds."""
    mean = f"{100 * accuracy['mean']:.1f}"
    return f"{mean} ± {100 * accuracy['std']:.1f} %" if len(accuracy["seeds"]) > 1 else f"{mean} %"
