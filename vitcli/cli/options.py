"""Arguments and options that several commands share, and the settings behind the short flags.

The flags of `vitcli predict`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vitcli import distributed as launch
from vitcli.errors import VitcliError

# Short flags of the commands -> the settings that they stand for.
SHORTHAND = {
    "epochs": "train.epochs",
    "steps": "train.steps",
    "budget": "train.budget",
    "batch_size": "train.batch_size",
    "lr": "optim.lr",
    "image_size": "model.image_size",
    "seed": "train.seed",
    "precision": "train.precision",
    "shots": "fewshot.shots",
    "method": "fewshot.method",
    "l2": "fewshot.l2",
    "seeds": "fewshot.seeds",
    "representation": "fewshot.representation",
    "streaming": "data.streaming",
    "strict": "data.strict",
    "on_nan": "train.on_nan",
    "lora": "lora.rank",
}


def settings(assignments: list[str] | None, **flags: Any) -> dict[str, Any]:
    """`--set` assignments, and laid over them the short flags that were given (not None).

    Raises:
        VitcliError: an assignment that is not `section.key=value`, or two lengths of a run.
    """
    from vitcli.config.recipe import lay_over, nest, parse_overrides
    from vitcli.config.schema import DURATIONS

    found = parse_overrides(assignments or [])
    written = [text.partition("=")[0].strip() for text in assignments or []]
    written += [SHORTHAND[name] for name, value in flags.items() if value is not None]
    lengths = sorted({f"train.{name}" for name in DURATIONS} & set(written))
    if len(lengths) > 1:
        raise VitcliError(
            f"a run has one length, and here are {' and '.join(f'`{key}`' for key in lengths)}",
            "give one of `--steps`, `--epochs` and `--budget`",
        )
    for name, value in flags.items():
        if value is not None:
            lay_over(found, nest(SHORTHAND[name], value))
    return found


def numbers(text: str | None) -> list[int | str] | None:
    """`1,5,all` -> [1, 5, "all"].

    Raises:
        VitcliError: not that.
    """
    if text is None:
        return None
    try:
        return [part if part == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise VitcliError(
            f"`--shots {text}` is not a list of numbers", "for example `--shots 1,5,10`"
        ) from None


def words(text: str | None) -> list[str] | None:
    """`fp32,bf16` -> ["fp32", "bf16"]."""
    return None if text is None else [part.strip() for part in text.split(",")]


def sides(text: str | None) -> list[int] | None:
    """`224,384` -> [224, 384].

    Raises:
        VitcliError: not that.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise VitcliError(
            f"`--image-size {text}` is not a list of pixels", "for example `--image-size 224,384`"
        ) from None


def strength(text: str | None) -> float | str | None:
    """`1024` -> 1024.0; words stay.

    Raises:
        VitcliError: neither a number nor one of the words.
    """
    if text is None or text in ("auto", "path"):
        return text
    try:
        return float(text)
    except ValueError:
        raise VitcliError(
            f"`--l2 {text}` is no strength", "a number above 0, `auto` or `path`"
        ) from None


def _several(context: typer.Context, number: int | None) -> int | None:
    """Hand the command line over to so many processes, if this is not one of them."""
    from vitcli.cli import console as report

    arguments = context.find_root().obj or []
    if number is None or number == launch.size():
        return number
    if any(word.partition("=")[0] == "--suite" for word in arguments):
        return number  # a suite hands the number on to each of its tasks
    if launch.size() > 1:
        raise VitcliError(
            f"`--processes {number}` in a launch of {launch.size()} processes", "leave it out"
        )
    raise typer.Exit(launch.several(number, arguments, report.print_error))


