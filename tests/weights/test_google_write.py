"""Files in the official names: against the official ones, and there and back."""

import json
import zipfile

import numpy as np
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.edit import resize
from vitcli.weights.expressible import find_limits
from vitcli.weights.google.write_google import write_google
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model


def read(path):
    return dict(np.load(path))


def filled(model, seed=0):
    """Every number different, so that none can take another's place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.network.parameters():
            p.normal_(generator=generator)
    return model


def small(name="Pico/8", **settings):
    values = {"num_classes": 5, "image_size": 32, "depth": 2, "gelu": "tanh", **settings}
    return filled(create_model(name, **values))


def equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for what in ("config", "labels", "preprocess", "head_trained"):
        assert getattr(one, what) == getattr(other, what), what


def linen(name):
    """The released name -> what flax writes now, which official loaders take as the same."""
    for old, new in {
        "LayerNorm_2": "LayerNorm_1",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "MlpBlock_3": "MlpBlock_0",
    }.items():
        name = name.replace(f"/{old}/", f"/{new}/")
    return name


def test_official_files_come_back_bit_for_bit(shared, tmp_path):
    """Names, shapes, type and every bit; one open case is vit_jax's model in flax's numbering."""
    files = sorted((shared / "reference").glob("google_vit/*/params.npz"))
    files += sorted((shared / "reference").glob("bigvision_vit/*/params.npz"))
    assert len(files) >= 10
    for path in files:
        said = json.loads((path.parent / "config.json").read_text())
        model = load_model(path, image_size=said.get("image_hwc", [32, 32])[:2])
        out = tmp_path / f"{path.parent.name}.npz"
        assert write_google(model, out) == []
        expected, found = read(path), read(out)
        expected = {n.removeprefix("params/"): a for n, a in expected.items()}
        if path.parent.name.endswith("linenkeys"):
            assert set(found) != set(expected)
            found = {linen(n): a for n, a in found.items()}
        assert sorted(found) == sorted(expected), path
        for name, array in expected.items():
            assert found[name].dtype == np.float32 and found[name].shape == array.shape, name
            assert found[name].tobytes() == array.tobytes(), (path, name)
        equal(model, load_model(out))


def test_real_weights_come_back_bit_for_bit(shared, tmp_path):
    path = shared / "data/weights/vit_cifar10_mae/jax.npz"
    model = load_model(path)
    write_google(model, tmp_path / "w.npz")
    expected, found = read(path), read(tmp_path / "w.npz")
    assert expected.keys() == found.keys()
    assert all(expected[n].tobytes() == found[n].tobytes() for n in expected)
    equal(model, load_model(tmp_path / "w.npz"))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), load_model(tmp_path / "w.npz")(images))


ROUND_TRIPS = {
    "class token": {},
    "class token, hidden layer": {"representation_size": 40},
    "class token without position": {"position_covers_prefix": False},
    "not square": {"image_size": (32, 56)},
    "one channel": {"num_channels": 1},
    "mean": {"pool": "mean", "class_token": False},
    "mean, big_vision": {"pool": "mean", "class_token": False, "position_covers_prefix": False},
    "attention pool": {"pool": "map", "class_token": False},
    "fixed positions": {"position": "sincos2d", "image_size": (32, 48)},
    "fixed positions, uncovered": {"position": "sincos2d", "position_covers_prefix": False},
    "fixed positions, mean": {"position": "sincos2d", "pool": "mean", "class_token": False},
    "no head": {"num_classes": 0},
    "dropout": {"dropout_rate": 0.1, "drop_path_rate": 0.2},
    # 5 x 10 = 7 x 7 + 1: the count alone would mean a class token.
    "ambiguous count": {"image_size": (40, 80), "position_covers_prefix": False},
    "hybrid": {"name": "Pico/1", "stem": (2, 1), "stem_width": 0.5, "image_size": (32, 48)},
    "hybrid, mean": {
        "name": "Pico/1",
        "stem": (1, 1, 1),
        "image_size": 64,
        "pool": "mean",
        "class_token": False,
    },
    "root alone": {"name": "Pico/2", "stem": (), "image_size": 32},
    "resnet": {"name": "R50x1"},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_ours_there_and_back(tmp_path, case):
    settings = {**ROUND_TRIPS[case]}
    name = settings.pop("name", "Pico/8")
    if name == "R50x1":
        model = filled(create_model(name, num_classes=5, image_size=(64, 96)))
    else:
        model = small(name, **settings)
    config = model.config
    model.head_trained = config.num_classes > 0
    if config.num_classes:
        model.labels = ("a", "b", "naïve ünïcode, 名前", "d e", '"f"')
    channels = config.num_channels
    model.preprocess = Preprocess(
        config.image_size, "crop", None, 0.875, "lanczos", (0.1,) * channels, (0.2,), channels
    )
    notes = write_google(model, tmp_path / "w.npz")
    assert bool(notes) == (case == "no head")
    again = load_model(tmp_path / "w.npz")
    equal(model, again)
    assert not again.load_report.names("dropped") and not again.load_report.notes
    # The same model is the same file, and the file read is the same file again.
    write_google(again, tmp_path / "again.npz")
    assert (tmp_path / "w.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    if "stem" not in settings and name != "R50x1":  # one token of its own is bit-equal
        images = torch.rand(2, channels, *config.image_size)
        with torch.no_grad():
            assert torch.equal(model(images), again(images))


def test_which_names_a_model_gets(tmp_path):
    """Released numbering and covered positions for vit_jax, big_vision's for what only it has."""

    def names(**settings):
        write_google(small(depth=1, **settings), tmp_path / "w.npz")
        found = set(read(tmp_path / "w.npz"))
        (tmp_path / "w.npz").unlink()
        return found

    block = "Transformer/encoderblock_0/"
    positions = "Transformer/posembed_input/pos_embedding"
    for settings in ({}, {"pool": "mean", "class_token": False}):
        found = names(**settings)
        assert {positions, f"{block}MlpBlock_3/Dense_0/bias", f"{block}LayerNorm_2/bias"} <= found
    for settings in (
        {"pool": "map", "class_token": False},
        {"position_covers_prefix": False},
    ):
        found = names(**settings)
        assert {"pos_embedding", f"{block}MlpBlock_0/Dense_0/bias"} <= found
        assert positions not in found
    fixed = names(position="sincos2d")
    assert not any("pos" in name for name in fixed) and f"{block}LayerNorm_1/bias" in fixed


