"""The result of `vitcli evaluate`, as tables.

The result of a suite as a table.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from vitcli.cli.console import print_facts, print_table, show_next
from vitcli.cli.show.training import MOST_CLASSES, percent, worst
from vitcli.run import run_stem

MOST_PAIRS = 5  # of classes that are taken for each other


def show_evaluation(result: Any) -> None:
    """One model or several."""
    if hasattr(result, "models"):
        show_evaluations(result)
    elif hasattr(result.metrics, "map"):
        show_labels_evaluation(result)
    else:
        show_images_evaluation(result)


def with_interval(figure: float, pair: Sequence[float]) -> str:
    """72.40 % (68.40 to 76.20)."""
    return f"{percent(figure)} ({100 * pair[0]:.2f} to {100 * pair[1]:.2f})"


def show_images_evaluation(result: Any) -> None:
    """Figures over the set, and the classes."""
    m, of = result.metrics, result.intervals.of
    rows: list[tuple[str, Any]] = [
        ("images", f"{m.images:,} ({result.split})"),
        ("top-1", with_interval(m.top1, of["top1"])),
    ]
    if result.top1_restricted != m.top1:
        among = with_interval(result.top1_restricted, of["top1_restricted"])
        rows.append(("top-1 among the data's classes", among))
    rows.append(("top-5", with_interval(m.top5, of["top5"])))
    if result.real is not None:
        real = f"{with_interval(result.real.top1, of['top1_real'])}, {result.real.images:,} images"
        rows.append(("top-1 by ReaL", real))
    low, high = of["ece"]
    rows += [
        ("loss", f"{m.loss:.4f}"),
        ("calibration error", f"{m.ece:.4f} ({low:.4f} to {high:.4f})"),
    ]
    print_facts(f"{result.model} on {result.data}", [*rows, *_temperature(result)])
    words = result.words

    def called(name: str) -> str:
        return f"{name} ({words[name]})" if name in words else name

    classes = [
        [called(name), f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", c["images"]]
        for name, c in result.per_class.items()
    ]
    shown = classes if len(classes) <= MOST_CLASSES else worst(classes)
    title = "" if len(classes) <= MOST_CLASSES else f"the {MOST_CLASSES} of lowest F1"
    print_table(title, ["class", "precision", "recall", "F1", "images"], shown)
    if pairs := result.mistakes.confused[:MOST_PAIRS]:
        said = [[called(p.true), called(p.predicted), f"{p.images} of {p.of}"] for p in pairs]
        print_table("most often confused", ["true", "predicted", "images"], said)
    files = result.files or {}
    shown_files = ("confusion", "confusion_picture", "reliability", "mistakes")
    print_facts("written", [(k.replace("_", " "), files[k]) for k in shown_files if k in files])


def _temperature(result: Any) -> list[tuple[str, Any]]:
    """The temperature, where there is one, and what it has changed."""
    done = result.calibration
    if done is None:
        return [("temperature", f"{result.temperature:.4g}")] if result.temperature != 1 else []
    loss = done.loss_before
    before = "" if done.ece_before is None else f", calibration error {done.ece_before:.4f}"
    return [
        ("before", f"loss {loss:.4f}{before}"),
        ("temperature", f"{done.temperature:.4g}, fitted on {done.images:,} images: {done.split}"),
        ("stored in", done.stored),
    ]


def show_labels_evaluation(result: Any) -> None:
    """Figures over a set whose images have any number of labels."""
    m = result.metrics
    rows: list[tuple[str, Any]] = [
        ("images", f"{m.images:,} ({result.split})"),
        ("mean average precision", with_interval(m.map, result.intervals.of["map"])),
        ("micro F1 at 0.5", percent(m.micro_f1)),
        ("loss", f"{result.loss:.4f}"),
    ]
    print_facts(f"{result.model} on {result.data}", [*rows, *_temperature(result)])
    classes = [
        [
            name,
            f"{c['average_precision']:.3f}",
            f"{c['precision']:.3f}",
            f"{c['recall']:.3f}",
            f"{c['f1']:.3f}",
            c["images"],
        ]
        for name, c in result.per_class.items()
        if c["average_precision"] is not None
    ]
    many = len(classes) > MOST_CLASSES
    shown = sorted(classes, key=lambda row: row[1])[:MOST_CLASSES] if many else classes
    title = f"the {MOST_CLASSES} of lowest average precision" if many else ""
    columns = ["class", "average precision", "precision", "recall", "F1", "images"]
    print_table(title, columns, shown)


def show_evaluations(result: Any) -> None:
    """A row for each model, and how far it lies from the first."""
    models = result.models
    if all(hasattr(one.metrics, "top1") for one in models):
        restricted = any(one.top1_restricted != one.metrics.top1 for one in models)
        real = any(one.real is not None for one in models)
        columns = ["model", "images", "top-1"]
        columns += ["among the data's"] * restricted + ["ReaL"] * real
        columns += ["top-5", "loss", "calibration error"]
        rows = [
            [
                one.model,
                f"{one.metrics.images:,}",
                with_interval(one.metrics.top1, one.intervals.of["top1"]),
                *([percent(one.top1_restricted)] * restricted),
                *(["-" if one.real is None else percent(one.real.top1)] * real),
                percent(one.metrics.top5),
                f"{one.metrics.loss:.4f}",
                f"{one.metrics.ece:.4f}",
            ]
            for one in models
        ]
    else:
        columns = ["model", "images", "mean average precision", "loss"]
        rows = [
            [
                one.model,
                f"{one.metrics.images:,}",
                with_interval(one.metrics.map, one.intervals.of["map"]),
                f"{one.loss:.4f}",
            ]
            for one in models
        ]
    print_table(result.data, columns, rows)
    first, *others = models
    for one, pair in zip(others, result.paired, strict=True):
        title = f"{one.model} against {first.model}"
        if isinstance(pair, str):
            print_facts(title, [("not paired", pair)])
            continue
        between = f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}"
        facts = [("difference", f"{100 * pair.difference:+.2f} points, 95 % interval {between}")]
        if hasattr(pair, "p_value"):
            alone = f"{pair.only_second} images, the other {pair.only_first}"
            facts.append(("right alone", alone))
            facts.append(("McNemar's p", f"{pair.p_value:.3g}, over {pair.images:,} images"))
        print_facts(title, facts)


def show_suite(result: Any) -> None:
    """A row a task, by groups, with the means; beside this model what others have published."""
    facts = result.to_json()
    others = facts["published"]
    columns = ["task", "group", "images", run_stem(facts["model"]), *others]
    rows = []
    for name, task in facts["tasks"].items():
        row = [name, task["group"], "" if task["images"] is None else f"{task['images']:,}"]
        row.append(percent_or_dash(task["accuracy"]))
        rows.append(row + [percent_or_dash(other["tasks"].get(name)) for other in others.values()])
    for group, mean in facts["groups"].items():
        names = [name for name, task in facts["tasks"].items() if task["group"] == group]
        row = [f"mean of {group}", "", "", percent_or_dash(mean)]
        rows.append(
            row + [percent_or_dash(_mean(other["tasks"], names)) for other in others.values()]
        )
    row = [f"mean of {len(facts['tasks'])}", "", "", percent_or_dash(facts["mean"])]
    rows.append(row + [percent_or_dash(other["mean"]) for other in others.values()])
    how = "fine-tuned" if facts["method"] == "finetune" else "with few shots"
    print_table(f"{facts['suite']}, {how}: test accuracy, %", columns, rows)
    show_next(f"each task is a run in {facts['run']}")


def percent_or_dash(share: float | None) -> str:
    """0.7763 -> 77.63; - where there is none."""
    return "-" if share is None else f"{100 * share:.2f}"


def _mean(figures: dict[str, float], names: list[str]) -> float | None:
    return fmean(figures[n] for n in names) if all(n in figures for n in names) else None
