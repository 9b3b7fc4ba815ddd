"""The table of contents: one thin function per command, its help with an example, exit statuses."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli import __version__, launch
from vitcli.errors import VitcliError

EXIT_BUG, EXIT_MISTAKE, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 3, 130


def _several(context: typer.Context, number: int | None) -> None:
    """Hand the command line over to so many processes, if this is not one of them."""
    from vitcli import report

    if number is None or number == launch.size():
        return
    if launch.size() > 1:
        raise VitcliError(
            f"`--processes {number}` in a launch of {launch.size()} processes", "leave it out"
        )
    raise typer.Exit(launch.several(number, context.find_root().obj, report.print_error))


app = typer.Typer(
    name="vitcli",
    help="Train, evaluate and use Vision Transformers.",
    epilog="The first minutes: `vitcli pretrain`, `vitcli fewshot --shots 5`, `vitcli finetune`, "
    "`vitcli predict image.jpg`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str | None,
    typer.Argument(
        help="A folder of images, a .csv/.tsv/.jsonl manifest, parquet, or `builtin:digits`.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A run, a weights file or folder, or a variant such as `B/16`. Default: the newest "
        "run that fits.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name or file.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, `section.key=value`; repeatable.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where the result goes. Default: under runs/.", show_default=False),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run at --out, exactly where it stopped.")
]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", help="As many steps as fit: `90s`, `10m`, `1h30m`.", show_default=False
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images a step, in all.")]
Lr = Annotated[float | None, typer.Option("--lr", help="The peak learning rate.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the images in pixels.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of weights, order and augmentation.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="auto, fp32, bf16 or fp16.", show_default=False)
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
Labels = Annotated[
    Path | None, typer.Option("--labels", help="Class names, one a line.", show_default=False)
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"vitcli {__version__}")
        raise typer.Exit


@app.command()
def pretrain(
    data: Data = None,
    recipe: RecipeName = None,
    set_: Set = None,
    epochs: Epochs = None,
    steps: Steps = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    precision: Precision = None,
    processes: Processes = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train a model from random weights.

    Without DATA: a few minutes on images drawn from formulas, no download.

    Example: `vitcli pretrain photos/ --recipe pretrain --epochs 30 --out runs/photos`
    """
    from vitcli import report
    from vitcli.commands import pretrain as command

    settings = _settings(
        set_,
        {
            "train.epochs": epochs,
            "train.steps": steps,
            "train.budget": budget,
            "train.batch_size": batch_size,
            "optim.lr": lr,
            "model.image_size": image_size,
            "train.seed": seed,
            "train.precision": precision,
        },
    )
    result = command.run(
        data, recipe=recipe, settings=settings, out=out, resume=resume, watch=report.Terminal()
    )
    _show(result, json, report.show_trained)
    _unreadable(f"{name}: {reason}" for name, reason in result.broken.items())


@app.command()
def finetune(
    data: Data = None,
    model: Model = None,
    recipe: RecipeName = None,
    set_: Set = None,
    epochs: Epochs = None,
    steps: Steps = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    precision: Precision = None,
    processes: Processes = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Fine-tune pretrained weights on labelled images, at their or a higher resolution.

    Example: `vitcli finetune photos/ --model runs/pretrain_formula --image-size 48 --epochs 20`
    """
    from vitcli import report
    from vitcli.commands import finetune as command

    settings = _settings(
        set_,
        {
            "train.epochs": epochs,
            "train.steps": steps,
            "train.budget": budget,
            "train.batch_size": batch_size,
            "optim.lr": lr,
            "model.image_size": image_size,
            "train.seed": seed,
            "train.precision": precision,
        },
    )
    result = command.run(
        data,
        model=model,
        recipe=recipe,
        settings=settings,
        out=out,
        resume=resume,
        watch=report.Terminal(),
    )
    _show(result, json, report.show_trained)
    _unreadable(f"{name}: {reason}" for name, reason in result.broken.items())


@app.command()
def fewshot(
    data: Data = None,
    model: Model = None,
    shots: Annotated[
        str | None, typer.Option("--shots", help="Images a class; several with commas: `1,5,10`.")
    ] = None,
    set_: Set = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.")] = 128,
    image_size: ImageSize = None,
    precision: Precision = None,
    processes: Processes = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure a frozen model with few labelled images a class, in closed form.

    The protocol of the paper's code: regularised least squares on the standardised features, 3
    seeds. The classifier is kept as a run, so that `vitcli predict` can use it.

    Example: `vitcli fewshot photos/ --model runs/pretrain_formula --shots 1,5,10`
    """
    from vitcli import report
    from vitcli.commands import fewshot as command

    result = command.run(
        data,
        model=model,
        settings=_settings(
            set_, {"fewshot.shots": _numbers(shots), "model.image_size": image_size}
        ),
        out=out,
        batch_size=batch_size,
        precision=precision or "auto",
        watch=report.Terminal(),
    )
    _show(result, json, report.show_fewshot)
    _unreadable(result.broken)


@app.command()
def evaluate(
    data: Data = None,
    model: Model = None,
    labels: Labels = None,
    set_: Set = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.")] = 128,
    image_size: ImageSize = None,
    precision: Precision = None,
    processes: Processes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A folder for confusion.csv and .png.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Run a model over a whole labelled set: accuracy, calibration, confusion.

    Example: `vitcli evaluate photos/ --model runs/finetune --out report/`
    """
    from vitcli import report
    from vitcli.commands import evaluate as command

    result = command.run(
        data,
        model=model,
        settings=_settings(set_, {"model.image_size": image_size}),
        labels=labels,
        out=out,
        batch_size=batch_size,
        precision=precision or "auto",
        watch=report.Terminal(),
    )
    _show(result, json, report.show_evaluation)
    _unreadable(result.broken)


@app.command()
def predict(
    images: Annotated[
        list[str], typer.Argument(help="Images, folders, quoted globs.", metavar="IMAGE...")
    ],
    model: Model = None,
    top: Annotated[int, typer.Option("--top", help="Classes shown for each image.")] = 5,
    labels: Labels = None,
    set_: Set = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.")] = 32,
    precision: Precision = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the table there.", show_default=False)
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", help="Write the table there.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Name the classes of images, with probabilities.

    Example: `vitcli predict holiday/ cat.jpg --model runs/finetune --top 3 --csv classes.csv`
    """
    from vitcli import report
    from vitcli.commands import predict as command

    rows = command.run(
        images,
        model=model,
        settings=_settings(set_, {}),
        labels=labels,
        top=top,
        batch_size=batch_size,
        precision=precision or "auto",
        csv_file=csv,
        parquet_file=parquet,
        watch=report.Terminal(),
    )
    for row in rows:
        if json:
            report.print_json(row)
        else:
            report.show_prediction(row)
        if row["error"] is not None:
            report.print_error(VitcliError(f"{row['path']}: {row['error']}"))
    if rows.failed:
        raise typer.Exit(EXIT_UNREADABLE)


@app.command()
def patchify(
    source: Annotated[str, typer.Argument(help="An image, or DATA.", metavar="IMAGE|DATA")],
    patch_size: Annotated[int, typer.Option("--patch-size", help="Side of a patch.")] = 16,
    image_size: ImageSize = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="x.safetensors for the patches, x.png for the picture."),
    ] = None,
    json: Json = False,
) -> None:
    """Cut images into patches: look at them, measure them, or store them as tokens.

    Example: `vitcli patchify cat.jpg --patch-size 32 --out cat.safetensors`
    """
    from vitcli import report
    from vitcli.commands import patchify as command

    result = command.run(
        source,
        patch_size=patch_size,
        image_size=image_size,
        out=None if out is None else str(out),
        watch=report.Terminal(),
    )
    _show(result, json, report.show_patches)
    _unreadable(result.broken)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes, or print one.

    Example: `vitcli recipes pretrain_formula > mine.toml`
    """
    from vitcli import report
    from vitcli.commands import recipes as command

    if name is not None:
        typer.echo(command.text(name), nl=False)
        return
    _show(command.run(), json, report.show_recipes)


def _numbers(text: str | None) -> list[int] | None:
    """`1,5,10` -> [1, 5, 10].

    Raises:
        VitcliError: not that.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise VitcliError(
            f"`--shots {text}` is not a list of numbers", "for example `--shots 1,5,10`"
        ) from None


