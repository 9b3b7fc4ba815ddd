"""The option groups of the commands.

A group is a frozen dataclass whose fields are Typer options. `option_groups` turns the fields of
every keyword-only parameter into flags of the command. `schema_option` makes a flag that sets a key
of the recipe schema and shows the help of that key, so nothing is described twice.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from vitcli import distributed
from vitcli.cli.completion import complete_assignment, complete_model, complete_recipe
from vitcli.cost.hardware import HARDWARE
from vitcli.data.readers import DATA_HELP
from vitcli.errors import VitcliError
from vitcli.evals.fewshot.methods import METHODS
from vitcli.train.trackers import TRACKERS

DATA, MODEL, TRAINING, EVALUATION = "Data", "Model", "Training", "Evaluation"
SETTINGS, MACHINE, OUTPUT = "Settings", "Machine", "Output"
# The panels of a help page, in this order.
PANELS = (DATA, MODEL, TRAINING, EVALUATION, SETTINGS, MACHINE, OUTPUT)
MODEL_FORMS = "A run, a weights file or folder, a name from `vitcli models`, `hf:ORG/NAME`"
NAMES = "; names: "
DATASET = f"Dataset: {DATA_HELP}."
SCHEMA = "schema:"  # marks a help text that `SettingsCommand` reads from the schema


def option(panel: str, *flags: str, help: str, **more: Any) -> Any:
    """A Typer option in the help panel `panel`; its default is shown only where that helps."""
    more.setdefault("show_default", False)
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


def schema_option(
    panel: str,
    key: str,
    *flags: str,
    parse: Callable[[Any], Any] | None = None,
    names: Mapping[str, Any] | None = None,
) -> Any:
    """A flag that sets the key `key` of the recipe schema.

    Args:
        parse: converts what is typed.
        names: the registry of the values, whose entries have a `help`.
    """
    known = ", ".join(f"{name} ({entry.help})" for name, entry in (names or {}).items())
    info = option(panel, *flags, help=f"{SCHEMA}{key}{NAMES}{known}")
    info.setting, info.parse = key, parse
    return info


def listed(names: Iterable[str], last: str = "or") -> str:
    """`a, b or c`: the names of a registry in a help text."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}"


class PlainFlags:
    """A command whose help shows no type beside its switches, which take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class CommandGroup(PlainFlags, TyperGroup):
    """`vitcli` itself."""


class SettingsCommand(PlainFlags, TyperCommand):
    """A command that fills in help texts from the schema when its help is shown.

    The schema needs pydantic, which takes longer to import than all of `vitcli --help`.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        fill_help(self)
        super().format_help(ctx, formatter)


def fill_help(command: Any) -> None:
    """Replace the marked help texts of a click command by those of the schema, sort the panels."""
    from vitcli.config.schema import help_of

    ranks = {panel: rank for rank, panel in enumerate(PANELS)}
    command.params.sort(key=lambda p: ranks.get(str(getattr(p, "rich_help_panel", "")), -1))

    for parameter in command.params:
        text = getattr(parameter, "help", None)
        if text and text.startswith(SCHEMA):
            key, _, names = text.removeprefix(SCHEMA).partition(NAMES)
            sentence = help_of(key).replace(f" ({command.name})", "")  # it is known here
            parameter.help = f"{sentence.removesuffix('.')}: {names}." if names else sentence


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give Typer a command whose keyword-only dataclass parameters become flags."""
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters.values()
    groups = {p.name: hints[p.name] for p in parameters if is_dataclass(hints[p.name])}

    @wraps(command)
    def expanded(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        command(**given)

    own = [p.replace(annotation=hints[p.name]) for p in parameters if p.name not in groups]
    own = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in own]
    flags = [
        p for k in groups.values() for p in inspect.signature(k, eval_str=True).parameters.values()
    ]
    # Typer reads the signature for the parameters and the annotations for their types.
    expanded.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
    return expanded


def settings_of(*groups: Any, set_: list[str] | None = None, **keys: Any) -> dict[str, Any]:
    """The recipe settings in `--set` and in the flags of `groups`, nested; flags win.

    Args:
        set_: assignments of a command that has no option group.
        keys: further settings with `__` for the dot, such as `lora__rank=4`.

    Raises:
        VitcliError: an assignment is malformed, or two flags set the length of the run.
    """
    from vitcli.config.recipe import lay_over, nest, parse_overrides
    from vitcli.config.schema import DURATIONS

    assignments = list(set_ or [])
    given = {name.replace("__", "."): value for name, value in keys.items()}
    for group in groups:
        for name, hint in get_type_hints(type(group), include_extras=True).items():
            value = getattr(group, name)
            if name == "set_":
                assignments += value or []
            for info in getattr(hint, "__metadata__", ()):
                # A switch that is off leaves the setting to the recipe; the number 0 is a value.
                key = getattr(info, "setting", None)
                if key and value is not None and value is not False:
                    given[key] = info.parse(value) if info.parse else value
    given = {key: value for key, value in given.items() if value is not None}
    written = {text.partition("=")[0].strip() for text in assignments} | set(given)
    lengths = sorted({f"train.{name}" for name in DURATIONS} & written)
    if len(lengths) > 1:
        raise VitcliError(
            f"the length of the run is set by {' and '.join(f'`{key}`' for key in lengths)}",
            "use only one of `--epochs`, `--steps` and `--budget`",
        )
    found = parse_overrides(assignments)
    for key, value in given.items():
        lay_over(found, nest(key, value))
    return found


def shot_counts(text: str) -> list[int | str]:
    """`1,5,all` -> [1, 5, "all"]."""
    try:
        return [part if part == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise VitcliError(
            f"`--shots {text}` is not a list of numbers", "for example `--shots 1,5,10`"
        ) from None


def words(text: str | None) -> list[str] | None:
    """`fp32,bf16` -> ["fp32", "bf16"]."""
    return None if text is None else [part.strip() for part in text.split(",")]


def image_sizes(text: str | None) -> list[int] | None:
    """`224,384` -> [224, 384]."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise VitcliError(
            f"`--image-size {text}` is not a list of sizes in px",
            "for example `--image-size 224,384`",
        ) from None


