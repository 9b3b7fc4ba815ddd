"""Masked autoencoders: what the encoder sees, and the loss."""

import numpy as np
import pytest
import torch
from support.pictures import model, smooth

from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.mae import Mae
from vitcli.weights.loaded import create_model


def objective(net=None, **more):
    torch.manual_seed(0)
    section = ObjectiveSection(name="mae", decoder_dim=32, decoder_heads=2, **more)
    return Mae(net or model(), section)


def test_the_encoder_sees_visible_patches_only():
    task = objective()
    images = smooth(2, torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 4:], hidden[1, :12] = True, True
    x = task.encode(images, hidden)
    assert x.shape == (2, 4 + task.model.config.num_prefix_tokens, 64)
    other = images.clone()
    other[0, :, 4:], other[1, :, :12] = 0.3, -0.7  # pixels of hidden patches
    torch.testing.assert_close(task.encode(other, hidden), x, rtol=0, atol=0)
    other[0, :, :4] = 0.1
    assert not torch.allclose(task.encode(other, hidden)[0], x[0])


def test_rotary_positions_are_those_of_the_visible_patches(monkeypatch):
    task = objective(model(rope="centred", position="none"))
    task.mask_rate = 13 / 16
    hidden = torch.ones(2, 16, dtype=torch.bool)
    hidden[0, [3, 7, 8]], hidden[1, [0, 1, 15]] = False, False
    turns = []
    real = task.model.blocks[0].forward
    monkeypatch.setattr(
        task.model.blocks[0], "forward", lambda *given: turns.append(given[3]) or real(*given)
    )
    task.encode(smooth(2, torch.Generator().manual_seed(0)), hidden)
    whole = task.model.rotation((4, 4))
    for i, places in enumerate(([3, 7, 8], [0, 1, 15])):
        assert torch.equal(turns[0].cos[i, 0], whole.cos[places])
        assert torch.equal(turns[0].sin[i, 0], whole.sin[places])


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_equals_numpy(normalised):
    task = objective(norm_pixels=normalised).eval()
    images = smooth(2, torch.Generator().manual_seed(1)) + 0.1 * torch.randn(2, 3, 16, 16)
    hidden = []
    real = task.encode
    task.encode = lambda x, mask: hidden.append(mask) or real(x, mask)
    torch.manual_seed(2)
    loss, figures = task(images, torch.zeros(2))
    assert hidden[0].sum(dim=1).tolist() == [12, 12]
    guess = task.decode(real(images, hidden[0]), hidden[0], (4, 4)).detach().numpy()
    blocks = images.numpy().reshape(2, 3, 4, 4, 4, 4).transpose(0, 2, 4, 3, 5, 1)
    wanted = blocks.reshape(2, 16, 48)
    if normalised:
        mean, var = wanted.mean(-1, keepdims=True), wanted.var(-1, keepdims=True, ddof=1)
        wanted = (wanted - mean) / np.sqrt(var + 1e-6)
    errors = ((guess - wanted) ** 2).mean(axis=-1)
    assert float(loss.detach()) == pytest.approx(errors[hidden[0].numpy()].mean(), rel=1e-4)
    assert float(figures["explained"]) < 1.0


def test_a_token_is_drawn_at_its_place():
    """The decoder gets each visible token where its patch was: swapped places, swapped pictures."""
    task = objective().eval()
    images = smooth(1, torch.Generator().manual_seed(3))
    task.mask_rate = 15 / 16
    hidden = torch.ones(1, 16, dtype=torch.bool)
    hidden[0, 5] = False
    x = task.encode(images, hidden)
    seen = []
    task.decoder[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    task.decode(x, hidden, (4, 4))
    prefix = task.model.config.num_prefix_tokens
    from vitcli.vit.position import sincos2d

    places = seen[0][0, prefix:] - sincos2d((4, 4), 32)[0]
    expected = task.entry(x[0, prefix:])[0]
    torch.testing.assert_close(places[5], expected)
    torch.testing.assert_close(places[4], task.mask)


def test_it_learns():
    generator = torch.Generator().manual_seed(0)
    task = objective(norm_pixels=False)
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(220):
        loss, figures = task(smooth(64, generator), torch.zeros(64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert figures["explained"] > 0.5


def test_what_cannot_be_is_said():
    with pytest.raises(VitcliError, match="axial blocks need all of them"):
        objective(model(axial=True, class_token=False))
    with pytest.raises(VitcliError, match="positions inside the blocks"):
        objective(model(position="relative"))
    with pytest.raises(VitcliError, match="not a multiple of 4 and of 3 heads"):
        Mae(model(), ObjectiveSection(name="mae", decoder_dim=32, decoder_heads=3))
    with pytest.raises(VitcliError, match="a ResNet has no patches"):
        objective(create_model("R50x1", image_size=32, num_classes=0))
