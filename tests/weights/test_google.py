"""Official `.npz` files of vit_jax and big_vision, against numbers of the official code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vitcli.errors import VitcliError
from vitcli.vit.position import sincos2d
from vitcli.weights.edit import replace_head, resize
from vitcli.weights.google.write_google import write_google
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model

CASES = 10
# Of the READMEs: logits and named intermediates; activations of convolutions are larger.
TOLERANCE, HYBRID = 5e-5, 2e-4


def cases(shared):
    folders = [shared / "reference/google_vit", shared / "reference/bigvision_vit"]
    return sorted(f for folder in folders for f in folder.glob("*/params.npz"))


def load_case(path):
    # Sin-cos files do not say their size.
    said = json.loads((path.parent / "config.json").read_text())
    return load_model(path, image_size=said.get("image_hwc", [32, 32])[:2])


def numbers(path):
    found = dict(np.load(path.parent / "io.npz"))
    return torch.from_numpy(found.pop("images")).permute(0, 3, 1, 2), found


def test_reference_logits(shared):
    assert len(cases(shared)) >= CASES
    for path in cases(shared):
        model, (images, expected) = load_case(path), numbers(path)
        with torch.no_grad():
            assert np.abs(model(images).numpy() - expected["logits"]).max() <= TOLERANCE, path


def test_reference_intermediates(shared):
    compared = 0
    for path in cases(shared):
        model, (images, expected) = load_case(path), numbers(path)
        bound = HYBRID if model.config.stem is not None else TOLERANCE
        names = [name for name in expected if name.startswith("inter/")]
        with torch.no_grad():
            for name, got in intermediates(model, images, names).items():
                want = expected[name]
                difference = np.abs(got.numpy().reshape(want.shape) - want).max()
                assert difference <= bound, (path, name, difference)
                compared += 1
        if "posemb_sincos2d" in expected:
            table = sincos2d(model.config.grid, model.config.embed_dim).numpy()
            want = expected["posemb_sincos2d"].reshape(table.shape)
            assert np.abs(table - want).max() <= 1e-6
    assert compared >= 75


def intermediates(model, images, names):
    """What our modules give, under the reference's names, NHWC where they are maps."""
    kept = {}

    def keep(name, module):
        module.register_forward_hook(lambda _m, _i, out: kept.__setitem__(name, out))

    keep("inter/Transformer/encoder_norm", model.network.norm)
    keep("inter/encoded", model.network.norm)
    for i, block in enumerate(model.network.blocks):
        keep(f"inter/Transformer/encoderblock_{i}", block)
        keep(f"inter/encoder/block{i:02d}/+mlp", block)
    if model.config.stem is not None:
        stem = model.network.patch_embed.backbone
        maps = {"inter/conv_root": stem.stem.conv, "inter/gn_root": stem.stem.norm}
        maps |= {f"inter/block{i + 1}": stage for i, stage in enumerate(stem.stages)}
        for name, module in maps.items():
            keep(name, module)
    kept["inter/embedding"] = model.network.patch_embed(images)
    embedded = model.network.embed(images)
    kept["inter/Transformer/posembed_input"] = embedded
    prefix = model.config.num_prefix_tokens
    kept["inter/with_posemb"] = embedded[:, prefix:]
    pooled = []
    model.network.pre_logits.register_forward_hook(lambda _m, i, _o: pooled.append(i[0]))
    kept["inter/pre_logits"] = model.features(images)
    kept["inter/head_input"] = pooled[0]
    if model.config.representation_size:
        kept["inter/pre_logits_dense"] = model.network.pre_logits.fc(pooled[0])
    # big_vision puts head and hidden layer on every patch, too.
    kept["inter/pre_logits_2d"] = model.network.pre_logits(kept["inter/encoded"][:, prefix:])
    kept["inter/logits_2d"] = model.network.head(kept["inter/pre_logits_2d"])
    found = {name: kept[name] for name in names}
    return {n: t.permute(0, 2, 3, 1) if t.ndim == 4 else t for n, t in found.items()}


def test_fine_tuning_load(shared):
    """Head new and zero, hidden layer gone, positions carried over bilinearly."""
    folders = sorted((shared / "reference/google_vit").glob("transfer_*"))
    assert folders
    for folder in folders:
        expected = np.load(folder / "expected.npz")
        keys = set(expected.files)
        model = load_model(folder / "pretrained.npz")
        old, classes = model.config.grid, expected["test_head_bias"].shape[0]
        kept = "restored/pre_logits/kernel" in keys
        replace_head(model, [str(i) for i in range(classes)], keep_pre_logits=kept)
        images = torch.from_numpy(expected["images"]).permute(0, 3, 1, 2)
        resize(model, tuple(images.shape[2:]))
        positions = expected["restored/Transformer/posembed_input/pos_embedding"]
        assert np.abs(model.network.pos_embed.detach().numpy() - positions).max() < 1e-5
        with torch.no_grad():
            assert not model(images).any()
            model.network.head.weight.copy_(torch.from_numpy(expected["test_head_kernel"]).T)
            model.network.head.bias.copy_(torch.from_numpy(expected["test_head_bias"]))
            difference = model(images).numpy() - expected["logits_with_test_head"]
        assert np.abs(difference).max() < 1e-5
        fates, new = model.load_report.status, model.config.grid
        told = f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}, bilinear"
        assert fates["pos_embed"] == ("resampled", told) and fates["head.weight"][0] == "new"
        if not kept:
            assert fates["pre_logits.fc.weight"][0] == "dropped"


