"""Public names: the table against our own counts and published ones, and loading by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.loopback import write_model
from support.watching import Told

from vitcli.cli.main import run
from vitcli.commands import models
from vitcli.errors import VitcliError
from vitcli.vit.macs import macs
from vitcli.vit.variants import from_config, is_variant, parse_variant
from vitcli.weights.load import load_model
from vitcli.weights.public import (
    FAMILIES,
    public_models,
    resolve_name,
    search_models,
    similar_names,
)

TABLE = public_models()
TI = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
# Millions of parameters in timm's results/results-imagenet.csv at 0173a139.
PUBLISHED = {
    "vit-ti16-augreg": 5.72, "vit-s32-augreg-384": 22.92, "vit-b8-augreg2": 86.58,
    "vit-l16-augreg-384": 304.72, "r-ti16-augreg": 6.34, "r26-s32-augreg-384": 36.47,
    "r50-l32-augreg": 328.99, "r50-b16-384": 98.95, "vit-l32-orig-384": 306.63,
    "vit-b32-sam": 88.22, "deit-ti16-distilled": 5.91, "deit-b16-distilled-384": 87.63,
    "deit3-m16": 38.85, "deit3-h14": 632.13, "flexivit-s16": 22.06, "clip-b32-384": 88.30,
    "clip-l14-336": 304.53, "clip-h14-336": 632.46, "bit-r50x1": 25.55, "bit-r101x1": 44.54,
    "bit-r50x3": 217.32, "eva02-ti14-336": 5.76, "eva02-s14-336": 22.13, "eva02-b14-448": 87.12,
    "eva02-l14-448": 305.08,
}  # fmt: skip
# Heads that have no weights of their own in the file, and what a family adds to the variant.
BACKBONES = (
    "clip-openai",
    "clip-laion",
    "siglip",
    "dino",
    "dinov2",
    "dinov3",
    "mae",
    "msn",
    "ijepa",
)
BEIT = {"position": "none", "key_bias": False, "layer_scale": 0.1, "pool": "mean"}
SETTINGS = {
    "deit3": {"layer_scale": 1e-6, "position_covers_prefix": False},
    "flexivit": {"position_covers_prefix": False},
    "clip": {"norm_before_blocks": True, "patch_bias": False},
    "clip-openai": {"norm_before_blocks": True, "patch_bias": False},
    "clip-laion": {"norm_before_blocks": True, "patch_bias": False},
    "siglip": {"pool": "map", "class_token": False},
    "dinov2": {"layer_scale": 1e-5},
    "dinov3": {
        "rope": "centred",
        "position": "none",
        "num_registers": 4,
        "layer_scale": 1.0,
        "key_bias": False,
    },
    "beit": BEIT,
    "data2vec": BEIT,
    "ijepa": {"pool": "mean", "class_token": False},
    "eva02": {
        "rope": "index",
        "mlp": "swiglu",
        "key_bias": False,
        "pool": "mean",
        "norm_after_pool": True,
    },
}
# Hidden widths of EVA-02, 2/3 of 4 times the width.
EVA_MLP = {"Ti": 512, "S": 1024, "B": 2048, "L": 2730}


def config_of(row):
    """The configuration that the row's variant, family and name mean."""
    is_21k = row.name.endswith("in21k") and row.family in ("augreg-in21k", "bit")
    classes = 21843 if is_21k else 1000
    if row.family in BACKBONES or (row.name.endswith("in21k") and not is_21k):
        classes = 0
    settings = dict(SETTINGS.get(row.family, {}))
    if "distilled" in row.name and row.family == "deit":
        settings |= {"distillation_token": True, "distillation_head": True, "pool": "distilled"}
    if row.name == "vit-b16-google-in21k":  # its pooler
        settings["representation_size"] = 768
    if row.name.endswith("-reg"):
        settings |= {"num_registers": 4, "position_covers_prefix": False}
    if row.name.startswith("dinov2-g14"):
        settings |= {"embed_dim": 1536, "mlp_dim": 4096, "num_heads": 24, "mlp": "swiglu"}
    if row.family in ("clip-openai", "clip-laion"):
        settings["projection_size"] = {"B": 512, "L": 768, "H": 1024}[row.variant[0]]
    if row.family == "eva02":
        classes = 1000 if row.accuracy else 0
        size = row.variant.partition("/")[0]
        settings |= {"mlp_dim": EVA_MLP[size], "mlp_norm": size in "BL"}
    if row.family in ("beit", "data2vec"):
        tuned = bool(row.accuracy) or row.name.endswith("ft1k")
        classes = 1000 if tuned else 0
        bias = "every" if tuned else "shared"
        settings |= {"position_bias": bias, "norm_after_pool": tuned}
    if row.family == "dinov3" and row.name.endswith("plus"):
        settings |= {"mlp": "swiglu", "num_heads": {"S": 6, "H": 20}[row.variant[0]]}
    return parse_variant(
        row.variant, image_size=[row.image_size] * 2, num_classes=classes, **settings
    )


