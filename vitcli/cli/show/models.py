"""Print the list of public weights, and a download."""

from itertools import groupby
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts

# Name, parameters, GMACs, pixels, accuracy, images/s; the name of the longest model has 24 letters.
COLUMNS = "{:26}{:>11}{:>10}{:>6}{:>10}{:>12}"


def _line(text: str, style: str = "") -> None:
    report.out.print(Text(text, style=style), soft_wrap=True)


def show_models(result: Any) -> None:
    """Print two lines per model, its figures and its address, under the title of its family."""
    _line(COLUMNS.format("name", "parameters", "GMACs", "px", "accuracy", "images/s"), "bold")
    for facts, rows in groupby(result.rows, lambda row: row.public.facts):
        source = f"; accuracy: {facts.protocol}, {facts.evidence}" if facts.evidence else ""
        _line(f"\n{facts.title} ({facts.licence}{source})", "bold")
        for row in rows:
            public, speed = row.public, row.images_per_second
            figures = COLUMNS.format(
                public.name,
                f"{public.parameters:,.1f} M",
                f"{public.gmacs:,.1f}",
                public.image_size,
                "" if public.accuracy is None else f"{public.accuracy:.1f} %",
                f"~{speed:,.0f}" if speed >= 10 else f"~{speed:.2g}",
            )
            revision = f" ({public.revision})" if public.revision else ""
            _line(figures)
            _line(f"    {public.source}{revision}", "dim")
    _line(
        f"\nimages/s is an estimate for this machine ({result.device}, fp32); `vitcli bench NAME` "
        "measures it. The accuracy is that of ImageNet-1k's validation images.",
        "dim",
    )


def show_fetched(result: Any) -> None:
    """Print where the weights are."""
    rows = [("model", result.model), ("file", result.path), ("folder to copy", result.folder)]
    print_facts(f"fetched: {result.name}", [*rows, *(("version", note) for note in result.notes)])
