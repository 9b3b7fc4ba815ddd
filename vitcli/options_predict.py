"""The flags of `vitcli predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli.options import AtOnce, Labels, Precision, Set, Verbose, settings

Top = Annotated[int, typer.Option("--top", help="Classes shown for each image.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="A file with more paths, one a line or ended by NUL (`find -print0`); `-` is stdin.",
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="No label for images whose best probability lies below this.",
        show_default=False,
    ),
]
Ood = Annotated[
    bool,
    typer.Option(
        "--ood",
        help="How strange each image is: the share of held-out training images that lie nearer, by "
        "their features, to what the model knows.",
    ),
]
OodThreshold = Annotated[
    float | None,
    typer.Option(
        "--ood-threshold",
        help="No label for images with a larger share than this; 0.99 turns one in a hundred "
        "ordinary images away.",
        show_default=False,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="DATA that is usual, for `--ood`: its features are kept beside the weights. Default: "
        "those kept, else the data that the run learned from.",
        show_default=False,
    ),
]
Tta = Annotated[
    str | None,
    typer.Option(
        "--tta",
        help="Mean probabilities of several views: `flip`, `crops:5`, `crops:10` take 2, 5, 10 "
        "times as long.",
        show_default=False,
    ),
]
Csv = Annotated[
    Path | None, typer.Option("--csv", help="Write the table there.", show_default=False)
]
Jsonl = Annotated[
    Path | None, typer.Option("--jsonl", help="Write the table there.", show_default=False)
]
Parquet = Annotated[
    Path | None, typer.Option("--parquet", help="Write the table there.", show_default=False)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the table of an interrupted command.")
]
Lines = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@dataclass(frozen=True)
class Predicting:
    """The flags, named as the arguments of `commands.predict.run` but for four."""

    from_: From = None
    top: Top = 5
    threshold: Threshold = None
    ood: Ood = False
    ood_threshold: OodThreshold = None
    reference: Reference = None
    tta: Tta = None
    labels: Labels = None
    set_: Set = None
    batch_size: AtOnce = 32
    precision: Precision = None
    csv: Csv = None
    jsonl: Jsonl = None
    parquet: Parquet = None
    resume: Resume = False
    verbose: Verbose = False
    json: Lines = False

    @property
    def abstains(self) -> bool:
        """Whether there may be images without an answer."""
        return self.threshold is not None or self.ood_threshold is not None

    def arguments(self) -> dict[str, Any]:
        """What `commands.predict.run` takes; raises as `options.settings` does."""
        given = dict(vars(self))
        del given["json"]
        given["source"] = given.pop("from_")
        given["settings"] = settings(given.pop("set_"))
        given["precision"] = self.precision or "auto"
        for table in ("csv", "jsonl", "parquet"):
            given[f"{table}_file"] = given.pop(table)
        return given
