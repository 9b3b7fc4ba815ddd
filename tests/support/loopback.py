"""What tests of downloads share: a small model to serve, and ears for what is told."""

import torch

from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet, QuietBar
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

NAMES = ("ant", "bee", "cat")


class Told(Quiet):
    """Keeps what it is told: notes, warnings, and of every bar its label, total, start and end."""

    def __init__(self):
        self.notes, self.warnings, self.bars = [], [], []

    def warn(self, message):
        self.warnings.append(message)

    def note(self, message):
        self.notes.append(message)

    def progress(self, label, total=None, done=0):
        self.bars.append([label, total, done, done])
        told = self.bars[-1]

        class Bar(QuietBar):
            def advance(self, n=1, **figures):
                told[3] += n

        return Bar()


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
