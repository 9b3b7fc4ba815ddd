"""What tests of downloads share: a small model to serve."""

import torch

from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

NAMES = ("ant", "bee", "cat")


def write_model(path, seed=0, depth=1):
    """A small classifier of ours."""
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=depth, seed=seed)
    torch.nn.init.normal_(net.network.head.weight)
    net.preprocess, net.labels, net.head_trained = Preprocess(image_size=(16, 16)), NAMES, True
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, net)
    return net


def files_in(home):
    """What the cache holds, unfinished files included, locks and marks left out."""
    found = [p for p in home.rglob("*") if p.is_file() and ".locks" not in p.parts]
    return sorted(p.name for p in found if p.name not in ("CACHEDIR.TAG", ".agent_harnesses.json"))
