"""The memory of a training step, traced operation by operation on tensors without content."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitcli.config.schema import Recipe
from vitcli.malloc import LARGE_BLOCK
from vitcli.train.ema import Ema
from vitcli.train.optimizers import build_optimizers
from vitcli.vit.blocks import forced_attention

# On a CPU a process grows by more than its tensors: glibc's malloc keeps the holes between freed
# blocks, and kernels and threads have buffers of their own. Activation checkpointing leaves more
# holes, because it frees and allocates blocks of many sizes in turn. The three constants are fitted
# to measured runs (recipes/LOG.md).
CPU_BUFFERS = 50 * 2**20
MALLOC_OVERHEAD = {False: 1.12, True: 1.7}  # by activation checkpointing
ITEM = torch.ops.aten._local_scalar_dense.default
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ForwardMemory:
    """Bytes of a forward pass without gradients, on top of what is there before.

    Attributes:
        peak: the largest sum of all tensors that are alive at once.
        large: the same for blocks from `LARGE_BLOCK` only.
    """

    peak: int = 0
    large: int = 0

    def with_batches(self, waiting: int) -> "ForwardMemory":
        """The same with `waiting` bytes of decoded images that wait for their pass."""
        return ForwardMemory(self.peak + waiting, self.large + waiting)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step in one process.

    Attributes:
        weights: parameters and buffers, with those of a frozen teacher.
        gradients: of the trainable weights.
        optimizer: state that the optimizer keeps between steps.
        average: the moving average of the weights.
        activations: kept by the forward pass of a micro-batch for its backward pass.
        gradient_peak: the largest sum of all tensors that are alive at once in the forward and
            backward passes. It is smaller than the sum of the above, because activations are freed
            while gradients are made.
        update_peak: the same for clipping, optimizer and average, which do not depend on the batch.
        small_peak: the largest sum of all blocks below `LARGE_BLOCK`.
        checkpointing: the step uses activation checkpointing.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    gradient_peak: int
    update_peak: int
    small_peak: int
    checkpointing: bool = False

    @property
    def peak(self) -> int:
        """Peak bytes of all tensors."""
        return max(self.gradient_peak, self.update_peak)

    @property
    def between_steps(self) -> int:
        """Bytes that stay between two steps; gradients are freed at the start of a step."""
        return self.weights + self.optimizer + self.average

    def growth_per_image(self, larger: "StepMemory", images: int) -> float:
        """Bytes by which a step grows per image; `larger` is the same step with `images` more.

        In a small batch the gradients may decide both peaks, and then they are equal. The
        activations always grow.
        """
        peak = larger.gradient_peak - self.gradient_peak
        return max(1.0, max(peak, larger.activations - self.activations) / images)

    @property
    def cpu_peak(self) -> int:
        """Bytes by which a process on a CPU grows."""
        return CPU_BUFFERS + int(MALLOC_OVERHEAD[self.checkpointing] * self.peak)

    def evaluation_peak(self, forward: ForwardMemory) -> int:
        """Peak bytes of all tensors in an evaluation between two steps.

        Gradients are freed only when the next step starts. Averaged weights are evaluated in place
        of the trained ones, which are copied aside.
        """
        return self.between_steps + self.gradients + self.average + forward.peak

    def cpu_evaluation_peak(self, forward: ForwardMemory) -> int:
        """Bytes by which a process on a CPU grows in an evaluation between two steps.

        The small blocks that the steps have freed are still with the process, and few of the
        evaluation's blocks fit between those in use (measured in recipes/RESULTS.md). Large blocks
        are mapped and unmapped one by one, so they leave no holes.
        """
        if not forward.peak:
            return 0
        between = self.evaluation_peak(forward) - forward.peak
        holes = MALLOC_OVERHEAD[False]
        heap = max(MALLOC_OVERHEAD[self.checkpointing] * self.small_peak, holes * between)
        return CPU_BUFFERS + int(heap + holes * (forward.peak - forward.large) + forward.large)


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive, and their largest sum.

    Attributes:
        live, peak: bytes of all storages that are alive, and the largest such sum.
        small, small_peak: the same for storages below `LARGE_BLOCK`.
        large_peak: the same for the others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.small = self.small_peak = self.large_peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM and isinstance(args[0], FakeTensor):
            return 1.0  # some optimizers read their step number, which a fake tensor does not have
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def known(self, tensors: list[Tensor]) -> None:
        """Never count the storages of `tensors`, which outlive the tracker."""
        self._storages |= {t.untyped_storage()._cdata: None for t in tensors}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        small = size if size < LARGE_BLOCK else 0

        def freed(_: Any) -> None:
            self.live -= size
            self.small -= small
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.small += small
        self.peak = max(self.peak, self.live)
        self.small_peak = max(self.small_peak, self.small)
        self.large_peak = max(self.large_peak, self.live - self.small)


@dataclass(frozen=True)
class StepShape:
    """The sizes that decide the memory of a step.

    Attributes:
        size: (C, Y, X) of an image from the loader.
        batch, micro_batch: images per step and per forward pass, in this process.
        side: pixels to which the stage of the run shrinks images, or None.
        classes: number of classes if labels are mixed or multi-label, else 0.
        on_gpu: use the fused attention of a GPU.
    """

    size: tuple[int, int, int]
    batch: int
    micro_batch: int
    precision: str
    side: int | None = None
    classes: int = 0
    patch_drop_rate: float = 0.0
    checkpointing: bool = False
    on_gpu: bool = False

    @property
    def num_micro_batches(self) -> int:
        """At most two: the second already has the gradients of the first beside it."""
        return min(2, -(-self.batch // self.micro_batch))


MakeObjective = Callable[[], nn.Module]


def step_memory(
    make_objective: MakeObjective, recipe: Recipe, shape: StepShape, *, fake: bool = True
) -> StepMemory:
    """The memory of a step of `recipe`: two steps as the training loop makes them.

    They have micro-batches, clipping, optimizer and average. The second step counts, because
    optimizers allocate their state in the first. Buffers inside of kernels are not seen.

    Args:
        make_objective: builds the objective on any device; the trace replaces its weights.
        fake: trace tensors without content.
    """
    objective = make_objective()
    with (
        FakeTensorMode() if fake else nullcontext(),
        forced_attention("fused" if shape.on_gpu else None),
    ):
        objective = replace_tensors(objective).train()
        model: Any = objective.model
        model.checkpoint_activations = shape.checkpointing
        model.patch_drop_rate = shape.patch_drop_rate
        optimizers = build_optimizers(objective, recipe.optim, shape.precision)
        tracker = StorageTracker()
        for tensor in all_tensors(objective):
            tracker.add(tensor)
        weights = tracker.live
        with tracker:
            average = Ema(objective, 0.9) if recipe.train.ema_decay else None
            for _ in range(2):
                tracker.peak = tracker.live
                activations = _accumulate_gradients(objective, optimizers, shape, tracker)
                gradient_peak, tracker.peak = tracker.peak, tracker.live
                if recipe.optim.grad_clip is not None:
                    nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.grad_clip)
                for optimizer in optimizers:
                    optimizer.step()
                if average is not None:
                    average.update(objective, 1)
        gradients = [p.grad for p in objective.parameters() if p.grad is not None]
        states = [
            value
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return StepMemory(
            weights=weights,
            gradients=storage_bytes(gradients),
            optimizer=storage_bytes(states),
            average=storage_bytes(average.tensors.values()) if average else 0,
            activations=activations,
            gradient_peak=gradient_peak,
            update_peak=tracker.peak,
            small_peak=tracker.small_peak,
            checkpointing=shape.checkpointing,
        )


def _accumulate_gradients(
    objective: nn.Module, optimizers: Any, shape: StepShape, tracker: StorageTracker
) -> int:
    """Forward and backward passes; returns the bytes that a forward pass keeps for the backward."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    pixels = torch.empty(shape.batch, *shape.size, dtype=torch.uint8)
    kept = 0
    for _ in range(shape.num_micro_batches):
        before = tracker.live
        images, targets = _inputs(pixels[: shape.micro_batch], shape)
        with _autocast(shape.precision):
            loss, _metrics = objective(images, targets)
        del images, targets
        kept = max(kept, tracker.live - before)
        loss.backward()
        del loss, _metrics
    return kept


