"""Print settings of the recipe schema."""

import shlex
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts


def show_settings(result: Any) -> None:
    """Print two lines per setting; of a single one all facts, with an example."""
    if result.exact:
        (row,) = result.rows
        facts = [("type", row.type.replace("`", "")), ("default", row.default or "none")]
        if row.meaning:
            facts.append(("meaning", row.meaning))
        print_facts(row.key, [*facts, ("example", shlex.join(["--set", row.example]))])
        return
    for row in result.rows:
        default = "" if row.default is None else f", default {row.default}"
        kind = f"  {row.type.replace('`', '')}{default}"
        report.out.print(Text.assemble((row.key, "bold"), kind), soft_wrap=True)
        report.out.print(Text(f"    {row.meaning}", style="dim"), soft_wrap=True)