Data = Annotated[
    str | None,
    typer.Argument(
        help="A folder of images, a .csv/.tsv/.jsonl manifest, parquet, .tar shards, `hf:NAME`, "
        "or `builtin:digits`.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A run, a weights file or folder, `hf:ORG/NAME`, the address of a weights file, or a "
        "variant such as `B/16`. Default: the newest run that fits.",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="A run, a weights file or folder, `hf:ORG/NAME`, or the address of a weights file; "
        "given several times, several models in one table. Default: the newest run that fits.",
        show_default=False,
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        help="Which classes of the model stand for which of the data, as JSON or CSV; images of "
        "others are left out.",
        show_default=False,
    ),
]
Real = Annotated[
    Path | None,
    typer.Option(
        "--real",
        help="ReaL labels of ImageNet's validation images, as published: accuracy by them too.",
        show_default=False,
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Fit a temperature on the validation images, or on half of the images where there "
        "are none, report the others, and store it with the weights.",
    ),
]
Resampling = Annotated[
    int, typer.Option("--seed", min=0, help="Of the resampling and of what is held out.")
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name or file.", show_default=False)
]
Shots = Annotated[
    str | None,
    typer.Option("--shots", help="Images a class, or `all`; several with commas: `1,5,10`."),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="ridge (the paper's), knn, logistic (a linear probe) or mean (nearest class mean).",
        show_default=False,
    ),
]
L2 = Annotated[
    str | None,
    typer.Option(
        "--l2",
        help="Strength of the penalty: a number; `auto`: chosen on the images learned from; "
        "`path`: that, and the accuracy of every strength. Default: 1024; logistic 1.",
        show_default=False,
    ),
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="Draws of the shots.")]
Representation = Annotated[
    str | None,
    typer.Option(
        "--representation",
        help="pre-logits (what the head reads), cls, mean, quadrants, token_mean, `layer:N` or "
        "`concat:N` (the last N blocks).",
        show_default=False,
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Neither read nor keep features on disk.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, `section.key=value`; repeatable.", show_default=False),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Tell what became of every tensor of the weights.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where the result goes. Default: under runs/.", show_default=False),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run at --out, exactly where it stopped.")
]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Read training images shard by shard, keeping none; resume is not exact.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at an image that cannot be read; else replace it.")
]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", help="As many steps as fit: `90s`, `10m`, `1h30m`.", show_default=False
    ),
]
AtOnce = Annotated[int, typer.Option("--batch-size", help="Images at once.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images a step, in all.")]
Lr = Annotated[float | None, typer.Option("--lr", help="The peak learning rate.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the images in pixels.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of weights, order and augmentation.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="auto, fp32, bf16 or fp16.", show_default=False)
]
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Instead of DATA: every task of a suite, by its name (`vtab1k`) or file.",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Processes on this machine that share the work.",
        callback=_several,
        show_default=False,
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        "--track", help="Send records to tensorboard, wandb or trackio.", show_default=False
    ),
]
OnNan = Annotated[
    str | None,
    typer.Option(
        "--on-nan",
        help="A loss that is not finite: `stop`, or `rewind` and go on with half the rate.",
        show_default=False,
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(
        "--lora",
        help="Of `finetune`: train adapters of this rank and the head, nothing else.",
        show_default=False,
    ),
]
FindLr = Annotated[
    bool,
    typer.Option(
        "--find-lr", help="Do not train: try learning rates for half a minute, and draw the curve."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would cost, and train and write nothing.")
]
Labels = Annotated[
    Path | None, typer.Option("--labels", help="Class names, one a line.", show_default=False)
]


@dataclass(frozen=True)
class Training:
    """The flags of every command that trains."""

    recipe: RecipeName = None
    set_: Set = None
    epochs: Epochs = None
    steps: Steps = None
    budget: Budget = None
    batch_size: BatchSize = None
    lr: Lr = None
    image_size: ImageSize = None
    seed: Seed = None
    precision: Precision = None
    processes: Processes = None
    out: Out = None
    resume: Resume = False
    on_nan: OnNan = None
    lora: Lora = None
    track: Track = None
    find_lr: FindLr = False
    dry_run: DryRun = False
    streaming: Streaming = False
    strict: Strict = False
    json: Json = False

    def settings(self) -> dict[str, Any]:
        """What they say about the recipe; raises as the function `settings` does."""
        names = [field.name for field in fields(self) if field.name in SHORTHAND]
        given = {name: getattr(self, name) for name in names}
        # A switch that was not thrown says nothing.
        return settings(self.set_, **{k: None if v is False else v for k, v in given.items()})


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command whose keyword-only argument, a dataclass, is written out as its flags.

    Such as `training: Training`.
    """
    hints = get_type_hints(command, include_extras=True)
    takes = inspect.signature(command).parameters.values()
    (keyword,) = (p.name for p in takes if p.kind is p.KEYWORD_ONLY)
    kind = hints[keyword]

    @wraps(command)
    def written_out(**given: Any) -> None:
        mine = {f.name: given.pop(f.name) for f in fields(kind)}
        command(**given, **{keyword: kind(**mine)})

    own = [p.replace(annotation=hints[p.name]) for p in takes if p.name != keyword]
    theirs = inspect.signature(kind, eval_str=True).parameters.values()
    parameters = [*own, *theirs]
    # Both, because typer looks at both.
    written_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    written_out.__annotations__ = {p.name: p.annotation for p in parameters}
    return written_out


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
ResumePrediction = Annotated[
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
    resume: ResumePrediction = False
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
