"""A model that names the colour of an image, for tests that need one whose answers are known."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitcli.preprocess import Preprocess
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def colour_model(path, labels):
    """A head that answers with the colour of the image's mean, in the order of `labels`."""
    net = create_model(
        "Pico/8", image_size=8, num_classes=len(labels), pool="mean", depth=1, position="none"
    )
    net.preprocess, net.labels, net.head_trained = Preprocess(image_size=(8, 8)), labels, True
    with torch.no_grad():
        colours = torch.tensor([COLOURS.get(n, (255, 255, 255)) for n in COLOURS]) / 127.5 - 1
        images = colours[:, :, None, None].expand(-1, -1, 8, 8)
        x = net.features(images)
        x = x - x.mean(0)
        solution = torch.linalg.lstsq(x, torch.eye(3) * 4).solution  # (D, 3)
        net.network.head.bias.fill_(-9.0)
        for i, name in enumerate(COLOURS):
            if labels is not None and name in labels:
                row = labels.index(name)
                net.network.head.weight[row] = solution[:, i]
                net.network.head.bias[row] = -float(net.features(images).mean(0) @ solution[:, i])
    save_model(path, net)
    return path


def noisy_colours():
    """Noisy colours, 40 of each, in `test/`; a model that is far too sure of itself."""
    rng = np.random.default_rng(0)
    for name in COLOURS:
        folder = Path("noisy/test") / name
        folder.mkdir(parents=True)
        for i in range(40):
            pixels = 0.2 * np.array(COLOURS[name]) + rng.normal(100, 150, (8, 8, 3)).mean((0, 1))
            pixels = np.clip(pixels + rng.normal(0, 60, (1, 1, 3)), 0, 255)
            Image.fromarray(np.broadcast_to(pixels, (8, 8, 3)).astype(np.uint8)).save(
                folder / f"{i}.png"
            )
    net = load_model(colour_model("m.safetensors", ("red", "green", "blue")))
    with torch.no_grad():
        net.network.head.weight *= 6
        net.network.head.bias *= 6
    save_model("m.safetensors", net, extra={"note": "kept"})
    return "noisy"
