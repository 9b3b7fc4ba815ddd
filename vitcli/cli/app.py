"""Commands and switches about what a run costs, before it starts: `cli.py` lists them.

The table of contents: one thin function per command, its help with an example.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli import __version__
from vitcli.cli import main as exits
from vitcli.cli.options import (
    L2,
    AtOnce,
    BatchSize,
    Budget,
    Calibrate,
    ClassMap,
    Data,
    Epochs,
    ImageSize,
    Json,
    Labels,
    Method,
    Model,
    Models,
    NoCache,
    Out,
    Precision,
    Predicting,
    Processes,
    Real,
    Representation,
    Resampling,
    Seeds,
    Set,
    Shots,
    Steps,
    Suite,
    Training,
    Verbose,
    flags,
    numbers,
    settings,
    sides,
    strength,
    words,
)
from vitcli.errors import VitcliError


def find_lr(find: Callable[..., Any], training: Training, **given: Any) -> None:
    """`--find-lr` of a command that trains."""
    from vitcli.cli import console as report
    from vitcli.cli.show import training as results

    if training.resume:
        raise VitcliError("`--find-lr` makes no run that `--resume` could go on with")
    found = find(
        **given,
        recipe=training.recipe,
        settings=training.settings(),
        out=training.out,
        watch=report.Terminal(),
    )
    exits.show(found, training.json, results.show_found_rate)


def dry_run(name: str, data: str | None, model: str | None, training: Training) -> None:
    """`vitcli plan` of exactly this command line."""
    from vitcli.cli import console as report
    from vitcli.cli.show import cost as results_cost
    from vitcli.commands import plan as command

    result = command.run(
        training.recipe,
        data,
        command=name,
        model=model,
        settings=training.settings(),
        out=training.out,
        resume=training.resume,
        compare=False,
        watch=report.Terminal(),
    )
    exits.show(result, training.json, results_cost.show_plan)


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or file, or a run directory.",
            metavar="RECIPE|RUN",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    model: Model = None,
    set_: Set = None,
    epochs: Epochs = None,
    steps: Steps = None,
    budget: Budget = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    precision: Precision = None,
    processes: Processes = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=1,
            help="Training images, where no data are at hand.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option("--classes", min=1, help="Likewise, their classes.", show_default=False),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Make a few real steps on this machine.")
    ] = True,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Estimate other machines: t4, l4, rtx4090, a100, h100, h200, tpuv3 (a core), "
            "several with commas, or `all`.",
            show_default=False,
        ),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option("--watts", min=0.0, help="Power that the machine draws.", show_default=False),
    ] = None,
    kwh_price: Annotated[
        float | None,
        typer.Option("--kwh-price", min=0.0, help="Price of a kWh.", show_default=False),
    ] = None,
    hour_price: Annotated[
        float | None,
        typer.Option("--hour-price", min=0.0, help="Price of a rented hour.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run would cost before it starts: operations, memory, hours, money.

    Numbers of the model are exact; time is measured by a few real steps of the recipe; other
    machines are estimated from their peak. Nothing is written.

    Example: `vitcli plan pretrain_cifar10_small cifar10/ --budget 30m --watts 65 --kwh-price 0.3`
    or: `vitcli plan paper_vit_l16_jft --device all --no-probe`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import cost as results_cost
    from vitcli.commands import plan as command

    given = settings(
        set_,
        epochs=epochs,
        steps=steps,
        budget=budget,
        batch_size=batch_size,
        image_size=image_size,
        precision=precision,
    )
    result = command.run(
        recipe,
        data,
        model=model,
        settings=given,
        images=images,
        classes=classes,
        probing=probe,
        device=device,
        prices=command.Prices(watts, kwh_price, hour_price),
        watch=report.Terminal(),
    )
    exits.show(result, json, results_cost.show_plan)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A MODEL, or several with commas. Default: the newest run, else `S/16`.",
            metavar="[MODEL]",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", help="Side in pixels; several with commas: `224,384`."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="auto, fp32, bf16 or fp16; several too.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="auto, fused (torch's kernel) or explicit; several too."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 16,
    against: Annotated[
        str | None,
        typer.Option("--against", help="transformers or timm, measured in turn; several too."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="For each figure of each contender.")
    ] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of that time.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="That the largest batch fits in: `4G`. Default: what is free."
        ),
    ] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="A .png file for a picture.")] = None,
    json: Json = False,
) -> None:
    """Measure a model: images a second, latency, memory, the largest batch that fits.

    Contenders are measured in turn, so that a busy machine is fair to all. Peak memory is that of
    the tensors, traced; on a CPU with the holes that malloc leaves.

    Example: `vitcli bench S/16 --image-size 224,384 --against transformers --out bench.png`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import cost as results_cost
    from vitcli.commands import bench as command

    result = command.run(
        model,
        image_sizes=sides(image_size),
        precisions=words(precision),
        attentions=words(attention),
        batch_size=batch_size,
        against=words(against),
        seconds=seconds / 10 if quick else seconds,
        memory=memory,
        settings=settings(set_),
        out=out,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_cost.show_bench)


