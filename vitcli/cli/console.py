"""Terminal output: progress bars, messages, tables and pictures through Rich, or plain JSON.

`vitcli/cli/show/` prints the result of each command with these functions.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from vitcli.errors import VitcliError, printable
from vitcli.progress import Bar

if TYPE_CHECKING:
    from PIL.Image import Image

LONG_NAME = 20  # columns of the terminal; a longer column name may become a number
NARROWEST = 12  # a wrapped column is still legible
MOST_CLASSES = 20  # rows of a table of classes
PLAIN_SECONDS = 20.0  # between two progress lines when stderr is not a terminal
LOG_WIDTH = 200  # columns of such a line
# The figures of a progress line, the most important first: a narrow terminal shows only these.
SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "train acc {:.1%}",
    "mae": "MAE {:.4g}",
    "validation_accuracy": "validation {:.1%}",
    "test_accuracy": "test {:.1%}",
    "validation_map": "validation mAP {:.1%}",
    "test_map": "test mAP {:.1%}",
    "validation_mae": "validation MAE {:.4g}",
    "test_mae": "test MAE {:.4g}",
    "images_per_second": "{:.0f} img/s",
    "mfu": "MFU {:.0%}",
    "memory_mb": "{:,.0f} MB",
}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


EXIT_UNREADABLE = 3  # done, but some inputs could not be read


def show(
    result: Any,
    as_json: bool,
    draw: Callable[[Any], None],
    following: str | None = None,
    broken: Iterable[str] = (),
) -> None:
    """Print a result as JSON, or let `draw` print it as tables, and the command to run next.

    Args:
        broken: the inputs that could not be read. They are printed first, as errors, and the
            command exits with status 3 if there is any.
    """
    lines = list(broken)
    for line in lines:
        print_error(VitcliError(line))
    if as_json:
        print_json(result.to_json())
    else:
        draw(result)
        if following is not None:
            show_next(following)
    if lines:
        raise typer.Exit(EXIT_UNREADABLE)


def mute() -> None:
    """Print nothing from now on: with several processes, only the first one prints."""
    out.quiet = err.quiet = True
    sys.stdout = io.StringIO()


def progress_text(
    label: str,
    done: float,
    total: float | None,
    first: float,
    elapsed: float,
    figures: Mapping[str, float],
    width: int,
) -> str:
    """`train 120/400  30%  0:36 (1:24 left)  loss 1.234  train acc 56.7%`.

    Figures that do not fit into `width` columns are left out, the least important first.

    Args:
        done, total: units; `total` is None if it is unknown.
        first: the units that were done at the start, by an earlier command.
        elapsed: seconds since the start.
    """
    parts = [f"{label} {done:.0f}" + (f"/{total:.0f}" if total else "")]
    if total:
        parts.append(f"{min(1.0, done / total):.0%}")
    left = ""
    if total and first < done < total:
        left = f" ({_clock((total - done) * elapsed / (done - first))} left)"
    parts.append(_clock(elapsed) + left)
    line = "  ".join(parts)
    for name, form in SHOWN.items():
        if name in figures:
            longer = f"{line}  {form.format(figures[name])}"
            # The weights have changed since an evaluation, so its step belongs to the figure.
            if (step := figures.get(f"{name.partition('_')[0]}_step")) is not None:
                longer += f" at step {step:,.0f}"
            if len(longer) > width:
                break
            line = longer
    return line


def _clock(seconds: float) -> str:
    """`1:02` or `3:01:02`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def percent(fraction: float) -> str:
    """Format 0.9077 as `90.77 %`."""
    return f"{100 * fraction:.2f} %"


class Terminal:
    """A watcher that prints to stderr: live bars on a terminal, plain lines elsewhere."""

    def note(self, message: str) -> None:
        err.print(Text(printable(message), style="dim"), soft_wrap=True)

    def warn(self, message: str) -> None:
        err.print(Text.assemble(("warning: ", "yellow bold"), printable(message)), soft_wrap=True)

    def progress(self, label: str, total: int | None = None, done: int = 0) -> Bar:
        return LiveBar(label, total, done) if err.is_terminal else PlainBar(label, total, done)


