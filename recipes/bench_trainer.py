"""Time to an accuracy on CIFAR-10: `vitcli pretrain` beside transformers' `Trainer`.

Both train from random weights on the same files and evaluate on as many test images, at the same
time, each bound to half of the cores. The clock is CPU-seconds of the whole program, imports,
reading and evaluations included, so that other work on the machine does not count. Theirs is what
one would write first: a plain ViT, AdamW, cosine, crop and flip, class token. Ours is the recipe
that `vitcli pretrain` has for CIFAR-10, or another: `speedrun_plain` has the shape of theirs.

    python recipes/bench_trainer.py cifar10/ --target 0.6 --out curves.png
    python recipes/bench_trainer.py cifar10/ --target 0.4 --their-steps 300 --steps 120 \
        -- --set model.name=Conv+Pico/4 --set train.batch_size=64
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from measuring import add_json_option

RECIPE = "pretrain_cifar10_small"
VARIANT, SIDE, PATCH = "Pico/4", 32, 4
THEIR_LR, THEIR_BATCH, WARMUP = 1e-3, 128, 0.05

Curve = list[tuple[float, float]]  # (CPU-seconds, accuracy)


def main() -> None:
    """Run both and report, or be the other side's process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--recipe", default=RECIPE, help="recipe of ours")
    parser.add_argument("--steps", type=int, default=300, help="steps of ours")
    parser.add_argument("--their-steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=20, help="of each side")
    parser.add_argument("--test-percent", type=int, default=20, help="share of the test images")
    parser.add_argument("--out", type=Path, default=Path("trainer.png"))
    parser.add_argument("flags", nargs="*", help="settings of ours, after `--`")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    given = parser.parse_intermixed_args()
    if given.theirs:
        train_theirs(given)
        return
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [sys.executable, "-m", "vitcli", "pretrain", given.data, "--no-check"]
        command += ["--recipe", given.recipe, "--steps", str(given.steps)]
        command += ["--out", str(folder / "run")]
        command += ["--set", f"train.eval_steps={max(1, given.steps // given.evaluations)}"]
        command += ["--set", f"data.test_split=test[:{given.test_percent}%]", *given.flags]
        other = [sys.executable, sys.argv[0], "--theirs", str(folder / "theirs.jsonl")]
        other += sys.argv[1:]
        sides = {
            "vitcli pretrain": (command, folder / "run/metrics.jsonl", cores[:half]),
            "transformers Trainer": (other, folder / "theirs.jsonl", cores[-half:]),
        }
        curves: dict[str, Curve] = {name: [] for name in sides}
        threads = [
            threading.Thread(target=follow, args=(*side, curves[name]))
            for name, side in sides.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report(curves, given.target, given.out)
    times = [seconds_to(curve, given.target) for curve in curves.values()]
    if None not in times:
        name = f"CPU-seconds to {given.target:.0%} on CIFAR-10: share of Trainer's"
        given.json.add(name, times[0] / times[1], "", "lower")


def seconds_to(curve: Curve, target: float) -> float | None:
    """The CPU-seconds at which the target is reached first; None if it is not."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def follow(command: list[str], metrics: Path, cores: list[int], curve: Curve) -> None:
    """Run `command` on `cores`; note when each accuracy appears in its metrics."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    bound = ["taskset", "-c", ",".join(map(str, cores)), *command]
    process = psutil.Popen(
        bound, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds = 0.0
    while True:
        ended = process.poll() is not None
        if not ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                seconds = used.user + used.system
        written = metrics.read_text() if metrics.is_file() else ""
        # Not line by line: an accuracy is added to the line of its step.
        found = re.findall(r'"test/accuracy": ([^,}]+)[,}]', written)
        curve += [(seconds, float(accuracy)) for accuracy in found[len(curve) :]]
        if ended:
            break
        time.sleep(0.25)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{process.stderr.read()}")


def train_theirs(given: argparse.Namespace) -> None:
    """transformers' Trainer on the same files."""
    import torch
    from datasets import load_dataset
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )

    from vitcli.vit import parse_variant

    data, steps, metrics = given.data, given.their_steps, given.theirs
    shape = parse_variant(VARIANT, image_size=(SIDE, SIDE), num_classes=10)
    names = {"train": "train*.parquet", "test": "test*.parquet"}
    files = {split: str(Path(data) / name) for split, name in names.items()}
    sets = load_dataset("parquet", data_files=files)
    column = next(c for c in ("label", "labels") if c in sets["train"].column_names)
    picture = next(c for c in ("image", "img") if c in sets["train"].column_names)

    def pixels(rows: Any) -> torch.Tensor:
        import numpy as np

        stacked = np.stack([np.asarray(image.convert("RGB")) for image in rows[picture]])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2)  # (n, 3, 32, 32) bytes

    class Pixels(torch.utils.data.Dataset):  # type: ignore[type-arg]
        """All pictures decoded once, as ours keeps them."""

        def __init__(self, rows: Any, augment: bool) -> None:
            parts = [rows[i : i + 1000] for i in range(0, len(rows), 1000)]
            self.images = torch.cat([pixels(part) for part in parts])
            self.labels = torch.tensor(rows[column])
            self.augment = augment

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = self.images[index].float() / 127.5 - 1.0
            if self.augment:
                y, x, flip = torch.randint(9, (3,)).tolist()
                image = torch.nn.functional.pad(image, (4, 4, 4, 4))[:, y : y + 32, x : x + 32]
                image = image.flip(2) if flip % 2 else image
            return {"pixel_values": image, "labels": self.labels[index]}

    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=shape.embed_dim,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.mlp_dim,
            image_size=SIDE,
            patch_size=PATCH,
            num_labels=10,
        )
    )
    shuffled = sets["test"].shuffle(seed=0)
    some = shuffled.select(range(len(shuffled) * given.test_percent // 100))
    train, test = Pixels(sets["train"], True), Pixels(some, False)

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            with metrics.open("a") as file:
                file.write(json.dumps({"test/accuracy": more["metrics"]["eval_accuracy"]}) + "\n")

    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=THEIR_BATCH,
            per_device_eval_batch_size=256,
            learning_rate=THEIR_LR,
            lr_scheduler_type="cosine",
            warmup_steps=int(WARMUP * steps),
            weight_decay=0.05,
            eval_strategy="steps",
            eval_steps=max(1, steps // given.evaluations),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            seed=0,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda p: {"accuracy": float((p[0].argmax(1) == p[1]).mean())},
            callbacks=[Note()],
        ).train()


def report(curves: dict[str, Curve], target: float, picture: Path) -> None:
    """Print the CPU-seconds to the target of each side, and draw both."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, curve in curves.items():
        reached = seconds_to(curve, target)
        seconds, accuracy = curve[-1]
        told = f"after {reached:.0f}" if reached else f"not within {seconds:.0f}"
        sys.stdout.write(
            f"{name:22} {target:.0%} {told} CPU-seconds; {accuracy:.1%} after {seconds:.0f}\n"
        )
        sys.stdout.write("  " + ", ".join(f"{s:.0f} s {a:.1%}" for s, a in curve) + "\n")
        axes.plot([s for s, _ in curve], [100 * a for _, a in curve], label=name, marker=".", ms=3)
    axes.axhline(100 * target, color="grey", lw=0.8, ls=":")
    axes.set_xlabel("CPU-seconds from the start")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