def penalty(text: str) -> float | str:
    """`1024` -> 1024.0; `auto` and `path` stay."""
    if text in ("auto", "path"):
        return text
    try:
        return float(text)
    except ValueError:
        raise VitcliError(
            f"`--l2 {text}` is not a number", "give a number above 0, `auto` or `path`"
        ) from None


def start_processes(context: typer.Context, number: int | None) -> int | None:
    """Start `number` processes with this command line, unless this process is one of them."""
    from vitcli.cli import console

    if context.resilient_parsing:  # the shell asks for completions
        return number
    arguments = context.find_root().obj or []
    if number is None or number == distributed.world_size():
        return number
    if any(word.partition("=")[0] == "--suite" for word in arguments):
        return number  # a suite starts the processes of each task itself
    if distributed.world_size() > 1:
        started = distributed.world_size()
        raise VitcliError(
            f"`--processes {number}` does not match the launch of {started} processes",
            "remove `--processes`",
        )
    cores = os.cpu_count() or 1
    if number > max(16, 4 * cores):
        raise VitcliError(
            f"`--processes {number}` is far above the {cores} CPU cores of this machine",
            f"use `--processes {cores}` at most, or one process per GPU",
        )
    raise typer.Exit(distributed.launch_processes(number, arguments, console.print_error))


def use_device(context: typer.Context, name: str | None) -> str | None:
    """Make the device `name` that of this command; torch is imported for a name only."""
    if not context.resilient_parsing and (name is not None or "vitcli.devices" in sys.modules):
        from vitcli import devices

        devices.choose_device(name)
    return name


