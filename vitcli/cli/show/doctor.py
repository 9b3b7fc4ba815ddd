"""The result of `doctor` as tables."""

from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts
from vitcli.errors import printable

GIB = 2**30


def show_doctor(result: Any) -> None:
    """Facts by topic, then each problem with its remedy."""
    facts = result.facts
    versions = {name: v for name, v in facts["versions"].items() if not isinstance(v, bool)}
    missing = ", ".join(name for name, value in versions.items() if value is None)
    rows = [(name, value) for name, value in versions.items() if value is not None]
    print_facts("versions", [*rows, ("not installed", missing)] if missing else rows)
    print_facts("machine", _machine_rows(facts))
    print_facts("speed", _speed_rows(facts))
    report.print_title("problems" if result.findings else "no problems found")
    for finding in result.findings:
        report.out.print(Text(f"  {printable(finding.what)}"), soft_wrap=True)
        report.out.print(Text(f"    {printable(finding.remedy)}", style="dim"), soft_wrap=True)


def _machine_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    devices, threads = facts["devices"], facts["threads"]
    total, available = devices["memory_bytes"] / GIB, devices["memory_free_bytes"] / GIB
    rows: list[tuple[str, Any]] = [
        ("processor", f"{devices['cpu']}, {devices['instructions']}"),
        ("cores, threads", f"{devices['cores']:g}, {threads['threads']}"),
        ("memory", f"{total:.1f} GiB, {available:.1f} GiB available"),
        ("memory allocator", facts["malloc"]["allocator"]),
        ("load", f"{threads['load']:.1f} processes"),
    ]
    for gpu in devices["gpus"]:
        size = f"{gpu['memory_bytes'] / GIB:.0f} GiB"
        rows.append(("GPU", f"{gpu['name']}, {size}, compute capability {gpu['capability']}"))
    rows.append(("device for training", f"{devices['device']}, {devices['precision']}"))
    return rows


def _speed_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    threads, attention, images = facts["threads"], facts["attention"], facts["images"]
    rows: list[tuple[str, Any]] = [
        (
            f"{kind} matrix products",
            f"{threads[f'{kind}_one_thread'] / 1e9:.0f} GFLOP/s on one thread, "
            f"{threads[kind] / 1e9:.0f} GFLOP/s on {threads['threads']}",
        )
        for kind in ("fp32", "bf16")
    ]
    times = (f"{1e3 * attention[key]:.1f} ms {key}" for key in ("explicit", "fused", "chosen"))
    formats = ", ".join(name.upper() for name in ("webp", "avif") if images[name])
    return [
        *rows,
        ("attention", f"{', '.join(times)} ({attention['precision']})"),
        ("JPEG decoding", f"{images['jpegs_per_second']:.0f} images/s per core (2 megapixels)"),
        ("optional image formats", formats or "none"),
        ("disk", _disk_text(facts["disk"])),
    ]


def _disk_text(disk: dict[str, Any]) -> str:
    free = f"{disk['free_bytes'] / GIB:.0f} GiB free"
    if disk["write"] is None:
        return f"{free}, not writable"
    return f"{free}, writes {disk['write'] / 1e6:.0f} MB/s, reads {disk['read'] / 1e6:.0f} MB/s"
