"""The comment at the top of a recipe; loads nothing heavy."""

import re


def header(text: str) -> dict[str, str]:
    """`Run`, `Data`, `Cost`, `Expect` of the comment at the top of a recipe, first line each."""
    top = text.partition("\ncommand")[0]
    return dict(re.findall(r"^# (Run|Data|Cost|Expect|Then): +(.+)$", top, flags=re.MULTILINE))
