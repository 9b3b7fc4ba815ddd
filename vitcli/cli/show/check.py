"""Print the result of check."""

from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import MOST_CLASSES, print_facts, print_table
from vitcli.errors import printable

MOST_EXAMPLES = 3  # examples of each kind of finding
NUMBERS = ("labels as numbers", "numbers")
MOST_NAMES = 5  # file names of one group of duplicates


def show_check(result: Any) -> None:
    """Print splits, sizes and classes of a dataset, and the problems found."""
    facts = result.to_json()
    rows: list[tuple[str, Any]] = [
        ("images", ", ".join(f"{n:,} {name}" for name, n in facts["splits"].items())),
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
    if training := facts["training"].get("splits"):
        rows.append(("training uses", ", ".join(f"{n:,} {name}" for name, n in training.items())))
    for name in ("height", "width"):
        if found := facts[name]:
            rows.append((name, f"{found['min']} to {found['max']}, median {found['median']}"))
    if found := facts["samples"]:
        low, high = found["window"]
        seen = f"{found['min']:g} to {found['max']:g} in {found['images']} images"
        rows.append(("samples", f"{found['bits']} bits, {seen}; window {low:g} to {high:g}"))
    if hint := facts["suggested"]:
        said = (
            f"--set model.image_size={hint['image_size']} --set model.patch_size="
            f"{hint['patch_size']} ({hint['tokens']} tokens)"
        )
        rows.append(("suggested", said))
    if facts["sheet"]:
        rows.append(("sheet", facts["sheet"]))
    if facts["report"]:
        rows.append(("report", facts["report"]))
    print_facts(result.data, rows)
    splits = list(facts["splits"])
    classes = sorted(facts["classes"].items(), key=lambda item: item[1][splits[0]])
    if len(classes) > MOST_CLASSES:
        classes = [*classes[: MOST_CLASSES // 2], *classes[-MOST_CLASSES // 2 :]]
    if not result.source.numeric:
        print_table("", ["class", *splits], [[k, *(v[s] for s in splits)] for k, v in classes])
    report.print_title("problems" if facts["problems"] else "no problems found")
    for line in facts["problems"]:
        report.out.print(Text(f"  {printable(line)}"), soft_wrap=True)
    for title, pairs in facts["leaks"].items():
        for names in pairs[:MOST_EXAMPLES]:
            shown = " = ".join(printable(name) for name in names)
            report.out.print(Text(f"    {title}: {shown}", style="dim"), soft_wrap=True)
    for kind in ("exact_duplicates", "near_duplicates"):
        for names in facts[kind][:MOST_EXAMPLES]:
            shown = " = ".join(printable(name) for name in names[:MOST_NAMES])
            shown += f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
            report.out.print(
                Text(f"    {kind.replace('_', ' ')}: {shown}", style="dim"), soft_wrap=True
            )