def test_bit_in_big_visions_names(tmp_path):
    """Names and shapes as bit_paper's Model(depth=50, width=1) has them, written down by hand."""
    write_google(create_model("R50x1", num_classes=10), tmp_path / "w.npz")
    found = {name: array.shape for name, array in read(tmp_path / "w.npz").items()}
    expected = {
        "root_block/conv_root/kernel": (7, 7, 3, 64),
        "norm-pre-head/scale": (1, 1, 1, 2048),
        "norm-pre-head/bias": (1, 1, 1, 2048),
        "head/kernel": (2048, 10),
        "head/bias": (10,),
    }
    before = 64
    for block, units in enumerate((3, 4, 6, 3), 1):
        middle = 64 * 2 ** (block - 1)
        for unit in range(1, units + 1):
            base = f"block{block}/unit0{unit}"
            widths = {1: before, 2: middle, 3: middle}
            for n, width in widths.items():
                expected[f"{base}/gn{n}/scale"] = expected[f"{base}/gn{n}/bias"] = (1, 1, 1, width)
            expected[f"{base}/conv1/kernel"] = (1, 1, before, middle)
            expected[f"{base}/conv2/kernel"] = (3, 3, middle, middle)
            expected[f"{base}/conv3/kernel"] = (1, 1, middle, 4 * middle)
            if unit == 1:
                expected[f"{base}/conv_proj/kernel"] = (1, 1, before, 4 * middle)
            before = 4 * middle
    assert found == expected


def test_fixed_positions_on_another_grid_become_learned_ones(tmp_path):
    """big_vision would compute them anew; carried over they are another table."""
    model = small(position="sincos2d", pool="mean", class_token=False)
    resize(model, (56, 56))
    notes = write_google(model, tmp_path / "w.npz")
    assert len(notes) == 1 and "written as learned" in notes[0]
    again = load_model(tmp_path / "w.npz")
    assert again.config.position == "learned"
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


# Models that the official code does not have.

IMPOSSIBLE = {
    "gelu": {"gelu": "exact"},
    "norm_eps": {"norm_eps": 1e-12},
    "num_registers": {"num_registers": 2},
    "layer_scale": {"layer_scale": 0.1},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": False},
    "patch_bias": {"patch_bias": False},
    "pixel_norm": {"pixel_norm": True},
    "patch_norm": {"patch_norm": True},
    "mlp": {"mlp": "swiglu"},
    "pool": {"pool": "quadrants", "class_token": False},
    "class_token": {"pool": "mean"},
    "distillation_token": {"distillation_token": True},
    "norm_after_pool": {"norm_after_pool": True},
    "norm_before_blocks": {"norm_before_blocks": True},
    "axial": {"axial": True, "pool": "mean", "class_token": False},
    "position": {"position": "learned2d"},
    "position_at": {"position_at": "every"},
    "stem_arithmetic": {"name": "Pico/2", "stem": (), "stem_arithmetic": "timm"},
    "position_covers_prefix": {"name": "Pico/2", "stem": (), "position_covers_prefix": False},
}