def _unreadable(broken: Iterable[str]) -> None:
    """Name the inputs that could not be read, and end with the status that says so."""
    from vitcli import report

    lines = list(broken)
    for line in lines:
        report.print_error(VitcliError(line))
    if lines:
        raise typer.Exit(EXIT_UNREADABLE)


def _settings(set_: list[str] | None, shorthand: dict[str, Any]) -> dict[str, Any]:
    """`--set` assignments with the shorthand flags that were given laid over them."""
    from vitcli.config import lay_over, nest, parse_overrides

    settings = parse_overrides(set_ or [])
    for key, value in shorthand.items():
        if value is not None:
            lay_over(settings, nest(key, value))
    return settings


def _show(result: Any, as_json: bool, show: Any) -> None:
    """The result for a program, or for a person."""
    from vitcli import report

    if as_json:
        report.print_json(result.to_json())
    else:
        show(result)


def main() -> None:
    """The entry point: runs the command line and turns what happened into an exit status."""
    # Threads that spin while another process works make two cores slower than one; read by
    # OpenMP when torch is loaded (recipes/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launch.follow()
    launch.leave(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; the exit status of INTERFACE, "Output"."""
    from vitcli import report

    if launch.rank():
        report.mute()
    if warning := launch.lonely():
        report.Terminal().warn(warning)
    try:
        status = app(args=arguments, prog_name="vitcli", standalone_mode=False, obj=arguments)
        return launch.together(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        return launch.together(done.exit_code)
    except VitcliError as error:
        return _tell(error)
    except (KeyboardInterrupt, typer.Abort):
        report.err.print("interrupted")
        return EXIT_INTERRUPTED if launch.rank() == 0 else 0
    except BrokenPipeError:
        # The reader of our output (`| head`) is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (stopped := _stopped(error)) is not None:
            return launch.together(stopped)
        if (usage := _usage_error(error)) is not None:
            return _tell(usage)
        launch.hold(mistake=False)
        if launch.size() == 1:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return EXIT_BUG


def _tell(error: VitcliError) -> int:
    """Print an error; the exit status for it."""
    from vitcli import report

    launch.hold(mistake=True)
    report.err.quiet = False
    report.print_error(error)
    return EXIT_MISTAKE


def _usage_error(error: Exception) -> VitcliError | None:
    """What is wrong with a command line that cannot be parsed; None for any other exception.

    Known by its method: typer brings click along under a name that depends on typer's version.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitcli"
    return VitcliError(message(), f"see `{command} --help`")


def _stopped(error: Exception) -> int | None:
    """128 + the signal's number, when `error` says that a signal stopped a training run."""
    from vitcli import report

    loop = sys.modules.get("vitcli.train.loop")
    if loop is None or not isinstance(error, loop.Stopped):
        return None
    report.err.print(
        f"{error}; to go on: the same command with `--out {error.run} --resume`", soft_wrap=True
    )
    return 128 + error.number
