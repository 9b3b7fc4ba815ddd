"""`vitcli inspect`: what it finds, writes and refuses."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from support.kinds import small
from support.pages import check_page
from support.tiny import tiny_recipe

from vitcli.cli import console as report
from vitcli.cli.main import run as cli
from vitcli.cli.show import inspection as results_look
from vitcli.commands.inspect import run
from vitcli.data.readers.builtin import sklearn_photographs
from vitcli.errors import VitcliError
from vitcli.inspection import drawing as draw
from vitcli.inspection.inductive_bias import random_network
from vitcli.preprocess import Preprocess
from vitcli.run import create_run
from vitcli.vit import ResNetConfig
from vitcli.weights.loaded import LoadedModel, create_model
from vitcli.weights.store import save_model

NAMES = ("ant", "bee", "cat", "dog", "<i>elk</i>")


@pytest.fixture
def pictures(here):
    """Six photographs of noise: three of a class that the model knows, three of none."""
    rng = np.random.default_rng(0)
    for folder in ("bee", "other"):
        (here / "p" / folder).mkdir(parents=True)
        for i in range(3):
            noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(here / "p" / folder / f"{i}.png")
    return here


def stored(kind="plain", path="m.safetensors", **settings):
    """A small model of a kind in a file, with names and a head that is trained."""
    network = small(kind, **settings)
    channels = network.config.num_channels
    preprocess = Preprocess(network.config.image_size, num_channels=channels)
    model = LoadedModel(network, labels=NAMES, preprocess=preprocess, head_trained=True)
    save_model(path, model)
    return model


def stored_resnet(path="r.safetensors"):
    network = random_network(ResNetConfig((64, 64), 3, (1, 1, 1), 0.5))
    save_model(path, LoadedModel(network, preprocess=Preprocess((64, 64))))


def test_numbers_pictures_and_one_page(pictures):
    stored()
    result = run(["p"], model="m.safetensors", out=pictures / "look")
    facts = json.loads((pictures / "look/inspect.json").read_text())
    assert facts == json.loads(json.dumps(result.to_json()))
    assert facts["images"] == 6 and facts["kind"] == "vit" and facts["source"] == "class token"
    assert facts["grid"] == [4, 6] and facts["cell_pixels"] == 4
    found = facts["attention_distance"]
    assert np.shape(found["pixels"]) == (3, 2) and found["layers"] == ["1", "2", "3"]
    assert np.allclose(np.array(found["patches"]) * 4, found["pixels"])
    assert (np.array(found["unscaled_patches"]) < found["patches"]).all()  # the class token's share
    with np.load(pictures / "look/figures.npz") as numbers:
        assert numbers["rollout"].shape == (6, 4, 6)
        assert numbers["layer_maps"].shape == (6, 3, 2, 4, 6)
        assert numbers["filters"].shape == (16, 3, 4, 4)
        assert numbers["position_similarity"].shape == (24, 24)
        peak = np.unravel_index(numbers["rollout"][0].argmax(), (4, 6))
    assert facts["rollout"][0]["peak"] == list(peak)
    names = set(facts["files"])
    assert names == {p.name for p in (pictures / "look").iterdir()} and "distance.png" in names
    for name in names:
        if name.endswith(".png"):
            with Image.open(pictures / "look" / name) as picture:
                picture.load()
    text = (pictures / "look/report.html").read_text()
    page = check_page(text)
    assert {"Filters", "Positions", "Attention distance", "Inductive bias"} < set(page.headings)
    # The chart of the distances is drawn as SVG, all others are images.
    pictured = sum(name.endswith(".png") for name in names)
    assert page.tags["img"] == pictured - 1 and page.tags["svg"] == 1
    assert "<i>elk" not in text


def test_classes_have_ranks(pictures):
    model = stored()
    result = run(["p/bee/0.png", "p/other/0.png"], model="m.safetensors", with_bias=False)
    assert str(result.out) == "runs/m-inspect" and result.facts["inductive_bias"] is None
    known, unknown = result.facts["rollout"]
    with torch.no_grad():
        shares = model.probabilities(model(model.preprocess("p/bee/0.png")[None]))[0]
    order = shares.argsort(descending=True).tolist()
    assert [one["label"] for one in known["top"]] == [NAMES[i] for i in order]
    assert [one["rank"] for one in known["top"]] == [1, 2, 3, 4, 5]
    assert known["truth"]["label"] == "bee" and known["truth"]["rank"] == order.index(1) + 1
    assert known["probability"] == pytest.approx(shares.max().item(), abs=1e-6)
    assert unknown["truth"] is None and unknown["label"] in NAMES


SEVERAL = ("plain", "mean", "quadrants", "map", "all of today", "distilled", "none", "sincos2d")
SEVERAL += ("learned, every", "relative", "axial", "axial, 2-D, every, map", "hybrid")


@pytest.mark.parametrize("kind", SEVERAL)
def test_every_kind_of_model_can_be_looked_into(kind, pictures):
    model = stored(kind)
    result = run(["p"], model="m.safetensors", out=pictures / "look", limit=4)
    facts = result.facts
    kinds = {"axial": "axial", "root": "hybrid", "hybrid": "hybrid"}
    assert facts["kind"] == next((v for k, v in kinds.items() if kind.startswith(k)), "vit")
    pool = model.config.pool
    expected = {"map": "pooling query", "mean": "mean of the patches"}
    expected["quadrants"] = "mean of the patches"
    assert facts["source"] == expected.get(pool, "class token") and facts["images"] == 4
    without = model.config.position in ("none", "relative")
    assert (facts["positions"]["reason"] is not None) == without
    this, twin, resnet = result.bias_rows
    assert this.parameters == twin.parameters and resnet.local is None
    assert this.equivariance.shifts == ((4, 8, 16) if kind in ("root", "hybrid") else (2, 4, 8))
    assert 0 < this.local_first <= 1 and -30 < this.equivariance.r2[0] <= 1


def test_without_an_image_there_are_built_in_ones(here):
    found = sklearn_photographs()
    assert found is not None and len(found) == 4
    with Image.open(found._store.files[0]) as whole:
        assert found.read(0).size == (whole.width // 2, whole.height)
        assert (np.asarray(found.read(2)) == np.asarray(whole)[:, whole.width // 2 :]).all()
    assert found.describe(1) == "flower.jpg, left half"
    for name, size, words in (
        ("mu/4", 8, "builtin:digits"),
        ("mu/4", 32, "builtin:formula"),
        ("mu/16", 64, "photographs"),
    ):
        settings = {"model": {"image_size": size}}
        facts = run(model=name, settings=settings, out=here / "o", with_bias=False).facts
        assert words in facts["data"] and facts["images"] == (4 if words == "photographs" else 32)
        assert facts["rollout"][0]["label"] is None  # no head


def test_random_weights_need_no_random_twin(pictures):
    result = run(["p"], model="mu/4", settings={"model": {"image_size": 16}}, out=pictures / "o")
    names = [row.name for row in result.bias_rows]
    assert names[0] == "this model" and names[1].endswith("x0.5/1, random")
    rows = result.facts["inductive_bias"]["rows"]
    assert set(rows[0]["r2"]) == {"2", "4", "8"} and rows[1]["local"] is None


def test_a_resnet_has_no_attention(pictures):
    stored_resnet()
    with pytest.raises(VitcliError, match="is a ResNet: it has no attention") as error:
        run(["p"], model="r.safetensors", with_bias=False)
    assert "--no-bias" in error.value.hint
    result = run(["p"], model="r.safetensors", out=pictures / "o")
    assert result.facts["attention_distance"] is None and result.facts["rollout"] is None
    assert result.facts["filters"]["of"] == "root convolution"
    assert [row.name for row in result.bias_rows] == ["this model", "random twin"]


def test_a_resnet_can_be_given(pictures):
    stored_resnet()
    settings = {"model": {"image_size": 64}}
    result = run(["p"], model="mu/16", settings=settings, resnet="r.safetensors")
    assert [row.name for row in result.bias_rows] == ["this model", "r.safetensors"]
    assert result.bias_rows[-1].equivariance.cell == 16
    stored(path="grey.safetensors", num_channels=1)
    with pytest.raises(VitcliError, match="reads 3 channels, the model reads 1"):
        run(["p"], model="grey.safetensors", resnet="r.safetensors")
    with pytest.raises(VitcliError, match="is not a ResNet"):
        run(["p"], model="mu/16", resnet="mu/16")


def test_data_of_every_kind_is_looked_at(pictures):
    (pictures / "t.csv").write_text("path,label\np/bee/0.png,bee\np/other/0.png,dog\n")
    stored()
    facts = run(["t.csv"], model="m.safetensors", with_bias=False).facts
    assert facts["images"] == 2 and facts["data"] == "t.csv"
    assert [one["truth"]["label"] for one in facts["rollout"]] == ["bee", "dog"]
    facts = run(["builtin:digits"], model="m.safetensors", limit=3, with_bias=False).facts
    assert facts["images"] == 3 and len(facts["rollout"]) == 3


def test_what_cannot_be_read_is_named(pictures, capsys):
    stored()
    (pictures / "p/bad.png").write_bytes(b"no picture")
    arguments = ["inspect", "p", "gone.png", "--model", "m.safetensors", "--no-bias", "--json"]
    assert cli([*arguments, "--out", "o"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 6
    assert "p/bad.png: " in captured.err and "gone.png: the file does not exist" in captured.err
    assert cli(["inspect", "gone.png", "--model", "m.safetensors", "--out", "new"]) == 2
    assert cli(["inspect", "p/bad.png", "--model", "m.safetensors", "--out", "new"]) == 2
    assert "none of 1 images can be read" in capsys.readouterr().err
    assert not (pictures / "new").exists()


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv.weight", "pos_embed", "patch_embed.proj.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(pictures, name, value):
    model = stored()
    model.network.get_parameter(name).data[0, 0] = value
    save_model("m.safetensors", model)
    with pytest.raises(VitcliError, match="is not a number"):
        run(["p"], model="m.safetensors", out=pictures / "new")
    assert not (pictures / "new").exists()


def test_mistakes_are_said_before_the_work(pictures):
    stored()
    for message, arguments in (
        ("`--limit` is 0", {"limit": 0}),
        ("is not a folder", {"out": pictures / "m.safetensors"}),
        ("no such image", {"paths": ["gone.png"]}),
        ("unknown dataset `builtin:digit`", {"paths": ["builtin:digit"]}),
        ("no finished run", {"model": None}),
    ):
        with pytest.raises(VitcliError, match=message):
            run(**{"paths": ["p"], "model": "m.safetensors", **arguments})
    assert not (pictures / "runs").exists()


def test_the_newest_run_is_looked_into(here, capsys):
    one = create_run(here / "runs/one", tiny_recipe())
    stored(path=one.weights_file)
    one.finish({"command": "pretrain"})
    assert cli(["inspect", "--no-bias", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"] == "runs/one"
    assert "no `--model` given" in captured.err and "no IMAGE given" in captured.err


def test_a_terminal_with_colours_shows_pictures(pictures, monkeypatch):
    stored()
    result = run(["p"], model="m.safetensors", limit=4)
    shown = {}
    for colour in (True, False):
        kind = {"force_terminal": colour, "no_color": not colour, "highlight": False}
        out = Console(file=io.StringIO(), width=80, **kind)
        monkeypatch.setattr(report, "out", out)
        results_look.show_inspection(result)
        shown[colour] = out.file.getvalue()
    assert shown[True].count("▀") > 500 and "▀" not in shown[False]
    for words in (
        "attention rollout",
        "Rank 1",
        "R2 at a shift of 1 cell ",
        "uniform",
        "report.html",
    ):
        assert words in shown[False]


def test_the_mask_is_the_authors():
    rollout = np.zeros((4, 4))
    rollout[1, 2] = 0.5
    shade = np.asarray(draw.rollout_mask(rollout, (64, 64), 16)).astype(float)
    assert shade.min() == 0 and shade.max() == 255
    row, column = np.unravel_index(shade.argmax(), shade.shape)
    assert abs(row - 23.5) <= 3 and abs(column - 39.5) <= 3  # the middle of the patch
    assert np.asarray(draw.rollout_mask(np.ones((2, 2)), (8, 8), 1)).min() == 255
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    over = np.asarray(draw.overlay_rollout(image, rollout, 16)).astype(float)
    bright = over / [200, 100, 50]  # (64, 64, 3): equal in all channels
    assert np.ptp(bright, axis=2).max() < 0.03
    # The order of the mask, stretched: nothing is black, and the peak is the image itself.
    assert bright.min() == pytest.approx(0.2, abs=0.02) and bright.max() == pytest.approx(1)
    order = np.argsort(shade.ravel(), kind="stable")
    assert (np.diff(bright[..., 0].ravel()[order]) > -0.01).all()


def test_a_rollout_with_one_high_peak_does_not_leave_the_image_black():
    rollout = np.full((8, 8), 0.01) + np.random.default_rng(0).random((8, 8)) * 0.02
    rollout[0, 0] = 1.0
    image = Image.new("RGB", (128, 128), (200, 200, 200))
    old = np.asarray(draw.rollout_mask(rollout, (128, 128), 16)) / 255
    shown = np.asarray(draw.overlay_rollout(image, rollout, 16))[..., 0] / 200
    assert np.median(old) < 0.05 and np.percentile(shown, 90) > 0.5 and shown.min() >= 0.19


def test_a_constant_rollout_shows_the_image():
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    assert draw.overlay_rollout(image, np.ones((2, 2)), 8).tobytes() == image.tobytes()


def test_tiles_stand_where_their_places_are():
    similarity = np.eye(6)
    sheet = np.asarray(draw.draw_similarity(similarity, (2, 3)))
    scale = draw.tile_scale(3, 42)
    for place in range(6):
        row, column = divmod(place, 3)
        top, left = row * (2 * scale + draw.GAP), column * (3 * scale + draw.GAP)
        tile = sheet[top : top + 2 * scale : scale, left : left + 3 * scale : scale].astype(int)
        bright = (tile == tile[row, column]).all(-1)
        assert bright.sum() == 1 and bright[row, column]
    assert draw.tile_positions(5, 9) == [0, 1, 2, 3, 4]
    assert draw.tile_positions(37, 3) == [0, 18, 36]


def test_a_square_of_another_size_than_the_weights(pictures):
    model = create_model("mu/4", image_size=16, num_classes=0)
    model.preprocess = Preprocess((16, 16))
    save_model("s.safetensors", model)
    facts = run(
        ["p"], model="s.safetensors", settings={"model": {"image_size": 24}}, with_bias=False
    ).facts
    assert facts["grid"] == [6, 6] and facts["positions"]["grid"] == [6, 6]


def test_a_few_bright_patches_do_not_make_the_others_black():
    """As the corners of the last layers, which often take most of the attention."""
    maps = np.linspace(0.2, 1, 196).reshape(1, 14, 14)
    maps[0, [0, 0, -1, -1], [0, -1, 0, -1]] = 100
    drawn = np.asarray(draw.draw_maps(maps, ["1"])).astype(int).sum(axis=2)
    tile = drawn[3 : 14 * 7 : 7, 3 : 14 * 7 : 7]  # the middle of each patch, 7 px wide
    brightness = np.delete(tile.ravel(), [0, 13, 182, 195])
    assert brightness[-20:].mean() > 200 + brightness[:20].mean()  # of 765
    sparse = np.zeros((1, 14, 14))
    sparse[0, 3, 3] = 1  # no percentile is above 0
    assert np.asarray(draw.draw_maps(sparse, ["1"]))[3 * 7 + 3, 3 * 7 + 3].sum() > 500


def test_captions_fit_under_their_tiles():
    for name in ("12", "head 12", "a long name"):
        assert draw._caption_font([name], 98).getlength(name) <= 98
    assert draw._caption_font(["12"], 98).size == draw.CAPTION_SIZE
