"""Every benchmark of RESULTS.md in one go, and what became slower since the last record.

    python recipes/bench_all.py                       about an hour on two cores
    python recipes/bench_all.py --only step,data      some
    python recipes/bench_all.py --quick               fewer repetitions, about a quarter of the time
    python recipes/bench_all.py --only defaults       takes hours, as trainer, plain and hybrid do

Each benchmark is a process with the command line of its documentation. The record has date,
processor, threads, versions, commit and every figure. It is written to `recipes/records/`; commit
it with a claim that rests on it. A figure is compared with the newest record of the same processor,
cores and threads that has it. It became worse if the difference is larger than both spreads
together; a figure without a spread may move by a tenth.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, SHARED, Figures, machine, run_timed, run_vitcli

RECORDS = ROOT / "recipes/records"
WITHOUT_SPREAD = 0.1  # of the earlier figure
CIFAR, WEIGHTS = SHARED / "cifar10", SHARED / "weights/vit_tiny_patch16_224_in1k"
FORMULA = "FORMULA"  # stands for a run of `vitcli pretrain`, which is made first


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        words: script and arguments, as RESULTS.md has them.
        quick: further arguments of `--quick`; None leaves it out there.
        tiny: further arguments that show in seconds that it runs; None leaves it out there.
        takes_hours: it runs only if `--only` names it.
    """

    words: tuple[object, ...]
    quick: tuple[object, ...] | None = None
    tiny: tuple[object, ...] | None = None
    takes_hours: bool = False


BENCHES = {
    "cold": Bench(("bench_cold_start.py",), ("--runs", 3)),
    "load": Bench(("bench_load.py",), ("--rounds", 5), ("--rounds", 2, "--model", "mu/4")),
    "step": Bench(("bench_step.py",), ("S/16", 224, 16, "fp32"), ("mu/4", 8, 2, "fp32")),
    "loop": Bench(("bench_step.py", "loop")),
    "data": Bench(("bench_data.py",), ("flowers",)),
    "predict": Bench(("bench_predict.py", "--images", 320, "--pairs", 5), ("--pairs", 3)),
    "extract": Bench(
        ("bench_fewshot.py", "extract"),
        ("--pairs", 3),
        ("--model", "mu/16", "--images", 8, "--batch-size", 8, "--pairs", 1),
    ),
    "solve": Bench(("bench_fewshot.py", "solve", "--pairs", 3)),
    "memory": Bench(("bench_memory.py",), ("--counts", "1000,10000")),
    "plan": Bench(("bench_plan.py", "--rounds", 1), ("--only", "0,9")),
    "imbalance": Bench(("bench_imbalance.py", SHARED / "cifar10_small", WEIGHTS), ("--seeds", 2)),
    "start": Bench(("bench_start.py", CIFAR, FORMULA, "--part", "2%", "--seeds", 3)),
    "defaults": Bench(("bench_defaults.py", "--data", SHARED), takes_hours=True),
    "trainer": Bench(("bench_trainer.py", CIFAR), takes_hours=True),
    "plain": Bench(("bench_records.py", "--track", "plain", "--data", CIFAR), takes_hours=True),
    "hybrid": Bench(("bench_records.py", "--track", "hybrid", "--data", CIFAR), takes_hours=True),
}


def chosen(given: argparse.Namespace) -> dict[str, list[object]]:
    """The command line of each benchmark to run."""
    names = given.only.split(",") if given.only else list(BENCHES)
    if unknown := sorted(set(names) - BENCHES.keys()):
        raise SystemExit(f"no benchmark `{unknown[0]}`; there are {', '.join(BENCHES)}")
    commands = {}
    for name in names:
        bench = BENCHES[name]
        more = bench.tiny if given.tiny else bench.quick if given.quick else ()
        if more is None or (bench.takes_hours and not given.only):
            continue
        commands[name] = [*bench.words, *more]
    return commands


