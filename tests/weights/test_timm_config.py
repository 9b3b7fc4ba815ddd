"""What timm's Hub `config.json` and the names of its architectures say."""

import pytest
import torch
from PIL import Image
from support.timm_files import read, tiny

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.timm.timm_config import architecture_heads, read_hub_config


@pytest.mark.parametrize(
    ("architecture", "width", "heads"),
    [  # of timm's own sources
        ("vit_tiny_patch16_224.augreg_in21k", 192, 3),
        ("vit_small_patch16_224.augreg_in21k", 384, 6),
        ("vit_base_patch16_gap_224", 768, 16),
        ("vit_huge_patch14_clip_224.laion2b", 1280, 16),
        ("vit_giant_patch14_clip_224", 1408, 16),
        ("vit_giant_patch14_dinov2.lvd142m", 1536, 24),
        ("vit_so400m_patch14_siglip_384", 1152, 16),
        ("deit3_huge_patch14_224", 1280, 16),
        ("deit_small_distilled_patch16_224", 384, 6),
        ("vit_betwixt_patch16_reg4_gap_256", 640, 10),
        ("vit_huge_plus_patch16_dinov3.lvd1689m", 1280, 20),
        ("vit_7b_patch16_dinov3.lvd1689m", 4096, 32),
        ("eva_giant_patch14_224.clip_ft_in1k", 1408, 16),
        ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 1024, 16),
        ("resnet50", 2048, None),
    ],
)
def test_architectures_say_their_heads(architecture, width, heads):
    assert architecture_heads(read_hub_config({"architecture": architecture}, "w"), width) == heads


def test_architectures_say_epsilon_and_gelu():
    net = tiny()
    for architecture, eps, gelu in (
        ("vit_base_patch16_224.x", 1e-6, "exact"),
        ("vit_base_patch16_clip_224.openai", 1e-5, "exact"),
        ("vit_base_patch32_clip_quickgelu_224", 1e-5, "quick"),
        ("vit_so400m_patch16_siglip_256", 1e-6, "tanh"),
        ("eva02_base_patch16_clip_224.merged2b", 1e-6, "exact"),
    ):
        back = read(net.state_dict(), hub={"architecture": architecture}, num_heads=3)
        assert (back.config.norm_eps, back.config.gelu) == (eps, gelu)
    quick = {"architecture": "x", "model_args": {"act_layer": "quick_gelu", "final_norm": False}}
    state = tiny(final_norm=False).state_dict()
    config = read(state, hub=quick, num_heads=3).config
    assert config.gelu == "quick" and not config.final_norm
    said = {"architecture": "x", "model_args": {"act_layer": "gelu_tanh"}}
    assert read(net.state_dict(), hub=said, num_heads=3).config.gelu == "tanh"
    assert read(net.state_dict(), hub=said, num_heads=3, gelu="exact").config.gelu == "exact"


@pytest.mark.parametrize(
    ("hub", "words"),
    [
        ({"architecture": "vit_base_patch16_rpn_224"}, "after the residual"),
        ({"architecture": "vit_medium_patch16_rope_reg1_gap_256"}, "rotary"),
        ({"architecture": "vit_pe_core_base_patch16_224"}, "rotary"),
        ({"architecture": "eva02_enormous_patch14_clip_224"}, "after the residual"),
        ({"architecture": "x", "model_args": {"act_layer": "relu"}}, "`relu`"),
        ({"architecture": "x", "model_args": {"pool_include_prefix": True}}, "pool_include_prefix"),
        ({"architecture": "x", "model_args": {"global_pool": "avgmax"}}, "avgmax"),
    ],
)
def test_computations_that_tensors_do_not_show_are_refused(hub, words):
    with pytest.raises(VitcliError, match=words) as error:
        read(tiny().state_dict(), hub=hub, num_heads=3)
    assert error.value.hint


def test_a_gated_mlp_with_another_activation_is_refused():
    hub = {"architecture": "x", "model_args": {"act_layer": "gelu"}}
    with pytest.raises(VitcliError, match="activation `gelu`"):
        read(tiny(mlp="swiglu").state_dict(), hub=hub, num_heads=3)


