"""Masked patch prediction: targets, what is corrupted, and that colours are learned."""

import numpy as np
import pytest
import torch
from support.pictures import model, smooth
from support.tiny import records, tiny_recipe, train_recipe

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.masked_patch import (
    MASKED,
    OTHER,
    MaskedPatch,
    chosen_positions,
    color_classes,
    most_frequent_fraction,
    num_masked,
    random_mask,
    take,
)
from vitcli.train.signals import Stopped


def objective(**more):
    torch.manual_seed(0)
    return MaskedPatch(model(), ObjectiveSection(name="masked_patch", **more))


def by_hand(pixels, side, cell):
    """The same classes, written as loops over numpy arrays."""
    _, c, height, width = pixels.shape
    found = []
    for image in pixels:
        patches = []
        for y in range(0, height, side):
            for x in range(0, width, side):
                cells = []
                for v in range(y, y + side, cell):
                    for u in range(x, x + side, cell):
                        mean = image[:, v : v + cell, u : u + cell].mean(axis=(1, 2))
                        bins = np.minimum((mean * 8).astype(int), 7)
                        cells.append(
                            sum(int(bin_) * 8 ** (c - 1 - k) for k, bin_ in enumerate(bins))
                        )
                patches.append(cells)
        found.append(patches)
    return np.array(found)


