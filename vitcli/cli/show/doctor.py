"""What `vitcli doctor` found, as tables."""

from typing import Any

from rich.text import Text

from vitcli.cli import console as report
from vitcli.cli.console import print_facts
from vitcli.errors import printable

GIB = 2**30


def show_doctor(result: Any) -> None:
    """Facts by topic, then what slows this set-up, each with its remedy."""
    facts = result.facts
    have = {name: v for name, v in facts["versions"].items() if not isinstance(v, bool)}
    lack = ", ".join(name for name, value in have.items() if value is None)
    rows = [(name, value) for name, value in have.items() if value is not None]
    print_facts("versions", [*rows, ("not installed", lack)] if lack else rows)
    print_facts("machine", _machine(facts))
    d, images, disk = facts["devices"], facts["images"], facts["disk"]
    formats = ", ".join(name.upper() for name in ("webp", "avif") if images[name])
    a = facts["attention"]
    print_facts(
        "speed",
        [
            *_products(facts["threads"]),
            (
                "attention",
                f"{1e3 * a['explicit']:.1f} ms written out, {1e3 * a['fused']:.1f} ms fused, "
                f"{1e3 * a['chosen']:.1f} ms as chosen ({a['precision']})",
            ),
            ("JPEGs of 2 megapixels", f"{images['jpegs_per_second']:.0f} a second and core"),
            ("formats besides", formats or "none"),
            ("disk", _disk(disk)),
            ("training takes", f"{d['device']}, {d['precision']}"),
        ],
    )
    report.print_title("what slows it" if result.findings else "nothing that slows it was found")
    for finding in result.findings:
        report.out.print(Text(f"  {printable(finding.what)}"), soft_wrap=True)
        report.out.print(Text(f"    {printable(finding.remedy)}", style="dim"), soft_wrap=True)


def _machine(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    d, threads = facts["devices"], facts["threads"]
    rows: list[tuple[str, Any]] = [
        ("processor", f"{d['cpu']}, {d['instructions']}"),
        ("cores, threads", f"{d['cores']:g}, {threads['threads']}"),
    ]
    if d["memory_bytes"] is not None:
        free = d["memory_free_bytes"] / GIB
        rows.append(("memory", f"{d['memory_bytes'] / GIB:.1f} GiB, {free:.1f} free"))
    if threads["load"] is not None:
        rows.append(("load", f"{threads['load']:.1f}"))
    for gpu in d["gpus"]:
        size = f"{gpu['memory_bytes'] / GIB:.0f} GiB"
        rows.append(("GPU", f"{gpu['name']}, {size}, capability {gpu['capability']}"))
    return rows


def _products(threads: dict[str, Any]) -> list[tuple[str, Any]]:
    number = threads["threads"]
    return [
        (
            f"{kind} products",
            f"{threads[f'{kind}_one_thread'] / 1e9:.0f} GFLOP/s on one thread, "
            f"{threads[kind] / 1e9:.0f} on {number}",
        )
        for kind in ("fp32", "bf16")
    ]


def _disk(disk: dict[str, Any]) -> str:
    free = f"{disk['free_bytes'] / GIB:.0f} GiB free"
    if disk["write"] is None:
        return f"{free}, not to be written to"
    return f"{free}, writes {disk['write'] / 1e6:.0f} and reads {disk['read'] / 1e6:.0f} MB/s"
