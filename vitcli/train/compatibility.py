"""Checks of a recipe against the data and the model, before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace

from vitcli.config.schema import ObjectiveSection, Recipe
from vitcli.data.augment.mixing import mixes_pairs
from vitcli.data.augment.policies import changes_pixels
from vitcli.data.augment.transform import resolve_augment
from vitcli.data.batch import check_batch
from vitcli.data.image_set import BatchSource, ImageSet, Stream
from vitcli.errors import VitcliError, quoted
from vitcli.train.objectives import OBJECTIVES, objective_class
from vitcli.train.objectives.mae import check_droppable
from vitcli.vit import Config, Network, ResNet
from vitcli.weights.edit import find_classes
from vitcli.weights.loaded import LoadedModel

TrainImages = ImageSet | BatchSource | Stream
MAX_NAMES = 5  # classes that an error lists


def check_augment(recipe: Recipe, images: TrainImages, processes: int) -> None:
    """Check that `[augment]` fits the data, the objective and the batch."""
    settings = resolve_augment(recipe.augment)
    mixes = mixes_pairs(settings)
    # Generated images come as whole batches with their variations.
    # A plan without data trains on noise; its augmentation is not measured.
    generated = images.kind == "batches" and recipe.data.name is not None
    if generated and (changes_pixels(settings) or settings.repeats > 1):
        raise VitcliError(
            f"`{recipe.data.name}` generates whole batches, which `[augment]` cannot change",
            "remove `augment.preset`, `policy`, the colour settings, `erase_rate` and `repeats`",
        )
    if images.kind == "stream" and settings.repeats > 1:
        raise VitcliError("a stream cannot repeat images", "remove `augment.repeats`")
    objective = objective_class(recipe.objective.name)
    if mixes and (objective.regression or not objective.supervised):
        raise VitcliError(
            f"objective `{recipe.objective.name}` has no classes that mixup or cutmix could mix",
            "`--set augment.mix_rate=0.0`",
        )
    micro = recipe.train.micro_batch_size
    if mixes and micro is not None and micro % 2:
        raise VitcliError(
            f"`train.micro_batch_size` = {micro} is odd, and mixup or cutmix needs pairs of images",
            f"`--set train.micro_batch_size={micro + 1}`",
        )
    check_batch(recipe.train.batch_size, processes, settings.repeats, mixes)


def check_sampler(recipe: Recipe, images: TrainImages) -> None:
    """Check that `data.sampler` has one class per image to choose by."""
    several = getattr(images, "targets", None) is not None
    faults = {
        "numbers instead of classes": getattr(images, "values", None) is not None,
        "several classes per image": several,
        "classes of one size, because it draws its images": images.kind == "batches",
    }
    # A plan without data trains on noise.
    if recipe.data.sampler == "shuffle" or recipe.data.name is None or not any(faults.values()):
        return
    found = next(text for text, applies in faults.items() if applies)
    raise VitcliError(
        f"`data.sampler={recipe.data.sampler}` chooses images by their class, and "
        f"`{recipe.data.name}` has {found}",
        "`--set objective.class_weights=balanced`, without `data.sampler`"
        if several
        else "remove `data.sampler`",
    )


def check_smaller_sizes(recipe: Recipe, config: Config) -> None:
    """Check that the model accepts each image size of `train.smaller_sizes`."""
    for side, _ in recipe.train.smaller_sizes:
        try:
            replace(config, image_size=(side, side))
        except ValueError as error:
            raise VitcliError(
                f"`train.smaller_sizes` has {side} px, which the model does not accept: {error}",
                "use multiples of the patch size",
            ) from error


def check_channels(recipe: Recipe, images: TrainImages, config: Config) -> None:
    """Check that images that are drawn as tensors have the channels of the model."""
    # A plan without data has noise of the right shape.
    drawn = images.kind == "batches" and recipe.data.name is not None
    if drawn and config.num_channels != 3:
        channels = config.num_channels
        raise VitcliError(
            f"`{recipe.data.name}` draws RGB images, and the model takes {channels} channel",
            "`--set model.num_channels=3`",
        )


def check_patch_drop(recipe: Recipe, network: Network) -> None:
    """Check that `train.patch_drop_rate`, if set, works with the model and the objective."""
    if not recipe.train.patch_drop_rate:
        return
    if isinstance(network, ResNet):
        raise VitcliError("a ResNet has no patches to drop", "`--set train.patch_drop_rate=0.0`")
    if objective_class(recipe.objective.name).masks_patches:
        raise VitcliError(
            f"objective `{recipe.objective.name}` masks patches and cannot drop others",
            "`--set train.patch_drop_rate=0.0`; `objective.mask_rate` sets the masked fraction",
        )
    check_droppable(network.config, "`train.patch_drop_rate`")
    if network.config.pool == "quadrants":
        raise VitcliError(
            "`train.patch_drop_rate` drops patches, and pool `quadrants` needs all of them",
            "`--set model.pool=mean`",
        )


def check_kept_head(model: LoadedModel, labels: Sequence[str], section: ObjectiveSection) -> None:
    """Check that the head of `model` is trained for the classes `labels`, in any order.

    Raises:
        VitcliError: it is not, or the objective reads its outputs in another way.
    """
    new_head = "leave out `--keep-head`: a new head is made for the classes of the data"
    if not model.head_trained or not model.labels:
        raise VitcliError(
            "`--keep-head`: this model has no trained head with class names", new_head
        )
    found = find_classes(labels, model.labels)
    missing = [label for label, index in zip(labels, found, strict=True) if index is None]
    known = set(found)
    extra = [label for i, label in enumerate(model.labels) if i not in known]
    faults = {"the data has": missing, "only the model has": extra}
    if texts := [f"{who} {quoted(names, MAX_NAMES)}" for who, names in faults.items() if names]:
        raise VitcliError(
            f"`--keep-head` needs the same classes in the data and in the model; "
            f"{', and '.join(texts)}",
            new_head,
        )
    wanted = objective_class(section.name).head_activation
    if wanted != model.head_activation:
        kinds = OBJECTIVES.items()
        able = next(n for n, kind in kinds if kind.head_activation == model.head_activation)
        raise VitcliError(
            f"`--keep-head`: the head was trained with `{model.head_activation}` outputs, and the "
            f"objective `{section.name}` has `{wanted}` outputs",
            f"`--set objective.name={able}`, or leave out `--keep-head`",
        )
