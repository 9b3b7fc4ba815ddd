"""State dicts of `torch.save`: what is read, and that nothing in a file ever runs."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.pickles import load_pickle, own_tensors

FORMATS = pytest.mark.parametrize("zipped", [True, False])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.fixture(scope="module")
def net():
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=2)
    torch.nn.init.normal_(net.network.head.weight)
    return net


def save(value, path="w.pth", zipped=True) -> str:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path) -> VitcliError:
    with pytest.raises(VitcliError) as error:
        load_model(path, num_heads=4)
    assert error.value.hint and "\n" not in error.value.message
    return error.value


@FORMATS
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin", "w.ckpt", "w.pkl", "bare"])
def test_a_plain_state_dict(net, here, name, zipped):
    save(net.state_dict(), name, zipped)
    for given in (name, ".") if name != "bare" else (name,):
        back = load_model(given, num_heads=4)
        assert back.config == net.config and back.load_report.layout == "timm"
        for key, tensor in net.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key


@FORMATS
@pytest.mark.parametrize("wrapping", ["state_dict", "model_state", "any name"])
def test_wrappings_and_what_is_left_of_a_training(net, here, wrapping, zipped):
    optimizer = torch.optim.AdamW(net.network.parameters())
    path = save(
        {
            wrapping: net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "args": argparse.Namespace(lr=1e-3, output_dir="out"),
        },
        zipped=zipped,
    )
    back = load_model(path, num_heads=4)
    assert torch.equal(back.network.blocks[1].mlp.fc1.weight, net.network.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("taken", "left"), [("teacher", "student"), ("ema", "model"), ("state_dict_ema", "state_dict")]
)
def test_of_two_models_the_averaged_one_is_taken_and_named(net, here, taken, left):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    back = load_model(save({left: zeros, taken: net.state_dict()}), num_heads=4)
    assert torch.equal(back.network.patch_embed.proj.weight, net.network.patch_embed.proj.weight)
    note = f"loaded the weights under `{taken}.`, not those under `{left}.`"
    assert note in back.load_report.notes[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.backbone.", "encoder."])
def test_prefixes_go_and_what_stands_outside_is_named(net, here, prefix):
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    back = load_model(save({"model": {**state, "fc.weight": torch.zeros(2, 2)}}), num_heads=4)
    assert torch.equal(back.network.pos_embed, net.network.pos_embed)
    assert back.load_report.status["fc.weight"][0] == "dropped"


@FORMATS
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda net: {"w": Bomb()}, "calls `posix.mkdir`"),
        (lambda net: {**net.state_dict(), "z": [Bomb()]}, "calls `posix.mkdir`"),
        (
            lambda net: net.network,
            "pickle of a whole module (`vitcli.vit.model.VisionTransformer`)",
        ),
        (lambda net: {"model": torch.nn.Linear(2, 2)}, "(`torch.nn.modules.linear.Linear`)"),
        (lambda net: {"model": net.state_dict(), "at": Path("x")}, "calls `pathlib."),
    ],
)
def test_code_is_refused_and_does_not_run(net, here, value, words, zipped):
    error = refused(save(value(net), zipped=zipped))
    assert words in error.message and "safetensors" in error.hint
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_and_does_not_run(here, protocol):
    Path("w.pth").write_bytes(pickle.dumps({"w": Bomb()}, protocol=protocol))
    message = refused("w.pth").message
    named = "calls `posix.mkdir`, so" if protocol < 4 else "is a pickle of protocol 4 or later"
    if protocol:  # the oldest is plain text, which nothing tells from another
        assert named in message and "no code was run" in message
    assert "truncated" not in message
    assert not Path("it_ran").exists()


@FORMATS
def test_another_protocol_than_that_of_torch_is_refused(net, here, zipped):
    kind = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": 4}
    torch.save(net.state_dict(), "w.pth", **kind)
    error = refused("w.pth")
    assert "a pickle of protocol 4" in error.message and "save only its tensors" in error.hint


@FORMATS
def test_truncated(net, here, zipped):
    whole = Path(save(net.state_dict(), zipped=zipped)).read_bytes()
    for keep in (0, 3, 4, 20, 5000, len(whole) // 2, len(whole) - 1):
        Path("w.pth").write_bytes(whole[:keep])
        message = refused("w.pth").message
        assert "truncated" in message or "not written by `torch.save`" in message, keep


@FORMATS
def test_flipped_bytes_end_in_one_error_or_in_the_weights(here, zipped):
    whole = bytearray(Path(save({"w": torch.ones(4, 4)}, zipped=zipped)).read_bytes())
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        Path("w.pth").write_bytes(damaged)
        try:
            load_pickle("w.pth")
        except VitcliError as error:
            assert error.hint


def test_torchscript_is_refused(here):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save("w.pt")
    assert "TorchScript" in refused("w.pt").message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ([torch.ones(3)], "holds a list, not a state dict"),
        ({"epoch": 3, "loss": 0.5}, "holds no state dict; its keys are `epoch`, `loss`"),
        ({}, "holds no state dict; its keys are none"),
        ({"conv1.weight": torch.ones(3)}, "its tensors are `conv1.weight`"),
    ],
)
def test_no_state_dict(here, value, words):
    assert words in refused(save(value)).message


def test_a_dictionary_that_contains_itself(here):
    value = {}
    value["model"] = value["state_dict"] = value
    torch.save(value, "x.pth")
    with pytest.raises(VitcliError, match="no state dict; its keys are `model`, `state_dict`"):
        load_pickle("x.pth")
    value["weights"] = {"w": torch.ones(2)}
    torch.save(value, "x.pth")
    assert list(load_pickle("x.pth")) == ["weights"]


def test_tensors_that_are_no_weights_are_named(net, here):
    state = net.state_dict()
    cases = {
        "sparse_coo": state["head.weight"].to_sparse(),
        "without data": torch.empty(3, 128, device="meta"),
        "torch.int8": state["head.weight"].to(torch.int8),
    }
    for words, tensor in cases.items():
        error = refused(save({**state, "head.weight": tensor}))
        assert f"head.weight ({words})" in error.message, words


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_are_noted(net, here, dtype):
    back = load_model(save({k: v.to(dtype) for k, v in net.state_dict().items()}), num_heads=4)
    assert back.network.head.weight.dtype == torch.float32
    assert back.load_report.status["head.weight"] == ("loaded", f"from {dtype}")


@FORMATS
def test_tensors_that_share_memory_become_copies(here, zipped):
    x = torch.arange(16.0).reshape(4, 4)
    path = save({"a": x, "b": x, "c": x.t(), "d": x[1], "e": x[:1].expand(3, 4)}, zipped=zipped)
    tensors = own_tensors(load_pickle(path)[""], Path(path))
    for name, expected in {"b": x, "c": x.t(), "d": x[1], "e": x[:1].expand(3, 4)}.items():
        assert torch.equal(tensors[name], expected) and tensors[name].is_contiguous(), name
    tensors["a"].zero_()
    assert torch.equal(tensors["b"], x)
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


@FORMATS
@pytest.mark.parametrize(
    ("name", "shape"), [("foo", (10**9,)), ("head.weight", (10**8, 48)), ("w", (2**40, 2**21))]
)
def test_one_number_spread_over_a_large_shape_is_refused(net, here, name, shape, zipped):
    path = save({**net.state_dict(), name: torch.zeros(1).expand(shape)}, zipped=zipped)
    error = refused(path)
    assert f"the largest, `{name}`, has the shape {shape} and takes 4 bytes" in error.message


def test_it_is_refused_before_memory_is_taken(net, here):
    save({**net.state_dict(), "foo": torch.zeros(1).expand(5 * 10**8)})
    code = (
        "import resource; from vitcli.weights.load import load_model, VitcliError\n"
        "import vitcli.weights.pickles\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_model('w.pth', num_heads=4)\n"
        "except VitcliError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 200_000  # KiB; a copy would take 2 GB


@FORMATS
def test_blocks_that_share_their_weights_load(here, zipped):
    """As in ALBERT: one block's tensors under the names of twelve."""
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=12)
    state = net.state_dict()
    for name in state:
        if name.startswith("blocks."):
            state[name] = state[f"blocks.0.{name.split('.', 2)[2]}"]
    back = load_model(save(state, zipped=zipped), num_heads=4)
    for name, tensor in state.items():
        assert torch.equal(back.state_dict()[name], tensor), name
    places = {p.data_ptr() for p in back.network.parameters()}
    assert len(places) == len(list(back.network.parameters()))


def test_the_file_stays_as_it_is(net, here):
    before = Path(save(net.state_dict())).read_bytes()
    model = load_model("w.pth", num_heads=4)
    with torch.no_grad():
        model.network.head.weight.zero_()
    assert Path("w.pth").read_bytes() == before


def test_several_in_a_folder(net, here):
    save(net.state_dict(), "a.pth")
    save(net.state_dict(), "b.pth")
    assert "holds 2 weights files: `a.pth`, `b.pth`" in refused(".").message
    save(net.state_dict(), "pytorch_model.bin")  # the one that libraries name so goes first
    assert load_model(".", num_heads=4).config == net.config


def test_another_file_of_that_name(here):
    Path("w.pth").write_text("hello")
    assert "not written by `torch.save`" in refused("w.pth").message
    Path("w.pth").unlink()
    Path("w.pth").mkdir()
    assert "holds no weights" in refused("w.pth").message
