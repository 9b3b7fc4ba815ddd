"""Random pictures and small models for self-supervised objectives."""

import numpy as np
import torch
from PIL import Image

from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model


def photographs(n, seed=0, size=96):
    """Smooth random pictures in colour, of a spectrum such as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    falloff = np.maximum(np.hypot(y, x), 1 / size) ** -1.5
    for _ in range(n):
        noise = np.fft.fft2(rng.normal(size=(3, size, size))) * falloff
        field = np.fft.ifft2(noise).real
        field = (field - field.mean()) / field.std() * 45 + 128
        yield Image.fromarray(np.clip(field, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def smooth(count, generator, side=16):
    """(n, 3, side, side) in -1..1: colours that change slowly over the picture."""
    coarse = torch.rand(count, 3, 2, 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return fine * 2 - 1


def model(**more):
    settings = {"image_size": 16, "depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_dim": 128}
    built = create_model("Pico/4", **{**settings, "pool": "mean", "num_classes": 0, **more})
    size, channels = built.config.image_size, built.config.num_channels
    built.preprocess = Preprocess(size, mean=(0.5,), std=(0.5,), num_channels=channels)
    return built
