"""The results of `plan` and `bench` as tables."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts, print_table, show_path

SI_UNITS = ((1e21, "zetta"), (1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"))
BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
DAY = 86_400


def format_flops(count: float | None) -> str:
    """2.24e20 -> 224 exaFLOPs."""
    if count is None:
        return "-"
    scale, unit = next((u for u in SI_UNITS if count >= u[0]), (1e6, "mega"))
    return f"{format_number(count / scale)} {unit}FLOPs"


def format_bytes(count: float | None) -> str:
    """3758096384 -> 3.5 GiB."""
    if count is None:
        return "-"
    scale, unit = next((u for u in BYTE_UNITS if count >= u[0]), (1, "bytes"))
    return f"{format_number(count / scale)} {unit}"


def format_number(value: float) -> str:
    """Three significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_duration(seconds: float | None) -> str:
    """4000 -> 1 h 7 min."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.3g} min"
    if seconds < 2 * DAY:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    days = seconds / DAY
    return f"{format_number(days)} days" if days < 1000 else f"{days / 365.25:,.3g} years"


def show_plan(plan: Any) -> None:
    """The cost of a run, by topic."""
    facts = plan.to_json()
    data = f" on {facts['data']}" if facts["data"] else ""
    print_facts(f"{facts['command']}: {facts['recipe']}{data}", _run_rows(facts))
    print_facts("per image", _image_rows(facts))
    print_facts("memory per process", _memory_rows(facts))
    if facts["measured"] or facts["seconds"] is not None:
        print_facts(f"time: {facts['device']}", _time_rows(facts))
    if facts["budget"]:
        print_facts("budget", _budget_rows(facts["budget"]))
    if facts["devices"]:
        _show_devices(facts["devices"])
    if len(facts["changes"]) > 1:
        _show_changes(facts["changes"])
    for note in facts["notes"]:
        report.out.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _run_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    parameters = f"{facts['model']}, {facts['parameters']:,} parameters"
    if facts["trained_parameters"] != facts["parameters"]:
        parameters += f"; {facts['trained_parameters']:,} trained, with heads of the objective"
    rows: list[tuple[str, Any]] = [
        ("model", parameters),
        ("objective", facts["objective"]),
        ("optimizer", f"{facts['optimizer']}, {facts['precision']}"),
    ]
    if facts["steps"] is not None:
        epochs = f", {facts['epochs']:,.3g} epochs" if facts["train_images"] > 1 else ""
        images = f"{facts['steps']:,} x {facts['batch_size']:,} images = {facts['images']:,} images"
        rows.append(("steps", f"{images}{epochs}"))
        if facts["tokens"]:
            rows.append(("tokens", f"{facts['tokens']:,.0f}"))
        flops = format_flops(facts["training_flops"])
        rows.append(("training FLOPs", f"{flops}, forward and backward"))
    return rows


def _image_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    y, x = facts["image_size"]
    tokens = f", {facts['tokens_per_image']:,.4g} tokens" if facts["tokens_per_image"] else ""
    macs = facts["macs_per_image"]
    rows: list[tuple[str, Any]] = [
        ("size", f"{y}x{x} px{tokens}"),
        ("multiply-adds", f"{macs:,} ({format_flops(facts['flops_per_image'])})"),
    ]
    rows += [(f"  {name}", f"{v:,}  {v / macs:.1%}") for name, v in facts["parts"].items()]
    rows.append(("training", f"{format_flops(facts['training_flops_per_image'])} on average"))
    return rows


def _memory_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    memory = facts["memory"]
    other, has_checkpointing = memory["otherwise"], memory["activation_checkpointing"]
    names = {"average": "moving average", "optimizer": "optimizer state"}
    rows: list[tuple[str, Any]] = [
        (names.get(name, name), format_bytes(memory[name]))
        for name in ("weights", "gradients", "optimizer", "average")
        if memory[name]
    ]
    alternative = f"  {'without' if has_checkpointing else 'with'} activation checkpointing"
    micro_batch = f"{facts['micro_batch_size']:,} images per forward pass"
    rows += [
        ("activations", f"{format_bytes(memory['activations'])}, {micro_batch}"),
        (alternative, format_bytes(other["activations"])),
    ]
    if memory["process"]:
        rows.append(("Python and libraries", format_bytes(memory["process"])))
    rows += [
        ("peak", format_bytes(facts["memory_bytes"])),
        (alternative, format_bytes(other["memory_bytes"])),
    ]
    if memory["measured"]:
        rows.append(("measured peak", format_bytes(memory["measured"])))
    return rows


def _time_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    kind = "" if facts["measured"] else " (estimate)"
    rows: list[tuple[str, Any]] = [("total", format_duration(facts["seconds"]) + kind)]
    if facts["time"]:
        rows += [(f"  {name}", format_duration(v)) for name, v in facts["time"].items() if v]
    if facts["images_per_second"]:
        rows.append(("images/s", format_number(facts["images_per_second"])))
    stages = facts["stages"]
    if facts["measured"] and len(stages) > 1:
        rows += [
            (
                f"  {stage['share']:.0%} of the steps",
                f"{format_duration(stage['seconds_per_step'])} per step, "
                f"{stage['tokens_per_image']:,} tokens per image",
            )
            for stage in stages
        ]
    if facts["mfu"]:
        peak = format_number(facts["peak_flops"] / 1e9)
        rows.append(("MFU", f"{facts['mfu']:.1%} of {peak} GFLOP/s"))
    if facts["ends_at"]:
        end = datetime.fromisoformat(facts["ends_at"])
        rows.append(("would finish at", f"{end:%A %d %B %Y, %H:%M}"))
    names = (("kwh", "energy", " kWh"), ("electricity", "electricity", ""), ("rent", "rent", ""))
    rows += [(name, f"{facts[key]:,.3g}{unit}") for key, name, unit in names if key in facts]
    return rows


def _budget_rows(budget: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("budget", format_duration(budget["seconds"]))]
    if budget["steps"] is not None:
        rows.append(("steps in the budget", f"{budget['steps']:,}"))
    if budget["whole_steps"] is not None:
        whole = f"{budget['whole_steps']:,} steps, {format_duration(budget['whole_seconds'])}"
        rows.append(("steps of the recipe", f"{whole}; {budget['share']:.1%} fit into the budget"))
    return rows


def _show_devices(devices: Sequence[dict[str, Any]]) -> None:
    priced = [key for key in ("kwh", "electricity", "rent") if key in devices[0]]
    rows = []
    for row in devices:
        low, high = row["seconds_range"]
        days = row["device_days"]
        rows.append(
            [
                row["device"],
                "-" if low is None else f"{format_duration(low)} to {format_duration(high)}",
                "-" if days is None else f"{days:,.3g}",
                format_number(row["images_per_second"]),
                f"{row['largest_micro_batch']:,}",
                *(f"{row[key]:,.3g}" for key in priced),
            ]
        )
    columns = ["device", "time on one", "days", "images/s", "max batch", *priced]
    print_table("other machines: estimates, not measurements", columns, rows)
    for row in devices:
        low, high = row["assumed_mfu"]
        line = (
            f"  {row['device']}: peak {row['peak_flops'] / 1e12:.4g} TFLOP/s, assumed MFU "
            f"{low:.0%} to {high:.0%}; {row['source']}"
        )
        report.out.print(Text(line, style="dim"), soft_wrap=True)


def _show_changes(changes: Sequence[dict[str, Any]]) -> None:
    rows = []
    for row in changes:
        ratio = "-" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
        fits = {None: "", True: "fits", False: "too long"}[row["fits"]]
        name = f"{row['change']} ({row['settings']})" if row["settings"] else row["change"]
        flops = f"{row['training_flops_ratio']:.2f}"
        rows.append([name, flops, ratio, format_duration(row["seconds"]), fits])
    columns = ["change", "FLOPs ratio", "step time ratio", "total time", "budget"]
    print_table("cheaper alternatives (the effect on accuracy is not estimated)", columns, rows)


def show_bench(result: Any) -> None:
    """One line for each library and setting, then the ratios."""
    facts = result.to_json()
    number = facts["threads"]
    threads = f", {number} thread{'s' * (number > 1)}" if facts["device"] == "cpu" else ""
    batch = facts["rows"][0]["batch_size"]
    names = [_bench_name(row) for row in facts["rows"]]
    print_table(
        f"{facts['device']}{threads}, batch size {batch}: images/s, latency p50 / p90 / p99 in ms",
        ["", "forward", "training", "MFU", "latency"],
        [
            [
                name,
                format_number(row["forward_images_per_second"]),
                format_number(row["training_images_per_second"]),
                f"{row['forward_mfu']:.0%} / {row['training_mfu']:.0%}",
                " / ".join(format_number(value) for value in row["latency_ms"].values()),
            ]
            for name, row in zip(names, facts["rows"], strict=True)
        ],
    )
    print_table(
        f"peak memory, and the largest batch within {format_bytes(facts['memory_limit_bytes'])}",
        ["", "forward", "training", "forward batch", "training batch"],
        [
            [
                name,
                format_bytes(row["forward_memory_bytes"]),
                format_bytes(row["training_memory_bytes"]),
                f"{row['largest_forward_batch']:,}",
                f"{row['largest_training_batch']:,}",
            ]
            for name, row in zip(names, facts["rows"], strict=True)
        ],
    )
    for row in facts["ratios"]:
        title = f"{row['model']} {row['image_size'][0]} px {row['precision']}"
        rows = [
            (
                name,
                f"{row[name]['median']:.2f} times as fast "
                f"({row[name]['least']:.2f} to {row[name]['largest']:.2f})",
            )
            for name in ("forward", "training", "latency")
        ]
        print_facts(f"{title}: vitcli compared with {row['against']}", rows)
    if facts["picture"]:
        show_path("picture", facts["picture"])


def _bench_name(row: dict[str, Any]) -> str:
    side = "x".join(str(n) for n in dict.fromkeys(row["image_size"]))
    attention = "" if row["attention"] == "auto" else f" {row['attention']}"
    return f"{row['model']} {side} px {row['precision']}{attention}, {row['library']}"
