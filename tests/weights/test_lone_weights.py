"""State dicts of transformers without their config.json."""

import pytest
import torch
from support.timm_files import tiny

from vitcli.errors import VitcliError
from vitcli.weights.huggingface.write_huggingface import write_huggingface
from vitcli.weights.load import load_model
from vitcli.weights.store import load_weights, save_tensors

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DINO = {"layer_scale": 1.0, "norm_eps": 1e-6, "mlp_dim": 96}
KINDS = {
    "vit": {"norm_eps": 1e-12},
    "deit": {"norm_eps": 1e-12, "distillation_token": True, "pool": "distilled",
             "distillation_head": True},
    "dinov2": {**DINO, "pool": "token_mean"},
    "dinov2_with_registers": {**DINO, "num_classes": 0, "num_registers": 2,
                              "position_covers_prefix": False},
    "swiglu": {**DINO, "mlp": "swiglu", "mlp_dim": 128, "num_classes": 0},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_as_with_the_config(here, kind):
    model = tiny(**KINDS[kind])
    write_huggingface(model, here / "hf")
    tensors = load_weights(here / "hf/model.safetensors")
    save_tensors("lone.safetensors", tensors)
    back = load_model("lone.safetensors", num_heads=3)
    assert torch.allclose(back(IMAGES), model(IMAGES), atol=1e-5)
    assert back.preprocess is not None and back.load_report.layout == "huggingface"
    name = kind if kind != "swiglu" else "dinov2"
    assert f"there is no config.json: assumed a `{name}` model" in " ".join(back.load_report.notes)


def test_what_is_missing_is_named(here):
    write_huggingface(tiny(norm_eps=1e-12, image_size=(32, 48)), here / "hf")
    tensors = load_weights(here / "hf/model.safetensors")
    save_tensors("lone.safetensors", tensors)
    with pytest.raises(VitcliError, match=r"`model\.num_heads`") as error:
        load_model("lone.safetensors")
    assert "--set model.num_heads=" in error.value.hint
    with pytest.raises(VitcliError, match="24 patches, which do not form a square"):
        load_model("lone.safetensors", num_heads=3)
    assert load_model("lone.safetensors", num_heads=3, image_size=(32, 48)).config.grid == (4, 6)
    tensors.pop(next(name for name in tensors if name.endswith("position_embeddings")))
    save_tensors("less.safetensors", tensors)
    with pytest.raises(VitcliError, match="do not determine the model") as error:
        load_model("less.safetensors", num_heads=3)
    assert "config.json" in error.value.hint
