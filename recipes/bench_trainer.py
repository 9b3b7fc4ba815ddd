"""Time to an accuracy on CIFAR-10: `vitcli pretrain` beside transformers' `Trainer`.

Both train a ViT of the same width, depth and patch from random weights on the same files, at the
same time, each bound to half of the cores, so that a busy machine slows both. Theirs is what one
would write first: AdamW, cosine, fp32, crop and flip, class token. Clocks run from each program's
start, imports and evaluations included. Prints the seconds to the target, and draws both curves.

    python recipes/bench_trainer.py cifar10/ --minutes 25 --target 0.6 --out curves.png
"""

import argparse
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

RECIPE = "speedrun_plain"
VARIANT, SIDE, PATCH = "Pico/4", 32, 4
THEIR_LR, THEIR_BATCH, WARMUP = 1e-3, 128, 0.05
EVAL_IMAGES = 2000  # of the test set, for theirs; ours looks at all of it
THEIR_EVALS = 40

Curve = list[tuple[float, float]]  # (seconds, accuracy)


def main() -> None:
    """Run both and report, or be the other side's process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--minutes", type=float, default=25.0, help="that theirs may take")
    parser.add_argument("--budget", default="4m", help="of ours")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path("trainer.png"))
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.theirs:
        train_theirs(given.data, given.minutes * 60, given.theirs)
        return
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [sys.executable, "-m", "vitcli", "pretrain", given.data, "--recipe", RECIPE]
        command += ["--budget", given.budget, "--out", str(folder / "run")]
        command += ["--set", "train.eval_steps=50"]
        other = [sys.executable, __file__, given.data, "--minutes", str(given.minutes)]
        other += ["--theirs", str(folder / "theirs.jsonl")]
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


def follow(command: list[str], metrics: Path, cores: list[int], curve: Curve) -> None:
    """Run `command` on `cores`; note when each accuracy appears in its metrics."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    bound = ["taskset", "-c", ",".join(map(str, cores)), *command]
    process = subprocess.Popen(bound, env=environment, stderr=subprocess.DEVNULL)
    while True:
        ended = process.poll() is not None
        written = metrics.read_text() if metrics.is_file() else ""
        # Not line by line: an accuracy is added to the line of its step.
        found = re.findall(r'"test/accuracy": ([^,}]+)[,}]', written)
        curve += [(time.monotonic() - began, float(accuracy)) for accuracy in found[len(curve) :]]
        if ended:
            break
        time.sleep(0.25)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")


def train_theirs(data: str, seconds: float, metrics: Path) -> None:
    """transformers' Trainer on the same files, for about so many seconds."""
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

    began = time.monotonic()
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
    train, test = (
        Pixels(sets["train"], True),
        Pixels(sets["test"].select(range(EVAL_IMAGES)), False),
    )
    batch = torch.stack([train[i]["pixel_values"] for i in range(THEIR_BATCH)])
    paces = []
    for _ in range(3):  # how many steps fit
        start = time.monotonic()
        model(pixel_values=batch, labels=train.labels[:THEIR_BATCH]).loss.backward()
        paces.append(time.monotonic() - start)
    model.zero_grad()
    steps = int((seconds - (time.monotonic() - began)) / (min(paces) * 1.15))

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            with metrics.open("a") as file:
                file.write(json.dumps({"test/accuracy": more["metrics"]["eval_accuracy"]}) + "\n")
            if time.monotonic() - began > seconds:
                control.should_training_stop = True

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
            eval_steps=max(1, steps // THEIR_EVALS),
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
    """Print the seconds to the target of each side, and draw both."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, curve in curves.items():
        reached = next((seconds for seconds, accuracy in curve if accuracy >= target), None)
        seconds, accuracy = curve[-1]
        told = f"{reached:.0f} s" if reached else f"not in {seconds:.0f} s"
        sys.stdout.write(f"{name:22} {target:.0%} after {told}; at the end {accuracy:.1%}\n")
        axes.plot(
            [s / 60 for s, _ in curve], [100 * a for _, a in curve], label=name, marker=".", ms=3
        )
    axes.axhline(100 * target, color="grey", lw=0.8, ls=":")
    axes.set_xlabel("minutes from the start")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
