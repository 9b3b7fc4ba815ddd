"""The results of `plan` and `bench` as tables."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts, print_table, show_next

UNITS = ((1e21, "zetta"), (1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"))
BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
DAY = 86_400


def operations(count: float | None) -> str:
    """2.24e20 -> 224 exaFLOPs."""
    if count is None:
        return "-"
    scale, unit = next((u for u in UNITS if count >= u[0]), (1e6, "mega"))
    return f"{significant(count / scale)} {unit}FLOPs"


def size(count: float | None) -> str:
    """Bytes in a unit that suits them."""
    if count is None:
        return "-"
    scale, unit = next((u for u in BYTES if count >= u[0]), (1, "bytes"))
    return f"{significant(count / scale)} {unit}"


def significant(value: float) -> str:
    """Three figures, and all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
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
    return f"{significant(days)} days" if days < 1000 else f"{days / 365.25:,.3g} years"


def show_plan(plan: Any) -> None:
    """What a run costs, part by part."""
    facts = plan.to_json()
    print_facts(_title(facts), _run_rows(facts))
    print_facts("an image", _image_rows(facts))
    print_facts("memory of one process", _memory_rows(facts))
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
    command = f"vitcli {facts['command']}"
    if facts["recipe"]:
        command += f" --recipe {facts['recipe']}"
    show_next(command)


def _title(facts: dict[str, Any]) -> str:
    data = f" on {facts['data']}" if facts["data"] else ""
    return f"{facts['command']}: {facts['recipe']}{data}"


def _run_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    parameters = f"{facts['model']}, {facts['parameters']:,} parameters"
    if facts["trained_parameters"] != facts["parameters"]:
        parameters += f", {facts['trained_parameters']:,} learn"
    rows: list[tuple[str, Any]] = [
        ("model", parameters),
        ("objective", f"{facts['objective']}, {facts['optimizer']}, {facts['precision']}"),
    ]
    if facts["steps"] is not None:
        epochs = f", {facts['epochs']:,.3g} epochs" if facts["train_images"] > 1 else ""
        count = f"{facts['steps']:,} of {facts['batch_size']:,} images: {facts['images']:,}{epochs}"
        rows.append(("steps", count))
        if facts["tokens"]:
            rows.append(("tokens", f"{facts['tokens']:,.0f}"))
        rows.append(("operations", f"{operations(facts['training_flops'])}, forward and backward"))
    return rows


def _image_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    y, x = facts["image_size"]
    tokens = f", {facts['tokens_per_image']:,.4g} tokens" if facts["tokens_per_image"] else ""
    macs = facts["macs_per_image"]
    rows: list[tuple[str, Any]] = [
        ("size", f"{y}x{x}{tokens}"),
        ("multiply-adds", f"{macs:,} ({operations(facts['flops_per_image'])})"),
    ]
    rows += [(f"  {k}", f"{v:,}  {v / macs:.1%}") for k, v in facts["parts"].items()]
    rows.append(("in training", f"{operations(facts['training_flops_per_image'])}, on average"))
    return rows


def _memory_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    memory = facts["memory"]
    other, own = memory["otherwise"], memory["activation_checkpointing"]
    rows: list[tuple[str, Any]] = [
        (name, size(memory[name]))
        for name in ("weights", "gradients", "optimizer", "average")
        if memory[name]
    ]
    at_once = f"{facts['micro_batch_size']:,} images at a time"
    checkpointed = {True: "with activation checkpointing", False: "without it"}
    rows += [
        ("activations", f"{size(memory['activations'])}, {at_once}"),
        ("  " + checkpointed[not own], size(other["activations"])),
    ]
    if memory["process"]:
        rows.append(("the process itself", size(memory["process"])))
    rows += [
        ("in all, at most", size(facts["memory_bytes"])),
        ("  " + checkpointed[not own], size(other["memory_bytes"])),
    ]
    if memory["measured"]:
        rows.append(("of the steps just made", size(memory["measured"])))
    return rows


def _time_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    kind = "" if facts["measured"] else " (an estimate)"
    rows: list[tuple[str, Any]] = [("in all", duration(facts["seconds"]) + kind)]
    if facts["time"]:
        parts = ", ".join(f"{k} {duration(v)}" for k, v in facts["time"].items() if v)
        rows.append(("of which", parts))
    if facts["images_per_second"]:
        rows.append(("images/s", significant(facts["images_per_second"])))
    stages = facts["stages"]
    if facts["measured"] and len(stages) > 1:
        rows += [
            (
                f"  {stage['share']:.0%} of the steps",
                f"{duration(stage['seconds_per_step'])} a step, "
                f"{stage['tokens_per_image']:,} tokens an image",
            )
            for stage in stages
        ]
    if facts["mfu"]:
        rows.append(
            ("MFU", f"{facts['mfu']:.1%} of {significant(facts['peak_flops'] / 1e9)} GFLOP/s")
        )
    if facts["ends_at"]:
        end = datetime.fromisoformat(facts["ends_at"])
        rows.append(("begun now, it ends", f"{end:%A %d %B %Y, %H:%M}"))
    rows += _price_rows(facts)
    return rows