class ProgressLine(ProgressColumn):
    """All of a progress bar in one line of text, as wide as the terminal."""

    def render(self, task: Task) -> Text:
        """The line of one bar."""
        line = progress_text(
            task.description,
            task.completed,
            task.total,
            task.fields["first"],
            task.elapsed or 0.0,
            task.fields["figures"],
            err.width,
        )
        return Text(line, no_wrap=True, overflow="ellipsis")


class LiveBar:
    """A progress line that a terminal redraws."""

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self.figures: dict[str, float] = {}
        self.bars = Progress(ProgressLine(), console=err, transient=True)
        self.task = self.bars.add_task(
            label, total=total, completed=done, first=done, figures=self.figures
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def advance(self, n: int = 1, **figures: float) -> None:
        self.figures |= figures
        self.bars.update(self.task, advance=n)

    def extend(self, total: int) -> None:
        self.bars.update(self.task, total=total)


class PlainBar:
    """A progress line every `PLAIN_SECONDS`, for logs and pipes."""

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.figures: dict[str, float] = {}
        self.started = self.printed = time.monotonic()
        self.shown: int | None = None  # `done` of the last line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown not in (None, self.done) and self.done == self.total:
            self._print(time.monotonic())

    def extend(self, total: int) -> None:
        self.total = total

    def advance(self, n: int = 1, **figures: float) -> None:
        self.done += n
        self.figures |= figures
        now = time.monotonic()
        if now - self.printed >= PLAIN_SECONDS:
            self._print(now)

    def _print(self, now: float) -> None:
        self.printed, self.shown, elapsed = now, self.done, now - self.started
        line = progress_text(
            self.label, self.done, self.total, self.first, elapsed, self.figures, LOG_WIDTH
        )
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
    """Print one JSON document to stdout; file names that are not UTF-8 are escaped."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def print_title(title: str) -> None:
    """Print the title of a table on one line; an empty title prints nothing."""
    if title:
        out.print(Text(printable(title), style="bold"), soft_wrap=True)


def print_facts(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print a table of names and values; text that does not fit is wrapped, never cut."""
    print_title(title)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(printable(name), style="dim"), Text(printable(str(value))))
    out.print(table)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with column names; all but the first column are right-aligned.

    Nothing is cut: column names that are too long become numbers with a legend, cells are wrapped,
    and columns that do not fit beside each other stand below each other.
    """
    print_title(title)
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    names = [printable(name) for name in columns]
    widths = [max((cell_len(row[j]) for row in cells), default=0) for j in range(len(names))]
    if _total_width(max(w, cell_len(n)) for w, n in zip(widths, names, strict=True)) > out.width:
        for j in range(1, len(names)):
            if cell_len(names[j]) > max(widths[j], LONG_NAME):
                out.print(Text(f"  [{j}] {names[j]}", overflow="fold"))
                names[j] = f"[{j}]"
    widths = [max(w, cell_len(n)) for w, n in zip(widths, names, strict=True)]
    for block in _column_blocks(widths, out.width):
        table = Table(box=None, padding=(0, 2))
        for j in block:
            justify: Literal["left", "right"] = "left" if j == 0 else "right"
            table.add_column(Text(names[j], overflow="fold"), justify=justify, overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[j]) for j in block))
        out.print(table)


def _total_width(widths: Iterable[int]) -> int:
    """Columns of the terminal that a table needs, with its padding."""
    return sum(width + 4 for width in widths)


def _column_blocks(widths: Sequence[int], limit: int) -> list[list[int]]:
    """Columns that are printed beside each other; the first column is in every block."""
    least = [min(width, NARROWEST) for width in widths]
    blocks, block = [], [0]
    for j in range(1, len(widths)):
        if len(block) > 1 and _total_width(least[k] for k in [*block, j]) > limit:
            blocks.append(block)
            block = [0]
        block.append(j)
    return [*blocks, block]


def print_picture(image: "Image", width: int = 64) -> None:
    """Print an image as coloured half blocks, two pixel rows per line, if colour is on."""
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


def show_next(command: str) -> None:
    """Print the command that a user would run next; `following` makes it."""
    out.print(Text(f"next: {printable(command)}", style="dim"), soft_wrap=True)


def show_path(name: str, path: Any) -> None:
    """Print where a file or a folder is, on one line that is never folded."""
    out.print(Text(f"{name}: {printable(str(path))}", style="dim"), soft_wrap=True)
