"""The commands in the documentation."""

import re
from collections.abc import Iterator


def commands(text: str, seeds: int = 1) -> Iterator[str]:
    """Every `vitcli …` command in a code block, without comment, prompt and launcher.

    Args:
        seeds: a line of a loop over `$seed` gives one command for each.
    """
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            line = line.removeprefix("$ ").partition(" #")[0].strip()
            if found := re.search(r"(?:^|(?:^srun|-m|&&) )(vitcli [a-z].*)", line):
                for seed in range(seeds if "$seed" in line else 1):
                    yield found[1].replace("$seed", str(seed))