@pytest.mark.parametrize(("channels", "cell"), [(3, 8), (3, 2), (1, 8)])
def test_colours_are_the_classes_that_the_paper_says(channels, cell):
    pixels = torch.rand(2, channels, 16, 24)
    pixels[0, :, :8, :8] = 1.0  # the brightest is in the last bin, not beyond it
    found = color_classes(pixels, 8, cell)
    np.testing.assert_array_equal(found.numpy(), by_hand(pixels.double().numpy(), 8, cell))
    assert found.shape == (2, 6, (8 // cell) ** 2) and int(found.max()) == 8**channels - 1


def test_exactly_half_is_corrupted_of_each_image():
    torch.manual_seed(0)
    chosen = random_mask(64, 49, 0.5, torch.device("cpu"))
    assert (chosen.sum(dim=1) == 24).all()  # 24.5, to even
    assert (chosen.float().mean(dim=0) - 24 / 49).abs().max() < 0.25  # every place
    assert random_mask(3, 4, 0.01, torch.device("cpu")).sum(dim=1).tolist() == [1, 1, 1]
    # A masked autoencoder needs a patch to see.
    assert random_mask(3, 4, 0.99, torch.device("cpu")).sum(dim=1).tolist() == [3, 3, 3]


def test_the_chosen_rows_are_those_of_a_boolean_index():
    torch.manual_seed(0)
    x = torch.randn(5, 12, 3)
    chosen = random_mask(5, 12, 0.4, x.device)
    places = chosen_positions(chosen, num_masked(12, 0.4))
    assert torch.equal(take(x, places), x[chosen])


def test_eighty_ten_ten():
    torch.manual_seed(0)
    task = objective()
    x = torch.randn(200, 100, 64)
    chosen = random_mask(200, 100, 0.5, x.device)
    y = task.corrupt(x, chosen).detach()
    masked = (y == task.mask.detach()).all(dim=-1)
    same = (y == x).all(dim=-1)
    total = int(chosen.sum())
    assert total == 200 * 50 and same[~chosen].all() and not masked[~chosen].any()
    assert int(masked.sum()) / total == pytest.approx(MASKED, abs=0.02)
    other = chosen & ~masked & ~same
    assert int(other.sum()) / total == pytest.approx(OTHER, abs=0.02)
    rows = {tuple(row) for row in x.reshape(-1, 64)[:, :3].tolist()}
    assert all(tuple(row) in rows for row in y[other][:, :3].tolist())  # another patch's, whole


@pytest.mark.parametrize(
    ("target", "shape"), [("mean_color", 512), ("small_patch", 16 * 512), ("pixels", 48)]
)
def test_the_loss_is_over_corrupted_patches_only(target, shape):
    task = objective(target=target)
    assert task.predict.out_features == shape
    images = smooth(4, torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    loss, figures = task(images, torch.zeros(4))
    loss.backward()
    assert task.mask.grad is not None and task.mask.grad.abs().sum() > 0
    assert torch.isfinite(loss) and figures["loss"] == loss
    # Predictions for patches that were left alone weigh nothing: an oracle for the rest has loss 0.
    torch.manual_seed(3)
    chosen = random_mask(4, 16, 0.5, images.device)
    torch.manual_seed(3)
    seen = []
    task.predict.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    task(images, torch.zeros(4))
    assert seen == [(int(chosen.sum()), 64)]


def test_no_gradient_reaches_the_outputs_of_patches_left_alone():
    task = objective()
    images = smooth(3, torch.Generator().manual_seed(2))
    kept = []
    real = task.model.encode

    def watched(x, grid):
        kept.append(real(x, grid))
        kept[0].retain_grad()
        return kept[0]

    task.model.encode = watched
    torch.manual_seed(3)
    task(images, torch.zeros(3))[0].backward()
    torch.manual_seed(3)
    chosen = random_mask(3, 16, 0.5, images.device)
    prefix = task.model.config.num_prefix_tokens
    reached = kept[0].grad.abs().sum(dim=-1) > 0  # (B, T)
    assert torch.equal(reached[:, prefix:], chosen) and not reached[:, :prefix].any()


def test_pixels_loss_equals_numpy():
    task = objective(target="pixels")
    images = smooth(2, torch.Generator().manual_seed(1))
    guesses = []
    task.predict.register_forward_hook(lambda m, i, o: guesses.append(o.detach()))
    torch.manual_seed(5)
    loss, _ = task(images, torch.zeros(2))
    torch.manual_seed(5)
    chosen = random_mask(2, 16, 0.5, images.device).numpy()
    blocks = images.numpy().reshape(2, 3, 4, 4, 4, 4).transpose(0, 2, 4, 3, 5, 1)
    wanted = blocks.reshape(2, 16, 48)[chosen]
    expected = ((guesses[0].numpy() - wanted) ** 2).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_it_learns_the_colours_of_smooth_images():
    """A masked patch of a smooth picture has nearly the colour of its neighbours."""
    generator = torch.Generator().manual_seed(0)
    task = objective()
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(200):
        loss, _ = task(smooth(64, generator), torch.zeros(64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    task.eval()
    with torch.no_grad():
        _, figures = task(smooth(512, generator), torch.zeros(512))
    assert figures["chance"] < 0.04
    assert figures["accuracy"] > 5 * figures["chance"]


def test_chance_is_the_share_of_the_commonest():
    assert float(most_frequent_fraction(torch.tensor([[3, 3], [1, 2]]), 4)) == 0.5


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({"pool": "map"}, "mean_color", "would not train pool `map`"),
        ({"representation_size": 32}, "mean_color", "representation_size"),
        ({"patch_size": 2}, "small_patch", "cuts a patch into 4x4"),
    ],
)
def test_what_cannot_be_is_said(changes, target, words):
    with pytest.raises(VitcliError, match=words):
        MaskedPatch(model(**changes), ObjectiveSection(name="masked_patch", target=target))


@pytest.mark.parametrize("name", ["masked_patch", "mae"])
def test_a_resumed_run_is_exact_and_its_model_is_an_ordinary_one(tmp_path, name):
    from vitcli.train import loop
    from vitcli.weights.load import load_model

    recipe = tiny_recipe(objective={"name": name, "decoder_dim": 32}, train={"steps": 6})
    train_recipe(tmp_path / "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Loop, "_stop_request", lambda run, _: 15 if run.state.step == 3 else None
        )
        with pytest.raises(Stopped):
            train_recipe(tmp_path / "parts", recipe)
    train_recipe(tmp_path / "parts", recipe, resume=True)
    a, b = (tmp_path / n / "model.safetensors" for n in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()
    figures = [r for r in records(tmp_path / "whole") if "train/loss" in r]
    assert "train/chance" in figures[0] or "train/explained" in figures[0]
    assert ("mfu" in figures[0]) == (name == "masked_patch")  # `mae` does less than the model's
    net = load_model(tmp_path / "whole")
    assert net.config.num_classes == 0 and not net.head_trained
    assert not any("mask" in key or "decoder" in key for key in net.state_dict())