def parameters_of(config):
    with torch.device("meta"):
        return sum(p.numel() for p in from_config(config).parameters())


def test_the_table_is_sound():
    sources = [row.source for row in TABLE.values()]
    assert len(TABLE) > 100 and len(set(sources)) == len(sources)
    assert list(FAMILIES) == list(dict.fromkeys(row.family for row in TABLE.values()))
    for name, row in TABLE.items():
        assert not is_variant(name) and name == name.lower() and len(name) <= 24
        assert (row.accuracy is None) or row.facts.evidence
        assert resolve_name(name) == row.source
        if row.source.startswith("hf:"):
            assert resolve_name(f"{name}@0123abc") == f"{row.source}@0123abc"


SAMPLE = [
    "r-ti16-augreg",
    "deit-ti16-distilled",
    "dinov2-s14-reg",
    "siglip-b16",
    "siglip2-b16-naflex",
    "clip-openai-b32",
    "beit-b16",
    "beit-b16-pt22k",
    "ijepa-h14",
    "vit-ti16-augreg-in21k",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_counts_are_ours(name):
    row, config = TABLE[name], config_of(TABLE[name])
    assert parameters_of(config) / 1e6 == pytest.approx(row.parameters, abs=0.006)
    assert macs(config) / 1e9 == pytest.approx(row.gmacs, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_are_ours(family):
    for row in (row for row in TABLE.values() if row.family == family):
        assert parameters_of(config_of(row)) / 1e6 == pytest.approx(row.parameters, abs=0.006), row


@pytest.mark.proof
@pytest.mark.parametrize("family", FAMILIES)
def test_all_multiply_adds_are_ours(family):
    for row in (row for row in TABLE.values() if row.family == family):
        assert macs(config_of(row)) / 1e9 == pytest.approx(row.gmacs, abs=0.006), row


def test_the_parameters_are_the_published_ones():
    assert {name: TABLE[name].parameters for name in PUBLISHED} == PUBLISHED


def test_the_multiply_adds_are_those_of_the_official_code(shared):
    found = json.loads((shared / "reference/facts.json").read_text())["models"]
    for model, name in (
        ("ViT-Ti_16", "vit-ti16-augreg"),
        ("ViT-S_16", "vit-s16-augreg"),
        ("ViT-B_16", "vit-b16-augreg"),
        ("ViT-L_16", "vit-l16-augreg"),
        ("ViT-S_32", "vit-s32-augreg"),
        ("R26+ViT-S_32", "r26-s32-augreg"),
        ("R50+ViT-L_32", "r50-l32-augreg"),
    ):
        for size, suffix in ((224, ""), (384, "-384")):
            gmacs = found[model]["compute"][f"{size}px"]["gmacs"]
            assert TABLE[f"{name}{suffix}"].gmacs == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("vit-ti16-augreg", f"hf:{TI}"),
        (TI, f"hf:{TI}"),
        (TI.removeprefix("timm/"), f"hf:{TI}"),
        ("vit_tiny_patch16_224", f"hf:{TI}"),  # timm's own default tags
        ("vit_base_patch16_224", "hf:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("timm/vit_base_patch16_siglip_224", "hf:timm/vit_base_patch16_siglip_224.v2_webli"),
        ("vit_small_patch16_224.unlisted", "hf:timm/vit_small_patch16_224.unlisted"),
        ("google/vit-base-patch16-224", "hf:google/vit-base-patch16-224"),
        ("somebody/anything@v1", "hf:somebody/anything@v1"),
        ("hf:a/b", "hf:a/b"),
        ("https://host/x.npz", "https://host/x.npz"),
    ],
)
def test_names(here, given, model):
    assert resolve_name(given) == model


@pytest.mark.parametrize("given", ["runs/photos", "weights/x.safetensors", "google/x", "../a/b"])
def test_paths_are_not_names(here, given):
    (here / "google").mkdir()
    with pytest.raises(VitcliError, match="no such model"):
        resolve_name(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/flower", "did you mean `runs/flowers/`?"),
        ("run/flower/", "did you mean `runs/flowers/`?"),
        ("runs/flowers/model.safetensor", "did you mean `runs/flowers/model.safetensors`?"),
        ("vit_tiny/", "`vit-ti16-augreg`"),
        ("vit_tiny", "`vit-ti16-augreg`"),
        ("resnet50", "`R50x1` (random weights)"),
        ("resnet50", "`bit-r50x1`"),
    ],
)
def test_a_misspelt_model_is_guessed(here, given, meant):
    write_model(here / "runs/flowers/model.safetensors")
    assert meant in " ".join(similar_names(given))


