"""The decoder of transformers' ViTMAEForPreTraining: loss, pixels, and further training."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import DECODER, VIT, random_model
from support.tiny import records
from typer.testing import CliRunner

from vitcli.cli.app import app
from vitcli.config.schema import ObjectiveSection
from vitcli.errors import VitcliError
from vitcli.train.objectives.mae import Mae
from vitcli.weights.load import load_model

pytest.importorskip("transformers")


def pretraining_model(**settings):
    theirs = random_model("ViTMAEForPreTraining", "ViTMAEConfig", {**VIT, **DECODER, **settings})
    with torch.no_grad():  # `random_model` leaves the fixed positions of the encoder as they are
        theirs.decoder.decoder_pos_embed.normal_()
    return theirs


@pytest.mark.parametrize("classic", [True, False], ids=["classic", "in-memory"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_pix_loss": True, "mask_ratio": 0.5, "qkv_bias": False},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "decoder_num_hidden_layers": 2},
    ],
)
def test_loss_and_pixels_are_those_of_transformers(tmp_path, settings, classic):
    theirs = pretraining_model(**settings)
    theirs.save_pretrained(tmp_path, save_original_format=classic)
    model = load_model(tmp_path)
    task = Mae(model, ObjectiveSection(name="mae")).eval()
    task.mask_rate = theirs.config.mask_ratio
    images = torch.randn(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        out = theirs(images, noise=noise)
        hidden = out.mask.bool()
        predicted, targets = task.reconstruct(images, hidden)
        torch.testing.assert_close(predicted, out.logits, atol=5e-5, rtol=0)
        loss = (predicted - targets)[hidden].square().mean()
        torch.testing.assert_close(loss, out.loss, atol=5e-5, rtol=0)
        larger = torch.randn(1, 3, 48, 40)
        task.mask_rate = 0.5
        hidden = torch.arange(30)[None] % 2 == 0
        assert task.reconstruct(larger, hidden)[0].shape[1] == 30


def test_a_decoder_that_does_not_fit_is_refused(tmp_path):
    pretraining_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "decoder.decoder_pred.bias"
    save_file({n: t for n, t in tensors.items() if n != gone}, tmp_path / "model.safetensors")
    section = ObjectiveSection(name="mae")
    with pytest.raises(VitcliError, match=r"`its decoder` .*missing: `exit\.bias`"):
        Mae(load_model(tmp_path), section)
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "decoder_intermediate_size": 64}))
    with pytest.raises(VitcliError, match=r"decoder\.0\.mlp\.fc1\.weight is \(48, 32\)"):
        Mae(load_model(tmp_path), section)
    path.write_text(json.dumps({**described, "decoder_num_attention_heads": 5}))
    with pytest.raises(VitcliError, match="5 heads"):
        load_model(tmp_path)


def test_pretrain_goes_on_with_the_weights_and_their_decoder(tmp_path):
    weights, out = tmp_path / "mae", tmp_path / "run"
    pretraining_model().save_pretrained(weights)
    arguments = ["pretrain", "builtin:formula", "--recipe", "pretrain_mae", "--out", str(out)]
    arguments += ["--set", f"model.name={weights}", "--set", "model.image_size=16"]
    arguments += ["--steps", "2", "--batch-size", "8", "--set", "train.log_steps=1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "continues with the decoder" in result.output
    assert "position" in result.output and "do not apply" in result.output
    before, after = load_model(weights, image_size=16), load_model(out)
    assert after.config == before.config and len(records(out)) >= 2
    moved = (after.state_dict()["cls_token"] - before.state_dict()["cls_token"]).abs().max()
    assert 0 < moved < 0.1
    arguments[5] = str(tmp_path / "other")
    result = CliRunner().invoke(app, [*arguments, "--set", "objective.name=softmax"])
    assert result.exit_code and "without labels" in str(result.exception)
