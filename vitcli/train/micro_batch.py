"""The micro-batch of a step: the images that go through the model at once."""

from typing import TYPE_CHECKING

from vitcli.config.schema import CUDA_GRAPHS
from vitcli.data.batch import Batch
from vitcli.devices import free_memory
from vitcli.errors import VitcliError
from vitcli.train.agreement import min_over_processes

if TYPE_CHECKING:
    from vitcli.train.loop import Loop


def micro_batch_size(loop: "Loop", batch: Batch) -> int:
    """The images of `batch` in one pass: what fitted, else what the recipe says, else all."""
    num_images = len(batch.labels)
    size = loop.state.micro_batch_size or loop.recipe.train.micro_batch_size or num_images
    return min(size, num_images)


def halve_micro_batch(loop: "Loop", batch: Batch) -> None:
    """Halve the micro-batch after memory ran out.

    The size is part of the state, because dropout masks depend on it: a resumed run starts with it.

    Raises:
        VitcliError: nothing smaller is possible.
    """
    loop.wrapped_optimizer.zero_grad(set_to_none=True)
    free_memory(loop.device)
    old, smallest = micro_batch_size(loop, batch), 2 if batch.mix else 1  # 2: pairs of mixup
    size = old // 2 - (old // 2) % smallest
    graphs = loop.recipe.train.compile == CUDA_GRAPHS  # they hold one pass per step
    if size < smallest or graphs:
        more = ", or `--set train.compile=true`" if graphs else ""
        raise VitcliError(
            f"out of memory with a micro-batch of {old} image{'s' * (old > 1)}",
            "use a smaller model or image size, or "
            f"`--set train.activation_checkpointing=true`{more}",
        ) from None
    loop.state.micro_batch_size = size
    loop.watch.warn(f"out of memory with a micro-batch of {old} images: continuing with {size}")


def fit_micro_batch(loop: "Loop", batch: Batch) -> None:
    """With several GPUs, find a micro-batch that fits in a pass by each process alone.

    A process that runs out of memory inside of a common backward pass would leave the others
    waiting for its gradients for ever.
    """
    if loop.accelerator.num_processes == 1 or (stage := loop.stage()) in loop.fitted_stages:
        return
    loop.fitted_stages.add(stage)
    if loop.device.type == "cuda":
        loop.gradients(batch, alone=True)
        size = micro_batch_size(loop, batch)
        loop.state.micro_batch_size = min_over_processes(loop.accelerator, size)
