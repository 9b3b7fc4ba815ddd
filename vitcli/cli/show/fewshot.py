"""The result of `vitcli fewshot` as tables."""

from collections.abc import Mapping
from typing import Any

from vitcli.cli.console import print_table, show_next

METHODS = {
    "ridge": "few-shot",
    "knn": "nearest neighbours",
    "logistic": "linear probe",
    "mean": "nearest class mean",
}


def show_fewshot(result: Any) -> None:
    """Accuracies by shots, beside those of the raw pixels; of `path` those of every strength."""
    facts = result.to_json()
    columns = ["shots", "this model"]
    if facts["raw_pixels"]:
        size = facts["raw_pixels_size"]
        columns.append(f"raw pixels ({size[0]}x{size[1]})")
    if chosen := isinstance(result.l2, str):
        columns.append("l2 of each seed")
    rows = []
    for shots, found in facts["shots"].items():
        row = ["all images" if shots == "all" else f"{shots} a class", spread(found["accuracy"])]
        if facts["raw_pixels"]:
            row.append(spread(facts["raw_pixels"][shots]["accuracy"]))
        if chosen:
            row.append(", ".join(f"{l2:g}" for l2 in found["l2"]))
        rows.append(row)
    of = "" if facts["representation"] == "pre-logits" else f", {facts['representation']}"
    title = (
        f"{METHODS[facts['method']]} accuracy of {result.model}{of} on {result.data}: "
        f"{result.classes} classes, {result.test_images:,} test images, {result.dim} features"
    )
    print_table(title, columns, rows)
    for shots, found in facts["shots"].items():
        if found.get("path", {}).get("accuracy"):
            show_path(shots, found["path"])
    if result.run:
        show_next(f"vitcli predict image.jpg --model {result.run}")


def show_path(shots: str, path: Mapping[str, Any]) -> None:
    """The accuracy of every strength on images left out, which decide, and on the test images."""
    rows = []
    for i, l2 in enumerate(path["l2"]):
        left_out = [100 * seed[i] for seed in path["left_out_accuracy"] if seed]
        mean = f"{sum(left_out) / len(left_out):.1f} %" if left_out else "-"
        rows.append([f"{l2:g}", mean, spread(path["accuracy"][i])])
    print_table(f"{shots} a class, by l2", ["l2", "left out", "test"], rows)


def spread(accuracy: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds."""
    mean = f"{100 * accuracy['mean']:.1f}"
    return f"{mean} ± {100 * accuracy['std']:.1f} %" if len(accuracy["seeds"]) > 1 else f"{mean} %"
