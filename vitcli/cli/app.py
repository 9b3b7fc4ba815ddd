"""The table of contents: one thin function per command, its help and a worked example."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli import __version__
from vitcli.cli import console, following
from vitcli.cli.completion import (
    complete_key,
    complete_model,
    complete_model_word,
    complete_recipe,
    complete_recipe_or_run,
    complete_run,
)
from vitcli.cli.options import (
    DATASET,
    EVALUATION,
    MACHINE,
    MODEL,
    OUTPUT,
    BenchOptions,
    CommandGroup,
    Data,
    Device,
    EvaluateOptions,
    FewshotOptions,
    ImageSize,
    Json,
    Labels,
    ModelName,
    PlanOptions,
    PredictOptions,
    Set,
    SettingsCommand,
    TrainOptions,
    Verbose,
    listed,
    option,
    option_groups,
    schema_option,
    settings_of,
)
from vitcli.errors import VitcliError
from vitcli.weights.formats import FORMATS

app = typer.Typer(
    name="vitcli",
    cls=CommandGroup,
    help="Train, evaluate and use Vision Transformers.",
    epilog="First steps: `vitcli pretrain`, `vitcli fewshot --shots 5`, `vitcli finetune`, "
    "`vitcli predict image.jpg`.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"vitcli {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command(cls=SettingsCommand)
@option_groups
def pretrain(context: typer.Context, data: Data = None, *, training: TrainOptions) -> None:
    """Train a model from random weights.

    Images with labels give a classifier for their classes. Without DATA, train for a few minutes
    on images drawn from formulas; nothing is downloaded.

    Example: `vitcli pretrain photos/ --recipe pretrain --epochs 30 --out runs/photos`
    """
    from vitcli.commands import pretrain as command

    _train(context, command, training, settings_of(training), data=data)


@app.command(cls=SettingsCommand)
@option_groups
def finetune(
    context: typer.Context,
    data: Data = None,
    model: ModelName = None,
    lora: Annotated[int | None, schema_option(MODEL, "lora.rank", "--lora")] = None,
    keep_head: Annotated[bool, schema_option(MODEL, "train.keep_head", "--keep-head")] = False,
    verbose: Verbose = False,
    *,
    training: TrainOptions,
) -> None:
    """Fine-tune pretrained weights on labelled images, at the same or another resolution.

    `--set objective.name=mse` learns a number per image, such as an age, instead of classes.

    Example: `vitcli finetune photos/ --model runs/pretrain_formula --image-size 48 --epochs 20`
    """
    from vitcli.commands import finetune as command

    settings = settings_of(training, lora__rank=lora, train__keep_head=keep_head or None)
    _train(context, command, training, settings, data=data, model=model, verbose=verbose)


def _train(
    context: typer.Context,
    command: Any,
    training: TrainOptions,
    settings: dict[str, Any],
    **given: Any,
) -> None:
    """Run `pretrain` or `finetune`, or only estimate its cost, or only find a learning rate."""
    from vitcli.cli.show import training as show

    name = command.__name__.rpartition(".")[2]
    out = training.out
    if (
        training.resume
        and out is None
        and given["data"]
        and Path(given["data"], "recipe.toml").is_file()
    ):
        out, given["data"] = Path(given["data"]), None  # `--resume RUN`
    shared: dict[str, Any] = {"recipe": training.recipe, "settings": settings, "out": out}
    verbose = {"verbose": given.pop("verbose")} if "verbose" in given else {}
    if training.find_lr:
        if training.dry_run:
            raise VitcliError(
                "`--find-lr` and `--dry-run` are two different commands", "remove one of them"
            )
        if training.resume:
            raise VitcliError(
                "`--find-lr` does not train, so there is no run to resume", "remove `--resume`"
            )
        from vitcli.commands import find_lr

        rate = find_lr.run(**given, **shared, command=name, watch=console.Terminal())
        after = following.after_find_lr(context, rate)
        console.show(rate, training.json, show.show_found_rate, after)
        return
    if training.dry_run:
        from vitcli.cli.show import cost as show_cost
        from vitcli.commands import plan as planning

        result = planning.run(
            **{"data": None, "model": None, **given, **shared},
            command=name,
            resume=training.resume,
            compare=False,
            watch=console.Terminal(),
        )
        after = following.repeated(context, ("dry_run",))
        console.show(result, training.json, show_cost.show_plan, after)
        return
    trained = command.run(
        **given,
        **shared,
        **verbose,
        resume=training.resume,
        track=training.track,
        check=not training.no_check,
        watch=console.Terminal(),
    )
    console.show(
        trained,
        training.json,
        show.show_trained,
        following.after_training(trained),
        broken=(f"{name}: {reason}" for name, reason in trained.broken.items()),
    )


@app.command(cls=SettingsCommand)
@option_groups
def fewshot(data: Data = None, *, options: FewshotOptions) -> None:
    """Evaluate frozen features with few labelled images per class, or with all of them.

    The default is the paper's protocol: regularised least squares on standardised features, in
    closed form, with 3 random draws. The classifier is stored as a run for `vitcli predict`.

    Example: `vitcli fewshot photos/ --model runs/pretrain_formula --shots 1,5,10 --l2 auto`

    or: `vitcli fewshot photos/ --model weights/ --shots all --method logistic`
    """
    from vitcli.cli.show import fewshot as show
    from vitcli.commands import fewshot as command

    result = command.run(
        data,
        model=options.model,
        settings=settings_of(options),
        out=options.out,
        batch_size=options.batch_size,
        precision=options.precision,
        cache=not options.no_cache,
        check=not options.no_check,
        verbose=options.verbose,
        watch=console.Terminal(),
    )
    console.show(
        result,
        options.json,
        show.show_fewshot,
        following.after_fewshot(result),
        broken=result.broken,
    )


@app.command(cls=SettingsCommand)
@option_groups
def evaluate(data: Data = None, *, options: EvaluateOptions) -> None:
    """Evaluate a model on a labelled dataset: accuracy, calibration, confusion matrix.

    A regression gets its mean absolute error, RMSE and R2.

    Metrics have 95 % confidence intervals. Several models are compared with the first one on the
    same images. `--suite` fine-tunes or few-shot evaluates on every task of a suite; run it again
    with the same `--out` to continue.

    Example: `vitcli evaluate photos/ --model runs/finetune --out report/`

    or: `vitcli evaluate photos/ --model runs/finetune --model runs/other`

    or: `vitcli evaluate --suite vtab1k --model B_16.npz --out runs/vtab`
    """
    if options.suite is not None:
        _evaluate_suite(options.suite, data, options)
        return
    from vitcli.cli.show import evaluation as show
    from vitcli.commands import evaluate as command

    result = command.run(
        data,
        model=options.model,
        settings=settings_of(options),
        labels=options.labels,
        out=options.out,
        real=options.real,
        class_map=options.class_map,
        calibrate=options.calibrate,
        thresholds=options.thresholds,
        tta=options.tta,
        batch_size=options.batch_size,
        precision=options.precision,
        seed=options.seed,
        check=not options.no_check,
        verbose=options.verbose,
        watch=console.Terminal(),
    )
    console.show(result, options.json, show.show_evaluation, broken=result.broken)


def _evaluate_suite(suite: str, data: str | None, options: EvaluateOptions) -> None:
    """Run `evaluate --suite`, which defines data and classes itself."""
    from vitcli.cli.show import evaluation as show
    from vitcli.commands import suite as command

    given = {
        "DATA": data,
        "--labels": options.labels,
        "--image-size": options.image_size,
        "--class-map": options.class_map,
        "--real": options.real,
        "--calibrate": options.calibrate or None,
        "--thresholds": options.thresholds,
        "--tta": options.tta,
        "--verbose": options.verbose or None,
        "--seed": options.seed if options.seed != EvaluateOptions.seed else None,
        "--batch-size": (
            options.batch_size if options.batch_size != EvaluateOptions.batch_size else None
        ),
    }
    if names := ", ".join(name for name, value in given.items() if value is not None):
        raise VitcliError(
            f"{names} cannot be combined with `--suite`: its file and recipes decide this per task",
            f"remove {names}, or edit a copy of the suite's file",
        )
    models = options.model or []
    if len(models) > 1:
        raise VitcliError(
            f"`--suite` evaluates one model, {len(models)} were given", "run one command per model"
        )
    result = command.run(
        suite,
        model=models[0] if models else None,
        settings=settings_of(options),
        out=options.out,
        processes=options.processes,
        precision=None if options.precision == "auto" else options.precision,
        device=options.device,
        check=not options.no_check,
        watch=console.Terminal(),
    )
    console.show(
        result,
        options.json,
        show.show_suite,
        broken=(f"{name}: {reason}" for name, reason in result.failed.items()),
    )


@app.command(cls=SettingsCommand)
@option_groups
def predict(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders, quoted globs, https:// addresses.", metavar="IMAGE"),
    ] = None,
    *,
    options: PredictOptions,
) -> None:
    """Predict classes and probabilities of images, or their numbers after a regression.

    The output file (`--csv`, `--jsonl`, `--parquet`) appears when all rows are written. Until then
    the rows are in `FILE.part`, and `--resume` continues from there.

    Example: `vitcli predict holiday/ cat.jpg --model runs/finetune --top 3 --csv classes.csv`

    or: `vitcli predict holiday/ --threshold 0.7 --ood-threshold 0.99` (no label when unsure)

    or: `find / -name '*.jpg' -print0 | vitcli predict --from - --jsonl all.jsonl --resume`
    """
    if not images and options.from_ is None:
        raise VitcliError(
            "Missing argument `IMAGE` or option `--from FILE`", "see `vitcli predict --help`"
        )
    from vitcli.cli.show import prediction as show
    from vitcli.commands import predict as command

    tables = {path: path.exists() for path in options.tables}
    rows = command.run(images or [], watch=console.Terminal(), **options.arguments())
    for row in rows:
        if options.json:
            console.print_json(row)
        else:
            show.show_prediction(row)
        if row["error"] is not None:
            console.print_error(VitcliError(f"{row['path']}: {row['error']}"))
    show.show_counts(rows.counts, options.abstains, tables)
    if rows.failed:
        raise typer.Exit(console.EXIT_UNREADABLE)


@app.command(cls=SettingsCommand)
def export(
    to: Annotated[str, option(OUTPUT, "--to", help=f"Format: {listed(FORMATS)}.")],
    model: ModelName = None,
    labels: Labels = None,
    image_size: ImageSize = None,
    out: Annotated[
        Path | None,
        option(OUTPUT, "--out", help="Folder (timm, huggingface) or file (.npz, .onnx)."),
    ] = None,
    set_: Set = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Export a model to another format, read it back, and compare the logits.

    Google's format supports only tanh GELU. `--set model.gelu=tanh` exports with that
    approximation.

    Example: `vitcli export --model runs/finetune --to onnx --out flowers.onnx`
    """
    from vitcli.cli.show import export as show
    from vitcli.commands import export as command

    result = command.run(
        to,
        model=model,
        settings=settings_of(set_=set_, model__image_size=image_size),
        labels=labels,
        out=out,
        verbose=verbose,
        watch=console.Terminal(),
    )
    console.show(result, json, show.show_export, following.after_export(result))


