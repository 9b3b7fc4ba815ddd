"""One training step of ours beside transformers' model and a plain encoder of torch's, in one run.

All do the same: forward, cross-entropy, backward, AdamW, on the same images, in turn (A B C A B C).
Printed are medians, and median, least and largest of the ratio to the faster of the two others; and
the bytes that each keeps for its backward pass. Then what the training loop costs around a step:
loader, metrics, logging, Accelerate.

    python recipes/bench_step.py                    the models of recipes/RESULTS.md
    python recipes/bench_step.py S/16 224 16 bf16   one: variant, pixels, batch, precision
    python recipes/bench_step.py loop               the loop alone
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Figures, add_json_option
from torch import Tensor, nn

from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.devices import pick_device, resolve_precision
from vitcli.progress import Quiet
from vitcli.run import create_run
from vitcli.train.build import build_loop, open_source, start_accelerator
from vitcli.train.resolve import random_model
from vitcli.vit import VisionTransformer, ViTConfig, parse_variant

CASES = [("S/16", 224, 16), ("Nano/4", 32, 128), ("Nano/8", 32, 128)]
ROUNDS, LOOP_STEPS = 7, 10
CLASSES = 10


def theirs(config: ViTConfig) -> nn.Module:
    """transformers' model of the same shape."""
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    return ViTForImageClassification(
        Config(
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            image_size=config.image_size[0],
            patch_size=config.patch_size,
            num_labels=CLASSES,
        )
    )


class Plain(nn.Module):
    """What one writes first: torch's own encoder layers behind a patch convolution."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, p = config.embed_dim, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, d, p, p)
        self.token = nn.Parameter(torch.zeros(1, 1, d))
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.num_tokens, d))
        layer = nn.TransformerEncoderLayer(
            d,
            config.num_heads,
            config.mlp_dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.depth, nn.LayerNorm(d), enable_nested_tensor=False
        )
        self.head = nn.Linear(d, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K)."""
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        logits: Tensor = self.head(self.encoder(x)[:, 0])
        return logits


def kept_bytes(model: nn.Module, images: Tensor, precision: str) -> int:
    """What autograd holds between the passes, without the weights; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kind = images.device.type
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"),
    ):
        out = model(images)
        loss = getattr(out, "logits", out).float().sum()
    del loss
    return sum(seen.values())


def stepper(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[], float]:
    """A function that makes one training step and gives its seconds."""
    device = images.device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.arange(len(images), device=device) % CLASSES

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = model(images)
        logits = getattr(out, "logits", out).float()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def compare(name: str, size: int, batch: int, precision: str, figures: Figures) -> None:
    """Print one line: the speeds, the ratio, and what is kept for the backward pass."""
    config = parse_variant(name, image_size=(size, size), num_classes=CLASSES)
    ours = VisionTransformer(config).init_weights(torch.Generator().manual_seed(0))
    images = torch.randn(batch, 3, size, size, device=pick_device())
    models = [ours, theirs(config), Plain(config)]
    steps = [stepper(model, images, precision) for model in models]
    for step in steps:
        step()
    rounds = [[step() for step in steps] for _ in range(ROUNDS)]
    speeds = [batch / statistics.median(times) for times in zip(*rounds, strict=True)]
    best = 1 if speeds[1] >= speeds[2] else 2
    ratios = sorted(times[best] / times[0] for times in rounds)
    kept = [kept_bytes(model, images, precision) / 2**20 for model in models]
    case = f"{name}, {size} px, batch {batch}, {precision}"
    figures.add(f"{case}: a step", [batch / times[0] for times in rounds], "images/s", "higher")
    figures.add(f"{case}: beside the faster of two others", ratios, "times as fast", "higher")
    sys.stdout.write(
        f"{name:8} {size:4} px  batch {batch:4}  {precision}  img/s: ours {speeds[0]:.1f}  "
        f"transformers {speeds[1]:.1f}  torch {speeds[2]:.1f}  "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
        f"MiB kept: {kept[0]:.0f}, {kept[1]:.0f}, {kept[2]:.0f}\n"
    )
    sys.stdout.flush()


def around(precision: str, figures: Figures) -> None:
    """Print what the loop takes beyond its steps, on digits enlarged to 32 pixels."""
    sections: dict[str, Any] = {
        "command": "pretrain",
        "data": {"name": "builtin:digits"},
        "model": {"name": "Nano/4", "image_size": 32},
        "train": {"steps": 10**6, "precision": precision, "log_steps": 5},
    }
    recipe = check(Recipe, sections, "bench")
    with tempfile.TemporaryDirectory() as folder:
        accelerator, _ = start_accelerator(recipe)
        run = create_run(Path(folder, "run"), recipe)
        source = open_source(recipe, Quiet())
        make_model = partial(random_model, recipe)
        loop = build_loop(recipe, source, make_model, run, accelerator, Quiet())
        loop.save = lambda: None  # type: ignore[method-assign]  # not a part of the loop's own time
        batch = next(iter(loop.loader.batches(0, 1))).to(loop.accelerator.device)

        def bare() -> float:
            start = time.perf_counter()
            for _ in range(LOOP_STEPS):
                images, targets = loop.inputs(batch)
                loss, _ = loop.wrapped(images, targets)
                loop.accelerator.backward(loss)
                for optimizer in loop.state.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - start

        def whole() -> float:
            loop.timeline.total = loop.timeline.planned = loop.state.step + LOOP_STEPS
            start = time.perf_counter()
            loop.fit()
            return time.perf_counter() - start

        bare(), whole()
        pairs = [(bare(), whole()) for _ in range(ROUNDS)]
    extra = sorted(b / a - 1 for a, b in pairs)
    percent = [100 * value for value in extra]
    figures.add(f"the loop around a step, Nano/4, batch 128, {precision}", percent, "%", "lower")
    sys.stdout.write(
        f"around a step of Nano/4, batch 128, {precision}: {statistics.median(extra):+.1%} "
        f"({extra[0]:+.1%} to {extra[-1]:+.1%})\n"
    )


def main() -> None:
    """Compare what the command line names, or everything in `CASES`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help="VARIANT PIXELS BATCH PRECISION, or `loop`")
    add_json_option(parser)
    given = parser.parse_args()
    auto = resolve_precision("auto", pick_device())
    if len(given.case) == 4:
        name, size, batch, precision = given.case
        compare(name, int(size), int(batch), precision, given.json)
        return
    sys.stdout.write(f"threads {torch.get_num_threads()}, `auto` is {auto} here\n")
    if given.case != ["loop"]:
        for case in CASES:
            for precision in ("fp32", "bf16"):
                compare(*case, precision, given.json)
    around(auto, given.json)


if __name__ == "__main__":
    main()
