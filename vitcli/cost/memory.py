"""The memory of a training step, traced operation by operation on tensors that hold nothing."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitcli.config.schema import Recipe
from vitcli.cost.malloc_replay import Event, heap_peak
from vitcli.train.ema import Ema
from vitcli.train.objectives import find_objective
from vitcli.train.optimizers import build_optimizers
from vitcli.vit.blocks import forced_attention

Make = Callable[[], nn.Module]
STEPS = 3
SCALAR = torch.ops.aten._local_scalar_dense.default
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process's training step.

    Attributes:
        weights: parameters and buffers, a frozen teacher's too.
        gradients: of the weights that learn.
        optimizer: what the chosen optimizer keeps between steps.
        average: the moving average of the weights, where there is one.
        activations: what the forward pass of a micro-batch leaves for the backward pass.
        peak: the most that is alive at once within a step: not the sum of these, because gradients
            come as activations go, and because of what lives for an operation or two only.
        heap: what the heap of a process on a CPU grows to by it, see `heap.py`; None where that is
            not known.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int
    heap: int | None = None

    @property
    def lasting(self) -> int:
        """What is there between two steps; gradients are dropped at the start of each."""
        return self.weights + self.gradients + self.optimizer + self.average


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.events: list[Event] = []
        self._seen: dict[int, Any] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SCALAR and isinstance(args[0], FakeTensor):
            return 1.0  # some optimizers ask for the number of their step; a fake one has none
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        self._count += 1
        number = self._count

        def gone(_: Any) -> None:
            self.events.append((-number, 0))
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.events.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Step:
    """What a step is made of, besides the model.

    Attributes:
        size: (C, Y, X) of an image as the loader hands it over.
        side: that images are shrunk to at this stage of the run, or None.
        batch, micro: images of a step and of one forward pass, on this process.
        classes: where labels are mixed or several, their number; 0 for one class an image.
        on_gpu: whether attention is the fused one of a GPU.
    """

    size: tuple[int, int, int]
    batch: int
    micro: int
    precision: str
    side: int | None = None
    classes: int = 0
    patch_drop_rate: float = 0.0
    checkpointing: bool = False
    on_gpu: bool = False


def hollow(module: nn.Module) -> nn.Module:
    """`module` with all its tensors replaced by zeros: inside of a `FakeTensorMode` by fake ones.

    It cannot be used otherwise any more.
    """
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    for part in [module, *getattr(module, "frozen_modules", ())]:
        for inner in part.modules():
            for name, p in inner._parameters.items():
                if p is not None:
                    inner._parameters[name] = nn.Parameter(empty(p), requires_grad=p.requires_grad)
            for name, buffer in inner._buffers.items():
                if buffer is not None:
                    inner._buffers[name] = empty(buffer)
    return module


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, those of a frozen teacher too."""
    parts = [module, *getattr(module, "frozen_modules", ())]
    return [t for part in parts for t in (*part.parameters(), *part.buffers())]


def size_of(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step_memory(make_objective: Make, recipe: Recipe, step: Step) -> Memory:
    """The memory of a step of `recipe`, by running it on tensors without content.

    What two objectives choose by masks has no size before it is computed. They are run in earnest,
    on one and on two images, and a line is drawn through both.

    Args:
        make_objective: builds it anew, on any device: its weights are replaced.
    """
    fake = not find_objective(recipe.objective.name).shapes_depend_on_data
    if fake or step.micro < 3:
        return trace(make_objective, recipe, step, fake=fake)
    parts = min(2, -(-step.batch // step.micro))
    one, two = (
        trace(make_objective, recipe, replace(step, micro=n, batch=n * parts), fake=False)
        for n in (1, 2)
    )

    def line(a: int, b: int) -> int:
        return a + (b - a) * (step.micro - 1)

    heap = None if one.heap is None or two.heap is None else line(one.heap, two.heap)
    activations, peak = line(one.activations, two.activations), line(one.peak, two.peak)
    return replace(two, activations=activations, peak=peak, heap=heap)


def trace(make_objective: Make, recipe: Recipe, step: Step, *, fake: bool = True) -> Memory:
    """`step_memory` for one size, on tensors with content where they are not `fake`.

    Some steps are made, as the training loop makes them: micro-batches, clipping, optimizers,
    average. The last one counts: optimizers make their states in the first, and a heap takes two or
    three to get its holes. What kernels allocate inside of one operation is not seen.

    """
    objective = make_objective()
    with (
        FakeTensorMode() if fake else nullcontext(),
        forced_attention("fused" if step.on_gpu else None),
    ):
        objective = hollow(objective).train()
        model: Any = objective.model
        model.checkpoint_activations = step.checkpointing
        model.patch_drop_rate = step.patch_drop_rate
        optimizers = build_optimizers(objective, recipe.optim)
        tracker = Tracker()
        for tensor in tensors_of(objective):
            tracker.add(tensor)
        weights = tracker.live
        with tracker:
            average = Ema(objective, 0.9) if recipe.train.ema_decay else None
            activations = 0
            for _ in range(2 if step.on_gpu else STEPS):
                tracker.peak = tracker.live
                activations = _step(objective, optimizers, recipe, step, tracker)
                if average is not None:
                    average.update(objective, 1)
        learning = [p for p in objective.parameters() if p.requires_grad]
        states = [
            value
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return Memory(
            weights=weights,
            gradients=size_of(p.grad for p in learning if p.grad is not None),
            optimizer=size_of(states),
            average=size_of(average.tensors.values()) if average else 0,
            activations=activations,
            peak=tracker.peak,
            heap=None if step.on_gpu else heap_peak(tracker.events),
        )


def _step(
    objective: nn.Module, optimizers: Any, recipe: Recipe, step: Step, tracker: Tracker
) -> int:
    """One optimizer step; what the forward pass of a micro-batch left for the backward pass."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    pixels = torch.empty(step.batch, *step.size, dtype=torch.uint8)
    kept = 0
    # Two parts say what many would: gradients that are there already while the next is forward.
    for _ in range(min(2, -(-step.batch // step.micro))):
        before = tracker.live
        images, targets = _inputs(pixels[: step.micro], step)
        with _autocast(step.precision):
            loss, _figures = objective(images, targets, {})
        del images, targets
        kept = max(kept, tracker.live - before)
        loss.backward()
        del loss, _figures
    if recipe.optim.grad_clip is not None:
        nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    return kept


def _inputs(pixels: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(B, C, Y, X) bytes -> images as the model sees them, and labels."""
    images = (pixels.float() / 255 - 0.5) / 0.5
    if step.side is not None:
        images = nn.functional.interpolate(images, size=(step.side, step.side), mode="bilinear")
    b = len(pixels)
    if step.classes:
        return images, torch.empty(b, step.classes)
    return images, torch.zeros(b, dtype=torch.long)


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    if precision == "fp32":
        yield
        return
    with torch.autocast("cpu", DTYPES[precision]):
        yield


def evaluation_memory(
    model: nn.Module, size: tuple[int, int, int], batch: int, precision: str = "fp32"
) -> int:
    """The most bytes that are alive in a forward pass over `batch` images, with the weights."""
    with FakeTensorMode():
        model = hollow(model).eval()
        tracker = Tracker()
        for tensor in tensors_of(model):
            tracker.add(tensor)
        with tracker, torch.no_grad(), _autocast(precision):
            pixels = torch.empty(batch, *size, dtype=torch.uint8)
            model((pixels.float() / 255 - 0.5) / 0.5)
        return tracker.peak