Data = Annotated[
    str | None,
    typer.Argument(
        help=DATASET,
        metavar="DATA",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    option(
        SETTINGS,
        "--set",
        help="Override a setting (see `vitcli settings`): `section.key=value`. Repeatable.",
        metavar="KEY=VALUE",
        autocompletion=complete_assignment,
    ),
]
Json = Annotated[bool, option(OUTPUT, "--json", help="Print the result as JSON to stdout.")]
Epochs = Annotated[float | None, schema_option(TRAINING, "train.epochs", "--epochs")]
Steps = Annotated[int | None, schema_option(TRAINING, "train.steps", "--steps")]
Budget = Annotated[str | None, schema_option(TRAINING, "train.budget", "--budget")]
TrainBatch = Annotated[int | None, schema_option(TRAINING, "train.batch_size", "--batch-size")]
ImageSize = Annotated[int | None, schema_option(MODEL, "model.image_size", "--image-size")]
NoCheck = Annotated[
    bool,
    option(
        DATA,
        "--no-check",
        help="Do not look for near copies between the splits, nor for equal training images with "
        "different labels.",
    ),
]
Labels = Annotated[
    Path | None, option(MODEL, "--labels", help="File with class names, one per line.")
]
Verbose = Annotated[
    bool, option(OUTPUT, "--verbose", help="List how each tensor of the weights was loaded.")
]
Out = Annotated[
    Path | None, option(OUTPUT, "--out", help="Run directory. Default: a new one under runs/.")
]
Processes = Annotated[
    int | None,
    option(
        MACHINE,
        "--processes",
        min=1,
        help="Number of processes on this machine that share the work.",
        callback=start_processes,
        is_eager=True,  # before `--device`, which needs torch
    ),
]
Device = Annotated[
    str | None,
    option(
        MACHINE,
        "--device",
        help="Device: cpu, cuda, cuda:1 or mps. Default: the GPU if there is one.",
        callback=use_device,
    ),
]
InferenceBatch = Annotated[
    int, option(MACHINE, "--batch-size", min=1, help="Images per forward pass.", show_default=True)
]
InferencePrecision = Annotated[
    str,
    option(
        MACHINE,
        "--precision",
        help="Precision: auto (fp32), fp32, bf16 or fp16.",
        show_default=True,
    ),
]
ModelName = Annotated[
    str | None,
    option(
        MODEL,
        "--model",
        "-m",
        help=f"{MODEL_FORMS}, the URL of a weights file, or a variant such as `B/16`. Default: the "
        "newest run that fits.",
        autocompletion=complete_model,
    ),
]
TrainedModel = Annotated[
    str | None,
    option(
        MODEL,
        "--model",
        "-m",
        help=f"{MODEL_FORMS}, or the URL of a weights file. Default: the newest run with a "
        "trained head.",
        autocompletion=complete_model,
    ),
]


@dataclass(frozen=True)
class TrainOptions:
    """The options of `pretrain` and `finetune`."""

    recipe: Annotated[
        str | None,
        option(
            TRAINING,
            "--recipe",
            help="Name or file of a recipe.",
            autocompletion=complete_recipe,
        ),
    ] = None
    epochs: Epochs = None
    steps: Steps = None
    budget: Budget = None
    batch_size: TrainBatch = None
    lr: Annotated[float | None, schema_option(TRAINING, "optim.lr", "--lr")] = None
    seed: Annotated[int | None, schema_option(TRAINING, "train.seed", "--seed")] = None
    on_nan: Annotated[str | None, schema_option(TRAINING, "train.on_nan", "--on-nan")] = None
    find_lr: Annotated[
        bool,
        option(
            TRAINING,
            "--find-lr",
            help="Run the learning-rate finder for half a minute and plot the curve; do not train.",
        ),
    ] = False
    dry_run: Annotated[
        bool, option(TRAINING, "--dry-run", help="Print the cost estimate only; do not train.")
    ] = False
    resume: Annotated[
        bool,
        option(
            TRAINING,
            "--resume",
            help="Resume a run from its last checkpoint: `--resume RUN`, or `--out RUN --resume`. "
            "A larger `--epochs`, `--steps` or `--budget` trains longer.",
        ),
    ] = False
    image_size: ImageSize = None
    streaming: Annotated[bool, schema_option(DATA, "data.streaming", "--streaming")] = False
    strict: Annotated[bool, schema_option(DATA, "data.strict", "--strict")] = False
    no_check: NoCheck = False
    precision: Annotated[str | None, schema_option(MACHINE, "train.precision", "--precision")] = (
        None
    )
    device: Device = None
    processes: Processes = None
    out: Out = None
    set_: Set = None
    track: Annotated[
        str | None,
        option(OUTPUT, "--track", help=f"Send metrics to {listed(TRACKERS)}."),
    ] = None
    json: Json = False


@dataclass(frozen=True)
class PlanOptions:
    """The options of `plan`: the run's settings, the machine and its prices."""

    model: ModelName = None
    epochs: Epochs = None
    steps: Steps = None
    budget: Budget = None
    batch_size: TrainBatch = None
    image_size: ImageSize = None
    images: Annotated[
        int | None,
        option(DATA, "--images", min=1, help="Number of training images, if there is no DATA."),
    ] = None
    classes: Annotated[
        int | None, option(DATA, "--classes", min=1, help="Number of classes, if there is no DATA.")
    ] = None
    probe: Annotated[
        bool,
        option(
            MACHINE,
            "--probe/--no-probe",
            help="Measure a few real training steps on this machine.",
            show_default=True,
        ),
    ] = True
    device: Annotated[
        str | None,
        option(
            MACHINE,
            "--device",
            help=f"Estimate for other machines: {', '.join(HARDWARE)}, several with commas, or "
            "`all`.",
        ),
    ] = None
    precision: Annotated[str | None, schema_option(MACHINE, "train.precision", "--precision")] = (
        None
    )
    processes: Processes = None
    watts: Annotated[
        float | None, option(MACHINE, "--watts", min=0.0, help="Power draw of the machine in W.")
    ] = None
    kwh_price: Annotated[
        float | None, option(MACHINE, "--kwh-price", min=0.0, help="Price of one kWh.")
    ] = None
    hour_price: Annotated[
        float | None, option(MACHINE, "--hour-price", min=0.0, help="Rent of the machine per hour.")
    ] = None
    set_: Set = None
    json: Json = False


@dataclass(frozen=True)
class BenchOptions:
    """The options of `bench`."""

    image_size: Annotated[
        str | None,
        option(
            MODEL, "--image-size", help="Image side in px; comma-separated for several: `224,384`."
        ),
    ] = None
    attention: Annotated[
        str | None,
        option(
            MODEL,
            "--attention",
            help="Attention: auto, fused (PyTorch's kernel) or explicit; comma-separated for "
            "several.",
        ),
    ] = None
    against: Annotated[
        str | None,
        option(MODEL, "--against", help="Libraries to compare with: transformers, timm or both."),
    ] = None
    device: Device = None
    precision: Annotated[
        str | None,
        option(
            MACHINE,
            "--precision",
            help="Precision: auto, fp32, bf16 or fp16; comma-separated for several.",
        ),
    ] = None
    batch_size: Annotated[
        int, option(MACHINE, "--batch-size", min=1, help="Images per batch.", show_default=True)
    ] = 16
    seconds: Annotated[
        float,
        option(MACHINE, "--seconds", min=0.0, help="Seconds per measurement.", show_default=True),
    ] = 3.0
    quick: Annotated[
        bool, option(MACHINE, "--quick", help="Measure for a tenth of `--seconds`.")
    ] = False
    memory: Annotated[
        str | None,
        option(
            MACHINE,
            "--memory",
            help="Memory limit for the largest-batch search, e.g. `4G`. Default: free memory.",
        ),
    ] = None
    out: Annotated[
        Path | None, option(OUTPUT, "--out", help="Write the plot to this .png file.")
    ] = None
    set_: Set = None
    json: Json = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `commands.bench.run`."""
        return {
            "image_sizes": image_sizes(self.image_size),
            "precisions": words(self.precision),
            "attentions": words(self.attention),
            "batch_size": self.batch_size,
            "against": words(self.against),
            "seconds": self.seconds / 10 if self.quick else self.seconds,
            "memory": self.memory,
            "settings": settings_of(self),
            "out": self.out,
        }


@dataclass(frozen=True)
class FewshotOptions:
    """The options of `fewshot`."""

    model: ModelName = None
    image_size: ImageSize = None
    representation: Annotated[
        str | None, schema_option(MODEL, "fewshot.representation", "--representation")
    ] = None
    shots: Annotated[
        str | None, schema_option(EVALUATION, "fewshot.shots", "--shots", parse=shot_counts)
    ] = None
    method: Annotated[
        str | None, schema_option(EVALUATION, "fewshot.method", "--method", names=METHODS)
    ] = None
    l2: Annotated[str | None, schema_option(EVALUATION, "fewshot.l2", "--l2", parse=penalty)] = None
    seeds: Annotated[int | None, schema_option(EVALUATION, "fewshot.seeds", "--seeds")] = None
    batch_size: InferenceBatch = 128
    precision: InferencePrecision = "auto"
    device: Device = None
    processes: Processes = None
    no_cache: Annotated[
        bool,
        option(MACHINE, "--no-cache", help="Do not read or write the feature cache on disk."),
    ] = False
    no_check: NoCheck = False
    out: Out = None
    set_: Set = None
    verbose: Verbose = False
    json: Json = False


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `evaluate`."""

    model: Annotated[
        list[str] | None,
        option(
            MODEL,
            "--model",
            "-m",
            help=f"{MODEL_FORMS}, or the URL of a weights file. Repeat it to compare models in one "
            "table. Default: the newest run with a trained head.",
            autocompletion=complete_model,
        ),
    ] = None
    image_size: ImageSize = None
    labels: Labels = None
    class_map: Annotated[
        Path | None,
        option(
            MODEL,
            "--class-map",
            help="JSON or CSV file: class of the data -> class(es) of the model. Images of classes "
            "that are not listed are excluded.",
        ),
    ] = None
    suite: Annotated[
        str | None,
        option(
            EVALUATION,
            "--suite",
            help="Suite to run instead of DATA: a name (`vtab1k`) or a file.",
        ),
    ] = None
    real: Annotated[
        Path | None,
        option(
            EVALUATION,
            "--real",
            help="ReaL labels of the ImageNet validation images; adds the ReaL accuracy.",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        option(
            EVALUATION,
            "--calibrate",
            help="Fit a temperature on the validation images (or on half of the images if there "
            "are none), and evaluate the remaining images. The temperature is stored with the "
            "weights.",
        ),
    ] = False
    thresholds: Annotated[
        str | None,
        option(
            EVALUATION,
            "--thresholds",
            help="Fit a threshold per class of multi-label images, on the images that "
            "`--calibrate` takes: the best F1 (`f1`), or the threshold that reaches "
            "`recall=0.95` or `precision=0.9`. They are stored with the weights, and `predict` "
            "gives the classes above them as `labels`.",
            metavar="f1|recall=R|precision=P",
        ),
    ] = None
    tta: Annotated[
        str | None,
        option(
            EVALUATION,
            "--tta",
            help="Average predictions over views of each image: `flip` adds its mirror image, "
            "`shifts` also small shifts of both (2 or 6 times the work).",
        ),
    ] = None
    no_check: NoCheck = False
    seed: Annotated[
        int,
        option(
            EVALUATION,
            "--seed",
            min=0,
            help="Random seed for held-out images and for the simulated calibration error.",
            show_default=True,
        ),
    ] = 0
    batch_size: InferenceBatch = 128
    precision: InferencePrecision = "auto"
    device: Device = None
    processes: Processes = None
    out: Annotated[
        Path | None,
        option(OUTPUT, "--out", help="Folder for `report.html`, the CSV files and the plots."),
    ] = None
    set_: Set = None
    verbose: Verbose = False
    json: Json = False


@dataclass(frozen=True)
class PredictOptions:
    """The options of `predict`."""

    from_: Annotated[
        str | None,
        option(
            DATA,
            "--from",
            help="File with a list of image paths (one per line or NUL-separated); `-` is stdin.",
        ),
    ] = None
    model: TrainedModel = None
    labels: Labels = None
    top: Annotated[
        int, option(EVALUATION, "--top", help="Number of classes per image.", show_default=True)
    ] = 5
    threshold: Annotated[
        float | None,
        option(EVALUATION, "--threshold", help="Give no label below this probability."),
    ] = None
    ood: Annotated[
        bool,
        option(
            EVALUATION,
            "--ood",
            help="Add the out-of-distribution (OOD) score, 0 to 1: the fraction of held-out (test "
            "or validation) images that are closer to the training images than this image.",
        ),
    ] = False
    ood_threshold: Annotated[
        float | None,
        option(
            EVALUATION,
            "--ood-threshold",
            help="Give no label above this OOD score; 0.99 rejects about 1 % of in-distribution "
            "images.",
        ),
    ] = None
    reference: Annotated[
        str | None,
        option(
            EVALUATION,
            "--reference",
            help="In-distribution reference dataset for `--ood`. Default: the reference stored "
            "with the weights, or the training data of the run.",
        ),
    ] = None
    tta: Annotated[
        str | None,
        option(
            EVALUATION,
            "--tta",
            help="Average predictions over augmented views: `flip`, `shifts`, `crops:5` or "
            "`crops:10` (2, 6, 5 or 10 times the work).",
        ),
    ] = None
    batch_size: InferenceBatch = 32
    precision: InferencePrecision = "auto"
    device: Device = None
    csv: Annotated[
        Path | None, option(OUTPUT, "--csv", help="Save the results to this CSV file.")
    ] = None
    jsonl: Annotated[
        Path | None, option(OUTPUT, "--jsonl", help="Save the results to this JSON Lines file.")
    ] = None
    parquet: Annotated[
        Path | None, option(OUTPUT, "--parquet", help="Save the results to this parquet file.")
    ] = None
    resume: Annotated[
        bool,
        option(
            OUTPUT, "--resume", help="Continue an interrupted `--csv`, `--jsonl` or `--parquet`."
        ),
    ] = False
    set_: Set = None
    verbose: Verbose = False
    json: Annotated[
        bool, option(OUTPUT, "--json", help="Print one JSON object per image to stdout.")
    ] = False

    @property
    def abstains(self) -> bool:
        """Whether some images may get no label."""
        return self.threshold is not None or self.ood_threshold is not None

    @property
    def tables(self) -> list[Path]:
        """The output files."""
        return [path for path in (self.csv, self.jsonl, self.parquet) if path is not None]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `commands.predict.run`."""
        given = dict(vars(self))
        for name in ("json", "set_", "device"):
            del given[name]
        given["settings"] = settings_of(self)
        given["source"] = given.pop("from_")
        for table in ("csv", "jsonl", "parquet"):
            given[f"{table}_file"] = given.pop(table)
        return given
