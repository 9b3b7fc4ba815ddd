"""What the user sees: progress, tables and pictures through Rich, or plain JSON."""

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vitcli.errors import VitcliError
from vitcli.watch import Bar

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_CLASSES = 20  # shown of an evaluation
PLAIN_SECONDS = 20.0  # between two lines of progress where there is no terminal
SHOWN = {"loss": "loss {:.3f}", "accuracy": "acc {:.1%}", "images_per_second": "{:.0f} img/s"}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def mute() -> None:
    """Say nothing from here on: of several processes the first one speaks."""
    out.quiet = err.quiet = True
    sys.stdout = io.StringIO()


def printable(text: str) -> str:
    r"""`text` with what no terminal can show escaped: a name's byte as `\xe9`, control codes."""
    with suppress(UnicodeEncodeError):  # bytes of a file name that is not UTF-8
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def figures_text(figures: Mapping[str, float]) -> str:
    """`loss 1.234  acc 56.7%  120 img/s`."""
    parts = [SHOWN[name].format(figures[name]) for name in SHOWN if name in figures]
    if "test_accuracy" in figures:
        parts.append(f"test {figures['test_accuracy']:.1%}")
    return "  ".join(parts)


class Terminal:
    """A watcher that draws on stderr: live bars on a terminal, a line now and then elsewhere."""

    def note(self, message: str) -> None:
        err.print(Text(printable(message), style="dim"), soft_wrap=True)

    def warn(self, message: str) -> None:
        err.print(Text.assemble(("warning: ", "yellow bold"), printable(message)), soft_wrap=True)

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return LiveBar(label, total, done) if err.is_terminal else PlainBar(label, total, done)


class LiveBar:
    """A Rich progress bar with the latest figures."""

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self.figures: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
        )
        self.task = self.bars.add_task(label, total=total, completed=done, figures="")

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def advance(self, n: int = 1, **figures: float) -> None:
        self.figures |= figures
        self.bars.update(self.task, advance=n, figures=figures_text(self.figures))


class PlainBar:
    """One line every `PLAIN_SECONDS`, and one at the end of what took that long."""

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self.label, self.total, self.done = label, total, done
        self.figures: dict[str, float] = {}
        self.printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def advance(self, n: int = 1, **figures: float) -> None:
        self.done += n
        self.figures |= figures
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            of = f"/{self.total}" if self.total is not None else ""
            line = f"{self.label} {self.done}{of}  {figures_text(self.figures)}"
            err.print(Text(line), soft_wrap=True)


def print_error(error: VitcliError) -> None:
    """`error:` on one line, `hint:` on the next, to stderr."""
    err.print(
        Text.assemble(("error: ", "red bold"), printable(error.message.replace("\n", " "))),
        soft_wrap=True,
    )
    if error.hint:
        err.print(
            Text.assemble(("hint: ", "cyan bold"), printable(error.hint.replace("\n", " "))),
            soft_wrap=True,
        )


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else; odd file names are kept as escapes."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def print_title(title: str) -> None:
    """What the table below is about, on one line however long; nothing for an empty title."""
    if title:
        out.print(Text(printable(title), style="bold"), soft_wrap=True)