def test_position_files(shared):
    """The resampled table as `state_dict` shows it, for the usual pairs of grids."""
    path = shared / "reference/google_vit/token_norep/params.npz"
    model = load_model(path, image_size=(56, 40))
    assert model.state_dict()["pos_embed"].shape == (1, 1 + 7 * 5, 48)
    both = load_model(path, image_size=56, position_resize="bicubic")
    assert "bicubic" in both.load_report.status["pos_embed"][1]
    images = torch.randn(2, 3, 56, 40)  # the same method, whether at loading or for the picture
    with torch.no_grad():
        assert torch.equal(load_model(path)(images), model(images))


def test_one_model_in_two_layouts(shared):
    """A trained model as timm has it and as Google has it differ only in their arithmetic."""
    folder = shared / "data/weights/vit_cifar10_mae"
    ours = load_model(folder / "timm.safetensors", num_heads=3, gelu="tanh")
    theirs = load_model(folder / "jax.npz")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def linen(name):
    """The released name -> the one that flax gives now, as convert_pre_linen does it."""
    for old, new in {
        "LayerNorm_2": "LayerNorm_1",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "MlpBlock_3": "MlpBlock_0",
    }.items():
        name = name.replace(f"/{old}/", f"/{new}/")
    return name


def scanned(arrays):
    """One array for all blocks, as big_vision writes it with `scan=True`."""
    stacked, rest = {}, {}
    for name, array in arrays.items():
        if m := re.match(r"Transformer/encoderblock_(\d+)/(.*)", name):
            stacked.setdefault(m[2], {})[int(m[1])] = array
        else:
            rest[name] = array
    for name, layers in stacked.items():
        rest[f"Transformer/encoderblock/{name}"] = np.stack([layers[i] for i in sorted(layers)])
    return rest


