"""timm's layout, against numbers that timm computed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.timm_files import read, tiny

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model, require_preprocess
from vitcli.weights.loaded import create_model

CASES = 4


@pytest.fixture
def plain(tmp_path):
    """A small file in timm's layout that says nothing about itself, and its model."""
    net = create_model("Pico/4", num_classes=10, image_size=28, num_channels=1, depth=2)
    torch.nn.init.normal_(net.network.head.weight)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors", net


def test_reference_logits(shared):
    cases = sorted((shared / "reference/timm_vit").glob("*/model.safetensors"))
    assert len(cases) >= CASES
    for path in cases:
        io = np.load(path.parent / "io.npz")
        model = load_model(path, num_heads=3)
        with torch.no_grad():
            images = torch.from_numpy(io["images"])
            assert np.abs(model(images).numpy() - io["logits"]).max() < 1e-5, path
            assert np.abs(model.features(images).numpy() - io["pre_logits"]).max() < 1e-5, path


def test_what_the_file_does_not_say_is_named(plain):
    path, _ = plain
    with pytest.raises(VitcliError) as error:
        load_model(path)
    keys = ("model.num_heads", "preprocess.mean", "preprocess.std")
    assert all(key in error.value.message and key in error.value.hint for key in keys)
    model = load_model(path, num_heads=4)
    with pytest.raises(VitcliError) as error:
        require_preprocess(model)
    assert "model.num_heads" not in error.value.message
    assert "`preprocess.mean`, `preprocess.std`" in error.value.message
    model = load_model(path, num_heads=4, preprocess={"mean": 0.5, "std": [0.25]})
    assert (model.preprocess.mean, model.preprocess.std) == ((0.5,), (0.25,))
    assert model.preprocess.num_channels == 1


def test_settings_reach_the_config(plain):
    path, net = plain
    model = load_model(path, num_heads=8, norm_eps=1e-5, gelu="tanh", pool="gap")
    assert (model.config.num_heads, model.config.norm_eps) == (8, 1e-5)
    assert (model.config.gelu, model.config.pool) == ("tanh", "mean")
    assert torch.equal(
        model.network.head.weight, net.network.head.weight
    )  # the user says what the head reads
    with pytest.raises(VitcliError, match="5, which does not divide the width 128"):
        load_model(path, num_heads=5)


def test_quadrants_have_no_head_in_timm(plain):
    model = load_model(plain[0], num_heads=4, pool="quadrants")
    assert model.config.num_classes == 0 and not model.head_trained
    assert model.load_report.status["head.weight"][0] == "dropped"
    assert model.features(torch.zeros(1, 1, 28, 28)).shape == (1, 512)


def test_the_variant_says_heads_and_normalisation(tmp_path):
    net = create_model("Ti/16", num_classes=5, image_size=32)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load_model(tmp_path / "w.safetensors")
    assert model.config == net.config
    assert model.preprocess.mean == (0.5, 0.5, 0.5)
    notes = " ".join(model.load_report.notes)
    assert "3 heads" in notes and "assumed" in notes and model.labels is None


def test_the_hub_config_beside_it(plain):
    path, _ = plain
    hub = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 10,
        "global_pool": "avg",
        "model_args": {"num_heads": 2, "fc_norm": False},
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "mean": [0.2],
            "std": [0.3],
            "crop_pct": 0.7,
            "interpolation": "bilinear",
            "label_names": [f"n{i}" for i in range(10)],
        },
    }
    (path.parent / "config.json").write_text(json.dumps(hub))
    for given in (path, path.parent):
        model = load_model(given)
        p = model.preprocess
        assert (p.mean, p.std, p.crop_fraction) == ((0.2,), (0.3,), 0.7)
        assert p.interpolation == "bilinear"
        assert (model.config.num_heads, model.config.pool) == (2, "mean")
        assert model.labels[3] == "n3"
    assert load_model(path, num_heads=4).config.num_heads == 4  # what is said goes first
    (path.parent / "config.json").write_text("{")
    with pytest.raises(VitcliError, match="cannot be read as JSON"):
        load_model(path)


def test_common_prefixes_go(plain):
    path, net = plain
    save_file({f"module.{k}": v for k, v in load_file(path).items()}, path)
    model = load_model(path, num_heads=4)
    assert torch.equal(model.network.pos_embed, net.network.pos_embed)


def test_a_grid_that_is_not_square(tmp_path):
    net = create_model("Pico/8", image_size=(16, 40), depth=1)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match="do not form a square grid"):
        load_model(tmp_path / "w.safetensors", num_heads=4)
    model = load_model(tmp_path / "w.safetensors", num_heads=4, image_size=(16, 40))
    assert model.config.grid == (2, 5) and not model.load_report.names("resampled")


