"""One training step of ours beside transformers' model of the same size, in one run.

Both do the same: forward, cross-entropy, backward, AdamW, on the same images, in turn (A B A B …).
Printed are medians, and median, least and largest of the ratio of each pair's times.

    python recipes/bench_step.py                    the models of recipes/RESULTS.md
    python recipes/bench_step.py S/16 224 16 bf16   one: variant, pixels, batch, precision
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from vitcli.devices import pick_device, resolve_precision
from vitcli.vit import VisionTransformer, ViTConfig, parse_variant

CASES = [("S/16", 224, 16), ("Nano/4", 32, 128), ("Nano/8", 32, 128)]
PAIRS = 7
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


def compare(name: str, size: int, batch: int, precision: str) -> None:
    """Print one line: both speeds and the ratio."""
    config = parse_variant(name, image_size=(size, size), num_classes=CLASSES)
    ours = VisionTransformer(config).init_weights(torch.Generator().manual_seed(0))
    images = torch.randn(batch, 3, size, size, device=pick_device())
    a, b = stepper(ours, images, precision), stepper(theirs(config), images, precision)
    a(), b()
    pairs = [(a(), b()) for _ in range(PAIRS)]
    speeds = [batch / statistics.median(times) for times in zip(*pairs, strict=True)]
    ratios = sorted(second / first for first, second in pairs)
    sys.stdout.write(
        f"{name:8} {size:4} px  batch {batch:4}  {precision}  "
        f"ours {speeds[0]:7.1f} img/s  transformers {speeds[1]:7.1f} img/s  "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Compare what the command line names, or everything in `CASES`."""
    if len(sys.argv) == 5:
        name, size, batch, precision = sys.argv[1:]
        compare(name, int(size), int(batch), precision)
        return
    auto = resolve_precision("auto", pick_device())
    sys.stdout.write(f"threads {torch.get_num_threads()}, `auto` is {auto} here\n")
    for case in CASES:
        for precision in ("fp32", "bf16"):
            compare(*case, precision)


if __name__ == "__main__":
    main()
