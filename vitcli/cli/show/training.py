"""Print the results of pretrain, finetune, compare, export, recipes and check."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts, print_table, show_next
from vitcli.errors import printable

MOST_CLASSES = 20  # rows of a table of classes
MOST_EXAMPLES = 3  # examples of each kind of finding
MOST_NAMES = 5  # file names of one group of duplicates


def percent(share: float) -> str:
    """0.9077 -> 90.77 %."""
    return f"{100 * share:.2f} %"


def with_interval(share: float, interval: Sequence[float] | None) -> str:
    """72.40 % (68.40 to 76.20): the 95 % interval is in parentheses."""
    if interval is None:
        return percent(share)
    return f"{percent(share)} ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


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
        ("time", f"{result.seconds:.0f} s, {result.images_per_second:.0f} images/s"),
    ]
    if "accuracy" in figures and "images" in figures:
        shown = with_interval(figures["accuracy"], accuracy_interval(figures))
        counted = f"{shown} of {figures['images']:,.0f} images"
        rows.append(("test accuracy", counted))
    if "map" in figures:
        counted = f"{percent(figures['map'])} of {figures['images']:,.0f} images"
        rows.append(("test mean average precision", counted))
        rows.append(("test micro F1 at 0.5", percent(figures["micro_f1"])))
    if "best_fewshot_accuracy" in figures:
        best = f"{percent(figures['best_fewshot_accuracy'])} at step "
        last = percent(figures["fewshot_accuracy"])
        rows.append(("few-shot accuracy", f"{last}; best {best}{figures['best_fewshot_step']:,}"))
    rows += [
        (name.removeprefix("train/"), f"{value:.4f}")
        for name, value in figures.items()
        if name == "loss" or name.startswith("train/")
    ]
    if result.broken:
        rows.append(("unreadable", f"{len(result.broken)} images, replaced by others of the class"))
    print_facts(f"{result.command}: {result.run}", rows)
    steps = {"pretrain": "vitcli fewshot --shots 5, or vitcli finetune"}
    show_next(steps.get(result.command, "vitcli predict image.jpg"))


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
    muon = "" if result.matrix_lr is None else f" --set optim.matrix_lr={result.matrix_lr:.2g}"
    show_next(f"the same command with --lr {result.lr:.2g}{muon}, without --find-lr")


def worst(classes: list[list[Any]]) -> list[list[Any]]:
    """The rows of the classes with the lowest F1."""
    return sorted(classes, key=lambda row: row[3])[:MOST_CLASSES]


def show_export(result: Any) -> None:
    """Print the files of an export, its facts, and the difference after reading it back."""
    facts, names = result.facts, "with names" if result.facts["class_names"] else "without names"
    rows: list[tuple[str, Any]] = [(name, f"{size:,} bytes") for name, size in result.files.items()]
    rows.append(("classes", f"{facts['classes']:,}, {names}" if facts["classes"] else "no head"))
    rows.append(("image size", "x".join(map(str, facts["image_size"]))))
    for key in ("mean", "std"):
        known = facts[key] is not None
        rows.append((key, ", ".join(f"{v:g}" for v in facts[key]) if known else "unknown"))
    if facts["gelu"] is not None:
        rows.append(("epsilon, GELU", f"{facts['norm_eps']:g}, {facts['gelu']}"))
    if result.difference is not None:
        largest = f"{result.difference:.2g} ({result.compared} up to {result.scale:.3g})"
        rows.append((f"largest {result.compared} difference", largest))
    print_facts(f"{result.model} as {result.format}: {result.path}", rows)
    for note in result.notes:
        report.Terminal().note(note)
    if result.format != "onnx" and result.head_trained:
        show_next(f"vitcli predict image.jpg --model {result.path}")


def show_recipes(result: Any) -> None:
    """Print two lines per recipe: its data, model and cost, and its description."""
    for row in result.rows:
        takes = f"{row.command} {row.data or 'DATA'} {row.model or '--model MODEL'}"
        takes += f", {row.cost}" if row.cost else ""
        report.out.print(Text.assemble((row.name, "bold"), "  ", takes), soft_wrap=True)
        report.out.print(Text(f"    {row.description}", style="dim"), soft_wrap=True)


def show_check(result: Any) -> None:
    """Print splits, sizes and classes of a dataset, and the problems found."""
    facts = result.to_json()
    rows: list[tuple[str, Any]] = [
        ("images", ", ".join(f"{n:,} {name}" for name, n in facts["splits"].items())),
        ("classes", len(facts["classes"])),
    ]
    if facts["layout"]:
        rows.append(("layout", facts["layout"]))
    if training := facts["training"].get("splits"):
        rows.append(("training uses", ", ".join(f"{n:,} {name}" for name, n in training.items())))
    for name in ("height", "width"):
        if found := facts[name]:
            rows.append((name, f"{found['min']} to {found['max']}, median {found['median']}"))
    if hint := facts["suggested"]:
        said = (
            f"--set model.image_size={hint['image_size']} --set model.patch_size="
            f"{hint['patch_size']} ({hint['tokens']} tokens)"
        )
        rows.append(("suggested", said))
    if facts["sheet"]:
        rows.append(("samples", facts["sheet"]))
    print_facts(result.data, rows)
    splits = list(facts["splits"])
    classes = sorted(facts["classes"].items(), key=lambda item: item[1][splits[0]])
    if len(classes) > MOST_CLASSES:
        classes = [*classes[: MOST_CLASSES // 2], *classes[-MOST_CLASSES // 2 :]]
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