# Options of timm's VisionTransformer, in our words. Each file of such a model says by its tensors,
# the number of heads and the image size what it is.
OPTIONS = {
    "mean": {"pool": "mean", "class_token": False},
    "mean, fc_norm": {"pool": "mean", "norm_after_pool": True},
    "map": {"pool": "map", "class_token": False},
    "map beside a class token": {"pool": "map"},
    "map, fc_norm, registers": {"pool": "map", "norm_after_pool": True, "num_registers": 2},
    "reg_tokens": {"num_registers": 3},
    "reg_tokens, no_embed_class": {"num_registers": 3, "position_covers_prefix": False},
    "no_embed_class": {"position_covers_prefix": False},
    "registers alone": {"num_registers": 1, "class_token": False, "pool": "mean"},
    "pre_norm": {"norm_before_blocks": True, "patch_bias": False},
    "qk_norm": {"qk_norm": True},
    "init_values": {"layer_scale": 1e-5},
    "qkv_bias": {"qkv_bias": False},
    "in_chans": {"num_channels": 1},
    "img_size": {"image_size": (16, 40)},
    "img_size, no_embed_class": {"image_size": (16, 40), "position_covers_prefix": False},
    "pos_embed": {"position": "none"},
    "swiglu": {"mlp": "swiglu", "layer_scale": 1e-5},
    "no head": {"num_classes": 0},
    "distilled": {
        "pool": "distilled",
        "distillation_token": True,
        "distillation_head": True,
        "image_size": (16, 40),
    },
    "distilled, no head": {"pool": "distilled", "distillation_token": True, "num_classes": 0},
    "two widths in one head": {"pool": "token_mean"},
    "hybrid, root alone": {"stem": (), "stem_width": 0.5, "image_size": (32, 64)},
    "hybrid, stride 16": {"stem": (1, 2, 1), "patch_size": 1, "image_size": (32, 64)},
    "hybrid, patches of 2": {"stem": (1, 1), "patch_size": 2, "num_channels": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tensors_say_what_the_model_is(options):
    net = tiny(**options)
    back = read(net.state_dict(), num_heads=3, image_size=net.config.image_size)
    assert back.config == net.config
    assert set(back.state_dict()) == set(net.state_dict())
    size = net.config.num_channels, *net.config.image_size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back(images), net(images))


def test_two_heads_are_averaged():
    """DeiT at test time: the mean of what class and distillation token say."""
    net = tiny(**OPTIONS["distilled"])
    images = torch.randn(2, 3, 16, 40)
    tokens = net.network.tokens(images)
    expected = (net.network.head(tokens[:, 0]) + net.network.head_dist(tokens[:, 1])) / 2
    assert torch.allclose(
        read(net.state_dict(), num_heads=3, image_size=(16, 40))(images), expected
    )


def test_the_norm_after_an_unnamed_pool_is_the_means():
    net = tiny(norm_after_pool=True)
    back = read(net.state_dict(), num_heads=3)
    assert back.config.pool == "mean" and "`fc_norm`" in back.load_report.notes[0]
    assert read(net.state_dict(), num_heads=3, pool="token").config == net.config
    said = {"architecture": "x", "model_args": {"global_pool": "token"}}
    assert read(net.state_dict(), num_heads=3, hub=said).config == net.config


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("reg_token", (48,), {"num_registers": 2}),
        ("cls_token", (48,), {}),
        ("pos_embed", (17, 48), {}),
        ("head.weight", (5,), {}),
        ("head.weight", (), {}),
        ("patch_embed.proj.weight", (48, 3, 0, 0), {}),
        ("patch_embed.proj.weight", (48, 192), {}),
        ("blocks.0.mlp.fc1.weight", (0, 48), {}),
        ("blocks.0.attn.q_norm.weight", (), {"qk_norm": True}),
        ("patch_embed.backbone.stem.conv.weight", (64,), {"stem": (1, 1), "patch_size": 1}),
    ],
)
def test_tensors_of_too_few_dimensions_are_named(name, shape, options):
    state = {**tiny(**options).state_dict(), name: torch.zeros(shape)}
    with pytest.raises(VitcliError, match="of the wrong shape") as error:
        read(state, num_heads=3)
    assert f"{name} has the shape {shape}" in error.value.message and error.value.hint


@pytest.mark.parametrize(
    "changed",
    [
        {"register_tokens": (1, 2, 48), "pos_embed": (17,)},
        {"register_tokens": (1, 2, 48), "cls_token": (48,)},
        {"register_tokens": (1, 2, 48), "cls_token": (1, 1, 47)},
        {"blocks.0.mlp.fc1_g.weight": (3, 48), "blocks.0.mlp.fc1_x.weight": (3, 47)},
        {"blocks.0.mlp.fc1_g.weight": (), "blocks.0.mlp.fc1_x.weight": ()},
        {"blocks.1000000000.norm1.weight": (48,)},
        {"blocks.999999.norm1.weight": (48,)},
    ],
)
def test_damaged_tensors_of_relatives_end_in_one_error(changed):
    state = tiny().state_dict() | {name: torch.zeros(shape) for name, shape in changed.items()}
    with pytest.raises(VitcliError) as error:
        read(state, num_heads=3)
    assert error.value.hint


