"""Results of `vitcli evaluate` and `vitcli compare` as tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vitcli.cli.console import MOST_CLASSES, percent, print_facts, print_table, show_path
from vitcli.cli.show.training import number_rows, with_interval
from vitcli.evals.scoring import MIN_TOP5_CLASSES
from vitcli.run import run_stem

MAX_PAIRS = 5  # pairs of confused classes
METHODS = {
    "finetune": "fine-tuning",
    "fewshot": "few-shot",
    "pretrain": "few-shot after pretraining",
}
FILES = (
    "confusion",
    "confusion_picture",
    "reliability",
    "mistakes",
    "mistakes_table",
    "scatter",
    "report",
)
AVERAGES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "roc_auc": "ROC-AUC, one-vs-rest",
}

Rows = list[tuple[str, Any]]


def show_evaluation(result: Any) -> None:
    """Show the evaluation of one model, or the comparison of several."""
    if hasattr(result, "models"):
        _show_comparison(result)
        return
    rows: Rows = [("images", f"{result.metrics.images:,} ({result.split})")]
    if result.numbers is not None:
        rows += number_rows(result.metrics.to_json(), result.intervals.to_json())
    elif result.details is None:
        rows += _multi_label_rows(result)
    else:
        rows += _single_label_rows(result)
    print_facts(f"{result.model} on {result.data}", [*rows, *_temperature_rows(result)])
    if result.numbers is not None:
        _show_worst_numbers(result)
    elif result.details is None:
        _show_multi_label_classes(result)
    else:
        _show_single_label_classes(result)
    if files := [(k.replace("_", " "), result.files[k]) for k in FILES if k in result.files]:
        print_facts("written", files)


def _show_worst_numbers(result: Any) -> None:
    rows = [
        [one["path"], f"{one['target']:.6g}", f"{one['value']:.6g}"]
        for one in result.worst[:MAX_PAIRS]
    ]
    name = result.numbers.name
    print_table(
        f"the {len(rows)} largest errors", ["image", f"true {name}", f"predicted {name}"], rows
    )


def _single_label_rows(result: Any) -> Rows:
    m, of, real = result.metrics, result.intervals.of, result.details.real
    rows: Rows = [("accuracy", with_interval(m.top1, of["top1"]))]
    if m.top1_restricted != m.top1:
        restricted = with_interval(m.top1_restricted, of["top1_restricted"])
        rows.append(("accuracy among the data's classes", restricted))
    if result.details.num_outputs >= MIN_TOP5_CLASSES:
        rows.append(("top-5 accuracy", with_interval(m.top5, of["top5"])))
    rows += _average_rows(result, ("balanced_accuracy", "macro_f1", "roc_auc"))
    if real is not None:
        by_real = f"{with_interval(real.top1, of['top1_real'])}, {real.images:,} images"
        rows.append(("accuracy by ReaL labels", by_real))
    rows.append(("loss", f"{m.loss:.4f}"))
    error, interval = result.details.calibration_error, of["ece"]
    spread = f"no interval: {result.intervals.reasons.get('ece')}"
    if interval is not None:
        spread = f"{interval[0]:.4f} to {interval[1]:.4f}"
    # A few images show an error even for a calibrated model.
    shown = f"{m.ece:.4f}; corrected for {m.images:,} images {error.debiased:.4f} ({spread})"
    return [*rows, ("calibration error", shown)]


def _multi_label_rows(result: Any) -> Rows:
    m, of, reasons = result.metrics, result.intervals.of, result.intervals.reasons
    rows: Rows = [("mean average precision", percent(m.map))]
    if "map" in reasons:
        rows.append(("95 % interval", f"none: {reasons['map']}"))
    else:
        corrected = with_interval(result.leave_out.corrected, of["map"])
        rows.append(("without the bias of few images", corrected))
    stored = any("threshold" in row for row in result.per_class.values())
    place = "at the thresholds" if stored else "at 0.5"
    rows.append((f"micro F1 {place}", with_interval(m.micro_f1, of["micro_f1"])))
    rows += _average_rows(result, ("macro_f1", "roc_auc"))
    return [*rows, ("loss", f"{m.loss:.4f}")]


def _average_rows(result: Any, names: Sequence[str]) -> Rows:
    """Figures averaged over classes with their intervals, or the reason why one is undefined."""
    found, of, rows = result.averages, result.intervals.of, []
    for name in names:
        value, reason = found.values.get(name), found.undefined.get(name)
        shown = f"undefined: {reason}" if value is None else with_interval(value, of.get(name))
        rows.append((AVERAGES[name], shown))
    return rows


def _temperature_rows(result: Any) -> Rows:
    """The temperature if it is not 1, and what a calibration changed."""
    done, rows = result.calibration, _threshold_rows(result)
    if done is None:
        known = [("temperature", f"{result.temperature:.4g}")] if result.temperature != 1 else []
        return known + rows
    error = "" if done.ece_before is None else f", calibration error {done.ece_before:.4f}"
    return [
        ("before calibration", f"loss {done.loss_before:.4f}{error}"),
        ("temperature", f"{done.temperature:.4g}, fitted on {done.images:,} images: {done.split}"),
        ("stored in", done.stored),
        *rows,
    ]


def _threshold_rows(result: Any) -> Rows:
    """Where new thresholds come from, and what they changed."""
    done = result.thresholds
    if done is None:
        return []
    macro = "" if done.macro_f1_before is None else f", macro F1 {percent(done.macro_f1_before)}"
    return [
        ("before the thresholds", f"micro F1 {percent(done.micro_f1_before)}{macro}"),
        ("thresholds", f"{done.rule}, fitted on {done.images:,} images: {done.split}"),
        ("stored in", done.stored),
    ]


def _show_single_label_classes(result: Any) -> None:
    names = result.details.display_names

    def display(name: str) -> str:
        return f"{name} ({names[name]})" if name in names else name

    def recall(one: Mapping[str, Any]) -> str:
        low, high = one["recall_interval"]
        return f"{one['recall']:.3f} ({low:.3f} to {high:.3f})"

    rows = [
        [display(k), f"{c['precision']:.3f}", recall(c), f"{c['f1']:.3f}", c["images"]]
        for k, c in result.per_class.items()
    ]
    many = len(rows) > MOST_CLASSES
    title = f"the {MOST_CLASSES} classes of lowest F1" if many else ""
    columns = ["class", "precision", "recall (95 % interval)", "F1", "images"]
    lowest = sorted(rows, key=lambda row: row[3])[:MOST_CLASSES]  # by F1
    print_table(title, columns, lowest if many else rows)
    if pairs := result.details.mistakes.confused[:MAX_PAIRS]:
        cells = [[display(p.true), display(p.predicted), f"{p.images} of {p.of}"] for p in pairs]
        total = result.details.mistakes.num_pairs
        title = "most often confused"
        title += f": {len(pairs)} of {total:,} pairs of classes" if total > len(pairs) else ""
        print_table(title, ["true", "predicted", "images"], cells)


def _show_multi_label_classes(result: Any) -> None:
    keys = ["average_precision", "precision", "recall", "f1"]
    columns = ["class", "average precision", "precision", "recall", "F1"]
    if any("threshold" in row for row in result.per_class.values()):
        keys, columns = [*keys, "threshold"], [*columns, "threshold"]
    rows = [
        [name, *(f"{c[key]:.3f}" for key in keys), c["images"]]
        for name, c in result.per_class.items()
        if c["average_precision"] is not None
    ]
    many = len(rows) > MOST_CLASSES
    rows = sorted(rows, key=lambda row: row[1])[:MOST_CLASSES] if many else rows
    title = f"the {MOST_CLASSES} classes of lowest average precision" if many else ""
    print_table(title, [*columns, "images"], rows)


def _show_comparison(result: Any) -> None:
    """Show a row for each model, then the paired comparison with the first model."""
    models = result.models
    if all(one.numbers is not None for one in models):
        rows = [[one.model, *_number_cells(one)] for one in models]
        print_table(_data_and_split(result), ["model", "images", "MAE", "RMSE", "R2"], rows)
        _show_pairs(result)
        return
    single = all(one.details is not None for one in models)
    restricted = single and any(m.metrics.top1_restricted != m.metrics.top1 for m in models)
    real = single and any(m.details.real is not None for m in models)
    top5 = single and any(m.details.num_outputs >= MIN_TOP5_CLASSES for m in models)
    columns = ["model", "images"]
    if single:
        columns += ["accuracy"] + ["among the data's"] * restricted + ["ReaL"] * real
        columns += ["top-5"] * top5 + ["loss", "calibration error"]
    else:
        columns += ["mean average precision", "loss"]
    rows = []
    for one in models:
        m = one.metrics
        row = [one.model, f"{m.images:,}"]
        if single:
            row.append(with_interval(m.top1, one.intervals.of["top1"]))
            row += [percent(m.top1_restricted)] * restricted
            row += [percent_or_dash(one.details.real and one.details.real.top1, " %")] * real
            row += [percent(m.top5)] * top5 + [f"{m.loss:.4f}", f"{m.ece:.4f}"]
        else:
            row += [percent(m.map), f"{m.loss:.4f}"]
        rows.append(row)
    print_table(_data_and_split(result), columns, rows)
    _show_pairs(result)


def _data_and_split(result: Any) -> str:
    """The title of a comparison: what the models were measured on."""
    splits = dict.fromkeys(one.split for one in result.models)
    return f"{result.data}: {' and '.join(splits)} images"


def _number_cells(one: Any) -> list[str]:
    rows = number_rows(one.metrics.to_json(), one.intervals.to_json())
    return [f"{one.metrics.images:,}", *(text for _, text in rows)]


def _show_pairs(result: Any) -> None:
    first, *others = result.models
    for one, pair in zip(others, result.paired, strict=True):
        title = f"{one.model} compared with {first.model}"
        print_facts(title, paired_rows(pair, first.model, one.model))


def paired_rows(pair: Any, first: str, second: str) -> Rows:
    """A paired comparison, or the reason why there is none."""
    if isinstance(pair, str):
        return [("no paired test", pair)]
    if getattr(pair, "metric", None) == "mae":
        shown = f"{pair.difference:+.4g}, 95 % interval {pair.low:+.4g} to {pair.high:+.4g}"
        return [("difference of MAE", shown), ("Student's p-value", f"{pair.p_value:.3g}")]
    interval = f"{100 * pair.low:+.2f} to {100 * pair.high:+.2f}"
    rows: Rows = [("difference", f"{100 * pair.difference:+.2f} points, 95 % interval {interval}")]
    if hasattr(pair, "p_value"):
        rows.append((f"only {second} correct", f"{pair.only_second:,} images"))
        rows.append((f"only {first} correct", f"{pair.only_first:,} images"))
        rows.append(("McNemar's p-value", f"{pair.p_value:.3g} ({pair.images:,} images)"))
    return rows


def show_run_comparison(result: Any) -> None:
    """Show settings and results of several runs in columns, then the paired tests."""
    columns = ["", *result.runs]
    if result.settings:
        settings = [[name, *map(str, values)] for name, values in result.settings.items()]
        print_table("settings that differ", columns, settings)
    results = [
        [name, *("-" if value is None else f"{value:,.4g}" for value in values)]
        for name, values in result.results.items()
    ]
    splits = [["split", *(split or "-" for split in result.splits)]]
    print_table("results", columns, splits + results)
    first, *others = result.runs
    if result.folds is None:  # folds hold different images
        for run, pair in zip(others, result.paired, strict=True):
            print_facts(f"{run} compared with {first}", paired_rows(pair, first, run))
    _show_ranking(result.ranking, result.splits[0])
    _show_folds(result.folds)
    if result.seeds:
        rows = [(n, f"{mean:,.5g} ± {std:.2g}") for n, (mean, std) in result.seeds.items()]
        measured = " and ".join(dict.fromkeys(split for split in result.splits if split))
        title = f"mean and std over {len(result.runs)} seeds of one recipe"
        print_facts(f"{title}, {measured} images" if measured else title, rows)


def _show_ranking(ranking: Any, split: str | None) -> None:
    """Print the runs from the best to the worst, and in words whether the difference is real."""
    if isinstance(ranking, str):
        print_facts("", [("no ranking", ranking)])
    elif ranking is not None:
        rows = [[one.run, f"{one.value:,.4g}", one.verdict or "best"] for one in ranking.runs]
        print_table(
            "ranking, best first",
            ["run", f"{split or ''} {ranking.metric}".strip(), "tested"],
            rows,
        )
        print_facts("", [("verdict", ranking.verdict)])


def _show_folds(folds: Any) -> None:
    """Print mean and spread over the folds, and the accuracy of all their images together."""
    if isinstance(folds, str):
        print_facts("", [("no summary over folds", folds)])
    elif folds is not None:
        rows = [(name, f"{mean:,.5g} ± {std:.2g}") for name, (mean, std) in folds.figures.items()]
        if folds.accuracy is not None:
            pooled = f"{with_interval(folds.accuracy, folds.interval)} of {folds.images:,} images"
            rows.append(("accuracy of all folds together", pooled))
        title = f"mean and std over the {folds.split} images of {folds.folds} folds"
        print_facts(f"{title}, drawn with seed {folds.seed}", rows)


def show_suite(result: Any) -> None:
    """Show a row for each task and the means of the groups, with published results beside."""
    facts = result.to_json()
    published = facts["published"]
    columns = ["task", "group", "images", run_stem(facts["model"]), "95 % interval", *published]
    rows = []
    for name, task in facts["tasks"].items():
        images = "" if task["images"] is None else f"{task['images']:,}"
        interval = " to ".join(f"{100 * x:.2f}" for x in task["interval"] or ())
        row = [name, task["group"], images, percent_or_dash(task["accuracy"]), interval]
        rows.append(row + [percent_or_dash(one["tasks"].get(name)) for one in published.values()])
    for group, mean in facts["groups"].items():
        names = [name for name, task in facts["tasks"].items() if task["group"] == group]
        row = [f"mean of {group}", "", "", percent_or_dash(mean), ""]
        means = [_mean(one["tasks"], names) for one in published.values()]
        rows.append(row + [percent_or_dash(mean) for mean in means])
    if facts["method"] != "pretrain":  # a mean over different models means nothing
        row = [f"mean of {len(facts['tasks'])} tasks", "", "", percent_or_dash(facts["mean"]), ""]
        rows.append(row + [percent_or_dash(one["mean"]) for one in published.values()])
    method = METHODS[facts["method"]]
    splits = "/".join(sorted({task["split"] for task in facts["tasks"].values() if task["split"]}))
    print_table(f"{facts['suite']}, {method}: {splits} accuracy in %", columns, rows)
    show_path("runs of the tasks", facts["run"])


def percent_or_dash(share: float | None, unit: str = "") -> str:
    """0.7763 -> 77.63; None -> -."""
    return "-" if share is None else f"{100 * share:.2f}{unit}"


def _mean(figures: Mapping[str, float], names: Sequence[str]) -> float | None:
    return fmean(figures[n] for n in names) if all(n in figures for n in names) else None
