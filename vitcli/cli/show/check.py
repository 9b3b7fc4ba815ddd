"""Print the result of check."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import MOST_CLASSES, print_facts, print_table
from vitcli.errors import counted, printable

MOST_EXAMPLES = 3  # examples of each kind of finding
NUMBERS = ("labels as numbers", "numbers")
MOST_NAMES = 5  # file names of one group of duplicates


def show_check(result: Any) -> None:
    """Print splits, sizes and classes of a dataset, and the problems found."""
    facts = result.to_json()
    rows: list[tuple[str, Any]] = [
        ("images", _image_counts(facts["splits"])),
    ]
    if not result.source.numeric:
        rows.append(("classes", len(facts["classes"])))
    if found := facts["numbers"]:
        spread = f"mean {found['mean']:.4g}, standard deviation {found['std']:.4g}"
        quartiles = " / ".join(f"{found[key]:.4g}" for key in ("q25", "median", "q75"))
        shown = f"{found['min']:.6g} to {found['max']:.6g}, {spread}, quartiles {quartiles}"
        rows.append((NUMBERS[result.source.numeric], shown))
        rows.append(("to predict them", "vitcli finetune … --set objective.name=mse"))
    if facts["layout"]:
        rows.append(("layout", facts["layout"]))
    if "splits" in facts["training"]:
        rows.append(("training uses", _training_uses(result, facts["training"])))
    for name in ("height", "width"):
        if found := facts[name]:
            rows.append((name, f"{found['min']} to {found['max']}, median {found['median']}"))
    if found := facts["samples"]:
        low, high = found["window"]
        of = counted(found["images"], "image", "images")
        seen = f"{found['min']:g} to {found['max']:g} in {of}"
        rows.append(("samples", f"{found['bits']} bits, {seen}; window {low:g} to {high:g}"))
    if hint := facts["suggested"]:
        sizes = f"image size {hint['image_size']} px, patch size {hint['patch_size']} px"
        rows.append(("pretrain uses", f"{sizes} ({hint['tokens']} tokens)"))
    if facts["sheet"]:
        rows.append(("sheet", facts["sheet"]))
    if facts["report"]:
        rows.append(("report", facts["report"]))
    print_facts(result.data, rows)
    splits = list(facts["splits"])
    classes = sorted(facts["classes"].items(), key=lambda item: item[1][splits[0]])
    if len(classes) > MOST_CLASSES:
        classes = [*classes[: MOST_CLASSES // 2], *classes[-MOST_CLASSES // 2 :]]
    if classes and not result.source.numeric:
        print_table("", ["class", *splits], [[k, *(v[s] for s in splits)] for k, v in classes])
    report.print_title("problems" if facts["problems"] else "no problems found")
    for line in facts["problems"]:
        report.out.print(Text(f"  {printable(line)}"), soft_wrap=True)
    conflicts = [[f"{i['path']} ({i['label']})" for i in g] for g in facts["label_conflicts"]]
    for title, groups in (
        *facts["leaks"].items(),
        ("different labels", conflicts),
        ("exact duplicates", facts["exact_duplicates"]),
        ("near duplicates", facts["near_duplicates"]),
    ):
        _print_groups(title, groups, result.report is None)


def _print_groups(title: str, groups: Sequence[Sequence[str]], propose: bool) -> None:
    """Print the first groups of images that look the same, and how many others there are."""
    for names in groups[:MOST_EXAMPLES]:
        shown = " = ".join(printable(name) for name in names[:MOST_NAMES])
        shown += f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        report.out.print(Text(f"    {title}: {shown}", style="dim"), soft_wrap=True)
    if len(groups) > MOST_EXAMPLES:
        left = counted(len(groups) - MOST_EXAMPLES, "more group", "more groups")
        more = f"    {title}: and {left} of images"
        more += "; `--out check/` shows them" if propose else ""
        report.out.print(Text(more, style="dim"), soft_wrap=True)


def _image_counts(splits: Mapping[str, int]) -> str:
    """`300 train, 600 test`; `525, no split` for data that training divides."""
    if list(splits) == ["train"]:
        return f"{splits['train']:,}, no split"
    return ", ".join(f"{n:,} {name}" for name, n in splits.items())


def _training_uses(result: Any, training: Mapping[str, Any]) -> str:
    """`166 train (3 unreadable), 42 test; too few images for validation`."""
    lost = {k: f" ({n:,} unreadable)" if n else "" for k, n in training["unreadable"].items()}
    parts = [f"{n:,} {name}{lost[name]}" for name, n in training["splits"].items()]
    few = "validation" not in training["splits"]
    few = few and result.training.splitting.get("validation_fraction") == 0.0
    return ", ".join(parts) + "; too few images for validation" * few