OTHER_FORMS = {
    "flax numbering": lambda a: {linen(n): x for n, x in a.items()},
    "training checkpoint": lambda a: {
        **{f"params/{n}": x for n, x in a.items()},
        **{f"opt/mu/{n}": x for n, x in a.items()},
    },
    "Flax's optimiser": lambda a: {
        **{f"opt/target/{n}": x for n, x in a.items()},
        **{f"opt/state/param_states/{n}/grad_ema": x for n, x in a.items()},
        "opt/state/step": np.int32(3),
    },
    "scanned": lambda a: scanned({linen(n): x for n, x in a.items()}),
    "scanned, released numbering, prefixed": lambda a: {
        f"params/{n}": x for n, x in scanned(a).items()
    },
    "two towers": lambda a: {
        **{f"params/img/{n}": x for n, x in a.items()},
        "params/txt/Embed_0/embedding": np.ones((3, 2), np.float32),
        "params/t": np.float32(1.0),
    },
    "positions in the encoder": lambda a: {
        n.replace("posembed_input/pos_embedding", "pos_embedding"): x for n, x in a.items()
    },
    "positions outside, class token covered": lambda a: {
        n.replace("Transformer/posembed_input/pos_embedding", "pos_embedding"): x
        for n, x in a.items()
    },
    "big-endian float64": lambda a: {n: x.astype(">f8") for n, x in a.items()},
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_of_the_same_file(shared, tmp_path, form):
    path = shared / "reference/google_vit/token_rep40/params.npz"
    np.savez(tmp_path / "w.npz", **OTHER_FORMS[form](dict(np.load(path))))
    model = load_model(tmp_path / "w.npz")
    same(load_model(path), model)
    dropped = {n: model.load_report.status[n][1] for n in model.load_report.names("dropped")}
    if form == "two towers":
        reason = "not the image tower"
        assert dropped == {"params/txt/Embed_0/embedding": reason, "params/t": reason}
    if form in ("training checkpoint", "Flax's optimiser"):
        steps = form == "Flax's optimiser"
        assert set(dropped.values()) == {"optimizer"} and len(dropped) == 58 + steps


def test_attention_pool_outside_its_module(shared, tmp_path):
    path = shared / "reference/bigvision_vit/map_learn/params.npz"
    arrays = {
        n.replace("params/", "").replace("MAPHead_0/", ""): a for n, a in np.load(path).items()
    }
    assert "probe" in arrays and "MlpBlock_0/Dense_0/kernel" in arrays
    np.savez(tmp_path / "w.npz", **arrays)
    same(load_model(path), load_model(tmp_path / "w.npz"))


def test_positions_of_a_class_token_that_is_not_there(shared, tmp_path):
    """As big_vision mends its oldest files: the first entry goes."""
    path = shared / "reference/bigvision_vit/gap_learn/params.npz"
    arrays = dict(np.load(path))
    table = arrays.pop("pos_embedding")
    arrays["Transformer/pos_embedding"] = np.concatenate([table[:, :1] + 7, table], axis=1)
    np.savez(tmp_path / "w.npz", **arrays)
    model = load_model(tmp_path / "w.npz")
    same(load_model(path), model)
    assert model.load_report.names("dropped") == ["Transformer/pos_embedding (first row)"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(shared, tmp_path, dtype):
    path = shared / "reference/google_vit/hybrid_2stage/params.npz"
    half = {n: torch.from_numpy(a).to(getattr(torch, dtype)) for n, a in np.load(path).items()}
    if dtype == "bfloat16":  # numpy knows it as two bytes without a type
        stored = {n: t.view(torch.int16).numpy().view("V2") for n, t in half.items()}
    else:
        stored = {n: t.numpy() for n, t in half.items()}
    np.savez(tmp_path / "w.npz", **stored)
    np.savez(tmp_path / "float.npz", **{n: t.float().numpy() for n, t in half.items()})
    model = load_model(tmp_path / "w.npz")
    same(load_model(tmp_path / "float.npz"), model)
    assert model.load_report.status["cls_token"] == ("loaded", f"from torch.{dtype}")


def test_group_norms_without_their_empty_axes(shared, tmp_path):
    path = shared / "reference/google_vit/hybrid_2stage/params.npz"
    arrays = {
        n: a.squeeze() if "/gn" in n or "gn_root" in n else a for n, a in np.load(path).items()
    }
    np.savez(tmp_path / "w.npz", **arrays)
    same(load_model(path), load_model(tmp_path / "w.npz"))


def test_a_hybrid_is_found_out_from_its_shapes(shared):
    config = load_model(shared / "reference/google_vit/hybrid_2stage/params.npz").config
    assert (config.stem, config.stem_width, config.patch_size) == ((2, 1), 0.5, 1)
    assert config.image_size == (64, 64) and config.grid == (8, 8)


def test_a_grid_that_is_no_square_must_be_said(shared, tmp_path):
    path = shared / "reference/google_vit/token_norep/params.npz"
    arrays = dict(np.load(path))
    name = "Transformer/posembed_input/pos_embedding"
    arrays[name] = arrays[name][:, :16]  # 3 x 5 and the class token
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(VitcliError, match="16 positions") as caught:
        load_model(tmp_path / "w.npz")
    assert "model.image_size" in caught.value.hint
    model = load_model(tmp_path / "w.npz", image_size=(24, 40))
    assert model.config.grid == (3, 5) and model.network.pos_embed.shape == (1, 16, 48)


def big_transfer(name):
    """big_vision's name of a BiT array -> that of the first release."""
    if m := re.match(r"(block\d/unit\d+)/(conv|gn)(\d|_proj)/(\w+)", name):
        unit, kind, number, leaf = m.groups()
        if number == "_proj":
            return f"resnet/{unit}/a/proj/standardized_conv2d/kernel"
        letter = "abc"[int(number) - 1]
        if kind == "conv":
            suffix = "_3" if unit.endswith("02") else ""  # some files count
            return f"resnet/{unit}/{letter}/standardized_conv2d{suffix}/kernel"
        return f"resnet/{unit}/{letter}/group_norm/{'gamma' if leaf == 'scale' else 'beta'}"
    return {
        "root_block/conv_root/kernel": "resnet/root_block/standardized_conv2d/kernel",
        "norm-pre-head/scale": "resnet/group_norm/gamma",
        "norm-pre-head/bias": "resnet/group_norm/beta",
        "head/kernel": "resnet/head/conv2d/kernel",
        "head/bias": "resnet/head/conv2d/bias",
    }[name]


def test_bit_in_the_names_of_its_first_release(tmp_path):
    model = create_model("R50x1", num_classes=3, image_size=64, seed=1)
    nn.init.normal_(model.network.head.weight)
    write_google(model, tmp_path / "new.npz")
    arrays = {}
    for name, array in np.load(tmp_path / "new.npz").items():
        array = array[None, None] if name == "head/kernel" else array
        arrays[big_transfer(name)] = array.squeeze() if "gn" in name or "norm" in name else array
    assert "resnet/block4/unit02/b/standardized_conv2d_3/kernel" in arrays
    np.savez(tmp_path / "old.npz", **arrays)
    again = load_model(tmp_path / "old.npz", image_size=64)
    # Its code pads the max-pool with zeros, as timm does.
    assert again.config == replace(model.config, arithmetic="timm")
    same(model, again)
    assert "1e-10" in write_google(again, tmp_path / "back.npz")[0]
    found = dict(np.load(tmp_path / "back.npz"))
    for name, array in arrays.items():
        name = name.replace("conv2d_3/", "conv2d/")
        assert found[name].shape == array.shape and np.array_equal(found.pop(name), array)
    assert not found
    assert load_model(tmp_path / "back.npz").config == again.config