@pytest.mark.parametrize("setting", IMPOSSIBLE)
def test_what_the_official_code_does_not_have(tmp_path, setting):
    model = small(**IMPOSSIBLE[setting])
    with pytest.raises(VitcliError, match=f"`model.{setting}` = ") as caught:
        write_google(model, tmp_path / "w.npz")
    assert list(find_limits(model, "google")) == [f"model.{setting}"]
    close = setting in ("gelu", "norm_eps", "stem_arithmetic")
    assert ("--set model." in caught.value.hint) == close and "--to onnx" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_all_contradictions_at_once(tmp_path):
    model = small(gelu="exact", norm_eps=1e-12, num_registers=1, position="none")
    with pytest.raises(VitcliError) as caught:
        write_google(model, tmp_path / "w.npz")
    for setting in ("gelu", "norm_eps", "num_registers", "position"):
        assert f"`model.{setting}` = " in str(caught.value)
    model = small(gelu="exact", norm_eps=1e-12)
    with pytest.raises(VitcliError) as caught:
        write_google(model, tmp_path / "w.npz")
    assert "--set model.gelu=tanh --set model.norm_eps=1e-6" in caught.value.hint


def test_the_hint_works(tmp_path, shared):
    """Exact GELU restated as tanh: written, and the logits move only a little."""
    path = shared / "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
    said = {"num_heads": 3, "gelu": "tanh", "preprocess": {"mean": 0.5, "std": 0.5}}
    exact, model = load_model(path, **{**said, "gelu": "exact"}), load_model(path, **said)
    write_google(model, tmp_path / "w.npz")
    again = load_model(tmp_path / "w.npz")
    equal(model, again)
    assert again.labels == imagenet_names(1000)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert 0 < (exact(images) - again(images)).abs().max() < 0.05


# The comment of the archive, and the file as such.


def labelled(labels):
    model = small(depth=1, num_classes=len(labels))
    model.labels, model.head_trained = tuple(labels), True
    return model


def test_only_the_models_arrays_are_in_the_file(tmp_path):
    """The official loaders refuse arrays that they do not know; a comment they do not see."""
    write_google(labelled(["cat", "dog"]), tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz") as packed:
        said = json.loads(packed.comment)["vitcli"]
        assert packed.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in packed.infolist())
    assert said["labels"] == ["cat", "dog"] and said["image_size"] == [32, 32]
    assert not any("label" in name or "vitcli" in name for name in read(tmp_path / "w.npz"))


@pytest.mark.parametrize("count", [2, 8000])
def test_names_that_fit(tmp_path, count):
    """Few as they are, many packed."""
    labels = [f"class number {i} of a longer list" for i in range(count)]
    assert write_google(labelled(labels), tmp_path / "w.npz") == []
    assert load_model(tmp_path / "w.npz").labels == tuple(labels)


def test_names_that_do_not_fit_are_left_out_with_a_note(tmp_path):
    rng = np.random.default_rng(0)
    labels = [rng.bytes(20).hex() for _ in range(3000)]
    notes = write_google(labelled(labels), tmp_path / "w.npz")
    assert len(notes) == 1 and "--labels" in notes[0]
    again = load_model(tmp_path / "w.npz")
    assert again.labels is None and again.head_trained


def test_imagenets_names_take_no_room(tmp_path):
    model = labelled(imagenet_names(21843))
    assert write_google(model, tmp_path / "w.npz") == []
    again = load_model(tmp_path / "w.npz")
    assert again.labels == model.labels and not again.load_report.notes


def test_a_damaged_comment(tmp_path):
    model = labelled(["cat", "dog"])
    write_google(model, tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as packed:
        packed.comment = b'{"vitcli": {"labels": ["cat", "d'
    with pytest.raises(VitcliError, match="cannot be read"):
        load_model(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as packed:
        packed.comment = b'{"vitcli": {"labels": ["cat"], "dropout_rate": "x", "image_size": 3}}'
    again = load_model(tmp_path / "w.npz")
    assert again.labels is None and "ignored the class names" in again.load_report.notes[0]
    for size in ("[0, 8]", "[-8, 8]", "[99999999, 99999999]", '"x"'):
        with zipfile.ZipFile(tmp_path / "w.npz", "a") as packed:
            packed.comment = b'{"vitcli": {"image_size": %s}}' % size.encode()
        assert load_model(tmp_path / "w.npz").config.image_size == (32, 32)
    for wrong in ("3", '{"image_size": 3}', '{"image_size": [8, 8], "mean": "x"}', '{"a": 1}'):
        with zipfile.ZipFile(tmp_path / "w.npz", "a") as packed:
            packed.comment = b'{"vitcli": {"preprocess": %s}}' % wrong.encode()
        with pytest.raises(VitcliError):
            load_model(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as packed:
        packed.comment = b"written by somebody else"
    assert load_model(tmp_path / "w.npz").labels is None


def test_a_file_that_is_there_stays(tmp_path):
    out = tmp_path / "w.npz"
    out.write_bytes(b"mine")
    with pytest.raises(VitcliError, match="exists already"):
        write_google(small(), out)
    assert out.read_bytes() == b"mine"
    with pytest.raises(VitcliError, match=r"does not end in `\.npz`"):
        write_google(small(), tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match="is not a folder"):
        write_google(small(), tmp_path / "none" / "w.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["w.npz"]