@app.command(cls=SettingsCommand)
@option_groups
def plan(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name or file of a recipe, or a run directory.",
            metavar="RECIPE|RUN",
            show_default=False,
            autocompletion=complete_recipe_or_run,
        ),
    ] = None,
    data: Data = None,
    *,
    options: PlanOptions,
) -> None:
    """Estimate the cost of a run before it starts: FLOPs, memory, time, money.

    Parameters and FLOPs are exact, counted as in Table 6 of the paper. The time is measured with a
    few real steps of the recipe. Other machines are estimated from their peak performance. Nothing
    is written.

    Example: `vitcli plan pretrain_cifar10_small cifar10/ --budget 30m --watts 65 --kwh-price 0.3`

    or: `vitcli plan paper_vit_l16_jft --device all --no-probe`
    """
    from vitcli.cli.show import cost as show
    from vitcli.commands import plan as command

    result = command.run(
        recipe,
        data,
        model=options.model,
        settings=settings_of(options),
        images=options.images,
        classes=options.classes,
        probing=options.probe,
        device=options.device,
        prices=command.Prices(options.watts, options.kwh_price, options.hour_price),
        watch=console.Terminal(),
    )
    console.show(result, options.json, show.show_plan, following.after_plan(context, result))


@app.command(cls=SettingsCommand)
@option_groups
def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A MODEL; comma-separated for several. Default: the newest run, or `S/16`.",
            metavar="MODEL",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    *,
    options: BenchOptions,
) -> None:
    """Benchmark a model: throughput, latency, memory, and the largest batch that fits.

    Measurements alternate between the models, so that load affects all equally. Peak memory is the
    sum of live tensors. On a CPU it includes the overhead of the allocator.

    Example: `vitcli bench S/16 --image-size 224,384 --against transformers --out bench.png`
    """
    from vitcli.cli.show import cost as show
    from vitcli.commands import bench as command

    result = command.run(model, **options.arguments(), watch=console.Terminal())
    console.show(result, options.json, show.show_bench)


