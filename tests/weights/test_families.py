"""Every model type that vitcli reads, against transformers: no type and no option is forgotten.

`pytest tests/weights/test_families.py --write-families` writes the measured differences into the
table of `docs/how-to/families.md`.
"""

import re
from pathlib import Path

import pytest
import torch
from support.families import (
    FAMILIES,
    LARGE,
    UNUSED,
    differences,
    native_size,
    random_model,
)

from vitcli.errors import VitcliError
from vitcli.weights.from_checkpoint import build_model, empty_network
from vitcli.weights.huggingface.huggingface_names import MODEL_TYPES, NOT_READ, TEACHER
from vitcli.weights.huggingface.read_huggingface import read_huggingface
from vitcli.weights.overrides import Overrides

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs/how-to/families.md"
TOLERANCE = 5e-5
CASES = [
    pytest.param(name, cls, settings, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, (cls, settings) in enumerate(family.models)
]
# (model type, native) -> kind -> the largest difference; filled by the tests, read by the last.
MEASURED: dict[tuple[str, bool], dict[str, float]] = {}


@pytest.mark.parametrize("classic", [True, False], ids=["classic", "in-memory"])
@pytest.mark.parametrize(("name", "cls", "settings"), CASES)
def test_a_family_is_what_transformers_computes(tmp_path, name, cls, settings, classic):
    family = FAMILIES[name]
    theirs = random_model(cls, family.config, settings)
    assert theirs.config.model_type == name or name in theirs.config.model_type
    theirs.save_pretrained(tmp_path, save_original_format=classic)
    native = native_size(settings)
    square = native[0] == native[1]  # transformers takes the grid of the positions as square
    for size in (native, *(family.other_sizes if classic and square else ())):
        found = differences(tmp_path, family, theirs, size, size == native)
        assert max(found.values()) < TOLERANCE, (size, found)
        worst = MEASURED.setdefault((name, size == native), {})
        for kind, value in found.items():
            worst[kind] = max(worst.get(kind, 0.0), value)


@pytest.mark.parametrize("name", LARGE)
def test_public_sizes_by_their_shapes(name):
    """On the meta device, without memory: every tensor finds its place in our network."""
    family = FAMILIES[name]
    for settings in LARGE[name]:
        registers = {"num_register_tokens": 4} if name == "dinov3_vit" else {}
        config = getattr(transformers, family.config)(**settings, **registers)
        with torch.device("meta"):
            theirs = getattr(transformers, MODEL_TYPES[name].backbone)(config)
        tensors = theirs.state_dict()
        found = read_huggingface(tensors, "folder", config.to_dict(), None, Overrides())
        wanted = {key: t.shape for key, t in empty_network(found.config).state_dict().items()}
        assert {key: t.shape for key, t in found.tensors.items()} == wanted
        assert found.config.num_heads == settings["num_attention_heads"]


DAMAGED = ("beit", "data2vec-vision", "ijepa", "vit_msn", "vit_mae", "dinov2_with_registers")
OPTIONAL = r"mask_token|decoder\.|pooler\.dense|patch_embeddings"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_half_folder_is_refused_in_words(name):
    """Without any one tensor, with one of another shape, and with another config.json."""
    family = FAMILIES[name]
    theirs = random_model(family.models[0][0], family.config, family.models[0][1])
    tensors, described = theirs.state_dict(), theirs.config.to_dict()

    def read(tensors, **values):
        found = read_huggingface(tensors, "folder", {**described, **values}, None, Overrides())
        return build_model(found, "folder")

    read(tensors)
    first = [n for n in tensors if "layers.1." not in n and not re.search(OPTIONAL, n)]
    assert len(first) > 15
    for key in first:
        rest = {n: t for n, t in tensors.items() if n != key}
        for half in (rest, {**tensors, key: torch.cat([tensors[key]] * 2)}):
            with pytest.raises(VitcliError, match=r"missing: |another shape|not part of|weights"):
                read(half)
    for key, value, words in (
        ("hidden_size", 96, "another shape"),
        ("num_hidden_layers", 3, "the weights have"),
        ("image_size", 64, "another shape|missing"),
        ("num_attention_heads", 5, "5 heads"),
        ("hidden_act", "relu", "activation `relu`"),
    ):
        with pytest.raises(VitcliError, match=words):
            read(tensors, **{key: value})


def test_a_bias_of_oblong_images_is_refused():
    theirs = random_model("BeitModel", "BeitConfig", {**FAMILIES["beit"].models[0][1]})
    described = {**theirs.config.to_dict(), "image_size": [32, 16]}
    with pytest.raises(VitcliError, match="images of 32x16 px, whose offsets transformers 4 and 5"):
        read_huggingface(theirs.state_dict(), "folder", described, None, Overrides())


def test_no_type_and_no_class_is_forgotten():
    assert set(FAMILIES) == set(MODEL_TYPES)
    compared = {cls.partition(" ")[0] for f in FAMILIES.values() for cls, _ in f.models}
    for family in MODEL_TYPES.values():
        assert {family.backbone, family.classifier} - {None} <= compared
    assert TEACHER in compared


@pytest.mark.parametrize("name", FAMILIES)
def test_no_option_is_forgotten(name):
    """Each option of the configuration is changed by a model, or `UNUSED` says why not."""
    family = FAMILIES[name]
    shared = set(vars(transformers.PretrainedConfig()))
    config = getattr(transformers, family.config)
    default = config()
    options = {key for key in vars(default) if key not in shared and key != "stage_names"}
    changed = {
        key
        for _, settings in family.models
        for key, value in settings.items()
        if getattr(default, key, None) != value
    }
    assert options - changed - set(UNUSED) - set(family.unused) == set()


def test_other_types_are_refused_by_name():
    """A Vision Transformer of transformers is read, or the error names the nearest thing."""
    assert not set(NOT_READ) & set(MODEL_TYPES)
    patches = {"embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 4, 4)}
    for model_type, hint in NOT_READ.items():
        assert model_type in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        with pytest.raises(VitcliError) as error:
            read_huggingface(patches, "folder", {"model_type": model_type}, None, Overrides())
        assert f"`{model_type}`" in error.value.message and hint in error.value.hint
    auto = transformers.models.auto.modeling_auto
    known = set(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    known |= {name for name in auto.MODEL_MAPPING_NAMES if re.search(r"vit|dino|clip|siglip", name)}
    known = {name for name in known if "_text" not in name} - {"vits"}  # which makes speech
    unknown = known - set(MODEL_TYPES) - set(NOT_READ)
    assert not unknown, f"neither read nor in NOT_READ: {sorted(unknown)}"


def number(value):
    """`2e-06`, or nothing for a kind that the family does not have."""
    return "" if value is None else f"{value:.0e}"


def table(old):
    """The table of the page; a type that the tests above have not measured keeps its `old` row."""
    rows = [
        "| model type | classes of transformers | sizes | native: features | logits | "
        "other sizes: features | logits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    before = {row.split("`")[1]: row for row in old.splitlines() if row.startswith("| `")}
    for name, family in FAMILIES.items():
        if name in before and (name, True) not in MEASURED:
            rows.append(before[name])
            continue
        classes = sorted({cls.partition(" ")[0] for cls, _ in family.models})
        cells = [f"`{name}`", ", ".join(f"`{cls}`" for cls in classes), family.sizes]
        for native in (True, False):
            worst = MEASURED.get((name, native), {})
            cells += [number(worst.get("features")), number(worst.get("logits"))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_the_page_lists_every_family(request):
    """The page has a row per type with the differences; `--write-families` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- families -->\n", "<!-- end of families -->"
    before, _, rest = text.partition(start)
    old, _, after = rest.partition(end)
    if request.config.getoption("--write-families"):
        PAGE.write_text(f"{before}{start}{table(old)}{end}{after}", encoding="utf-8")
        return
    named = re.findall(r"^\| `([\w-]+)`", old, flags=re.MULTILINE)
    assert named == list(FAMILIES), "run this file with --write-families"
    for value in re.findall(r"\d+e-\d+", old):
        assert float(value) < TOLERANCE
    assert all(f"`{name}`" in after for name in NOT_READ)
