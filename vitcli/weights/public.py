"""Public weights that load here, and the short names under which `--model` finds them.

The table is `public_models.csv`; this module is light, so that help and completion can read it.
Parameters (millions) and GMACs (billions of multiply-adds per image) are counted by `vit.macs` and
tests compare them. The Hub's revision is `main`, because no commit could be verified.
"""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vitcli.errors import VitcliError, nearest_path, printable
from vitcli.files import is_url

TABLE = Path(__file__).with_name("public_models.csv")
REVISION = "main"
TIMM = "timm/"
TIMM_RESULTS = "pytorch-image-models 0173a139, results/results-imagenet.csv"
WEIGHTS_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".onnx", ".npy")
# Architectures of timm with the tensors that `weights/timm` reads.
TIMM_NAME = re.compile(r"(vit|deit3?|flexivit|resnetv2|eva(02)?|beit(v2)?)_[a-z0-9_]+\.\w+")
RESNET = re.compile(r"resnet(?:v2_)?(50|101|152)")  # names of torchvision and timm
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Family:
    """Weights that were trained and measured in the same way.

    Attributes:
        title: the method and its training data.
        licence: of the weights, as timm 1.0.31 and the model cards give it.
        evidence: the source of the accuracies; None if none is given.
        protocol: the head that was measured: that of the weights, or a linear probe.
    """

    title: str
    evidence: str | None = TIMM_RESULTS
    licence: str = "apache-2.0"
    protocol: str = "top-1"


FAMILIES = {
    "augreg": Family("AugReg: ImageNet-21k, fine-tuned on ImageNet-1k"),
    "augreg-in21k": Family("AugReg: ImageNet-21k", None),
    "google": Family(
        "AugReg, Google's .npz files: ImageNet-21k, fine-tuned on ImageNet-1k",
        "google-research/vision_transformer c6de1e53, README.md",
    ),
    "vit": Family("The paper's ViT: ImageNet-21k (`in21k`), or fine-tuned on ImageNet-1k"),
    "vit-transformers": Family("The paper's ViT in transformers' layout", None),
    "sam": Family("Sharpness-aware minimisation (SAM): ImageNet-1k"),
    "deit": Family("DeiT: ImageNet-1k"),
    "deit3": Family("DeiT III: ImageNet-1k, or ImageNet-22k (`in22k`) and ImageNet-1k"),
    "flexivit": Family("FlexiViT: ImageNet-1k"),
    "clip": Family("CLIP vision towers, fine-tuned on ImageNet-12k and ImageNet-1k"),
    "clip-openai": Family("OpenAI's CLIP: 400 million images with texts", None, licence="mit"),
    "clip-laion": Family("open_clip: LAION-2B images with texts", None, licence="mit"),
    "siglip": Family("SigLIP and SigLIP 2 vision towers: WebLI", None),
    "dino": Family(
        "DINO: ImageNet-1k without labels",
        "facebookresearch/dino 00e1bccc, README.md",
        protocol="linear probe",
    ),
    "dinov2": Family(
        "DINOv2: LVD-142M without labels",
        "facebookresearch/dinov2 e203621e, README.md",
        protocol="linear probe",
    ),
    "dinov3": Family("DINOv3: LVD-1689M without labels", None, licence="dinov3-license"),
    "eva02": Family(
        "EVA-02: masked images of ImageNet-22k or Merged-38M, some fine-tuned on ImageNet",
        licence="mit",
    ),
    "beit": Family(
        "BEiT and BEiT v2: masked images (`pt22k`), fine-tuned on ImageNet-22k and ImageNet-1k"
    ),
    "data2vec": Family("Data2Vec-vision: ImageNet-1k without labels, or fine-tuned (`ft1k`)", None),
    "msn": Family("MSN: ImageNet-1k without labels", None),
    "ijepa": Family(
        "I-JEPA: ImageNet-1k or ImageNet-22k (`in22k`) without labels",
        None,
        licence="cc-by-nc-4.0",
    ),
    "mae": Family("MAE: ImageNet-1k without labels", None, licence="cc-by-nc-4.0"),
    "bit": Family("BiT ResNets: ImageNet-21k (`in21k`), or fine-tuned on ImageNet-1k"),
}


@dataclass(frozen=True)
class PublicModel:
    """One row of the table.

    Attributes:
        name: the short name.
        model: the Hub repository, or the URL of a file.
        variant: the size, as in `vit.variants`.
        image_size: side in pixels.
        accuracy: published accuracy on the validation images of ImageNet-1k in percent, by the
            protocol of the family.
        parameters: in millions, with the head.
        gmacs: billions of multiply-adds per image.
    """

    family: str
    name: str
    model: str
    variant: str
    image_size: int
    accuracy: float | None
    parameters: float
    gmacs: float

    @property
    def source(self) -> str:
        """The MODEL that `load_model` reads."""
        return self.model if is_url(self.model) else f"hf:{self.model}"

    @property
    def revision(self) -> str | None:
        """The revision on the Hub; None for a URL."""
        return None if is_url(self.model) else REVISION

    @property
    def facts(self) -> Family:
        """What holds for all weights of the family."""
        return FAMILIES[self.family]