def doctor(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder whose disk is measured.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Look at this machine and this installation, and say what slows them.

    Versions, devices, precisions, threads, attention, decoding and the disk, in about ten seconds.

    Example: `vitcli doctor --json > machine.json`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import doctor as results_doctor
    from vitcli.commands import doctor as command

    exits.show(command.run(out, report.Terminal()), json, results_doctor.show_doctor)


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
@flags
def pretrain(data: Data = None, *, training: Training) -> None:
    """Train a model from random weights.

    Without DATA: a few minutes on images drawn from formulas, no download.

    Example: `vitcli pretrain photos/ --recipe pretrain --epochs 30 --out runs/photos`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import training as results
    from vitcli.commands import pretrain as command

    if training.find_lr:
        find_lr(command.find_lr, training, data=data)
        return
    if training.dry_run:
        dry_run("pretrain", data, None, training)
        return

    result = command.run(
        data,
        recipe=training.recipe,
        settings=training.settings(),
        out=training.out,
        resume=training.resume,
        track=training.track,
        watch=report.Terminal(),
    )
    exits.show(result, training.json, results.show_trained)
    exits.unreadable(f"{name}: {reason}" for name, reason in result.broken.items())


@app.command()
@flags
def finetune(
    data: Data = None, model: Model = None, verbose: Verbose = False, *, training: Training
) -> None:
    """Fine-tune pretrained weights on labelled images, at their or a higher resolution.

    Example: `vitcli finetune photos/ --model runs/pretrain_formula --image-size 48 --epochs 20`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import training as results
    from vitcli.commands import finetune as command

    if training.find_lr:
        find_lr(command.find_lr, training, data=data, model=model)
        return
    if training.dry_run:
        dry_run("finetune", data, model, training)
        return

    result = command.run(
        data,
        model=model,
        recipe=training.recipe,
        settings=training.settings(),
        out=training.out,
        resume=training.resume,
        track=training.track,
        verbose=verbose,
        watch=report.Terminal(),
    )
    exits.show(result, training.json, results.show_trained)
    exits.unreadable(f"{name}: {reason}" for name, reason in result.broken.items())


@app.command()
def fewshot(
    data: Data = None,
    model: Model = None,
    shots: Shots = None,
    method: Method = None,
    l2: L2 = None,
    representation: Representation = None,
    seeds: Seeds = None,
    set_: Set = None,
    batch_size: AtOnce = 128,
    image_size: ImageSize = None,
    precision: Precision = None,
    processes: Processes = None,
    no_cache: NoCache = False,
    out: Out = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Measure a frozen model with few labelled images a class, or with all of them.

    The protocol of the paper's code: regularised least squares on the standardised features, in
    closed form, 3 seeds. Nearest neighbours and linear probes are other methods. The classifier is
    kept as a run, so that `vitcli predict` can use it, and features are computed once.

    Example: `vitcli fewshot photos/ --model runs/pretrain_formula --shots 1,5,10 --l2 auto`
    or: `vitcli fewshot photos/ --model vit_tiny/ --shots all --method logistic`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import fewshot as results_fewshot
    from vitcli.commands import fewshot as command

    given = settings(
        set_,
        shots=numbers(shots),
        method=method,
        l2=strength(l2),
        representation=representation,
        seeds=seeds,
        image_size=image_size,
    )
    result = command.run(
        data,
        model=model,
        settings=given,
        out=out,
        batch_size=batch_size,
        precision=precision or "auto",
        cache=not no_cache,
        verbose=verbose,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_fewshot.show_fewshot)
    exits.unreadable(result.broken)


@app.command()
def evaluate(
    data: Data = None,
    model: Models = None,
    suite: Suite = None,
    labels: Labels = None,
    class_map: ClassMap = None,
    real: Real = None,
    calibrate: Calibrate = False,
    set_: Set = None,
    batch_size: AtOnce = 128,
    image_size: ImageSize = None,
    precision: Precision = None,
    processes: Processes = None,
    seed: Resampling = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the CSV and the pictures.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Run a model over a whole labelled set: accuracy, calibration, confusion.

    Figures come with 95 % bootstrap intervals, several models with paired differences to the first.
    With `--suite` the model is fine-tuned, or tried with few shots, on each of its tasks;
    interrupted, the same command with `--out` goes on.

    Example: `vitcli evaluate photos/ --model runs/finetune --out report/`
    or: `vitcli evaluate photos/ --model runs/finetune --model runs/other`
    or: `vitcli evaluate --suite vtab1k --model B_16.npz --out runs/vtab`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import evaluation as results_evaluate
    from vitcli.commands import evaluate as command

    if suite is not None:
        given = {"DATA": data, "--labels": labels, "--image-size": image_size}
        given |= {"--class-map": class_map, "--real": real, "--calibrate": calibrate or None}
        _evaluate_suite(suite, given, model, settings(set_), out, processes, precision, json)
        return

    result = command.run(
        data,
        model=model,
        settings=settings(set_, image_size=image_size),
        labels=labels,
        out=out,
        real=real,
        class_map=class_map,
        calibrate=calibrate,
        batch_size=batch_size,
        precision=precision or "auto",
        seed=seed,
        verbose=verbose,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_evaluate.show_evaluation)
    exits.unreadable(result.broken)


def _evaluate_suite(
    suite: str,
    given: dict[str, Any],
    models: list[str] | None,
    changes: dict[str, Any],
    out: Path | None,
    processes: int | None,
    precision: str | None,
    json: bool,
) -> None:
    """`evaluate --suite`; `given` are the arguments of `evaluate` that a suite settles itself."""
    from vitcli.cli import console as report
    from vitcli.cli.show import evaluation as results_suite
    from vitcli.commands import suite as command

    if wrong := [name for name, value in given.items() if value is not None]:
        raise VitcliError(
            f"{', '.join(wrong)} beside `--suite`, which says that of each task itself",
            "leave it out, or change a copy of the suite's file",
        )
    if models is not None and len(models) > 1:
        raise VitcliError(f"`--suite` takes one model, not {len(models)}", "a command for each")
    result = command.run(
        suite,
        model=models[0] if models else None,
        settings=changes,
        out=out,
        processes=processes,
        precision=precision,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_suite.show_suite)
    exits.unreadable(f"{name}: {reason}" for name, reason in result.failed.items())


@app.command()
@flags
def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders, quoted globs.", metavar="IMAGE..."),
    ] = None,
    model: Model = None,
    *,
    predicting: Predicting,
) -> None:
    """Name the classes of images, with probabilities.

    A table (`--csv`, `--jsonl`, `--parquet`) appears when its last row is there; until then the
    rows lie beside it in a file that ends in `.part`, and `--resume` goes on with them.

    Example: `vitcli predict holiday/ cat.jpg --model runs/finetune --top 3 --csv classes.csv`

    or: `vitcli predict holiday/ --threshold 0.7 --ood-threshold 0.99` (no answer where unsure)

    or: `find / -name '*.jpg' -print0 | vitcli predict --from - --jsonl all.jsonl --resume`
    """
    if not images and predicting.from_ is None:
        raise VitcliError(
            "Missing argument `IMAGE...`, or `--from FILE`", "see `vitcli predict --help`"
        )
    from vitcli.cli import console as report
    from vitcli.cli.show import prediction as results_predict
    from vitcli.commands import predict as command

    rows = command.run(images or [], model=model, watch=report.Terminal(), **predicting.arguments())
    for row in rows:
        if predicting.json:
            report.print_json(row)
        else:
            results_predict.show_prediction(row)
        if row["error"] is not None:
            report.print_error(VitcliError(f"{row['path']}: {row['error']}"))
    results_predict.show_counts(rows.counts, predicting.abstains)
    if rows.failed:
        raise typer.Exit(exits.EXIT_UNREADABLE)


@app.command()
def export(
    to: Annotated[str, typer.Option("--to", help="timm, huggingface, google or onnx.")],
    model: Model = None,
    labels: Labels = None,
    set_: Set = None,
    image_size: ImageSize = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder, or x.npz, x.onnx.")] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Write a model in another layout, read it back, and compare the logits of both.

    Google's layout knows GELU's tanh form only: `--set model.gelu=tanh` where that is near enough.

    Example: `vitcli export --model runs/finetune --to onnx --out flowers.onnx`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import training as results
    from vitcli.commands import export as command

    result = command.run(
        to,
        model=model,
        settings=settings(set_, image_size=image_size),
        labels=labels,
        out=out,
        verbose=verbose,
        watch=report.Terminal(),
    )
    exits.show(result, json, results.show_export)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more finished runs.", metavar="RUN RUN...")
    ],
    json: Json = False,
) -> None:
    """Put runs beside each other: settings that differ, results, a paired test.

    The test is McNemar's, the interval a bootstrap over images; both need the same held-out images.

    Example: `vitcli compare runs/finetune runs/finetune-2`
    """
    from vitcli.cli.show import training as results
    from vitcli.commands import compare as command

    exits.show(command.run(runs), json, results.show_comparison)


