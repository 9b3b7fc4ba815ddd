"""When memory runs out: the same step in smaller parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitcli.data.batch import Batch
from vitcli.errors import VitcliError

# What torch's allocator on a CPU says; on a GPU there is an exception of its own.
WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def fitting(
    loop: Any, batch: Batch, gradients: Callable[[Batch], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`gradients(batch)`, in parts half as large whenever memory runs out.

    No weight has moved when it does, so the step begins again from its own seed, and its result is
    that of the whole batch, but for the order of sums and the masks of dropout. The size is part
    of the state: a resumed run begins with it. Images that are mixed stay in pairs.

    Args:
        loop: the run; its `state.micro_batch` is made smaller.

    Raises:
        VitcliError: not even one image, or one pair, fits.
    """
    while True:
        try:
            return gradients(batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler, so that what the failed pass held is free.
        for optimizer in loop.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if loop.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        least = 2 if batch.mix is not None else 1
        now = min(
            loop.state.micro_batch or loop.recipe.train.micro_batch_size or len(batch.labels),
            len(batch.labels),
        )
        size = now // 2 - (now // 2) % least
        if size < least:
            raise VitcliError(
                f"memory runs out with {now} image{'s' * (now > 1)} at a time",
                "a smaller model or image, or `--set train.activation_checkpointing=true`",
            ) from None
        loop.state.micro_batch = size
        loop.watch.warn(f"memory ran out with {now} images at a time: going on with {size}")
