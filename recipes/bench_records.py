"""A row of RECORDS.md: train a track several times, and print the row in Markdown.

Each seed is a process of its own. Its seconds and CPU-seconds are those of the whole command, with
imports, reading and evaluation. PFLOP are those of the training steps, forward and backward.

    python recipes/bench_records.py --track hybrid --budget 2m --seeds 3 --data cifar10/
    python recipes/bench_records.py --track hybrid --recipe speedrun_hybrid_long --budget 10m
    python recipes/bench_records.py --track plain --flop 0.06P     # as many steps on any processor
    python recipes/bench_records.py --track hybrid --budget 2m --validation -- --set optim.lr=2e-3

`--validation` trains on 90 % of the training images and evaluates on the rest. Use it to choose;
the test images are then not used. `--set` settings follow after `--`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import SHARED, add_json_option, machine, run_vitcli

from vitcli.config.schema import parse_duration
from vitcli.data.augment.test_time import EVALUATION_VIEWS
from vitcli.evals.intervals import wilson_interval

TRACKS = ("plain", "hybrid")
# Accuracies that issue 17 promises on two cores of the Zen 5 generation, by minutes: plain, hybrid.
GOALS = {2: (70, 80), 5: (78, 87), 10: (84, 90), 60: (90, 94)}
FLOP_UNITS = {"G": 1e9, "T": 1e12, "P": 1e15}
# 45,000 images of CIFAR-10 to train and 5,000 to choose. A slice has the same share of each class.
VALIDATION = ("--set", "data.train_split=train[:90%]", "--set", "data.test_split=train[90%:]")
# The smallest model of each track.
TINY = ("--set", "model.depth=1", "--set", "train.batch_size=8", "--set", "train.log_steps=1")
TINY_MODELS = {"plain": "mu/4", "hybrid": "Conv+mu/4"}


def parse_flop(text: str) -> float:
    """`0.06P` -> 6e13 operations."""
    try:
        return float(text[:-1]) * FLOP_UNITS[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"`{text}`: write a number and G, T or P") from None


def plan(recipe: str, data: str, flags: list[str]) -> dict[str, Any]:
    """What `vitcli plan` says without a measurement."""
    done = run_vitcli("plan", recipe, data, *flags, "--no-probe", "--json")
    planned: dict[str, Any] = json.loads(done.output)
    return planned


def train(given: argparse.Namespace, flags: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """One run and what it costs."""
    out = folder / f"seed-{seed}"
    # The search for copies knows this dataset, and its cache would make the first seed slower.
    words = ["pretrain", given.data, "--recipe", given.recipe, *flags, "--seed", seed]
    done = run_vitcli(*words, "--no-check", "--out", out, "--json")
    result = json.loads(done.output)
    found = result["figures"]
    row = {
        "track": given.track,
        "seed": seed,
        "accuracy": found["accuracy"],
        "interval": wilson_interval(found["accuracy"], found["images"]),
        "images": found["images"],
        "split": "validation" if given.validation else "test",
        "steps": result["steps"],
        "train_images": result["images"],
        "train_seconds": result["seconds"],
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(done.cpu_seconds, 1),
    }
    if given.tta is not None:
        flags = [*(VALIDATION if given.validation else ()), "--tta", given.tta, "--no-check"]
        words = ["evaluate", given.data, "--model", out, "--out", folder / f"report-{seed}"]
        evaluated = json.loads(run_vitcli(*words, *flags, "--json").output)
        row |= {"tta": given.tta, "tta_accuracy": evaluated["top1"]}
    return row


def mean_and_spread(values: list[float]) -> str:
    """`71.2 ± 0.4` from accuracies in 0..1, with the sample standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(given: argparse.Namespace, rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The row of RECORDS.md."""
    accuracies = [row["accuracy"] for row in rows]
    each = ", ".join(f"{100 * value:.1f}" for value in accuracies)
    accuracy = f"{mean_and_spread(accuracies)} % ({each})"
    if given.validation:
        accuracy += " on validation images"
    if given.tta is not None:
        with_tta = mean_and_spread([row["tta_accuracy"] for row in rows])
        accuracy += f"; {with_tta} % with `--tta {given.tta}`"
    minutes = None if given.flop else parse_duration(given.budget) / 60
    goals = GOALS.get(int(minutes or 0))
    goal = f"{goals[TRACKS.index(given.track)]} %" if goals and not given.validation else ""
    length = f"{minutes:g} min" if minutes else f"{rows[0]['pflop']:.3g} PFLOP"
    over = max(row["seconds"] for row in rows)
    if minutes and over > 60 * minutes:
        length += f" (took {over:.0f} s)"
    pflop, cpu = (statistics.mean(row[name] for row in rows) for name in ("pflop", "cpu_seconds"))
    commit = str(about["commit"])
    commit = commit[:7] + "+" * commit.endswith("+")
    cores = f"{about['cores']:g} core{'s' * (about['cores'] != 1)}"
    cells = [length, given.track, goal, len(rows), accuracy, f"{pflop:.3g}", f"{cpu:.0f}"]
    cells += [f"{about['processor']}, {cores}, {commit}", given.new]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print a JSON line per seed, and the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--track", choices=TRACKS, required=True)
    parser.add_argument("--recipe", help="default: speedrun_plain or speedrun_hybrid")
    parser.add_argument("--data", default=str(SHARED / "cifar10"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", default="2m", help="time of the whole command")
    length.add_argument("--flop", type=parse_flop, help="operations of the training, e.g. 0.06P")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="choose on training images")
    parser.add_argument("--tta", choices=EVALUATION_VIEWS, help="also evaluate with these views")
    parser.add_argument("--new", default="", help="the last cell of the row")
    parser.add_argument("--tiny", action="store_true", help="two steps of a tiny model")
    parser.add_argument("flags", nargs="*", help="settings of the run, after `--`")
    add_json_option(parser)
    given = parser.parse_args()
    given.recipe = given.recipe or f"speedrun_{given.track}"
    flags = [*(VALIDATION if given.validation else ()), *given.flags]
    if given.tiny:
        flags += [*TINY, "--set", f"model.name={TINY_MODELS[given.track]}"]
    planned = plan(given.recipe, given.data, flags)
    per_image, parts = planned["training_flops_per_image"], planned["parts"]
    share = (parts["attention"] + parts["mlp"]) / sum(parts.values())
    if given.flop:
        steps = max(1, round(given.flop / (per_image * planned["batch_size"])))
        flags += ["--steps", str(steps)]
    else:
        flags += ["--steps", "2"] if given.tiny else ["--budget", given.budget]
    about, rows = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            row = train(given, flags, seed, Path(folder))
            row["pflop"] = per_image * row["train_images"] / 1e15
            row["share_of_blocks"] = round(share, 3)
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    accuracies = [100 * row["accuracy"] for row in rows]
    given.json.add(f"{given.track}, accuracy", accuracies, "%", "higher")
    speeds = [row["train_images"] / row["train_seconds"] for row in rows]
    given.json.add(f"{given.track}, training", speeds, "images/s", "higher")
    sys.stdout.write(json.dumps({"machine": about, "flags": flags}) + "\n")
    sys.stdout.write(markdown(given, rows, about) + "\n")


if __name__ == "__main__":
    main()
