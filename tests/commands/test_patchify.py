"""`vitcli patchify`: what it says, draws and stores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vitcli.commands.patchify import resolve_image_size, run
from vitcli.decode import ImageError
from vitcli.errors import VitcliError
from vitcli.inspection.patch_grids import (
    dividing_patch_sizes,
    draw_grid,
    patch_size_costs,
    patch_statistics,
)
from vitcli.preprocess import Preprocess
from vitcli.vit import parse_variant
from vitcli.vit.macs import macs
from vitcli.vit.patches import unpatchify


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save("one.png")
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (10, 10), 100 * number + i).save(tmp_path / f"photos/{name}/{i}.png")
    return tmp_path


def tensors(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_picture_is_counted_and_drawn(folder):
    result = run("one.png", patch_size=16, image_size=48)
    facts = json.loads(json.dumps(result.to_json()))
    assert [row["patch_size"] for row in facts.pop("cost")] == [8, 16]
    assert {name: len(v["patches"]) for name, v in facts.pop("statistics").items()} == {
        "mean": 9,
        "std": 9,
        "entropy": 9,
    }
    assert facts == {
        "source": "one.png",
        "kind": "image",
        "image_size": [48, 48],
        "patch_size": 16,
        "channels": 3,
        "grid": [3, 3],
        "tokens": 9,
        "token_values": 768,
        "picture_size": [50, 70],
        "picture": "one-patches.png",
        "out": None,
        "comparison": None,
        "reconstruction": None,
    }
    with Image.open("one-patches.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(result.picture)).all()
    assert result.image.size == (48, 48)
    assert sorted(p.name for p in folder.iterdir()) == ["one-patches.png", "one.png", "photos"]


def test_the_grid_lies_between_the_patches():
    drawn = np.asarray(draw_grid(Image.new("RGB", (64, 64), (255, 0, 0)), 16)).astype(int)
    scale = drawn.shape[0] // 64
    lines = (drawn == 255).all(axis=2)
    assert np.flatnonzero(lines.all(axis=0)).tolist() == [scale * x for x in (16, 32, 48)]
    assert np.flatnonzero(lines.all(axis=1)).tolist() == [scale * y for y in (16, 32, 48)]


def test_the_patches_of_a_picture_give_it_back():
    result = run("one.png", patch_size=8, image_size=(24, 40), out="one.safetensors")
    found, metadata = tensors("one.safetensors")
    assert found["patches"].shape == (result.num_patches, result.patch_dim) == (15, 192)
    whole = unpatchify(found["patches"][None], 8, (24, 40))[0]
    assert torch.equal(whole, Preprocess((24, 40)).pixels("one.png"))
    # The second patch, cut by hand: rows, columns, channels.
    cut = np.asarray(result.image)[0:8, 8:16].reshape(-1)
    assert (found["patches"][1].numpy() == cut).all()
    assert metadata["patch_size"] == "8" and metadata["grid"] == "3x5"
    assert metadata["image_size"] == "24x40" and metadata["source"] == "one.png"


def test_a_picture_is_put_together_again(folder):
    """From the patches at once, and later from the file that holds them: the same pixels."""
    result = run(
        "one.png", patch_size=8, image_size=(24, 40), out="p.safetensors", reconstruct="r.png"
    )
    with Image.open("r.png") as whole:
        assert (np.asarray(whole) == np.asarray(result.image)).all()
    again = run("p.safetensors", reconstruct="again.png")
    assert (folder / "again.png").read_bytes() == (folder / "r.png").read_bytes()
    assert again.image_size == (24, 40) and again.patch_size == 8
    assert again.to_json()["statistics"] == result.to_json()["statistics"]
    grey = run("one.png", image_size=32, num_channels=1, reconstruct="grey.png")
    with Image.open("grey.png") as whole:
        assert whole.mode == "L" and (np.asarray(whole) == np.asarray(grey.image)).all()


def test_sizes_side_by_side():
    result = run("one.png", image_size=64, compare="sizes.png")
    with Image.open("sizes.png") as sheet:
        assert sheet.width == 3 * 448 + 2 * 8 and sheet.height == 448 + 18
        drawn = np.asarray(sheet)
    for number, size in enumerate((8, 16, 32)):
        left = number * (448 + 8)
        assert (drawn[:448, left : left + 448] == np.asarray(draw_grid(result.image, size))).all()


@pytest.mark.parametrize(
    "image_size,patch_size,sizes",
    [
        ((224, 224), 16, [8, 16, 32]),
        ((224, 224), 14, [8, 14, 16, 32]),
        ((225, 225), 15, [15]),
        ((48, 32), 16, [8, 16]),
        ((30, 60), 10, [5, 10]),
        ((12, 24), 6, [3, 6, 12]),
    ],
)
def test_patch_sizes_that_divide_the_image(image_size, patch_size, sizes):
    assert dividing_patch_sizes(image_size, patch_size) == sizes


def test_statistics_of_patches_are_scipys():
    from scipy.stats import entropy

    patches = np.random.default_rng(0).integers(0, 60, (5, 48), dtype=np.uint8)
    patches[2] = 7
    found = patch_statistics(patches)
    assert np.allclose(found.mean, patches.astype(float).mean(1))
    assert np.allclose(found.std, patches.astype(float).std(1))
    expected = [entropy(np.bincount(row), base=2) for row in patches]
    assert np.allclose(found.entropy, expected) and found.entropy[2] == 0


def test_the_cost_of_a_cut_is_what_is_counted():
    for row in patch_size_costs((64, 96), [8, 16, 32]):
        config = parse_variant(f"B/{row['patch_size']}", image_size=(64, 96))
        assert row["forward_macs"] == macs(config) and row["token_pairs"] == config.num_tokens**2
        assert row["attention_macs"] == 2 * config.num_tokens**2 * 768 * 12


def test_the_drawing_can_be_placed():
    result = run("one.png", out="deep.png")
    assert str(result.picture_path) == "deep.png" and result.out is None


def test_data_without_out_is_only_counted(folder):
    facts = run("photos").to_json()
    assert [row["tokens"] for row in facts.pop("cost")] == [784, 196, 49]
    assert facts | {"source": ""} == {
        "source": "",
        "kind": "data",
        "image_size": [224, 224],
        "patch_size": 16,
        "channels": 3,
        "grid": [14, 14],
        "tokens": 196,
        "token_values": 768,
        "images": {"train": 6},
        "classes": ["cat", "dog"],
        "unreadable": [],
        "out": None,
    }
    assert sorted(p.name for p in folder.iterdir()) == ["one.png", "photos"]


def test_data_is_stored_whole(folder):
    (folder / "photos/cat/broken.png").write_bytes(b"")
    result = run("photos", patch_size=2, image_size=4, num_channels=1, out="set.safetensors")
    found, metadata = tensors("set.safetensors")
    assert found["train.patches"].shape == (6, 4, 4)
    assert found["train.patches"].dtype == torch.uint8
    assert found["train.labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["train.patches"][:, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert len(result.broken) == 1 and "broken.png: the file is empty" in result.broken[0]


def test_split_data_keeps_its_splits():
    run("builtin:digits", patch_size=4, image_size=8, num_channels=1, out="d.safetensors")
    found, _ = tensors("d.safetensors")
    assert found["train.patches"].shape == (1438, 4, 16)
    assert found["test.patches"].shape == (359, 4, 16)
    assert found["test.labels"].shape == (359,)


@pytest.mark.parametrize(
    "size,near", [(225, "224 and 240"), ((224, 230), "224 and 240"), (9, "16")]
)
def test_a_size_that_the_patch_does_not_divide(size, near):
    with pytest.raises(VitcliError, match="is not a multiple of patch size 16") as caught:
        run("one.png", image_size=size)
    assert str(caught.value.hint).endswith(near)


def test_the_default_size_fits_the_patch():
    assert resolve_image_size(None, 16) == (224, 224)
    assert resolve_image_size(None, 15) == (225, 225)
    assert resolve_image_size(None, 500) == (500, 500)
    assert run("one.png", patch_size=15).notes
    with pytest.raises(VitcliError, match="patch size 0"):
        resolve_image_size(None, 0)


def test_what_cannot_be_done_is_said(folder, monkeypatch):
    with pytest.raises(ImageError, match="the file does not exist"):
        run("missing.jpg")
    with pytest.raises(VitcliError, match="no such file or folder"):
        run("missing")
    with pytest.raises(VitcliError, match=r"does not end in \.safetensors"):
        run("photos", out="x.npz")
    with pytest.raises(VitcliError, match="cannot write"):
        run("one.png", out="no/such/folder/x.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr("vitcli.inspection.patch_files.MAX_TOKEN_SET_BYTES", 1000)
        with pytest.raises(VitcliError, match="GiB") as caught:
            run("photos", image_size=64, out="x.safetensors")
        assert "--image-size" in str(caught.value.hint)
    with pytest.raises(VitcliError, match=r"does not end in \.png"):
        run("one.png", compare="x.jpg")
    with pytest.raises(VitcliError, match="needs an image, not a dataset"):
        run("photos", reconstruct="x.png")
    with pytest.raises(VitcliError, match="no such weights file"):
        run("gone.safetensors", reconstruct="x.png")
    run("photos", image_size=32, out="set.safetensors")
    with pytest.raises(VitcliError, match="does not hold the patches of one image"):
        run("set.safetensors", reconstruct="x.png")
    with pytest.raises(VitcliError, match="already contains patches") as caught:
        run("set.safetensors")
    assert "--reconstruct" in str(caught.value.hint)
    assert not list(folder.glob(".*")) and not list(folder.glob("x.*"))


def test_a_picture_of_a_dataset_is_refused_as_such(tmp_path):
    with pytest.raises(VitcliError, match=r"`--out x.png` needs one image, and `.*` is a dataset"):
        run(str(tmp_path / "photos"), out="x.png")
