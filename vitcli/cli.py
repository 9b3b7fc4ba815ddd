"""The table of contents: one thin function per command, its help with an example, exit statuses."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from vitcli import __version__, launch
from vitcli.errors import VitcliError
from vitcli.options import (
    BatchSize,
    Budget,
    Data,
    Epochs,
    ImageSize,
    Json,
    Labels,
    Lr,
    Model,
    Out,
    Precision,
    Processes,
    RecipeName,
    Resume,
    Seed,
    Set,
    Steps,
    numbers,
    settings,
)

REFUSALS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "see to its permissions, or take another place",
    errno.EPERM: "see to its permissions, or take another place",
    errno.EROFS: "take another place",
    errno.ENAMETOOLONG: "take a shorter name",
}
EXIT_BUG, EXIT_MISTAKE, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 3, 130
INTERRUPT_SECONDS = 3.0  # for what runs to put its files away


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

    given = settings(
        set_,
        epochs=epochs,
        steps=steps,
        budget=budget,
        batch_size=batch_size,
        lr=lr,
        image_size=image_size,
        seed=seed,
        precision=precision,
    )
    result = command.run(
        data, recipe=recipe, settings=given, out=out, resume=resume, watch=report.Terminal()
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

    given = settings(
        set_,
        epochs=epochs,
        steps=steps,
        budget=budget,
        batch_size=batch_size,
        lr=lr,
        image_size=image_size,
        seed=seed,
        precision=precision,
    )
    result = command.run(
        data,
        model=model,
        recipe=recipe,
        settings=given,
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
        settings=settings(set_, shots=numbers(shots), image_size=image_size),
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
        settings=settings(set_, image_size=image_size),
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
        settings=settings(set_),
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


def _unreadable(broken: Iterable[str]) -> None:
    """Name the inputs that could not be read, and end with the status that says so."""
    from vitcli import report

    lines = list(broken)
    for line in lines:
        report.print_error(VitcliError(line))
    if lines:
        raise typer.Exit(EXIT_UNREADABLE)


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
    _open_streams()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # before the command has begun
        status = EXIT_INTERRUPTED
    launch.leave(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C outside of training: unwind; and where some import swallows that, end all the same."""

    def end() -> None:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)

    timer = threading.Timer(INTERRUPT_SECONDS, end)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Streams that take every text, and be it into nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # maybe of an encoding without some letters
            stream.reconfigure(errors="backslashreplace")


def run(arguments: list[str]) -> int:
    """Run one command line; the exit status of INTERFACE, "Output"."""
    from vitcli import report

    if launch.rank():
        report.mute()
    if warning := launch.lonely():
        report.Terminal().warn(warning)
    try:
        status = app(args=arguments, prog_name="vitcli", standalone_mode=False, obj=arguments)
        if status == EXIT_INTERRUPTED:  # typer has caught Ctrl-C
            report.err.print("interrupted")
        return launch.together(status if isinstance(status, int) else 0)
    except typer.Exit as done:
        return launch.together(done.exit_code)
    except VitcliError as error:
        return _tell(error)
    except (KeyboardInterrupt, typer.Abort):
        report.err.print("interrupted")
        return EXIT_INTERRUPTED if launch.rank() == 0 else 0
    except (BrokenPipeError, SystemExit):  # the second is how typer and Rich tell of the first
        # The reader of our output (`| head`) is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (stopped := _stopped(error)) is not None:
            return launch.together(stopped)
        if (usage := _usage_error(error) or _refused(error)) is not None:
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


def _refused(error: Exception) -> VitcliError | None:
    """What the system refuses, where no command had a better word for it; None for the rest."""
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        return None
    place = f"`{error.filename}`" if error.filename else "the output"
    return VitcliError(f"{place}: {error.strerror}", REFUSALS[error.errno])


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
