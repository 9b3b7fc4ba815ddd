"""What `vitcli predict` shows: a line an image on stdout, what was left open on stderr."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.errors import printable


def show_prediction(row: Mapping[str, Any]) -> None:
    """One line an image."""
    if row["error"] is not None:
        return
    guesses = "  ".join(f"{one['label']} {100 * one['probability']:.1f} %" for one in row["top"])
    parts: list[str | tuple[str, str]] = [(printable(str(row["path"])), "bold"), "  "]
    if row.get("abstained"):
        parts += [("no answer", "yellow"), "; guesses: "]
    parts.append(printable(guesses))
    if row.get("ood") is not None:
        parts.append((f"  farther than {100 * row['ood']:.1f} % of usual images", "dim"))
    report.out.print(Text.assemble(*parts), soft_wrap=True)


def show_tally(tally: Any, abstains: bool) -> None:
    """How many images have no answer, where that was asked for."""
    if abstains and tally.count:
        images = "image" if tally.count == 1 else "images"
        report.Terminal().note(
            f"no answer for {tally.abstained:,} of {tally.count:,} {images} "
            f"({100 * tally.abstained / tally.count:.1f} %)"
        )