def test_forms_of_the_hub_config():
    state = tiny().state_dict()
    names, texts = [f"n{i}" for i in range(5)], [f"text {i}" for i in range(5)]
    old = {"architecture": "x", "input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3,
           "crop_mode": "squash", "crop_pct": 1.0, "labels": names}  # fmt: skip
    back = read(state, hub=old, num_heads=3)
    assert back.preprocess.mean == (0.1, 0.1, 0.1) and back.preprocess.resize_mode == "squash"
    assert back.labels == tuple(names)
    described = dict(zip(names, texts, strict=True))
    new = {"label_names": dict(zip("01234", names, strict=True)), "label_descriptions": described}
    new["pretrained_cfg"] = {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.3, 0.4], "crop_mode": "border"}
    back = read(state, hub=new, num_heads=3)
    assert back.labels == tuple(texts)
    assert (back.preprocess.resize_mode, back.preprocess.crop_fraction) == ("pad", 1.0)
    assert "timm would crop 0.875" in back.load_report.notes[-1]
    grey = read(tiny(num_channels=1).state_dict(), hub=new, num_heads=3)
    assert grey.preprocess.mean == (0.1,) and grey.preprocess.std == pytest.approx((0.3,))


@pytest.mark.parametrize(
    ("part", "key", "values"),
    [
        ("model_args", "num_heads", ["token", [[1]], 2.5, -1, 10**30, {"a": 1}, True]),
        ("model_args", "img_size", ["x", [32], -1, [32, "x"], 1e9, {"a": 1}]),
        ("model_args", "drop_path_rate", ["x", [0.1], 2, -1, float("nan"), float("inf")]),
        ("model_args", "init_values", ["x", [1e-5], float("nan"), 10**30]),
        ("pretrained_cfg", "input_size", [-1, "xyz", [3, 32], [3, -32, 32], {"a": 1}]),
        ("pretrained_cfg", "crop_pct", ["token", [[1]], 2.5, -1, float("nan")]),
        ("pretrained_cfg", "mean", ["x", [[1]], [0.5] * 7, {"a": 1}]),
        ("pretrained_cfg", "interpolation", ["x", [1], 3, {"a": 1}]),
        ("pretrained_cfg", "label_names", [["c0", {}, "c2", "c3", "c4"], [[1], 1, 2, 3, 4]]),
    ],
)
def test_values_that_cannot_be_end_in_one_error(part, key, values):
    for value in values:
        hub = {"architecture": "x", "model_args": {"num_heads": 3}, "pretrained_cfg": {}}
        hub["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
        hub[part][key] = value
        with pytest.raises(VitcliError) as error:
            read(tiny().state_dict(), hub=hub)
        assert error.value.hint and "\n" not in error.value.message, value


@pytest.mark.parametrize("value", [-1, "x", [1], {"a": 1}, 2.5, True, 0, None, "", [], {}])
@pytest.mark.parametrize("grey", [False, True])
def test_no_value_of_the_hub_config_escapes(value, grey):
    net = tiny(num_channels=1 if grey else 3)
    whole = {
        "architecture": "x",
        "num_classes": 5,
        "global_pool": "token",
        "labels": list("abcde"),
        "label_descriptions": {"a": "A"},
        "model_args": {"num_heads": 3, "act_layer": "gelu", "no_embed_class": False},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "center"},
    }
    for part in (None, "model_args", "pretrained_cfg"):
        for key in whole[part] if part else whole:
            inner = {**(whole[part] if part else whole), key: value}
            try:
                read(net.state_dict(), hub={**whole, part: inner} if part else inner, num_heads=3)
            except VitcliError as error:
                assert error.hint, (part, key)


def test_four_channels_have_no_preprocessing_of_ours():
    hub = {"architecture": "x", "pretrained_cfg": {"mean": [0.5] * 4, "std": [0.5] * 4}}
    back = read(tiny(num_channels=4).state_dict(), hub=hub, num_heads=3)
    assert back.preprocess is None and back(torch.zeros(1, 4, 32, 32)).shape == (1, 5)


def test_borders_lie_where_timm_puts_them():
    """What cannot be shared evenly goes to the right and to the bottom (`CenterCropOrPad`)."""
    for missing, left in ((1, 0), (2, 1), (3, 1), (5, 2), (7, 3)):
        picture = Image.new("RGB", (40 - missing, 40), "white")
        columns = Preprocess((40, 40), "pad", mean=(0.2,)).pixels(picture)[0, 20] == 255
        assert columns.nonzero().flatten().tolist() == list(range(left, left + 40 - missing))
