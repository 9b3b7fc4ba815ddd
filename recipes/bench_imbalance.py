"""Balanced accuracy with and without each correction of class sizes, on a long-tailed set.

    python recipes/bench_imbalance.py DATA [--seeds 3] [--steps 600]

DATA has train and test splits of one class per image. The training images are thinned out: class c
of K keeps LARGEST * RATIO^(-c / (K - 1)) images, and VALIDATION others per class choose. The test
images stay as they are. Each row is a small ViT that is trained from random weights. The method is
chosen by the validation images; the test column is there to report.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from vitcli.commands.pretrain import run
from vitcli.config.schema import DataSection
from vitcli.data.source import open_data

LARGEST, RATIO, VALIDATION = 500, 100, 100
METHODS = {
    "nothing": {},
    "objective.class_weights=balanced": {"objective": {"class_weights": "balanced"}},
    "objective.class_weights=effective": {"objective": {"class_weights": "effective"}},
    "data.sampler=class_balanced": {"data": {"sampler": "class_balanced"}},
    "data.sampler=square_root": {"data": {"sampler": "square_root"}},
    "objective.focal_gamma=2": {"objective": {"focal_gamma": 2.0}},
    "objective.logit_adjustment=1": {"objective": {"logit_adjustment": 1.0}},
}
MODEL = {"name": "mu/4", "image_size": 28, "num_channels": 1, "depth": 3, "embed_dim": 64}
MODEL |= {"mlp_dim": 256}
AUGMENT = {"crop": "pad", "crop_padding": 2, "flip_rate": 0.5}
FIGURES = ("balanced_accuracy", "accuracy", "macro_f1")


def long_tailed(data: str, path: Path) -> list[int]:
    """Write the thinned-out images to an .npz file; returns the training images per class."""
    source = open_data(DataSection(), data)
    train, test = source.splits["train"], source.splits["test"]
    rng, kept, aside = np.random.default_rng(0), [], []
    classes = len(source.classes)
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        count = round(LARGEST * RATIO ** (-label / (classes - 1)))
        if len(members) < VALIDATION + 1:
            raise SystemExit(f"class `{source.classes[label]}` has {len(members)} images only")
        aside.append(members[:VALIDATION])
        kept.append(members[VALIDATION : VALIDATION + count])

    def pixels(images, indices):
        return np.stack([np.asarray(images.read(int(i), "L")) for i in indices])

    parts = {"train": (train, np.concatenate(kept)), "val": (train, np.concatenate(aside))}
    parts["test"] = (test, np.arange(len(test)))
    arrays = {}
    for name, (images, indices) in parts.items():
        arrays[f"{name}_images"] = pixels(images, indices)
        arrays[f"{name}_labels"] = images.labels[indices]
    np.savez(path, **arrays)
    return [len(members) for members in kept]


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long_tailed.npz"
        counts = long_tailed(given.data, path)
        tell(f"training images per class: {counts}")
        for name, method in METHODS.items():
            rows = []
            for seed in range(given.seeds):
                train = {"steps": given.steps, "batch_size": 64, "seed": seed, "precision": "fp32"}
                train |= {"eval_steps": given.steps}
                settings = {"model": MODEL, "augment": AUGMENT, "train": train} | method
                out = Path(folder) / f"{len(rows)} {name}"
                result = run(str(path), recipe="pretrain", settings=settings, out=out)
                found = (result.validation or {}, result.figures)
                rows.append([split[figure] for split in found for figure in FIGURES])
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
            cells = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in zip(mean, spread, strict=True)]
            tell(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