@app.command(cls=SettingsCommand)
def inspect(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders, quoted globs, or DATA.", metavar="IMAGE", show_default=False
        ),
    ] = None,
    model: ModelName = None,
    labels: Labels = None,
    image_size: ImageSize = None,
    limit: Annotated[
        int, option(EVALUATION, "--limit", help="Maximum number of images.", show_default=True)
    ] = 128,
    bias: Annotated[
        bool,
        option(
            EVALUATION,
            "--bias/--no-bias",
            help="Measure the inductive bias: translation equivariance and locality.",
            show_default=True,
        ),
    ] = True,
    resnet: Annotated[
        str | None,
        option(
            EVALUATION,
            "--resnet",
            help="ResNet to compare with. Default: random weights, same number of parameters.",
        ),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        option(OUTPUT, "--out", help="Folder for `report.html`, the pictures and the numbers."),
    ] = None,
    set_: Set = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Draw the paper's figures for a model, with their numbers.

    The figures are embedding filters, position similarity, mean attention distance per head, and
    attention rollout per image. Translation equivariance and locality are compared with random
    weights and with a ResNet.

    The folder holds `report.html`, PNG files, `inspect.json` and `figures.npz`.

    Example: `vitcli inspect cat.jpg --model runs/finetune --out look/`
    """
    from vitcli.cli.show import inspection as show
    from vitcli.commands import inspect as command

    result = command.run(
        images or (),
        model=model,
        settings=settings_of(set_=set_, model__image_size=image_size),
        labels=labels,
        out=out,
        limit=limit,
        with_bias=bias,
        resnet=resnet,
        verbose=verbose,
        watch=console.Terminal(),
    )
    console.show(result, json, show.show_inspection, broken=result.broken)


@app.command(cls=SettingsCommand)
def patchify(
    source: Annotated[
        str,
        typer.Argument(help="An image, DATA, or a file of stored patches.", metavar="IMAGE|DATA"),
    ],
    patch_size: Annotated[
        int, option(MODEL, "--patch-size", help="Patch side in px.", show_default=True)
    ] = 16,
    image_size: ImageSize = None,
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "--out",
            help="`.safetensors`: patches; `.png`: patch grid; folder: decoded dataset.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        option(
            OUTPUT, "--compare", help="Draw the grids of patch sizes 8, 16, 32 into this .png file."
        ),
    ] = None,
    reconstruct: Annotated[
        str | None,
        option(
            OUTPUT, "--reconstruct", help="Rebuild the image from its patches into this .png file."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Cut images into patches: view them, measure them, or store them.

    `--out DIR` decodes and resizes the images of DATA once. Use DIR as DATA in any command; its
    images need no decoding. Run an interrupted command again to continue.

    For one image it prints mean, standard deviation and entropy of the patches and the cost of each
    patch size. `vitcli patchify cat.safetensors --reconstruct cat.png` rebuilds an image from
    stored patches.

    Example: `vitcli patchify cat.jpg --patch-size 32 --out cat.safetensors`

    or: `vitcli patchify photos/ --image-size 224 --out photos-224`
    """
    from vitcli.cli.show import inspection as show
    from vitcli.commands import patchify as command

    result = command.run(
        source,
        patch_size=patch_size,
        image_size=image_size,
        out=None if out is None else str(out),
        compare=compare,
        reconstruct=reconstruct,
        watch=console.Terminal(),
    )
    console.show(result, json, show.show_patches, broken=result.broken)


