"""Print the result of export."""

from typing import Any

from vitcli.cli import console as report
from vitcli.cli.console import print_facts


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