def run(words: list[object], folder: Path) -> dict[str, Any]:
    """One benchmark: command, seconds and figures; the error if it fails."""
    # Relative to the project, so that a record has no path of a machine.
    shown = [os.path.relpath(word, ROOT) if isinstance(word, Path) else word for word in words]
    if FORMULA in words:
        model = folder / "formula"
        if not model.exists():
            run_vitcli("pretrain", "--out", model)
        words = [model if word == FORMULA else word for word in words]
    figures, prints = folder / "figures.jsonl", words[0] == "bench_defaults.py"
    figures.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "recipes" / str(words[0]), *words[1:]]
    found: dict[str, Any] = {"command": " ".join(map(str, shown))}
    try:
        done = run_timed(command if prints else [*command, "--json", figures])
    except SystemExit as error:
        return {**found, "error": str(error)}
    sys.stdout.write(done.output)
    if prints:
        add_printed(Figures(str(figures)), done.output)
    lines = figures.read_text(encoding="utf-8").splitlines() if figures.is_file() else []
    found |= {"seconds": round(done.seconds, 1), "cpu_seconds": round(done.cpu_seconds, 1)}
    return {**found, "figures": [json.loads(line) for line in lines]}


def add_printed(figures: Figures, output: str) -> None:
    """Add the figures of `bench_defaults.py`, which prints a JSON object per run."""
    for row in (json.loads(line) for line in output.splitlines() if line.startswith("{")):
        name = f"{row['set']}, {row['budget']}, {row['flags'] or 'no recipe'}: accuracy"
        figures.add(name, 100 * row["accuracy"], "%", "higher")


def earlier_figures(folder: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The newest figure of each name among the records of the same machine, with its date."""
    same, found = ("processor", "cores", "threads"), {}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    for record in sorted(records, key=lambda record: record["machine"]["date"]):
        if all(record["machine"][key] == about[key] for key in same):
            for bench in record["benchmarks"].values():
                origin = {key: record["machine"][key] for key in ("date", "commit")}
                found |= {figure["name"]: figure | origin for figure in bench.get("figures", [])}
    return found


def is_worse(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """True if a figure became worse by more than the noise of both measurements."""
    loss = now["value"] - then["value"]
    if now["better"] == "higher":
        loss = -loss
    spreads = [one["spread"] for one in (now, then)]
    fallback = WITHOUT_SPREAD * abs(then["value"])
    noise = sum(fallback if spread is None else spread for spread in spreads)
    return bool(loss > noise)


def compare(record: dict[str, Any], earlier: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each figure that became worse."""
    lines = []
    for bench in record["benchmarks"].values():
        for now in bench.get("figures", []):
            then = earlier.get(now["name"])
            if then is not None and is_worse(now, then):
                lines.append(
                    f"{now['name']}: {now['value']:.4g} {now['unit']}, was {then['value']:.4g} "
                    f"on {then['date'][:10]} ({str(then['commit'])[:7]})"
                )
    return lines


def file_name(about: dict[str, Any]) -> str:
    """`2026-11-28-1405-amd-epyc-…-2-cores.json`."""
    words = f"{about['date'][:16]} {about['processor']} {about['cores']:g} cores".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".json"


def main() -> None:
    """Run, write the record, and print what became worse; the status is 1 if a benchmark fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"names with commas: {', '.join(BENCHES)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer repetitions")
    size.add_argument("--tiny", action="store_true", help="show in seconds that it runs")
    parser.add_argument("--out", type=Path, help="default: a file in `recipes/records/`")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder to compare with")
    given = parser.parse_args()
    about = machine()
    record: dict[str, Any] = {"machine": about, "benchmarks": {}}
    out = given.out or RECORDS / file_name(about)
    earlier = earlier_figures(given.records, about)
    with tempfile.TemporaryDirectory() as folder:
        for name, words in chosen(given).items():
            sys.stdout.write(f"== {name}: python recipes/{' '.join(map(str, words))}\n")
            sys.stdout.flush()
            record["benchmarks"][name] = found = run(words, Path(folder))
            sys.stdout.write(found.get("error", ""))
            out.parent.mkdir(parents=True, exist_ok=True)  # after each: an hour may be interrupted
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    slower = compare(record, earlier)
    known = sum(len(bench.get("figures", [])) for bench in record["benchmarks"].values())
    sys.stdout.write(f"{known} figures in {out}\n")
    for line in slower or [f"nothing is worse than before ({len(earlier)} earlier figures)"]:
        sys.stdout.write(f"worse: {line}\n" if slower else f"{line}\n")
    if any("error" in bench for bench in record["benchmarks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