def print_facts(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """A table of names and values."""
    print_title(title)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), escape(printable(str(value))))
    out.print(table)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with a heading; all but the first column are set to the right."""
    print_title(title)
    table = Table(box=None, padding=(0, 2))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(escape(printable(str(cell))) for cell in row))
    out.print(table)


def print_picture(image: "Image", width: int = 64) -> None:
    """A picture of coloured half blocks, two pixel rows a line; nothing where colour is off."""
    if not out.is_terminal or out.no_color or out.color_system is None:
        return
    width = min(width, out.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    small = image.convert("RGB").resize((width, height))
    values = small.tobytes()
    for y in range(0, height, 2):
        line = Text()
        for x in range(width):
            upper, lower = (3 * ((y + row) * width + x) for row in (0, 1))
            line.append("▀", style=f"{_rgb(values, upper)} on {_rgb(values, lower)}")
        out.print(line)


def _rgb(values: bytes, at: int) -> str:
    return f"rgb({','.join(map(str, values[at : at + 3]))})"


def percent(share: float) -> str:
    """0.9077 -> 90.77 %."""
    return f"{100 * share:.2f} %"


def show_trained(result: Any) -> None:
    """The result of `pretrain` and `finetune`."""
    figures = result.figures
    rows: list[tuple[str, Any]] = [
        ("model", f"{result.model}, {result.parameters:,} parameters"),
        ("data", result.data),
        ("steps", f"{result.steps:,} ({result.images:,} images)"),
        ("time", f"{result.seconds:.0f} s, {result.images_per_second:.0f} images/s"),
    ]
    if "accuracy" in figures and "images" in figures:
        counted = f"{percent(figures['accuracy'])} of {figures['images']:,.0f} images"
        rows.append(("test accuracy", counted))
    rows += [
        (name.removeprefix("train/"), f"{value:.4f}")
        for name, value in figures.items()
        if name == "loss" or name.startswith("train/")
    ]
    if result.broken:
        rows.append(("unreadable", f"{len(result.broken)} images, replaced"))
    print_facts(f"{result.command}: {result.run}", rows)
    steps = {"pretrain": "vitcli fewshot --shots 5, or vitcli finetune"}
    show_next(steps.get(result.command, "vitcli predict image.jpg"))


def show_next(command: str) -> None:
    """What one does after this."""
    out.print(Text(f"next: {command}", style="dim"), soft_wrap=True)


def show_fewshot(result: Any) -> None:
    """Accuracies by shots, beside those of the raw pixels."""
    facts = result.to_json()
    rows = []
    for shots, found in facts["shots"].items():
        row = [f"{shots} a class", spread(found["accuracy"])]
        if facts["raw_pixels"]:
            row.append(spread(facts["raw_pixels"][shots]["accuracy"]))
        rows.append(row)
    columns = ["shots", "this model"]
    if facts["raw_pixels"]:
        size = facts["raw_pixels_size"]
        columns.append(f"raw pixels ({size[0]}x{size[1]})")
    title = (
        f"few-shot accuracy of {result.model} on {result.data}: {result.classes} classes, "
        f"{result.test_images:,} test images, {result.dim} features"
    )
    print_table(title, columns, rows)
    show_next(f"vitcli predict image.jpg --model {result.run}")


def spread(accuracy: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"


def show_evaluation(result: Any) -> None:
    """Figures over the set, and the classes."""
    m = result.metrics
    rows: list[tuple[str, Any]] = [
        ("images", f"{m.images:,} ({result.split})"),
        ("top-1", percent(m.top1)),
        ("top-5", percent(m.top5)),
        ("loss", f"{m.loss:.4f}"),
        ("calibration error", f"{m.ece:.4f}"),
    ]
    if result.top1_restricted != m.top1:
        rows.insert(2, ("top-1 among the data's classes", percent(result.top1_restricted)))
    print_facts(f"{result.model} on {result.data}", rows)
    classes = [
        [name, f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", c["images"]]
        for name, c in result.per_class.items()
    ]
    shown = classes if len(classes) <= MOST_CLASSES else worst(classes)
    title = "" if len(classes) <= MOST_CLASSES else f"the {MOST_CLASSES} of lowest F1"
    print_table(title, ["class", "precision", "recall", "F1", "images"], shown)
    if result.confusion_file:
        show_next(f"confusion: {result.confusion_file}")


def worst(classes: list[list[Any]]) -> list[list[Any]]:
    """The rows with the lowest F1."""
    return sorted(classes, key=lambda row: row[3])[:MOST_CLASSES]


def show_prediction(row: Mapping[str, Any]) -> None:
    """One line an image."""
    if row["error"] is not None:
        return
    top = "  ".join(f"{one['label']} {100 * one['probability']:.1f} %" for one in row["top"])
    line = Text.assemble((printable(str(row["path"])), "bold"), "  ", printable(top))
    out.print(line, soft_wrap=True)


def show_patches(result: Any) -> None:
    """The picture with its grid, and what the patches are."""
    if result.picture is not None:
        print_picture(result.picture)
    rows, cols = result.grid
    facts: list[tuple[str, Any]] = [
        ("image", f"{result.image_size[0]}x{result.image_size[1]} pixels"),
        ("patches", f"{rows} x {cols} = {result.num_patches} tokens"),
        (
            "a token",
            f"{result.patch_size}x{result.patch_size}x{result.num_channels}"
            f" = {result.patch_dim} values",
        ),
    ]
    if result.splits:
        facts.append(("images", ", ".join(f"{n:,} {name}" for name, n in result.splits.items())))
        facts.append(("classes", len(result.classes)))
        total = sum(result.splits.values()) * result.num_patches
        facts.append(("tokens in all", f"{total:,}"))
    if result.picture_path is not None:
        facts.append(("picture", result.picture_path))
    if result.out is not None:
        facts.append(("written", result.out))
    print_facts(result.source, facts)
    for note in result.notes:
        Terminal().note(note)


def show_recipes(result: Any) -> None:
    """Two lines a recipe: what it takes, and what it is."""
    for row in result.rows:
        takes = f"{row.command} {row.data or 'DATA'} {row.model or '--model MODEL'}"
        out.print(Text.assemble((row.name, "bold"), "  ", takes), soft_wrap=True)
        out.print(Text(f"    {row.description}", style="dim"), soft_wrap=True)
