"""Files of open_clip, whose tower is compared with CLIP of transformers with the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.families import VIT, both, random_model

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model

pytest.importorskip("transformers")
MODEL = {"vision_cfg": {"image_size": 32, "head_width": 16}, "quick_gelu": True}
TRANSFORM = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}


def as_open_clip(theirs):
    """The state dict that open_clip has for a `CLIPModel` of transformers."""
    vision, state = theirs.vision_model.state_dict(), {}
    state["visual.class_embedding"] = vision["embeddings.class_embedding"]
    state["visual.positional_embedding"] = vision["embeddings.position_embedding.weight"]
    state["visual.conv1.weight"] = vision["embeddings.patch_embedding.weight"]
    state["visual.proj"] = theirs.visual_projection.weight.T
    outside = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inside |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for end in ("weight", "bias"):
        for name, old in outside.items():
            state[f"visual.{name}.{end}"] = vision[f"{old}.{end}"]
        for i in range(VIT["num_hidden_layers"]):
            block, layer = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
            for name, old in inside.items():
                state[f"{block}.{name}.{end}"] = vision[f"{layer}.{old}.{end}"]
            qkv = [vision[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            state[f"{block}.attn.in_proj_{end}"] = torch.cat(qkv)
    state["logit_scale"] = theirs.logit_scale
    state["text_projection"] = theirs.text_projection.weight.T
    state["token_embedding.weight"] = theirs.text_model.state_dict()[
        "embeddings.token_embedding.weight"
    ]
    return {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def clip():
    return random_model("CLIPModel", "CLIPConfig", both(VIT, 20))


def write(folder, state, model=MODEL, transform=TRANSFORM):
    save_file(state, folder / "open_clip_model.safetensors")
    if model is not None:
        described = {"model_cfg": model, "preprocess_cfg": transform}
        (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_a_folder_of_open_clip(tmp_path, clip, wrapped):
    state = {f"{wrapped}{name}": tensor for name, tensor in as_open_clip(clip).items()}
    model = load_model(write(tmp_path, state))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = clip.get_image_features(images)
        expected = clip.vision_model(images).pooler_output
        torch.testing.assert_close(model.features(images), expected, atol=5e-5, rtol=0)
        embedded = model.network.projection(model.features(images))
        torch.testing.assert_close(embedded, out.pooler_output, atol=5e-5, rtol=0)
    p = model.preprocess
    assert (p.mean, p.std, p.resize_mode) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    assert (p.crop_fraction, p.interpolation) == (1.0, "bicubic")
    assert model.load_report.layout == "open_clip" and not model.head_trained
    assert "the text tower of the file is left out" in model.load_report.notes


def test_a_visual_tower_alone_and_a_pickle(tmp_path, clip):
    state = as_open_clip(clip)
    visual = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    torch.save({"state_dict": visual}, tmp_path / "tower.pt")
    model = load_model(tmp_path / "tower.pt", num_heads=3, gelu="quick")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.vision_model(images).pooler_output
        torch.testing.assert_close(model.features(images), expected, atol=5e-5, rtol=0)
    assert model.preprocess.mean[0] == 0.48145466 and model.preprocess.resize_mode == "crop"
    assert any("CLIP's mean and std" in note for note in model.load_report.notes)


def test_without_a_config_the_activation_is_noted_or_known(tmp_path, clip):
    state = as_open_clip(clip)
    model = load_model(write(tmp_path, state, None), num_heads=3)
    assert model.config.gelu == "exact" and model.config.norm_eps == 1e-5
    assert any("`--set model.gelu=quick`" in note for note in model.load_report.notes)
    openai = {**state, "input_resolution": torch.tensor(32)}
    assert load_model(write(tmp_path, openai, None), num_heads=3).config.gelu == "quick"


def test_a_tower_of_timm_inside(tmp_path):
    """SigLIP in open_clip: the names of timm under `visual.trunk.`."""
    ours = create_model("mu/8", image_size=32, pool="map", class_token=False, gelu="tanh", seed=1)
    state = {f"visual.trunk.{name}": t for name, t in ours.state_dict().items()}
    state["visual.head.proj.weight"] = torch.randn(6, 32)
    state |= {"text.token_embedding.weight": torch.zeros(3, 4), "logit_bias": torch.zeros(1)}
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch32_siglip_256"}
    model = load_model(write(tmp_path, state, {"vision_cfg": {**vision, "timm_pool": "map"}}, {}),
                       num_heads=2)  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images), ours.features(images))
    assert model.config.num_classes == 0
    assert torch.equal(model.network.projection.weight, state["visual.head.proj.weight"])
    assert (model.preprocess.mean, model.preprocess.resize_mode) == ((0.5,) * 3, "squash")
    assert any("those of SigLIP" in note for note in model.load_report.notes)


def test_damaged_files_are_refused_in_words(tmp_path, clip):
    state = as_open_clip(clip)
    for name in (n for n in state if n.startswith("visual.") and "conv1" not in n):
        if name in ("visual.proj", "visual.class_embedding"):  # a tower without them exists
            continue
        rest = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(VitcliError) as error:
            load_model(write(tmp_path, rest))
        assert error.value.hint
    pooled = {**state, "visual.attn_pool.query": torch.zeros(2, 4)}
    with pytest.raises(VitcliError, match="not part of the model"):
        load_model(write(tmp_path, pooled))
    for broken in ({"vision_cfg": {"head_width": "wide"}}, {"vision_cfg": 3}):
        with pytest.raises(VitcliError, match=r"open_clip_config\.json"):
            load_model(write(tmp_path, state, broken))


def test_the_head_of_timms_clip_towers_is_a_projection(tmp_path):
    ours = create_model(
        "mu/8", image_size=32, num_classes=6, norm_before_blocks=True, patch_bias=False, seed=1
    )
    state = ours.state_dict() | {"head.weight": torch.randn(6, 32), "head.bias": torch.zeros(6)}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    described = {"architecture": "vit_base_patch16_clip_224", "model_args": {"num_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert model.config.num_classes == 0 and model.config.projection_size == 6
    with torch.no_grad():
        embedded = model.network.projection(model.features(images))
        ours.network.load_state_dict(state)
        tokens = model.features(images)
        torch.testing.assert_close(embedded, tokens @ state["head.weight"].T)
    assert any("projection to text embeddings" in note for note in model.load_report.notes)
