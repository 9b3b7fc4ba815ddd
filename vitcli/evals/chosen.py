"""Which images of DATA a model is measured on."""

from contextlib import suppress
from pathlib import Path

from vitcli.config.schema import Inference
from vitcli.data.image_set import ImageSet, Source
from vitcli.data.source import open_data
from vitcli.errors import VitcliError
from vitcli.progress import Watcher
from vitcli.run import Run


def choose_images(
    data: str, model: str, inference: Inference, watch: Watcher
) -> tuple[Source, ImageSet]:
    """The data's test images, else its validation images, else all of them.

    On a run that was trained on a part of the data: what the run had held out, split as the run's
    recipe says.
    """
    section = inference.data
    whole = open_data(section, data, whole=True, watch=watch, streams=True)
    if section.streaming:
        return whole, whole.split("test", "validation")
    run = Run(Path(model))
    if run.recipe_file.is_file():
        known = run.provenance().get("data", {}).get("fingerprint")
        for split in (section, run.data_section()):
            with suppress(VitcliError):  # the run's data may have other columns and splits
                source = open_data(split, data) if split is not None else whole
                if source.fingerprint == known:
                    return source, source.split("test", "validation", "train")
    if set(whole.splits) != {"train"}:
        return whole, whole.split("test", "validation")
    return whole, whole.split("train")