def _inputs(pixels: Tensor, shape: StepShape) -> tuple[Tensor, Tensor]:
    """(B, C, Y, X) uint8 -> the input of the model, and labels."""
    images = (pixels.float() / 255 - 0.5) / 0.5
    if shape.side is not None:
        size = (shape.side, shape.side)
        images = nn.functional.interpolate(images, size=size, mode="bilinear")
    if shape.classes:
        return images, torch.empty(len(pixels), shape.classes)
    return images, torch.zeros(len(pixels), dtype=torch.long)


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    if precision == "fp32":
        yield
        return
    with torch.autocast("cpu", AUTOCAST_DTYPES[precision]):
        yield


def evaluation_memory(
    model: nn.Module, size: tuple[int, int, int], batch: int, precision: str = "fp32"
) -> ForwardMemory:
    """The memory of a forward pass over `batch` images, on top of the weights."""
    with FakeTensorMode():
        model = replace_tensors(model).eval()
        tracker = StorageTracker()
        tracker.known(all_tensors(model))
        with tracker, torch.no_grad(), _autocast(precision):
            pixels = torch.empty(batch, *size, dtype=torch.uint8)
            model((pixels.float() / 255 - 0.5) / 0.5)
        return ForwardMemory(tracker.peak, tracker.large_peak)


def replace_tensors(module: nn.Module) -> nn.Module:
    """Replace all tensors of `module` by zeros; inside a `FakeTensorMode` by fake tensors.

    Tied weights stay tied. The module computes nothing useful afterwards.
    """
    made: dict[int, Tensor] = {}

    def zeros(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    for part in _modules(module):
        for inner in part.modules():
            for name, p in inner._parameters.items():
                if p is not None:
                    inner._parameters[name] = nn.Parameter(zeros(p), requires_grad=p.requires_grad)
            for name, buffer in inner._buffers.items():
                if buffer is not None:
                    inner._buffers[name] = zeros(buffer)
    return module


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, with those of a frozen teacher."""
    return [t for part in _modules(module) for t in (*part.parameters(), *part.buffers())]


def _modules(module: nn.Module) -> list[nn.Module]:
    return [module, *getattr(module, "frozen_modules", ())]


def storage_bytes(tensors: Any) -> int:
    """Bytes of tensors; a storage that several of them share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def base_memory() -> int:
    """Resident bytes of this process after it has loaded everything that a run loads.

    The first optimizer imports torch's compiler, the first products load kernels, and the curves at
    the end load matplotlib. So a small step and a small figure come first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layer = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(256, 64)).sum().backward()
    optimizer.step()
    canvas: Any = FigureCanvasAgg(Figure(figsize=(9.0, 3.2), layout="constrained"))
    canvas.draw()
    return int(psutil.Process().memory_info().rss)
