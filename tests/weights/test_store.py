import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.flipping import flip, flips

from vitcli.commands import export
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.position import resample
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model, model_hash
from vitcli.weights.store import load_weights, read_header, read_metadata, save_model


@pytest.fixture
def model():
    net = create_model("Pico/8", num_classes=3, image_size=(16, 24), pool="mean", depth=2)
    torch.nn.init.normal_(net.network.head.weight)
    net.labels, net.head_trained = ("cat", "dög", "a b"), True
    net.preprocess = Preprocess(image_size=(16, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    return net


def test_everything_comes_back(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, recipe_hash="abc", extra={"note": "x"})
    back = load_model(path)
    assert back.config == model.config
    assert (back.labels, back.preprocess) == (model.labels, model.preprocess)
    assert back.head_trained and not back.network.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    header = read_header(path)
    assert header["recipe_hash"] == "abc" and header["extra"] == {"note": "x"}
    assert back.load_report.line() == f"{len(model.state_dict())} tensors loaded (vitcli)"


def test_equal_weights_are_equal_bytes(model, tmp_path):
    for i in range(5):
        save_model(tmp_path / f"{i}.safetensors", model, extra={"a": "1", "b": "2"})
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(5)}) == 1


def test_anybody_can_read_the_tensors(model, tmp_path):
    save_model(tmp_path / "m.safetensors", model)
    assert set(load_file(tmp_path / "m.safetensors")) == set(model.state_dict())


def test_fixed_positions_are_stored_and_resampled_like_learned_ones(tmp_path):
    net = create_model("Pico/8", image_size=16, position="sincos2d", depth=1)
    save_model(tmp_path / "m.safetensors", net)
    assert torch.equal(
        load_model(tmp_path / "m.safetensors").network.pos_embed, net.network.pos_embed
    )
    back = load_model(tmp_path / "m.safetensors", image_size=32)
    expected = resample(net.network.pos_embed[:, 1:], (2, 2), (4, 4), "bicubic")
    assert torch.equal(back.network.pos_embed[:, 1:], expected)
    # A place keeps its code: the corners of the new grid are nearest to those of the old one.
    far, near = (expected[0, 0] - net.network.pos_embed[0, i] for i in (4, 1))
    assert near.norm() < far.norm()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(model, tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VitcliError, match="truncated or is not a safetensors") as error:
        load_model(path)
    assert "again" in error.value.hint