@cache
def public_models() -> dict[str, PublicModel]:
    """Short name -> row, in the order of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [
            PublicModel(
                family=row["family"],
                name=row["name"],
                model=row["model"],
                variant=row["variant"],
                image_size=int(row["image_size"]),
                accuracy=float(row["accuracy"]) if row["accuracy"] else None,
                parameters=float(row["parameters"]),
                gmacs=float(row["gmacs"]),
            )
            for row in csv.DictReader(file)
        ]
    return {row.name: row for row in rows}


def search_models(words: list[str]) -> list[PublicModel]:
    """The rows that contain every word in name, repository, variant, licence or title."""
    lowered = [word.lower() for word in words]
    found = []
    for row in public_models().values():
        facts = row.facts
        text = f"{row.name} {row.source} {row.variant} {facts.licence} {facts.title}".lower()
        if all(word in text for word in lowered):
            found.append(row)
    return found


def resolve_name(model: str) -> str:
    """The MODEL that a public name means; any other MODEL is returned as it is.

    A short name, a name of timm (with or without `timm/`, with or without its tag) and `ORG/NAME`
    on the Hub are public names, also with `@REVISION`. A path that exists wins over all of them.

    Raises:
        VitcliError: the text is neither a path nor a public name.
    """
    if not model or model.startswith("hf:") or is_url(model) or Path(model).exists():
        return model
    name, at, revision = model.partition("@")
    if (row := _known(name)) is not None and (not at or row.source.startswith("hf:")):
        return row.source + at + revision
    if TIMM_NAME.fullmatch(model):
        return f"hf:{TIMM}{model}"
    if HUB_NAME.fullmatch(model) and not _is_path(model):
        return f"hf:{model}"
    raise VitcliError(f"no such model: `{printable(model)}`", hint=_hint_for(model))


def is_listed(model: str) -> bool:
    """True if the table has this name."""
    return _known(model) is not None


def _known(model: str) -> PublicModel | None:
    """The row with this short name or repository, or the first with this architecture of timm.

    The first is timm's own default; a test of the table's order says so.
    """
    table = public_models()
    if model in table:
        return table[model]
    repository = model if "/" in model else f"{TIMM}{model}"
    rows = [row for row in table.values() if row.model == repository]
    if not rows and repository.startswith(TIMM) and "." not in model:
        rows = [row for row in table.values() if row.model.partition(".")[0] == repository]
    return rows[0] if rows else None


def _is_path(model: str) -> bool:
    """True if `FOLDER/NAME` means a path here rather than a repository."""
    from vitcli.run import RUNS  # which imports the schema, too slow for a completion

    folder = Path(model).parent
    return folder.exists() or folder == RUNS or model.lower().endswith(WEIGHTS_SUFFIXES)


def similar_names(model: str) -> list[str]:
    """At most one sentence: the path and the public names that are similar, `hf:` spelled out."""
    from difflib import get_close_matches

    near = nearest_path(model)
    found = [] if near is None else [f"`{printable(near)}`"]
    model = model.lower().rstrip("/")
    if resnet := RESNET.fullmatch(model):
        found.append(f"`R{resnet[1]}x1` (random weights)")
        model = f"bit-r{resnet[1]}x1"
    rows = public_models().values()
    names = [*public_models(), *(row.source.removeprefix("hf:") for row in rows)]
    if "/" not in model:
        names += [row.model.removeprefix(TIMM) for row in rows]
    # `vit_tiny` is the start of a name. A similarity alone does not find it.
    started = [name for name in names if len(model) > 3 and name.startswith(model)][:1]
    started = [row.name for row in map(_known, started) if row]
    for name in list(dict.fromkeys([*started, *get_close_matches(model, names, n=3)]))[:3]:
        row = _known(name)
        found.append(f"`{name}` (`{row.source}`)" if row else f"`{name}`")
    if len(found) == 1 and near is not None:
        return [f"did you mean {found[0]}?"]
    return [f"similar names: {', '.join(found)}; `vitcli models` lists all"] if found else []


def _hint_for(model: str) -> str:
    """The hint for a MODEL that is neither a path nor a public name."""
    from vitcli.run import RUNS

    similar = similar_names(model)
    hub = HUB_NAME.fullmatch(model) and not model.lower().endswith(WEIGHTS_SUFFIXES)
    if hub and Path(model).parent != RUNS:
        similar.append(f"for a repository on the Hugging Face Hub use `hf:{model}`")
    return "; ".join(similar) or (
        "a MODEL is a run directory, a weights file or folder, `hf:ORG/NAME`, a URL, a variant "
        "such as `B/16`, or a name that `vitcli models` lists"
    )
