"""Balanced accuracy with and without each correction of class sizes, on a long-tailed set.

    python recipes/bench_imbalance.py DATA MODEL [--image-size 112] [--seeds 5]

DATA has train and test splits of one class per image. Its training images are thinned out: class c
of K keeps LARGEST * RATIO^(-c / (K - 1)) images; VALIDATION others and TEST test images per class
measure. A linear head is trained on the frozen features of MODEL with the losses and samplers of
training. The value of each method's own setting, and then the method, are chosen by the balanced
accuracy of the validation images. The test columns only report.
"""

import argparse
import sys

import numpy as np
import torch
from measuring import add_json_option

from vitcli.config.schema import DataSection, ObjectiveSection
from vitcli.data.sampler import make_sampler
from vitcli.data.source import open_data
from vitcli.evals.class_averages import class_shares
from vitcli.evals.features import extract
from vitcli.train.objectives.class_losses import CrossEntropy
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model

LARGEST, RATIO, VALIDATION, TEST = 400, 100, 50, 200
STEPS, BATCH, LR = 400, 64, 2e-3
SHUFFLE = "shuffle"
METHODS = {
    "nothing": [(SHUFFLE, {})],
    "class_weights=balanced": [(SHUFFLE, {"class_weights": "balanced"})],
    "class_weights=effective": [
        (SHUFFLE, {"class_weights": "effective", "class_weights_beta": b})
        for b in (0.9, 0.99, 0.999)
    ],
    "sampler": [("class_balanced", {}), ("square_root", {})],
    "focal_gamma": [(SHUFFLE, {"focal_gamma": g}) for g in (1.0, 2.0)],
    "logit_adjustment": [(SHUFFLE, {"logit_adjustment": t}) for t in (0.5, 1.0, 1.5)],
}


def tell(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def take(images, counts, skip=0):
    """The images of a set with counts[c] random ones of class c, after `skip` others."""
    rng, chosen = np.random.default_rng(0), []
    for label, count in enumerate(counts):
        members = rng.permutation(np.flatnonzero(images.labels == label))
        chosen.append(members[skip : skip + count])
        assert len(chosen[-1]) == count, f"class {label} has {len(members)} images only"
    return images.subset(np.concatenate(chosen))


def train_head(train, features, sampler, settings, seed):
    """A linear head (K, F) on standardised features."""
    classes = len(train.classes)
    model = create_model("mu/4", num_classes=classes, image_size=8)
    model.labels, model.class_counts = train.classes, tuple(train.class_counts().tolist())
    loss = CrossEntropy(model, ObjectiveSection(**settings))
    head = torch.nn.Linear(features.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=1e-2)
    labels, at = torch.from_numpy(train.labels), make_sampler(sampler, train, seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        rows = torch.from_numpy(at(step * BATCH, BATCH)[1])
        optimizer.zero_grad()
        loss(head(features[rows]), labels[rows]).backward()
        optimizer.step()
    return head


@torch.no_grad()
def measure(head, features, labels):
    """Balanced accuracy, and the mean recall of the largest and of the smallest third."""
    predicted, classes = head(features).argmax(1).numpy(), head.out_features
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    counts, chosen = (np.bincount(x, minlength=classes) for x in (labels, predicted))
    recall = class_shares(hits, counts, chosen)["recall"]
    third = classes // 3
    return recall.mean(), recall[:third].mean(), recall[-third:].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--seeds", type=int, default=5)
    add_json_option(parser)
    given = parser.parse_args()
    source = open_data(DataSection(), given.data)
    classes = len(source.classes)
    counts = [round(LARGEST * RATIO ** (-c / (classes - 1))) for c in range(classes)]
    train = take(source.splits["train"], counts)
    validation = take(source.splits["train"], [VALIDATION] * classes, skip=LARGEST)
    test = take(source.splits["test"], [TEST] * classes)
    tell(f"training images per class: {counts}; held out: {len(validation)}, {len(test)}")
    model = load_model(given.model, image_size=given.image_size)
    found = [extract(model, images) for images in (train, validation, test)]
    mean, std = found[0].outputs.mean(axis=0), found[0].outputs.std(axis=0)
    features, *held_out = (torch.from_numpy((f.outputs - mean) / std).float() for f in found)
    for name, variants in METHODS.items():
        rows = []
        for sampler, settings in variants:
            heads = [train_head(train, features, sampler, settings, s) for s in range(given.seeds)]
            pairs = zip(held_out, (validation, test), strict=True)
            values = [[measure(h, x, images.labels) for h in heads] for x, images in pairs]
            rows.append((np.array(values), sampler, settings))  # (2 splits, seeds, 3 figures)
        best = max(rows, key=lambda row: row[0][0, :, 0].mean())
        recall = (100 * best[0][1, :, 0]).tolist()
        given.json.add(f"long tail, {name}: balanced accuracy", recall, "%", "higher")
        for row in rows:
            values, sampler, settings = row
            shown = " ".join(f"{k}={v}" for k, v in settings.items()) or sampler
            cells = [
                f"{100 * column.mean():.1f} ± {100 * column.std(ddof=1):.1f}"
                for column in [values[0, :, 0], *values[1].T]
            ]
            mark = " (chosen)" if row is best and len(rows) > 1 else ""
            tell(f"| {name} | {shown}{mark} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