def test_a_header_that_lies(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["head.bias"]["data_offsets"][1] += 400
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(VitcliError, match="truncated or is not"):
        load_weights(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "w.pkl", "w.safetensors"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_refused_and_does_not_run(here, name, zipped):
    torch.save({"w": Bomb()}, name, _use_new_zipfile_serialization=zipped)
    for given in (name, "."):
        with pytest.raises(VitcliError, match="pickle") as error:
            load_model(given)
        assert "safetensors" in error.value.hint
    assert not (here / "it_ran").exists()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle(tmp_path, length):
    """Its first bytes are 80 02 .. 80 05, which a bare pickle has as well."""
    path, tensor = tmp_path / "w.safetensors", {"x": torch.ones(2)}
    for padding in range(length):
        save_file(tensor, path, metadata={"note": "-" * padding})
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[:2] == bytes([0x80, length >> 8])
    assert torch.equal(load_weights(path)["x"], tensor["x"]) and read_header(path) is None


def test_foreign_tensors_are_named(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    header = {"vitcli": json.dumps(read_header(path))}
    tensors = load_file(path)
    tensors["head.weight"] = torch.zeros(4, 128)
    tensors["conv1.weight"] = tensors.pop("norm.bias")
    save_file(tensors, path, metadata=header)
    with pytest.raises(VitcliError) as error:
        load_model(path)
    for words in ("missing: `norm.bias`", "not part of the model: `conv1.weight`", "(4, 128)"):
        assert words in error.value.message


def test_integers_are_no_weights(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    header = {"vitcli": json.dumps(read_header(path))}
    tensors = load_file(path)
    tensors["head.bias"] = tensors["head.bias"].to(torch.int8)
    save_file(tensors, path, metadata=header)
    with pytest.raises(VitcliError, match=r"head\.bias \(torch\.int8\)"):
        load_model(path)


def test_half_precision_is_widened(model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.network.half()
    save_model(path, model)
    back = load_model(path)
    assert back.network.head.weight.dtype == torch.float32
    assert back.load_report.status["head.weight"] == ("loaded", "from torch.float16")


def test_a_damaged_description(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"vitcli": '{"format": 1, "config": {"q": 1}}'})
    with pytest.raises(VitcliError, match=r"header of .* is invalid: unknown model settings: q"):
        load_model(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"vitcli": '{"format": 99}'})
    with pytest.raises(VitcliError, match="newer vitcli"):
        load_model(path)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("config", None, [1], "is invalid"),
        ("config", "depth", 10**9, "depth is 1000000000"),
        ("config", "depth", 10**3, "claims to have 1000 blocks, but it holds"),
        ("config", "embed_dim", "128", "embed_dim is '128'"),
        ("config", "image_size", [10**30, 16], "image_size is 1000"),
        ("config", "stem", float("nan"), "is invalid"),
        ("preprocess", None, True, "is invalid"),
        ("preprocess", "mean", ["x"], "is invalid"),
        ("preprocess", "std", [0.0], r"preprocess\.std` is \(0\.0"),
        ("labels", None, ["a"], "1 class names for 3 classes"),
        ("labels", None, 5, "is invalid"),
    ],
)
def test_a_description_that_somebody_changed(model, tmp_path, part, key, value, words):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    header = read_header(path)
    if key is None:
        header[part] = value
    else:
        header[part][key] = value
    save_file(load_file(path), path, metadata={"vitcli": json.dumps(header)})
    with pytest.raises(VitcliError, match=words):
        load_model(path)


def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(VitcliError, match="cannot write") as error:
            save_model(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "free some space" in error.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(VitcliError, match="cannot write"):
        save_model(tmp_path / "no" / "model.safetensors", model)


def test_npz_with_objects_is_refused(here):
    np.savez("w.npz", x=np.array([Bomb()], dtype=object))
    with pytest.raises(VitcliError, match="cannot be read as numpy arrays"):
        load_model("w.npz")
    assert not (here / "it_ran").exists()


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "bicubic_plain"])
def test_the_method_that_resamples_positions_travels_with_the_weights(model, tmp_path, method):
    model.network.position_resize = method
    save_model(tmp_path / "m.safetensors", model)
    assert ("position_resize" in read_header(tmp_path / "m.safetensors")) == (method != "bicubic")
    back = load_model(tmp_path / "m.safetensors", image_size=(32, 40))
    assert back.network.position_resize == method
    net = create_model("Pico/8", image_size=(16, 24), depth=1)
    net.network.position_resize = method
    save_model(tmp_path / "n.safetensors", net)
    found = load_model(tmp_path / "n.safetensors", image_size=(32, 40)).network.pos_embed[:, 1:]
    assert torch.equal(found, resample(net.network.pos_embed[:, 1:], (2, 3), (4, 5), method))
    # What a caller asks for wins over what is stored.
    other = load_model(tmp_path / "n.safetensors", position_resize="bilinear_antialiased")
    assert other.network.position_resize == "bilinear_antialiased"


def test_an_unknown_method_in_the_header(model, tmp_path):
    model.network.position_resize = "cubic"
    save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(VitcliError, match="unknown position_resize `cubic`"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [1, -1, 10**30])
def test_a_whole_number_is_a_layer_scale(tmp_path, value):
    net = create_model("Pico/8", image_size=16, depth=1, layer_scale=value)
    save_model(tmp_path / "m.safetensors", net)
    back = load_model(tmp_path / "m.safetensors")
    assert torch.equal(back.network.blocks[0].ls1.gamma, torch.full((128,), float(value)))


@pytest.mark.parametrize("kind", ["vitcli", "timm", "huggingface"])
def test_each_flipped_bit_of_weights_is_detected_or_harmless(tmp_path, kind):
    sizes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16}
    small = create_model("Pico/8", image_size=16, num_classes=3, **sizes)
    file = tmp_path / "m.safetensors"
    save_model(file, small)
    if kind != "vitcli":
        export.run(kind, model=str(file), out=tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
    expected, detected = [model_hash(load_model(file)), read_metadata(file)], 0

    def check(position):
        nonlocal detected
        try:
            loaded = load_model(file)
        except VitcliError as error:
            assert str(tmp_path) in error.message
            detected += 1
        else:
            assert model_hash(loaded) == expected[0], f"byte {position}"

    flips(file, check)
    assert detected >= 45
    assert read_metadata(file) == expected[1]


def test_a_copy_and_another_name_keep_the_checksum(model, tmp_path):
    save_model(tmp_path / "a.safetensors", model)
    (tmp_path / "x").mkdir()
    copy = tmp_path / "x/b.safetensors"
    copy.write_bytes((tmp_path / "a.safetensors").read_bytes())
    flip(copy, copy.stat().st_size - 100)
    with pytest.raises(VitcliError, match="damaged: its checksum"):
        load_weights(copy)


def test_weights_without_a_checksum_load(model, tmp_path):
    save_model(tmp_path / "a.safetensors", model)
    metadata = {"vitcli": read_metadata(tmp_path / "a.safetensors")["vitcli"]}
    save_file(model.state_dict(), tmp_path / "old.safetensors", metadata)
    assert model_hash(load_model(tmp_path / "old.safetensors")) == model_hash(model)
