"""The result of a suite as a table."""

from statistics import fmean
from typing import Any

from vitcli.report import print_table, show_next
from vitcli.run import run_stem


def show_suite(result: Any) -> None:
    """A row a task, by groups, with the means; beside this model what others have published."""
    facts = result.to_json()
    others = facts["published"]
    columns = ["task", "group", "images", run_stem(facts["model"]), *others]
    rows = []
    for name, task in facts["tasks"].items():
        row = [name, task["group"], "" if task["images"] is None else f"{task['images']:,}"]
        row.append(percent(task["accuracy"]))
        rows.append(row + [percent(other["tasks"].get(name)) for other in others.values()])
    for group, mean in facts["groups"].items():
        names = [name for name, task in facts["tasks"].items() if task["group"] == group]
        row = [f"mean of {group}", "", "", percent(mean)]
        rows.append(row + [percent(_mean(other["tasks"], names)) for other in others.values()])
    row = [f"mean of {len(facts['tasks'])}", "", "", percent(facts["mean"])]
    rows.append(row + [percent(other["mean"]) for other in others.values()])
    how = "fine-tuned" if facts["method"] == "finetune" else "with few shots"
    print_table(f"{facts['suite']}, {how}: test accuracy, %", columns, rows)
    show_next(f"each task is a run in {facts['run']}")


def percent(share: float | None) -> str:
    """0.7763 -> 77.63; - where there is none."""
    return "-" if share is None else f"{100 * share:.2f}"


def _mean(figures: dict[str, float], names: list[str]) -> float | None:
    return fmean(figures[n] for n in names) if all(n in figures for n in names) else None