@app.command()
def patchify(
    source: Annotated[
        str,
        typer.Argument(help="An image, DATA, or patches that were stored.", metavar="IMAGE|DATA"),
    ],
    patch_size: Annotated[int, typer.Option("--patch-size", help="Side of a patch.")] = 16,
    image_size: ImageSize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="x.safetensors for patches, x.png for the picture, a folder for images."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", help="A .png for the grids of 8, 16 and 32 side by side."),
    ] = None,
    reconstruct: Annotated[
        str | None,
        typer.Option("--reconstruct", help="A .png put together of the patches again."),
    ] = None,
    json: Json = False,
) -> None:
    """Cut images into patches: look at them, measure them, or store them as tokens.

    `--out DIR` stores the images of DATA once, decoded and shrunk; DIR is DATA for every command
    then, and no epoch decodes anything again. Interrupted, the same command goes on.

    Of a picture also: mean, spread and entropy of its patches, and what each patch size costs.
    `vitcli patchify cat.safetensors --reconstruct cat.png` puts stored patches together again.

    Example: `vitcli patchify cat.jpg --patch-size 32 --out cat.safetensors`
    or: `vitcli patchify photos/ --image-size 224 --out photos-224`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import inspection as results_look
    from vitcli.commands import patchify as command

    result = command.run(
        source,
        patch_size=patch_size,
        image_size=image_size,
        out=None if out is None else str(out),
        compare=compare,
        reconstruct=reconstruct,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_look.show_patches)
    exits.unreadable(result.broken)


@app.command()
def inspect(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders, quoted globs, or DATA.", metavar="[IMAGE...]", show_default=False
        ),
    ] = None,
    model: Model = None,
    labels: Labels = None,
    set_: Set = None,
    image_size: ImageSize = None,
    limit: Annotated[int, typer.Option("--limit", help="Images to look at, at most.")] = 128,
    bias: Annotated[
        bool, typer.Option("--bias/--no-bias", help="Measure the inductive bias too.")
    ] = True,
    resnet: Annotated[
        str | None,
        typer.Option(
            "--resnet",
            help="The ResNet to compare with. Default: random weights, as many parameters.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for pictures and numbers.", show_default=False),
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Look into a model: the paper's figures as pictures and numbers.

    Embedding filters, position similarity, mean attention distance of every head, attention rollout
    over each image, and how translation-equivariant and how local the model is, beside random
    weights and a ResNet. The folder holds `index.html`, PNGs, `inspect.json` and `figures.npz`.

    Example: `vitcli inspect cat.jpg --model runs/finetune --out look/`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import inspection as results_look
    from vitcli.commands import inspect as command

    result = command.run(
        images or (),
        model=model,
        settings=settings(set_, image_size=image_size),
        labels=labels,
        out=out,
        limit=limit,
        with_bias=bias,
        resnet=resnet,
        verbose=verbose,
        watch=report.Terminal(),
    )
    exits.show(result, json, results_look.show_inspection)
    exits.unreadable(result.broken)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="The images to look at.", metavar="DATA")],
    set_: Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A .png file for samples of each class.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say what is wrong with a data set: unreadable, doubled, leaking, unbalanced images.

    Every image is read once. Copies are found by what they show, so recompressed and resized ones
    are too; the gravest are those of training images among the test images.

    Example: `vitcli check photos/ --out samples.png`
    """
    from vitcli.cli import console as report
    from vitcli.cli.show import training as results
    from vitcli.commands import check as command

    result = command.run(data, settings=settings(set_), out=out, watch=report.Terminal())
    exits.show(result, json, results.show_check)
    exits.unreadable(f"{name}: {reason}" for name, reason in result.seen.unreadable)


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
    from vitcli.cli.show import training as results
    from vitcli.commands import recipes as command

    if name is not None:
        typer.echo(command.text(name), nl=False)
        return
    exits.show(command.run(), json, results.show_recipes)


for command in (plan, bench, doctor):
    app.command()(command)


def run(arguments: list[str]) -> int:
    """Run one command line; the exit status."""
    return exits.run(app, arguments)


def main() -> None:
    """The entry point: this process is one command line."""
    exits.main(app)