def test_a_misspelt_run_is_not_taken_for_a_repository(here):
    write_model(here / "runs/flowers/model.safetensors")
    with pytest.raises(VitcliError) as error:
        resolve_name("runs/flower")
    assert error.value.hint == "did you mean `runs/flowers/`?"
    with pytest.raises(VitcliError) as error:
        resolve_name("runs/z")
    assert "hf:runs" not in error.value.hint


def test_search():
    assert [row.name for row in search_models(["DINOv2", "b/14"])] == [
        "dinov2-b14",
        "dinov2-b14-reg",
    ]
    assert {row.family for row in search_models(["cc-by-nc"])} == {"ijepa", "mae"}
    with pytest.raises(VitcliError, match="no listed model contains `resnext`"):
        models.run(["resnext"])


@pytest.fixture
def hub(loopback):
    write_model(loopback.root / f"models/{TI}/model.safetensors")
    write_model(loopback.root / "models/org/ours/model.safetensors", seed=1)
    return loopback


def test_every_name_loads_the_same(hub, here):
    expected = load_model(f"hf:{TI}").state_dict()
    for name in ("vit-ti16-augreg", "vit_tiny_patch16_224", TI, TI.removeprefix("timm/")):
        model = load_model(name)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())
        assert f"hf:{TI}: commit {hub.commit(TI)}" in model.load_report.notes
    other = load_model("org/ours")
    assert not torch.equal(other.network.head.weight, expected["head.weight"])


def test_a_path_wins_over_a_name(hub, here):
    write_model(here / "vit-ti16-augreg/model.safetensors", depth=2)
    write_model(here / "org/ours/model.safetensors", depth=2)
    assert load_model("vit-ti16-augreg").config.depth == 2
    assert load_model("org/ours").config.depth == 2


def test_a_command_takes_a_name(hub, here, capfd):
    Image.new("RGB", (16, 16)).save(here / "a.png")
    assert run(["predict", "a.png", "--model", "vit-ti16-augreg", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["label"] in ("ant", "bee", "cat")


def test_fetch_and_then_work_without_the_network(hub, here, capfd):
    assert run(["models", "fetch", "vit-ti16-augreg", "--json"]) == 0
    out, err = capfd.readouterr()
    fetched = json.loads(out)
    assert fetched["model"] == f"hf:{TI}" and Path(fetched["path"]).is_file()
    assert "downloading model.safetensors" in err
    hub.__exit__()
    assert load_model("vit-ti16-augreg").labels == ("ant", "bee", "cat")
    # The folder to copy is all that another machine needs.
    moved = here / "elsewhere"
    shutil.move(fetched["folder"], moved)
    with pytest.raises(VitcliError) as error:
        load_model("vit-ti16-augreg")
    assert f"`vitcli models fetch hf:{TI}`" in error.value.hint
    assert fetched["folder"] in error.value.hint
    shutil.move(moved, fetched["folder"])
    assert load_model("vit-ti16-augreg").labels == ("ant", "bee", "cat")


def test_a_file_at_a_url_names_the_command_too(hub):
    hub.__exit__()
    with pytest.raises(VitcliError, match="cannot download") as error:
        load_model(f"{hub.url}/files/x.npz")
    assert f"`vitcli models fetch {hub.url}/files/x.npz`" in error.value.hint


def test_a_misspelt_repository(hub, here):
    for given, similar in (
        ("google/vit-base-patch16-244", "`google/vit-base-patch16-224` (`hf:google/vit-base"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in2k", f"(`hf:{TI}`)"),
    ):
        with pytest.raises(VitcliError, match="is no path here, and the Hub has no model") as error:
            load_model(given)
        assert similar in error.value.hint


def test_fetch_refuses_a_path(hub, here):
    write_model(here / "mine.safetensors")
    with pytest.raises(VitcliError, match="on this machine already"):
        models.fetch("mine.safetensors", Told())
    assert run(["models", "fetch"]) == 2


def test_the_estimate(monkeypatch, capfd):
    monkeypatch.setattr(models, "matrix_peak", lambda device, precision: 1e12)
    (row,) = models.run(["vit-s16-augreg", "224", "ft_in1k"]).rows
    assert row.images_per_second == pytest.approx(0.6 * 1e12 / (2 * 4.6e9))
    assert run(["models", "vit-s16-augreg", "ft_in1k"]) == 0
    out = capfd.readouterr().out
    assert "estimate" in out and "~65" in out
    assert run(["models", "mae", "--json"]) == 0
    assert [m["accuracy"] for m in json.loads(capfd.readouterr().out)] == [None] * 3