@app.command(cls=SettingsCommand)
def check(
    data: Annotated[str, typer.Argument(help=DATASET, metavar="DATA")],
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "--out",
            help="Folder for `report.html` and samples of each class, or a .png file for the "
            "samples.",
        ),
    ] = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Check a dataset: unreadable images, duplicates, train/test leaks, class imbalance.

    Every image is read once. Duplicates are found by content, so recompressed and resized copies
    are found too. Training images that are also test images are reported first.

    Example: `vitcli check photos/ --out check/`
    """
    from vitcli.cli.show import check as show
    from vitcli.commands import check as command

    result = command.run(data, settings=settings_of(set_=set_), out=out, watch=console.Terminal())
    console.show(
        result,
        json,
        show.show_check,
        broken=(f"{name}: {reason}" for name, reason in result.scan.unreadable),
    )


@app.command(cls=SettingsCommand)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more finished runs.", metavar="RUN", autocompletion=complete_run
        ),
    ],
    json: Json = False,
) -> None:
    """Compare runs: settings that differ, results, and a paired test.

    The paired test is McNemar's exact test. The test and the confidence interval of the difference
    need runs that were evaluated on the same images.

    Example: `vitcli compare runs/finetune runs/finetune-2`
    """
    from vitcli.cli.show import evaluation as show
    from vitcli.commands import compare as command

    console.show(command.run(runs, console.Terminal()), json, show.show_run_comparison)


@app.command(cls=SettingsCommand)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Recipe to print.",
            metavar="NAME",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes, or print one.

    Example: `vitcli recipes pretrain_formula > mine.toml`
    """
    from vitcli.cli.show import training as show
    from vitcli.commands import recipes as command

    if name is not None:
        if json:
            console.print_json(command.settings(name))
        else:
            typer.echo(command.text(name), nl=False)
        return
    console.show(command.run(), json, show.show_recipes)


