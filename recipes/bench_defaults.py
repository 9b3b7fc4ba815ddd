"""The command without flags beside the best recipe chosen by hand, at the same budget.

    python recipes/bench_defaults.py --data ../shared/data      # 3 and 10 minutes per run
    python recipes/bench_defaults.py --sets signs,digits --budgets 3m
    python recipes/bench_defaults.py --sets signs --tiny                    # does it run at all?

Digits and signs are made here; the other sets and the weights are folders below `--data`. Prints a
JSON row per run, and a table at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits

PLAIN = ("--recipe", "speedrun_plain")
HYBRID = ("--recipe", "pretrain_cifar10_small")
PHOTOS = ("--recipe", "finetune_photos_small")
WEIGHTS = "weights/vit_tiny_patch16_224_in1k"
# Sides of the polygon, colours of the border and of the inside.
RED, WHITE, YELLOW = (200, 30, 30), (240, 240, 240), (240, 190, 20)
SIGNS = {
    "circle": (40, RED, WHITE),
    "triangle": (3, RED, WHITE),
    "diamond": (4, WHITE, YELLOW),
    "octagon": (8, WHITE, RED),
    "pentagon": (5, (30, 60, 200), WHITE),
    "hexagon": (6, (20, 130, 60), WHITE),
}


def set_to(**settings: object) -> tuple[str, ...]:
    """`set_to(model__image_size=28)` -> `--set model.image_size=28`."""
    pairs = (f"{key.replace('__', '.')}={value}" for key, value in settings.items())
    return tuple(word for pair in pairs for word in ("--set", pair))


@dataclass(frozen=True)
class Task:
    """A data set, the command for it, and recipes chosen by hand."""

    data: str
    by_hand: tuple[tuple[str, ...], ...]
    model: str | None = None

    @property
    def command(self) -> str:
        return "pretrain" if self.model is None else "finetune"


NO_FLIP = {"augment__flip_rate": 0.0}
SIXTEEN = {"model__image_size": 16, **NO_FLIP}
TASKS = {  # a plain ViT and a hybrid for each set without weights
    "digits": Task(
        "digits",
        (
            (*PLAIN, *set_to(**SIXTEEN, model__patch_size=2, train__smaller_sizes=[])),
            (*HYBRID, *set_to(**SIXTEEN, model__name="Conv+Pico/2", train__batch_size=32)),
        ),
    ),
    "fashion_mnist": Task(
        "fashion_mnist",
        (
            (*PLAIN, *set_to(augment__crop_padding=2)),
            (*HYBRID, *set_to(model__name="Conv+Pico/8", train__batch_size=64)),
        ),
    ),
    "cifar10_small": Task("cifar10_small", ((*PLAIN, "--batch-size", "64"), HYBRID)),
    "flower_photos": Task("flower_photos", (PHOTOS, ("--recipe", "finetune_lora")), WEIGHTS),
    "imagenette": Task(
        "imagenette_val500/test.parquet", (PHOTOS, ("--recipe", "finetune_lora")), WEIGHTS
    ),
    "signs": Task(
        "signs",
        (
            (*PLAIN, "--batch-size", "32"),
            (*HYBRID, "--batch-size", "32", *set_to(model__name="Conv+Pico/8"),
             *set_to(model__image_size=64)),
        ),
    ),
}  # fmt: skip


def draw_sign(kind: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A polygon with a border, turned and lit at random, on a noisy ground with two rectangles."""
    y, x = np.mgrid[0:side, 0:side] / side
    start, end = rng.integers(40, 216, (2, 3))
    way = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(way) * x + np.sin(way) * y)[..., None]
    ground = start + (end - start) * ramp + rng.normal(0, 12, (side, side, 3))
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(2):
        box = np.sort(rng.uniform(0, side, (2, 2)), axis=0).ravel().tolist()
        pen.rectangle(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    corners, *colours = SIGNS[kind]
    centre, radius = rng.uniform(0.35, 0.65, 2) * side, rng.uniform(0.2, 0.36) * side
    angles = rng.uniform(-0.3, 0.3) - np.pi / 2 + np.arange(corners) * 2 * np.pi / corners
    light = rng.uniform(0.5, 1.05)
    for share, colour in zip((1.0, 0.7), colours, strict=True):
        lit = np.clip(np.array(colour) * light + rng.normal(0, 12, 3), 0, 255).astype(int)
        outline = centre + share * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        pen.polygon([tuple(point) for point in outline.tolist()], fill=tuple(lit.tolist()))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))


def make_signs(folder: Path, train: int = 50, test: int = 100) -> None:
    """Images of 100 px per class of SIGNS."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for kind in SIGNS:
            place = folder / split / kind
            place.mkdir(parents=True)
            for index in range(count):
                draw_sign(kind, 100, rng).save(place / f"{index:03}.png")


def make_digits(folder: Path) -> None:
    """scikit-learn's digits as files, because `builtin:digits` has recipes of its own."""
    images, labels = load_digits(return_X_y=True)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        grey = np.rint(pixels.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(place / f"{index:04}.png")


def measure(task: Task, data: Path, length: list[str], flags: tuple[str, ...], out: Path) -> dict:
    """Run the command; accuracy on the test images and the model."""
    model = [] if task.model is None else ["--model", task.model]
    command = [sys.executable, "-m", "vitcli", task.command, str(data), *model, *flags, *length]
    done = subprocess.run(
        [*command, "--out", str(out), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    result = json.loads(done.stdout)
    found = {key: result[key] for key in ("model", "steps", "seconds")}
    return {**found, "accuracy": result["figures"]["accuracy"], "flags": " ".join(flags)}


def main() -> None:
    """Print a row per run, and per set and budget the difference to the best by hand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", default=",".join(TASKS))
    parser.add_argument("--budgets", default="3m,10m")
    parser.add_argument("--tiny", action="store_true", help="two steps per run")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        made = {"signs": make_signs, "digits": make_digits}
        for name in given.sets.split(","):
            task, data = TASKS[name], given.data / TASKS[name].data
            if name in made:
                data = Path(folder, name)
                made[name](data)
            if name == "imagenette":  # without the name of a split, so that vitcli divides it
                data = Path(shutil.copy(data, Path(folder, "imagenette.parquet")))
            if task.model is not None:
                task = Task(task.data, task.by_hand, str(given.data / task.model))
            for budget in ["2 steps"] if given.tiny else given.budgets.split(","):
                length = ["--steps", "2"] if given.tiny else ["--budget", budget]
                rows = []
                for number, flags in enumerate(((), *task.by_hand)):
                    out = Path(folder, f"{name}-{budget}-{number}".replace(" ", "-"))
                    row = measure(task, data, length, flags, out)
                    rows.append(row)
                    sys.stdout.write(json.dumps({"set": name, "budget": budget, **row}) + "\n")
                    sys.stdout.flush()
                best = max(rows[1:], key=lambda row: row["accuracy"])
                own, hand = (100 * row["accuracy"] for row in (rows[0], best))
                lines.append(f"{name:14} {budget:8} {own:6.1f} {hand:6.1f} {own - hand:+6.1f}")
    sys.stdout.write(f"{'set':14} {'budget':8} {'own':>6} {'hand':>6}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
