"""`vitcli export`: a model in another layout is the same model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitcli.cli.main import run as cli
from vitcli.commands import evaluate, export, predict
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.files import exclusive
from vitcli.preprocess import Preprocess
from vitcli.weights import onnx
from vitcli.weights.formats import FORMATS
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.onnx import run_onnx
from vitcli.weights.store import save_model
from vitcli.weights.timm.write_timm import write_timm

READABLE = ("timm", "huggingface", "google")
NAMES = ("ant", "bée", "cat")


def place(to):
    return Path(f"out/x{FORMATS[to].suffix or ''}")


def trained(**settings):
    """A model that says everything about itself; tanh, which every layout can say."""
    settings = {"num_classes": 3, "gelu": "tanh", "image_size": 32, "depth": 1, **settings}
    net = create_model("Pico/8", **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    net.head_trained = net.config.num_classes > 0
    net.labels = NAMES if net.head_trained else None
    net.preprocess = Preprocess(
        image_size=net.config.image_size, crop_fraction=0.9, mean=(0.4, 0.5, 0.6), std=(0.3,)
    )
    return net


@pytest.fixture
def model(here):
    net = trained()
    save_model("m.safetensors", net)
    return net


@pytest.mark.parametrize("to", READABLE)
def test_ours_there_and_back_is_bit_exact(to, model):
    result = export.run(to, model="m.safetensors", out=place(to))
    again = load_model(place(to), num_heads=4 if to == "google" else None)
    wanted, found = model.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again.config == model.config
    assert (again.labels, again.preprocess) == (model.labels, model.preprocess)
    assert again.head_trained
    assert result.difference == 0.0 < result.scale
    assert result.to_json()["class_names"] is True and result.to_json()["mean"] == [0.4, 0.5, 0.6]


def test_every_format_says_what_it_wrote(model, capfd):
    for to in FORMATS:
        arguments = ["export", "--model", "m.safetensors", "--to", to, "--out", str(place(to))]
        assert cli([*arguments, "--json"]) == 0
        streams = capfd.readouterr()
        facts = json.loads(streams.out)
        assert (facts["format"], facts["path"]) == (to, str(place(to)))
        assert facts["bytes"] == sum(facts["files"].values()) > 0
        folder = place(to) if place(to).is_dir() else place(to).parent
        assert all((folder / name).stat().st_size == n for name, n in facts["files"].items())
        assert facts["largest_difference"] <= export.LARGEST_DIFFERENCE * facts["largest_magnitude"]
        assert (facts["classes"], facts["norm_eps"], facts["gelu"]) == (3, 1e-6, "tanh")
        assert "warning" not in streams.err.lower()
        shutil.rmtree("out")
    assert cli(["export", "--model", "m.safetensors", "--to", "timm"]) == 0
    streams = capfd.readouterr()
    assert "runs/m-timm" in streams.out and "3, with names" in " ".join(streams.out.split())
    assert "no `--out` given: writing to runs/m-timm" in streams.err
    assert "next:" not in streams.out  # a file of weights names no data to evaluate on


def test_the_default_model_and_place(model, here):
    with pytest.raises(VitcliError, match="no finished run"):
        export.run("timm")
    for name, command, net in (
        ("old", "finetune", model),
        ("new", "pretrain", trained(num_classes=0)),
    ):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        save_model(folder / "model.safetensors", net)
        (folder / "result.json").write_text(json.dumps({"command": command}))
    assert export.run("timm").model == "runs/old"  # a head goes before youth
    assert export.run("timm").path == "runs/old-timm-2"
    assert export.run("google").path == "runs/old.npz"
    shutil.rmtree(here / "runs/old")
    assert export.run("google").model == "runs/new"


@pytest.mark.parametrize("to", READABLE)
@pytest.mark.parametrize("how", ["no head", "another pooling"])
def test_predict_refuses_a_model_without_its_head(to, how, here):
    net = trained(num_classes=0) if how == "no head" else trained()
    save_model("m.safetensors", net)
    export.run(to, model="m.safetensors", out=place(to))
    Image.new("RGB", (40, 40)).save("a.png")
    settings = {"model": {"num_heads": 4} if to == "google" else {}}
    if how == "another pooling":
        predict.run(["a.png"], model=str(place(to)), settings=settings)
        settings["model"]["pool"] = "mean"
    with pytest.raises(VitcliError, match="has no trained head"):
        predict.run(["a.png"], model=str(place(to)), settings=settings)


def test_what_is_stated_goes_along(model, here):
    Path("names.txt").write_text("x\ny\nz\n")
    result = export.run(
        "timm",
        model="m.safetensors",
        settings={"model": {"image_size": 48, "gelu": "exact"}, "preprocess": {"mean": 0.1}},
        labels="names.txt",
        out=Path("x"),
    )
    again = load_model("x")
    assert again.config.image_size == again.preprocess.image_size == (48, 48)
    assert (again.labels, again.config.gelu) == (("x", "y", "z"), "exact")
    assert again.preprocess.mean == (0.1,) * 3 == tuple(result.facts["mean"])


def test_what_google_cannot_express(here):
    save_model("m.safetensors", trained(gelu="exact"))
    with pytest.raises(VitcliError, match=r"`model.gelu` = exact") as error:
        export.run("google", model="m.safetensors")
    assert "--set model.gelu=tanh" in error.value.hint
    assert [p.name for p in here.iterdir()] == ["m.safetensors"]  # not even a folder
    export.run("google", model="m.safetensors", settings={"model": {"gelu": "tanh"}})


@pytest.mark.parametrize(
    ("to", "out", "words"),
    [
        ("tim", None, "unknown format `tim`"),
        ("onnx", "x.npz", "does not end in .onnx"),
        ("google", "x", "does not end in .npz"),
        ("timm", "taken", "`taken` exists already"),
        ("onnx", "taken/x.onnx", "exists already"),
        ("onnx", "folder.onnx", "`folder.onnx` is a folder"),
        ("timm", "m.safetensors", "`m.safetensors` exists already"),
        ("timm", "m.safetensors/deep/x", "cannot make `m.safetensors/deep`"),
    ],
)
def test_places_that_will_not_do(to, out, words, model, here):
    Path("taken").mkdir()
    Path("taken/x.onnx").write_text("mine")
    Path("folder.onnx").mkdir()
    before = sorted(here.rglob("*"))
    with pytest.raises(VitcliError, match=words) as error:
        export.run(to, model="m.safetensors", out=out and Path(out))
    assert error.value.hint
    assert sorted(here.rglob("*")) == before


def test_an_empty_folder_is_a_place(model):
    Path("x").mkdir()
    assert export.run("timm", model="m.safetensors", out=Path("x")).path == "x"


def test_what_gives_other_logits_is_not_kept(model, here, monkeypatch):
    def careless(net, out):
        with torch.no_grad():
            net = trained()
            net.network.head.bias += 0.01
        write_timm(net, out)
        return []

    monkeypatch.setattr("vitcli.weights.timm.write_timm.write_timm", careless)
    with pytest.raises(VitcliError, match="the logits of the"):
        export.run("timm", model="m.safetensors", out=Path("deep/x"))
    assert [p.name for p in here.iterdir()] == ["m.safetensors"]


def test_weights_that_are_not_finite(model, here):
    with torch.no_grad():
        model.network.head.bias[0] = float("nan")
    save_model("m.safetensors", model)
    with pytest.raises(VitcliError, match="the logits of the") as error:
        export.run("timm", model="m.safetensors")
    assert "NaN" in error.value.hint


def test_without_onnxruntime_the_file_is_kept_and_said_not_to_be_verified(model, monkeypatch):
    def quick(net, out):
        out.write_bytes(b"a graph")
        return []

    monkeypatch.setattr("vitcli.weights.onnx.write_onnx", quick)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    result = export.run("onnx", model="m.safetensors", out=Path("x.onnx"))
    assert result.difference is None and Path("x.onnx").is_file()
    assert result.notes[-1] == "not verified: onnxruntime is not installed"


@pytest.mark.parametrize(("to", "taken"), [("onnx", "x.onnx"), ("google", "x.npz"), ("timm", "x")])
def test_a_killed_export_is_repeated_and_leaves_nothing(to, taken, model, here, monkeypatch):
    """Killed while it wrote: the name is taken, and temporary files and the lock remain."""
    out = here / "deep" / taken
    out.parent.mkdir()
    temporary = out.with_name(f".{out.name}.0123456789ab.tmp")
    if out.suffix:
        out.touch()
        temporary.write_bytes(b"half")
    else:
        temporary.mkdir()
        (temporary / "model.safetensors").write_bytes(b"half")
    out.with_name(f".{out.name}.lock").touch()
    other = out.with_name(f".{out.name}.mine.0123456789ab.tmp")  # of another output
    other.touch()
    if to == "onnx":  # its exporter takes seconds
        monkeypatch.setattr(onnx, "write_onnx", lambda net, path: path.write_bytes(b"graph") and [])
        monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    export.run(to, model="m.safetensors", out=out)
    left = {path.name for path in out.parent.iterdir()} - {f"{out.name}.split.json"}
    assert left == {out.name, other.name}


def test_what_was_not_compared_yet_is_not_there(model, here, monkeypatch):
    """An export that is killed before its check leaves no output, so it can be repeated."""

    def compare(net, to, written):
        assert not out.exists() or not out.read_bytes()
        return compared(net, to, written)

    compared = export._compare
    monkeypatch.setattr(export, "_compare", compare)
    for to in READABLE:
        out = here / f"{to}{FORMATS[to].suffix or ''}"
        export.run(to, model="m.safetensors", out=out)
        assert out.exists()


def test_a_live_export_keeps_its_place(model, here):
    Path("x.npz").touch()
    with (
        exclusive(Path(".x.npz.lock"), lambda: VitcliError("held")),
        pytest.raises(VitcliError, match="another export writes it"),
    ):
        export.run("google", model="m.safetensors", out=Path("x.npz"))
    assert Path("x.npz").stat().st_size == 0


# A model that somebody trained, on photographs.

TINY = "data/weights/vit_tiny_patch16_224_in1k/timm.safetensors"
PHOTOS = "data/imagenette_val500"


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory):
    """Every fiftieth photograph: one a class."""
    images = load_data(str(shared / PHOTOS)).split("test")
    folder = tmp_path_factory.mktemp("photos")
    files = []
    for row in range(0, len(images), 50):
        file = folder / f"{row:03}.png"
        images.read(row).save(file)
        files.append(str(file))
    return files


def rows(photos, model):
    found = predict.predict(photos, model=model, top=1000)
    return [{one["label"]: one["probability"] for one in row["top"]} for row in found]


def same(wanted, found, tolerance):
    for a, b in zip(wanted, found, strict=True):
        assert max(a, key=a.get) == max(b, key=b.get)
        assert max(abs(a[name] - b[name]) for name in a) <= tolerance


def test_a_real_model_predicts_the_same_from_every_layout(shared, photos, here):
    tiny = str(shared / TINY)
    wanted = rows(photos, tiny)
    for to in ("timm", "huggingface"):
        result = export.run(to, model=tiny, out=place(to))
        assert result.difference == 0.0
        same(wanted, rows(photos, str(place(to))), 0.0)
        shutil.rmtree("out")
    with pytest.raises(VitcliError, match="gelu"):
        export.run("google", model=tiny, out=place("google"))


@pytest.mark.slow
def test_a_real_model_predicts_the_same_in_onnxruntime(shared, photos, here):
    tiny = str(shared / TINY)
    wanted = rows(photos, tiny)
    export.run("onnx", model=tiny, out=place("onnx"))
    net = load_model(tiny)
    images = torch.stack([net.preprocess(photo) for photo in photos])
    shares = run_onnx(place("onnx"), images).double().softmax(1).tolist()
    same(wanted, [dict(zip(net.labels, row, strict=True)) for row in shares], 1e-5)


@pytest.mark.proof
def test_a_real_model_counts_the_same_from_every_layout(shared, here):
    """The figures of the weights' README: 72.4 % of 1000 classes, 91.0 % top-5, 97.8 % of ten."""

    def counts(model, settings=None):
        result = evaluate.run(str(shared / PHOTOS), model=model, settings=settings)
        figures = (result.metrics.top1, result.metrics.top5, result.top1_restricted)
        assert result.metrics.images == 500
        return [round(500 * figure) for figure in figures], result.confusion

    tiny = str(shared / TINY)
    wanted, confusion = counts(tiny)
    assert wanted == [362, 455, 489]
    for to in ("timm", "huggingface"):
        export.run(to, model=tiny, out=place(to))
        found, again = counts(str(place(to)))
        assert found == wanted and (again == confusion).all()
        shutil.rmtree("out")
    # Google's layout has no exact GELU: the same figures as the same weights with the other one.
    tanh = {"model": {"gelu": "tanh"}}
    wanted, confusion = counts(tiny, tanh)
    export.run("google", model=tiny, settings=tanh, out=place("google"))
    found, again = counts(str(place("google")))
    assert found == wanted and (again == confusion).all()


@pytest.mark.parametrize("layout", ["timm", "huggingface", "google"])
def test_a_head_for_several_labels_stays_one(layout, tmp_path):
    """What makes probabilities of the logits travels with every layout."""
    model = trained()
    model.head_activation = "sigmoid"
    save_model(tmp_path / "ours.safetensors", model)
    out = tmp_path / f"x{FORMATS[layout].suffix or ''}"
    export.run(layout, model=str(tmp_path / "ours.safetensors"), out=out)
    back = load_model(out)
    assert back.head_activation == "sigmoid"
    logits = torch.tensor([[0.0, 2.0, -2.0]])
    assert torch.equal(back.probabilities(logits), logits.double().sigmoid())