def test_stages_without_end_are_refused():
    state = tiny(stem=(1, 1), patch_size=1).state_dict()
    name = "patch_embed.backbone.stages.{}.blocks.0.conv1.weight"
    state[name.format(10**9)] = state[name.format(0)]
    with pytest.raises(VitcliError, match=r"not part of the model: .*stages\.1000000000"):
        read(state, num_heads=3)


@pytest.mark.parametrize(("pool", "lacks"), [("token", "class token"), ("map", "attention pool")])
def test_a_pooling_that_the_tensors_cannot_do(pool, lacks):
    """The fault is of whoever asked for it, not of the file."""
    state = tiny(pool="mean", class_token=False).state_dict()
    with pytest.raises(VitcliError, match=f"`model.pool` does not fit `w`: .*{lacks}") as error:
        read(state, num_heads=3, pool=pool)
    assert "--set model.pool=" in error.value.hint
    hub = {"architecture": "x", "global_pool": pool}
    with pytest.raises(VitcliError, match=f"the config.json of `w`: .*{lacks}"):
        read(state, num_heads=3, hub=hub)


def test_an_image_size_that_does_not_divide_is_the_callers():
    state = tiny(position="none").state_dict()
    with pytest.raises(VitcliError, match=r"33x32 px do not divide .* 8x8 px") as error:
        read(state, num_heads=3, image_size=(33, 32))
    assert "model.image_size" in error.value.hint


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("described", [False, True])
def test_channels_that_are_not_pictures(channels, described, tmp_path):
    net = tiny(num_channels=channels)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    if described:
        said = {"mean": [0.5] * channels, "std": [0.5] * channels}
        hub = {"architecture": "x", "model_args": {"num_heads": 3}, "pretrained_cfg": said}
        (tmp_path / "config.json").write_text(json.dumps(hub))
    else:
        with pytest.raises(VitcliError) as error:
            load_model(tmp_path)
        assert "model.num_heads" in error.value.message and "mean" not in error.value.message
    for preprocess in (None, {"mean": 0.5, "std": 0.5}, {"mean": [0.5] * channels, "std": 0.5}):
        model = load_model(tmp_path, num_heads=3, preprocess=preprocess)
        assert model.preprocess is None
        notes = " ".join(model.load_report.notes)
        assert f"image files have 1 or 3 channels, the model {channels}" in notes
        images = torch.randn(1, channels, 32, 32)
        torch.testing.assert_close(model(images), net(images))
        with pytest.raises(VitcliError, match=f"reads {channels} channels, not grey or RGB"):
            require_preprocess(model)


BEIT_NAMES = {
    "beit.": "", "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "pooler.layernorm": "fc_norm",
    "layers.": "blocks.", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj", "lambda_": "gamma_", "classifier": "head",
    "attention.q_proj.bias": "attn.q_bias", "attention.v_proj.bias": "attn.v_bias",
    "shared_position_bias": "rel_pos_bias",
    ".relative_position_bias.relative_position_bias_table": ".attn.relative_position_bias_table",
}  # fmt: skip


def beit_of_timm(theirs):
    """The tensors of transformers' BEiT under the names of timm's class Beit."""
    found = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in BEIT_NAMES.items():
            name = name.replace(old, new)
        found[name] = tensor
    for i in range(2):
        parts = [found.pop(f"blocks.{i}.attention.{p}_proj.weight") for p in "qkv"]
        found[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        found[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["own", "own and shared"])
def test_beit_under_the_names_of_timm(tmp_path, shared):
    pytest.importorskip("transformers")
    from support.families import BEIT, SHARED, random_model

    settings = {**BEIT, **(SHARED if shared else {}), "layer_norm_eps": 1e-6}
    theirs = random_model("BeitForImageClassification", "BeitConfig", settings)
    tensors = beit_of_timm(theirs)
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    said = {"num_heads": 3, "preprocess": {"mean": 0.5, "std": 0.5}}
    model = load_model(path, **said)
    assert (model.config.image_size, model.config.pool) == ((32, 32), "mean")
    for size in ((32, 32), (48, 24)):
        model, images = load_model(path, image_size=size, **said), torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(model(images), theirs(images).logits, atol=5e-5, rtol=0)
    described = {"architecture": "beitv2_base_patch16_224", "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert load_model(path, num_heads=3).preprocess.mean == (0.485, 0.456, 0.406)
    (tmp_path / "config.json").unlink()
    name = "blocks.0.attn.relative_position_bias_table"
    save_file({**tensors, name: tensors[name][:-5].clone()}, path)
    with pytest.raises(VitcliError, match=r"44 offsets, which do not form|another shape"):
        load_model(path, **said)
    save_file({n: t for n, t in tensors.items() if not n.endswith("q_bias")}, path)
    with pytest.raises(VitcliError, match=r"not part of the model: `blocks\.0\.attn\.v_bias"):
        load_model(path, **said)