def _price_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    names = (("kwh", "energy", " kWh"), ("electricity", "electricity", ""), ("rent", "rent", ""))
    return [(name, f"{facts[key]:,.3g}{unit}") for key, name, unit in names if key in facts]


def _budget_rows(budget: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("given", duration(budget["seconds"]))]
    if budget["steps"] is not None:
        rows.append(("steps that fit", f"{budget['steps']:,}"))
    if budget["whole_steps"] is not None:
        whole = f"{budget['whole_steps']:,} steps, {duration(budget['whole_seconds'])}"
        rows.append(("the recipe's own", f"{whole}: {budget['share']:.1%} of it fit"))
    return rows


def _show_devices(devices: Sequence[dict[str, Any]]) -> None:
    asked = [key for key in ("kwh", "electricity", "rent") if key in devices[0]]
    rows = []
    for row in devices:
        low, high = row["seconds_range"]
        days = row["device_days"]
        rows.append(
            [
                row["device"],
                "-" if low is None else f"{duration(low)} .. {duration(high)}",
                "-" if days is None else f"{days:,.3g}",
                significant(row["images_per_second"]),
                f"{row['largest_micro_batch']:,}",
                *(f"{row[key]:,.3g}" for key in asked),
            ]
        )
    columns = ["device", "time, one of each", "days", "img/s", "most at once", *asked]
    print_table("other machines: estimates, not measurements", columns, rows)
    lines = [
        f"{row['device']}: {row['peak_flops'] / 1e12:.4g} TFLOP/s at most, of which "
        f"{row['assumed_mfu'][0]:.0%} to {row['assumed_mfu'][1]:.0%} are assumed; {row['source']}"
        for row in devices
    ]
    for line in lines:
        report.out.print(Text(f"  {line}", style="dim"), soft_wrap=True)


def _show_changes(changes: Sequence[dict[str, Any]]) -> None:
    rows = []
    for row in changes:
        ratio = "-" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
        fits = {None: "", True: "fits", False: "too long"}[row["fits"]]
        name = f"{row['change']} ({row['settings']})" if row["settings"] else row["change"]
        operations_ratio = f"{row['training_flops_ratio']:.2f}"
        rows.append([name, operations_ratio, ratio, duration(row["seconds"]), fits])
    columns = ["change", "operations", "steps' time", "in all", "budget"]
    print_table("what would be cheaper (time, not accuracy)", columns, rows)


def show_bench(result: Any) -> None:
    """A row for each contender in each setting, and how ours compare."""
    facts = result.to_json()
    number = facts["threads"]
    threads = f", {number} thread{'s' * (number > 1)}" if facts["device"] == "cpu" else ""
    rows = []
    for row in facts["rows"]:
        side = "x".join(str(n) for n in dict.fromkeys(row["image_size"]))
        latency = row["latency_ms"]
        attention = "" if row["attention"] == "auto" else f" {row['attention']}"
        rows.append(
            [
                f"{row['model']} {side} px {row['precision']}{attention}, {row['library']}",
                significant(row["forward_images_per_second"]),
                significant(row["training_images_per_second"]),
                " / ".join(significant(value) for value in latency.values()),
            ]
        )
    batch = facts["rows"][0]["batch_size"]
    title = f"{facts['device']}{threads}; medians, {batch} images at a time, latency of one in ms"
    print_table(title, ["", "forward img/s", "train img/s", "p50 / p90 / p99"], rows)
    rows = [
        [
            f"{row['model']} {row['image_size'][0]} px {row['precision']}, {row['library']}",
            size(row["forward_memory_bytes"]),
            size(row["training_memory_bytes"]),
            f"{row['largest_forward_batch']:,}",
            f"{row['largest_training_batch']:,}",
        ]
        for row in facts["rows"]
    ]
    limit = size(facts["memory_limit_bytes"])
    columns = ["", "forward", "training", "most forward", "most training"]
    print_table(f"memory, and the largest batch within {limit}", columns, rows)
    for row in facts["ratios"]:
        words = [
            f"{name} {row[name]['median']:.2f} ({row[name]['least']:.2f} to "
            f"{row[name]['largest']:.2f})"
            for name in ("forward", "training", "latency")
        ]
        title = f"{row['model']} {row['image_size'][0]} px {row['precision']}"
        print_facts(f"{title}: as fast as {row['against']}", [("times", ", ".join(words))])
    if facts["picture"]:
        show_next(f"picture: {facts['picture']}")
