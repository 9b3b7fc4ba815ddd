"""Commands and switches about what a run costs, before it starts: `cli.py` lists them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli import exits
from vitcli.errors import VitcliError
from vitcli.options import (
    BatchSize,
    Budget,
    Data,
    Epochs,
    ImageSize,
    Json,
    Model,
    Precision,
    Processes,
    Set,
    Steps,
    Training,
    settings,
    sides,
    words,
)


def find_lr(find: Callable[..., Any], training: Training, **given: Any) -> None:
    """`--find-lr` of a command that trains."""
    from vitcli import report, results

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
    from vitcli import report, results_cost
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
    from vitcli import report, results_cost
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
    from vitcli import report, results_cost
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
    from vitcli import report, results_doctor
    from vitcli.commands import doctor as command

    exits.show(command.run(out, report.Terminal()), json, results_doctor.show_doctor)
