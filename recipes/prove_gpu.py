"""Check on one GPU that the numbers are right, that every command works, and how fast it is.

The checks come in order of importance and stop at a time limit, so that a short run still gives the
first ones. Each row of the table is written to the JSON file as soon as it is known. A check that
fails is a row of its own and does not stop the others.

    python recipes/prove_gpu.py --out gpu.json                       all checks, 8 minutes
    python recipes/prove_gpu.py --cifar10 DATA --out gpu.json        with time to accuracy
    python recipes/prove_gpu.py --only numbers,speed --seconds 200   some of them
    python recipes/prove_gpu.py --tiny                               a test of this script, on a CPU

It needs a GPU (or `--tiny`), torch, and the dependencies of vitcli. timm and transformers are
measured too where they are installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitcli.config.recipe import check as check_recipe
from vitcli.config.schema import Recipe
from vitcli.cost.bench import ClassificationStep, build_baseline
from vitcli.cost.flops import macs
from vitcli.cost.memory import StepShape, step_memory
from vitcli.devices import matrix_peak, pick_device
from vitcli.files import replacing
from vitcli.train.optimizers import build_optimizers
from vitcli.vit import create_network

STEPS = 50  # of the loss curves of each precision
TOLERANCE = 1e-4  # of fp32 on the GPU against the CPU, as a fraction of the largest number


@dataclass
class Proof:
    """The rows so far, and what the checks need.

    Attributes:
        folder: scratch space, with an image folder `photos`.
        tiny: small sizes, for a test of this script on a CPU.
        end: the value of `time.monotonic` after which no further check starts.
    """

    folder: Path
    out: Path | None
    cifar10: str | None
    tiny: bool
    end: float
    device: torch.device = field(default_factory=pick_device)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, check: str, value: Any, *, unit: str = "", passed: bool | None = None) -> None:
        """Print a row and write all rows; `passed` is None for a figure without a goal."""
        self.rows.append({"check": check, "value": value, "unit": unit, "passed": passed})
        mark = {True: "ok  ", False: "FAIL", None: "    "}[passed]
        shown = f"{value:.5g}" if isinstance(value, float) else value
        sys.stdout.write(f"{mark} {check:64} {shown} {unit}\n")
        sys.stdout.flush()
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        if self.out is not None:
            with replacing(self.out) as temporary:
                temporary.write_text(json.dumps({**environment(), "rows": self.rows}, indent=1))

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """Turn an exception into a failed row."""
        try:
            yield
        except Exception as error:  # the other checks must still run
            traceback.print_exc()
            self.row(check, f"{type(error).__name__}: {str(error).splitlines()[:1]}", passed=False)

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit."""
        return self.end - time.monotonic()

    def vitcli(self, *arguments: str, expect: int = 0, **environ: str) -> dict[str, Any]:
        """Run a command in a process of its own and return what `--json` printed.

        Raises:
            RuntimeError: another exit status.
        """
        command = [sys.executable, "-m", "vitcli", *arguments, "--json"]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=os.environ | environ
        )
        if done.returncode != expect:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return found

    def losses(self, run: str) -> list[float]:
        """The training losses in the records of a run."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [r["train/loss"] for r in records if "train/loss" in r]


def environment() -> dict[str, Any]:
    """Date, commit, card, driver and versions."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        found["commit"] = ""
    found["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["driver"] = _driver()
    found["python"] = platform.python_version()
    for package in ("torch", "timm", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is not None:
            found[package] = version(package)
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---------------------------------------------------------------------------- numbers


def numbers(proof: Proof) -> None:
    """Logits and gradients in fp32 against the CPU, and loss curves in bf16 and fp16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    models: list[tuple[str, int, dict[str, Any]]] = [
        ("Ti/16", 224, {}),
        ("S/16", 224, {}),
        ("B/16", 224, {}),
        ("R+Ti/16", 224, {}),
        ("R50x1", 128, {}),
        ("Ti/16", 224, {"position": "relative"}),
        ("Ti/16", 224, {"pool": "map", "qk_norm": True}),
    ]
    for name, size, settings in models if not proof.tiny else [("Pico/8", 32, {})]:
        words = " ".join([name, *(f"{k}={v}" for k, v in settings.items())])
        with proof.guarded(f"numbers: {words}"):
            for what, difference in compare_devices(name, size, settings, proof.device).items():
                passed = difference <= TOLERANCE
                proof.row(
                    f"numbers: {words}, {what}, fp32, GPU against CPU", difference, passed=passed
                )
    for precision in ("bf16", "fp16"):
        with proof.guarded(f"numbers: {STEPS} steps in {precision}"):
            if precision == "fp16" and proof.device.type == "cpu":
                continue
            curves = [loss_curve(p, proof) for p in ("fp32", precision)]
            gap = float(np.abs(np.subtract(*curves)).max() / curves[0][0])
            text = f"numbers: {STEPS} losses in {precision} beside fp32, largest difference"
            proof.row(text, gap, unit="of the first loss", passed=gap < 0.05)


def compare_devices(
    name: str, size: int, settings: dict[str, Any], device: torch.device
) -> dict[str, float]:
    """The largest difference of logits and of gradients, as a fraction of the largest number."""
    found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    for place in (torch.device("cpu"), device):
        model = create_network(name, image_size=size, num_classes=10, **settings)
        model.init_weights(torch.Generator().manual_seed(0))
        # The head starts at zero, which would hide every gradient below it.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        model = model.to(place).eval()
        logits = model(images.to(place))
        nn.functional.cross_entropy(logits, torch.tensor([1, 2], device=place)).backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach().cpu(), gradients))
    (a, grads_a), (b, grads_b) = found
    largest = max(float(g.abs().max()) for g in grads_a)
    return {
        "logits": float((a - b).abs().max() / a.abs().max()),
        "gradients": max(float((x - y).abs().max()) for x, y in zip(grads_a, grads_b, strict=True))
        / largest,
    }


def loss_curve(precision: str, proof: Proof) -> list[float]:
    """The losses of a short training on the digits, one per step."""
    name = f"curve-{precision}"
    if not (proof.folder / name / "result.json").exists():
        steps = 8 if proof.tiny else STEPS
        flags = [
            *small_model(proof),
            "train.log_steps=1",
            f"train.precision={precision}",
            "optim.name=adamw",
        ]
        proof.vitcli(*training("builtin:digits", name, steps, flags))
    return proof.losses(name)


def small_model(proof: Proof) -> list[str]:
    """Settings of a model that trains in seconds."""
    if proof.tiny:
        return ["model.name=Pico/4", "model.image_size=8", "model.depth=2"]
    return ["model.name=Ti/4", "model.image_size=32"]


def training(data: str, out: str, steps: int, flags: list[str]) -> list[str]:
    """The words of a short `pretrain`."""
    sets = [word for flag in flags for word in ("--set", flag)]
    return ["pretrain", data, "--steps", str(steps), "--batch-size", "64", "--out", out, *sets]


# --------------------------------------------------------------------------- commands


def commands(proof: Proof) -> None:
    """Every command on the device, then what can go wrong in training."""
    small = small_model(proof)
    steps = 4 if proof.tiny else 60
    image = str(next((proof.folder / "photos").rglob("*.jpg")))
    lines: dict[str, list[str]] = {
        "pretrain": training("builtin:digits", "base", steps, small),
        "finetune": ["finetune", "builtin:digits", "--model", "base", "--steps", str(steps)],
        "fewshot": ["fewshot", "builtin:digits", "--model", "base", "--shots", "5"],
        "evaluate": ["evaluate", "builtin:digits", "--model", "base"],
        "predict": ["predict", image, "--model", "base"],
    }
    for name, words in lines.items():
        with proof.guarded(f"command: {name}"):
            start = time.perf_counter()
            proof.vitcli(*words)
            seconds = time.perf_counter() - start
            proof.row(f"command: {name}", seconds, unit="s, imports included", passed=True)
    options: dict[str, list[str]] = {
        "fp16 with a loss scale": ["train.precision=fp16"],
        "activation checkpointing": ["train.activation_checkpointing=true"],
        "averaged weights": ["train.ema_decay=0.99"],
        "FSDP2 on one device": ["train.fully_shard=true", "optim.name=adamw"],
        "torch.compile": ["train.compile=true"],
        "SGD with a bf16 momentum": ["optim.name=sgd", "optim.momentum_dtype=bf16"],
    }
    for name, flags in options.items():
        if proof.device.type == "cpu" and name != "averaged weights":
            continue  # the tests of the project cover the CPU
        with proof.guarded(f"training: {name}"):
            out = name.split()[0]
            proof.vitcli(*training("builtin:digits", out, steps, [*small, *flags]))
            losses = proof.losses(out)
            falls = losses[-1] < losses[0]
            proof.row(f"training: {name}, last loss", losses[-1], passed=falls)
    with proof.guarded("training: LoRA"):
        words = ["finetune", "builtin:digits", "--model", "base", "--steps", str(steps)]
        found = proof.vitcli(*words, "--lora", "4", "--out", "lora")
        proof.row("training: LoRA, accuracy", float(found["figures"]["accuracy"]), passed=True)
    with proof.guarded("training: one process of nccl"):
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        proof.vitcli(*training("builtin:digits", "nccl", steps, small), **alone, **address)
        proof.row("training: one process as a launcher starts it", "done", passed=True)
    resume(proof, small)
    if proof.device.type == "cuda":
        out_of_memory(proof)


def resume(proof: Proof, small: list[str]) -> None:
    """SIGKILL and resume, with and without deterministic kernels."""
    steps = 12 if proof.tiny else 200
    for deterministic in ("true", "false"):
        label = f"resume after SIGKILL, train.deterministic={deterministic}"
        with proof.guarded(label):
            flags = [*small, f"train.deterministic={deterministic}", "train.checkpoint_steps=2"]
            whole, killed = f"whole-{deterministic}", f"killed-{deterministic}"
            proof.vitcli(*training("builtin:digits", whole, steps, flags))
            words = training("builtin:digits", killed, steps, flags)
            process = subprocess.Popen(
                [sys.executable, "-m", "vitcli", *words],
                cwd=proof.folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            checkpoints = proof.folder / killed / "checkpoints"
            while process.poll() is None and not list(checkpoints.glob("step_*[1-9]*")):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            proof.vitcli(*words, "--resume")
            difference = largest_difference(proof.folder / whole, proof.folder / killed)
            passed = difference == 0.0 if deterministic == "true" else None
            proof.row(f"{label}, largest difference of a weight", difference, passed=passed)


def largest_difference(a: Path, b: Path) -> float:
    """The largest difference between two runs' weights."""
    from safetensors.torch import load_file

    first, second = (load_file(run / "model.safetensors") for run in (a, b))
    return max(float((first[k].float() - second[k].float()).abs().max()) for k in first)


def out_of_memory(proof: Proof) -> None:
    """A batch that does not fit must continue with a smaller micro-batch."""
    with proof.guarded("out of memory"):
        code = (
            "import torch; torch.cuda.set_per_process_memory_fraction(0.04); "
            "from vitcli.cli.main import main; main()"
        )
        words = training("photos", "oom", 3, ["model.name=S/16", "model.image_size=224"])
        words[words.index("64")] = "512"
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=proof.folder,
            capture_output=True,
            text=True,
        )
        smaller = "continuing with" in done.stderr
        passed = done.returncode == 0 and smaller
        proof.row("out of memory: a smaller micro-batch", done.stderr[-200:], passed=passed)


# ------------------------------------------------------------------------------ speed


def speed(proof: Proof) -> None:
    """Forward and training images/s and MFU beside timm and transformers, in turn."""
    precision = "bf16"
    peak = matrix_peak(proof.device, precision)
    proof.row("speed: matrix product, bf16", peak / 1e12, unit="TFLOP/s")
    cases = [
        ("B/16", 224, 256, (False, True)),
        ("S/16", 224, 256, (False, True)),
        ("L/16", 224, 128, (False,)),
        ("Ti/16", 224, 512, (False, True)),
        ("B/16", 384, 64, (False,)),
        ("L/16", 224, 128, (True,)),
    ]
    if proof.tiny:
        cases = [("Pico/8", 32, 4, (False,))]
    libraries = [n for n in ("timm", "transformers") if importlib.util.find_spec(n) is not None]
    for name, size, batch, kinds in cases:
        for compiled in kinds:
            if proof.seconds_left < 30:
                proof.row(f"speed: {name} {size} px", "no time left")
                continue
            label = f"speed: {name} {size} px, batch {batch}{', compiled' * compiled}"
            with proof.guarded(label):
                # Compiling takes a minute for each library, so one peer is enough.
                peers = libraries[:1] if compiled else libraries
                compare_speed(proof, label, (name, size, batch), compiled, peers, peak)
    torch.compiler.reset()
    feed(proof)


def compare_speed(
    proof: Proof,
    label: str,
    case: tuple[str, int, int],
    compiled: bool,
    peers: list[str],
    peak: float,
) -> None:
    """Rows for one model: ours and its peers."""
    name, size, batch = case
    config = create_network(name, image_size=size, num_classes=1000).config
    builders: dict[str, Callable[[], nn.Module]] = {
        "ours": partial(create_network, name, image_size=size, num_classes=1000)
    }
    for peer in peers:
        builders[peer] = partial(build_baseline, peer, config, "auto")
    for what in ("training", "forward"):
        steps = {}
        for library, build in builders.items():
            model = build().to(proof.device)
            if compiled:
                model.compile(dynamic=False)
            images = torch.randn(batch, 3, size, size, device=proof.device)
            steps[library] = (train_step if what == "training" else forward_step)(model, images)
        rates = alternate(proof, steps, batch)
        operations = (6.0 if what == "training" else 2.0) * macs(config)
        for library, rate in rates.items():
            proof.row(f"{label}, {what}, {library}", rate, unit="images/s")
        goal = None if proof.tiny else (0.5 if what == "training" else 0.6)
        mfu = rates["ours"] * operations / peak
        judged = goal is not None and compiled and name in ("B/16", "L/16")
        proof.row(f"{label}, {what}, MFU", mfu, passed=mfu >= (goal or 0) if judged else None)
        if len(rates) > 1:
            ratio = rates["ours"] / max(v for k, v in rates.items() if k != "ours")
            passed = None if proof.tiny else ratio >= 1.0
            proof.row(f"{label}, {what}, ours / best peer", ratio, passed=passed)


def train_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW under bf16 autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16):
            out = model(images)
        loss = nn.functional.cross_entropy(getattr(out, "logits", out).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Inference with weights in bf16."""
    model.to(torch.bfloat16).eval()
    images = images.to(torch.bfloat16)

    def step() -> None:
        with torch.inference_mode():
            model(images)

    return step


def alternate(
    proof: Proof, steps: dict[str, Callable[[], None]], batch: int, rounds: int = 5
) -> dict[str, float]:
    """Images/s of each, medians over rounds that take turns (A B A B)."""
    number = 2 if proof.tiny else 8
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(proof.device)
            start = time.perf_counter()
            for _ in range(number):
                step()
            synchronize(proof.device)
            seconds[name].append((time.perf_counter() - start) / number)
    return {name: batch / statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def feed(proof: Proof) -> None:
    """How fast the loader delivers batches of 224 px from files and from a stored set."""
    from bench_data import ours, ready

    files = [path.read_bytes() for path in sorted((proof.folder / "photos").rglob("*.jpg"))]
    workers = os.cpu_count() or 1
    for way in ("files", "stored"):
        with proof.guarded(f"speed: loader from {way}"), ready(files, way) as images:
            count = 2 if proof.tiny else 60
            for _ in ours(images, 2, workers):
                pass
            start = time.perf_counter()
            total = sum(len(batch) for batch in ours(images, count, workers))
            rate = total / (time.perf_counter() - start)
            proof.row(f"speed: loader from {way}, {workers} threads", rate, unit="images/s")


# ----------------------------------------------------------------------------- memory


def memory(proof: Proof) -> None:
    """The memory that `plan` expects against the most that torch allocated."""
    cases: list[tuple[str, int, int, str, bool]] = [
        ("Ti/16", 224, 256, "adamw", False),
        ("S/16", 224, 128, "adamw", False),
        ("S/16", 224, 128, "adamw", True),
        ("B/16", 224, 64, "adamw", False),
        ("B/16", 224, 64, "sgd", False),
        ("B/16", 224, 64, "muon", False),
        ("L/16", 224, 32, "lion", False),
        ("R+Ti/16", 224, 128, "adamw", False),
    ]
    if proof.device.type != "cuda":
        return
    for name, size, batch, optimizer, checkpointing in cases:
        label = f"memory: {name}, batch {batch}, {optimizer}{', checkpointing' * checkpointing}"
        with proof.guarded(label):
            sections = {"command": "pretrain", "train": {"steps": 1}, "optim": {"name": optimizer}}
            recipe = check_recipe(Recipe, sections, "proof")
            shape = StepShape(
                (3, size, size), batch, batch, "bf16", checkpointing=checkpointing, on_gpu=True
            )

            def objective(name: str = name, size: int = size) -> nn.Module:
                return ClassificationStep(create_network(name, image_size=size, num_classes=1000))

            expected = step_memory(objective, recipe, shape).peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            module: Any = objective().to(proof.device)
            module.model.checkpoint_activations = checkpointing
            optimizers = build_optimizers(module, recipe.optim, "bf16")
            images = torch.randn(batch, 3, size, size, device=proof.device)
            labels = torch.zeros(batch, dtype=torch.long, device=proof.device)
            for _ in range(2):
                with torch.autocast("cuda", torch.bfloat16):
                    loss, _ = module(images, labels)
                loss.backward()
                for each in optimizers:
                    each.step()
                    each.zero_grad(set_to_none=True)
            real = torch.cuda.max_memory_allocated() - before
            ratio = expected / real
            proof.row(f"{label}, planned / real", ratio, passed=0.9 <= ratio <= 1.1)
            del module, optimizers, images, labels, loss


# --------------------------------------------------------------------------- accuracy


def accuracy(proof: Proof) -> None:
    """Seconds to 90 and 94 % on CIFAR-10, imports included, and the compile cache."""
    if not proof.tiny:
        with proof.guarded("first step"):
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(proof.folder / "inductor")}
            flags = ["model.name=S/16", "model.image_size=224", "train.compile=true"]
            for kind in ("cold", "warm"):
                start = time.perf_counter()
                proof.vitcli(*training("photos", f"first-{kind}", 1, flags), **cache)
                seconds = time.perf_counter() - start
                proof.row(f"first step, compile cache {kind}", seconds, unit="s, whole command")
    if proof.cifar10 is None:
        proof.row("CIFAR-10", "skipped: no --cifar10 DATA")
        return
    with proof.guarded("CIFAR-10"):
        budget = min(120.0, proof.seconds_left - 20)
        length = ["--steps", "3"] if proof.tiny else ["--budget", f"{budget:.0f}s"]
        words = ["pretrain", proof.cifar10, "--recipe", "pretrain_cifar10_small", *length]
        start = time.perf_counter()
        found = proof.vitcli(*words, "--out", "cifar10")
        proof.row(
            "CIFAR-10: accuracy", float(found["figures"]["accuracy"]), unit=f"in {budget:.0f} s"
        )
        proof.row("CIFAR-10: whole command", time.perf_counter() - start, unit="s")


SECTIONS: dict[str, Callable[[Proof], None]] = {
    "numbers": numbers,
    "commands": commands,
    "speed": speed,
    "memory": memory,
    "accuracy": accuracy,
}


def draw_photos(folder: Path, number: int) -> None:
    """Write smooth random JPEGs of 400 x 300 pixels in ten classes."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = folder / f"class_{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
        image.save(place / f"{i}.jpg", quality=90)


def main() -> None:
    """Run the sections; end with 1 if a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--cifar10", help="DATA for the time to accuracy")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--seconds", type=float, default=460.0, help="no check starts after this")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.tiny:
        sys.stdout.write("skipped: torch sees no GPU here; `--tiny` tests this script on a CPU\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        cifar10 = given.cifar10
        if cifar10 is not None and Path(cifar10).exists():
            cifar10 = str(Path(cifar10).absolute())
        proof = Proof(
            folder=Path(folder),
            out=given.out.absolute() if given.out else None,
            cifar10=cifar10,
            tiny=given.tiny,
            end=time.monotonic() + given.seconds,
        )
        sys.stdout.write(" · ".join(f"{k} {v}" for k, v in environment().items()) + "\n")
        draw_photos(proof.folder / "photos", 20 if given.tiny else 2000)
        for name in given.only.split(","):
            with proof.guarded(name):
                if proof.seconds_left > 0:
                    SECTIONS[name](proof)
                else:
                    proof.row(name, "skipped: no time left")
    raise SystemExit(1 if any(row["passed"] is False for row in proof.rows) else 0)


if __name__ == "__main__":
    main()