@app.command(cls=SettingsCommand)
def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Words to search for, or `fetch NAME`.",
            metavar="[WORD]|fetch NAME",
            show_default=False,
            autocompletion=complete_model_word,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List public weights that `--model` finds by name, or download some.

    Names of timm and repositories on the Hugging Face Hub work too, listed or not. `fetch`
    downloads into the cache, whose folder you can copy to a machine without a network.

    A name means the branch `main` of its repository, which can change. `NAME@COMMIT` pins one
    commit, for `--model` and for `fetch`. Each load and `fetch` print the commit.

    Example: `vitcli models dinov2`

    or: `vitcli models fetch vit-s16-augreg`
    """
    from vitcli.cli.show import models as show
    from vitcli.commands import models as command

    words = words or []
    if words[:1] != ["fetch"]:
        found = command.run(words)
        after = following.command_line(["models", "fetch", found.rows[0].public.name])
        console.show(found, json, show.show_models, after)
        return
    if len(words) != 2:
        raise VitcliError("`vitcli models fetch` takes one name", "`vitcli models` lists them")
    fetched = command.fetch(words[1], console.Terminal())
    after = following.command_line(["fewshot", "builtin:digits", "--model", fetched.name])
    console.show(fetched, json, show.show_fetched, after)


@app.command(cls=SettingsCommand)
def settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Words in keys or meanings, or one whole key.",
            metavar="[WORD]",
            show_default=False,
            autocompletion=complete_key,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the settings of recipes and `--set`: key, type, default, meaning.

    Example: `vitcli settings warmup`

    or: `vitcli settings optim.lr`
    """
    from vitcli.cli.show import settings as show
    from vitcli.commands import settings as command

    console.show(command.run(words or []), json, show.show_settings)


@app.command(cls=SettingsCommand)
def doctor(
    folder: Annotated[
        Path | None, option(MACHINE, "--folder", help="Measure the disk of this folder.")
    ] = None,
    out: Annotated[Path | None, option(OUTPUT, "--out", help="Old name.", hidden=True)] = None,
    json: Json = False,
) -> None:
    """Check this machine and this installation for problems.

    It reports versions, devices, precisions, threads, attention, image decoding and disk speed in
    about ten seconds.

    Example: `vitcli doctor --json > machine.json`
    """
    from vitcli.cli.show import doctor as show
    from vitcli.commands import doctor as command

    console.show(command.run(folder or out, console.Terminal()), json, show.show_doctor)
