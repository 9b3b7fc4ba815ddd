"""ONNX files against onnxruntime, another program that computes what stands in them."""

import importlib.util
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights import onnx as module
from vitcli.weights.loaded import create_model
from vitcli.weights.onnx import data_file, run_onnx, write_onnx

TOLERANCE = 1e-4  # of the logits' largest magnitude
# The exporter takes seconds for a block; two are for what differs between blocks.
SMALL = {"depth": 1, "image_size": 32}

CASES = {
    "many-options": (
        "Pico/8",
        {
            "image_size": (32, 48),
            "num_classes": 5,
            "num_registers": 3,
            "qk_norm": True,
            "layer_scale": 0.1,
            "gelu": "tanh",
            "representation_size": 24,
            "mlp": "swiglu",
            "norm_before_blocks": True,
        },
    ),
}
MORE = {
    # What `vitcli finetune` makes of our own pre-training.
    "quadrants": (
        "Pico/8",
        {"pool": "quadrants", "position": "sincos2d", "class_token": False, "num_classes": 10},
    ),
    "attention-pool": ("Pico/8", {"pool": "map", "num_classes": 4}),
    "mean-and-fixed-positions": (
        "Pico/8",
        {"pool": "mean", "position": "sincos2d", "image_size": (32, 48), "class_token": False},
    ),
    "plain": ("Pico/8", {"num_classes": 10}),
    "norm-after-pool": ("Pico/8", {"pool": "mean", "norm_after_pool": True, "num_classes": 3}),
    "distilled": (
        "Pico/8",
        {
            "pool": "distilled",
            "distillation_token": True,
            "distillation_head": True,
            "num_classes": 6,
        },
    ),
    "token-and-mean": ("Pico/8", {"pool": "token_mean", "num_classes": 6}),
    "two-dimensional-positions-everywhere": (
        "Pico/8",
        {"position": "learned2d", "position_at": "every", "num_classes": 6, "depth": 2},
    ),
    "shared-positions": ("Pico/8", {"position_at": "shared", "num_classes": 6, "depth": 2}),
    "relative": ("Pico/8", {"position": "relative", "num_classes": 6}),
    "bias": (
        "Pico/8",
        {"position_bias": "every", "position": "none", "num_classes": 6, "depth": 2},
    ),
    "shared-bias": ("Pico/8", {"position_bias": "shared", "image_size": (32, 48), "depth": 2}),
    "rope": (
        "Pico/8",
        {
            "rope": "centred",
            "position": "none",
            "image_size": (32, 48),
            "num_registers": 2,
            "key_bias": False,
        },
    ),
    "rope-by-index": (
        "Pico/8",
        {"rope": "index", "rope_pairs": "neighbours", "rope_grid": (3, 3), "mlp_norm": True},
    ),
    "axial": ("Pico/8", {"axial": True, "pool": "mean", "class_token": False, "num_classes": 6}),
    "hybrid": ("R26+S/32", {"image_size": 64, "num_classes": 6, "depth": 1}),
    "conv-stem": ("Conv+Pico/4", {"image_size": 28, "num_classes": 6, "depth": 1}),
    "resnet": ("R50x1", {"image_size": 64, "num_classes": 6}),
}


def made(name):
    """A model whose every weight counts, with a head that answers."""
    variant, settings = (CASES | MORE)[name]
    settings = SMALL | settings if variant.startswith("Pico") else settings
    model = create_model(variant, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def images(model, batch):
    shape = (batch, model.config.num_channels, *model.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_onnxruntime_gives_our_logits_for_any_batch(name, here):
    model = made(name)
    write_onnx(model, Path("x.onnx"))
    assert [p.name for p in here.iterdir()] == ["x.onnx"]
    for batch in (1, 3, 7):
        x = images(model, batch)
        with torch.inference_mode():
            wanted = model(x)
        found = run_onnx(Path("x.onnx"), x)
        assert found.shape == wanted.shape == (batch, wanted.shape[1])
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    rows, columns = model.config.image_size
    assert (given.name, given.type) == ("images", "tensor(float)")
    assert given.shape == ["batch", 3, rows, columns]
    classes = model.config.num_classes
    assert answer.name == ("logits" if classes else "features")
    assert answer.shape == ["batch", classes or model.config.feature_dim]


@pytest.fixture(scope="module")
def small():
    model = create_model("Pico/16", depth=1, image_size=32, num_classes=2)
    model.labels, model.head_trained = ("ant", "bée"), True
    model.preprocess = Preprocess(image_size=(32, 32), crop_fraction=0.9, mean=(0.4,), std=(0.3,))
    return model


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """The file of `small`, the notes about it, and the program, which takes seconds to make."""
    path, real, made = tmp_path_factory.mktemp("onnx") / "x.onnx", module._program, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_program", lambda model: made.append(real(model)) or made[0])
        notes = write_onnx(small, path)
    return path, notes, made[0]


def test_what_a_caller_has_to_know_stands_in_the_metadata(small, written):
    path, (note,), _ = written
    assert "normalised images" in note
    # onnxruntime shows it to a caller who has only the file.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta()
    found = json.loads(about.custom_metadata_map["vitcli"])
    assert found["labels"] == ["ant", "bée"] and found["head_trained"] is True
    assert Preprocess.from_dict(found["preprocess"]) == small.preprocess
    assert (found["input"], found["output"]) == ("images", "logits")
    assert about.producer_name == "vitcli"
    onnx.checker.check_model(path, full_check=True)


def test_the_file_says_nothing_of_this_machine_and_is_the_same_each_time(small, written, here):
    write_onnx(small, Path("y.onnx"))
    content = written[0].read_bytes()
    assert content == Path("y.onnx").read_bytes()
    for trace in (b".py", b"site-packages", str(Path(module.__file__).parent).encode()):
        assert trace not in content


def test_weights_that_one_file_cannot_hold_lie_beside_it(small, written, here, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BYTES", 1000)
    monkeypatch.setattr(module, "_program", lambda model: written[2])
    notes = write_onnx(small, Path("x.onnx"))
    assert sorted(p.name for p in here.iterdir()) == ["x.onnx", "x.onnx.data"]
    assert any("`x.onnx.data`" in note for note in notes)
    weights = sum(t.nbytes for t in small.state_dict().values())
    assert data_file(Path("x.onnx")).stat().st_size > 0.9 * weights > Path("x.onnx").stat().st_size
    with torch.inference_mode():
        torch.testing.assert_close(
            run_onnx(Path("x.onnx"), images(small, 2)), small(images(small, 2))
        )


def test_nothing_is_replaced_and_nothing_is_left_behind(small, here, monkeypatch):
    monkeypatch.setattr(module, "_program", lambda model: None)
    Path("x.onnx").write_text("mine")
    with pytest.raises(VitcliError, match=r"`x\.onnx` exists already"):
        write_onnx(small, Path("x.onnx"))
    assert Path("x.onnx").read_text() == "mine"

    def full(program, path, external=None):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_save", full)
    with pytest.raises(VitcliError, match="`no` is not a folder"):
        write_onnx(small, Path("no/x.onnx"))
    with pytest.raises(VitcliError, match=r"cannot write `y\.onnx`"):
        write_onnx(small, Path("y.onnx"))
    assert [p.name for p in here.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_the_extra(package, small, here, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(VitcliError, match=f"`{package}` is not installed") as error:
        write_onnx(small, Path("x.onnx"))
    assert "pip install 'vitcli[onnx]'" in error.value.hint
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert run_onnx(Path("x.onnx"), images(small, 1)) is None
