"""Choose images that a model was not trained on."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from vitcli.config.schema import DataSection, Inference
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source, open_data
from vitcli.data.split_record import NEW, KnownImages, known_images
from vitcli.errors import VitcliError, counted
from vitcli.hub.split_names import SPLITS
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.weights.loaded import LoadedModel


def open_whole(section: DataSection, data: str, watch: Watcher, *, numeric: bool = False) -> Source:
    """Open data for an evaluation: without splits that the data do not have."""
    # `open_data` would hold a part out. A single class of the model's can be evaluated, too.
    return open_data(
        section, data, whole=True, min_classes=1, watch=watch, streams=True, numeric=numeric
    )


def choose_images(
    data: str,
    model: str,
    net: LoadedModel,
    inference: Inference,
    watch: Watcher,
    opened: Source | None = None,
) -> tuple[Source, ImageSet]:
    """The test images of the data, else the validation images, else all images.

    Images that the model was trained on would give too high an accuracy. If the weights record
    their training images, choose those of the data that were held out, or that are new. Runs of
    earlier versions record a fingerprint of their data and splits, which serves unchanged data.

    Args:
        opened: the data from `open_whole`; None opens them.
    """
    section, numeric = inference.data, net.is_regression
    whole = opened or open_whole(section, data, watch, numeric=numeric)
    if section.streaming:
        return whole, whole.split("test", "validation")
    # The record in the weights comes first: it finds each image by its content, so it holds after
    # images were added, removed or renamed. A fingerprint only tells that nothing has changed.
    known = known_images(whole, net.split_record, watch)
    if known is not None and net.split_record is not None:
        if known.held_out is not None:
            # The usual split has the fingerprint that runs and feature caches know.
            with suppress(VitcliError):
                usual = whole.divided()
                if same_splits(usual, known.source):
                    return usual, usual.splits[known.held_out]
            watch.note(f"{data}: {known.describe(net.split_record)}")
            return known.source, known.source.splits[known.held_out]
        return whole, _not_trained_on(whole, known, model, watch)
    run = Run(Path(model))
    recorded = run.provenance().get("data", {}).get("fingerprint")
    if run.recipe_file.is_file():
        own = run.data_section()
        openers: list[Callable[[], Source]] = [whole.divided]
        if own is None:
            openers.append(lambda: whole)
        elif own.model_copy(update={"name": section.name}) != section:
            openers.append(partial(open_data, own, data, numeric=numeric))
        for opener in openers:
            with suppress(VitcliError):  # the data of the run may have other columns and splits
                source = opener()
                if source.fingerprint == recorded:
                    return source, source.split("test", "validation", "train")
    if set(whole.splits) != {"train"}:
        return whole, whole.split("test", "validation")
    images = whole.split("train")
    watch.warn(
        f"`{model}` does not record which images it was trained on: all {len(images):,} images of "
        f"{data} are evaluated, and the accuracy is too high if it was trained on some of them"
    )
    return whole, as_test(images)


def open_known(
    section: DataSection,
    data: str | None,
    net: LoadedModel,
    watch: Watcher,
    *,
    labelled: bool = True,
) -> Source:
    """Open data with the splits of the run that made `net`, if that run had these images.

    So no image that the model was trained on becomes a test image. Other data are split as the
    settings say.
    """
    if net.split_record is None:
        return open_data(section, data, labelled=labelled, watch=watch)
    whole = open_data(section, data, whole=True, labelled=labelled, watch=watch)
    source = whole.divided()
    known = known_images(whole, net.split_record, watch)
    if known is None:
        return source
    if known.held_out is not None and "train" in known.source.splits:
        if same_splits(source, known.source):
            return source
        note = f"{source.notation}: {known.describe(net.split_record)}"
        return replace(known.source, notes=(*whole.notes, note))
    if trained := known.count(SPLITS.index("train")):
        watch.warn(
            f"the model was trained on {counted(trained, 'image', 'images')} of {source.notation}, "
            "and none of the others was held out: an accuracy on them may be too high"
        )
    return source


def same_splits(one: Source, other: Source) -> bool:
    """True if the splits of two sources of the same data have the same images."""
    return one.splits.keys() == other.splits.keys() and all(
        np.array_equal(images.rows, other.splits[name].rows) for name, images in one.splits.items()
    )


def as_test(images: ImageSet) -> ImageSet:
    """The same images under the name `test`."""
    return images.subset(np.arange(len(images)), "test")


def _not_trained_on(whole: Source, known: KnownImages, model: str, watch: Watcher) -> ImageSet:
    """The images of the data that the run of the model did not have."""
    images = whole.split("test", "validation", "train")
    new = np.flatnonzero(known.roles[images.name] == NEW)
    trained = len(images) - len(new)
    if not len(new):
        watch.warn(
            f"`{model}` was trained on all {len(images):,} images, so the result says nothing "
            "about new images"
        )
        return images
    if trained:
        watch.warn(
            f"`{model}` was trained on {trained:,} of the {len(images):,} images, which are not "
            f"counted: {len(new):,} are left"
        )
        return images.subset(new, "test" if images.name == "train" else images.name)
    return as_test(images) if images.name == "train" else images
