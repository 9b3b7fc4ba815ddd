"""Results of `vitcli predict`: one line per image on stdout, counts on stderr."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from vitcli.cli import console
from vitcli.errors import printable


def show_prediction(row: Mapping[str, Any]) -> None:
    """Print one line for an image that could be read."""
    if row["error"] is not None:
        return
    if "value" in row:
        path = (printable(str(row["path"])), "bold")
        console.out.print(Text.assemble(path, f"  {row['value']:.6g}"), soft_wrap=True)
        return
    classes = [f"{one['label']} {100 * one['probability']:.1f} %" for one in row["top"]]
    parts: list[str | tuple[str, str]] = [(printable(str(row["path"])), "bold"), "  "]
    if row.get("abstained"):
        parts += [("no label", "yellow"), "; best classes: "]
    if row.get("labels") is not None:
        found = ", ".join(map(printable, row["labels"])) or "no class reaches its threshold"
        parts += [(found, "bold"), "; most probable: "]
    ood = f"  OOD score {row['ood']:.3f}" if row.get("ood") is not None else ""
    shown = printable("  ".join(classes))
    if console.out.is_terminal:  # a terminal shows the classes that fit into a line
        width = console.out.width - Text.assemble(*parts, ood).cell_len
        for count in range(len(classes) - 1, 0, -1):
            if cell_len(shown) <= width:
                break
            shown = printable("  ".join(classes[:count])) + " …"
    console.out.print(Text.assemble(*parts, shown, (ood, "dim")), soft_wrap=True)


def show_counts(counts: Any, can_abstain: bool, tables: Mapping[Path, bool]) -> None:
    """Print how many images got no label, and what is in the files.

    Args:
        tables: each output file, and whether it replaced an older file.
    """
    if can_abstain and counts.count:
        images = "image" if counts.count == 1 else "images"
        share = 100 * counts.abstained / counts.count
        console.Terminal().note(
            f"no label for {counts.abstained:,} of {counts.count:,} {images} ({share:.1f} %)"
        )
    if tables and counts.count:
        names = (f"{printable(path)}{' (replaced)' * old}" for path, old in tables.items())
        images = "image" if counts.count == 1 else "images"
        console.Terminal().note(
            f"{counts.count:,} {images}, {counts.failed:,} unreadable, written to "
            f"{' and '.join(names)}"
        )
