"""Whether what was read fits together: tensors with a model, values in a JSON file with sense."""

from collections.abc import Iterator
from contextlib import contextmanager

from vitcli.errors import VitcliError
from vitcli.vit import Config, ResNetConfig, ViTConfig

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def fitting(file: str, source: str, hint: str) -> Iterator[None]:
    """Values that are none, in a JSON file that anybody may have written, are the user's error."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise VitcliError(
            f"the {file} of `{source}` does not fit together: {error}", hint=hint
        ) from error


def check_depth(config: Config, tensors: int, source: str) -> None:
    """Raises a VitcliError where there are more blocks than tensors, before any of them is made."""
    stem = config.layers if isinstance(config, ResNetConfig) else config.stem or ()
    blocks = sum(stem) + (config.depth if isinstance(config, ViTConfig) else 0)
    if blocks > tensors:
        raise VitcliError(
            f"`{source}` is said to have {blocks} blocks, but holds {tensors} tensors",
            hint="it is damaged: copy or download it again",
        )


def compare(found: Shapes, expected: Shapes, source: str) -> None:
    """Raises one error that names every tensor which contradicts the model."""
    missing = [n for n in expected if n not in found]
    foreign = [n for n in found if n not in expected]
    shapes = [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    groups = {"missing": missing, "not part of the model": foreign, "of another shape": shapes}
    told = [
        f"{kind}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" * (len(names) > 6))
        for kind, names in groups.items()
        if names
    ]
    if told:
        raise VitcliError(
            f"`{source}` does not fit a plain Vision Transformer; {'; '.join(told)}",
            hint="is this the file of another architecture, or a part of one?",
        )
