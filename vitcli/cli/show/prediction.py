"""Results of `vitcli predict`: one line per image on stdout, counts on stderr."""

from collections.abc import Mapping
from typing import Any

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
    classes = "  ".join(f"{one['label']} {100 * one['probability']:.1f} %" for one in row["top"])
    parts: list[str | tuple[str, str]] = [(printable(str(row["path"])), "bold"), "  "]
    if row.get("abstained"):
        parts += [("no label", "yellow"), "; best classes: "]
    if row.get("labels") is not None:
        found = ", ".join(map(printable, row["labels"])) or "no class reaches its threshold"
        parts += [(found, "bold"), "; most probable: "]
    parts.append(printable(classes))
    if row.get("ood") is not None:
        parts.append((f"  OOD score {row['ood']:.3f}", "dim"))
    console.out.print(Text.assemble(*parts), soft_wrap=True)


def show_counts(counts: Any, can_abstain: bool) -> None:
    """Print how many images got no label."""
    if can_abstain and counts.count:
        images = "image" if counts.count == 1 else "images"
        share = 100 * counts.abstained / counts.count
        console.Terminal().note(
            f"no label for {counts.abstained:,} of {counts.count:,} {images} ({share:.1f} %)"
        )
