"""The model against transformers, and against the numbers of timm and big_vision."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from vitcli.vit import (
    VisionTransformer,
    ViTConfig,
    create_network,
    from_config,
    parse_variant,
)
from vitcli.weights.load import load_model

TOLERANCE = 1e-5


def compare(got, expected):
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


def timm_config(kwargs):
    mean = kwargs.get("global_pool") == "avg"
    return ViTConfig(
        image_size=(kwargs["img_size"], kwargs["img_size"]),
        patch_size=kwargs["patch_size"],
        embed_dim=kwargs["embed_dim"],
        depth=kwargs["depth"],
        num_heads=kwargs["num_heads"],
        mlp_dim=int(kwargs["embed_dim"] * kwargs["mlp_ratio"]),
        num_classes=kwargs["num_classes"],
        pool="mean" if mean else "token",
        norm_after_pool=mean,
        num_registers=kwargs.get("reg_tokens", 0),
        qk_norm=kwargs.get("qk_norm", False),
        layer_scale=kwargs.get("init_values"),
    )


def test_logits_equal_timms(shared):
    folders = sorted((shared / "reference/timm_vit").glob("*/model.safetensors"))
    assert len(folders) == 4
    for folder in (path.parent for path in folders):
        kwargs = json.loads((folder / "config.json").read_text())["kwargs"]
        model = VisionTransformer(timm_config(kwargs)).eval()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        numbers = np.load(folder / "io.npz")
        images = torch.from_numpy(numbers["images"])
        compare(model(images), numbers["logits"])
        compare(model.features(images), numbers["pre_logits"])


def test_logits_equal_big_visions(shared):
    folders = sorted((shared / "reference/bigvision_vit").glob("*/params.npz"))
    names = {path.parent.name for path in folders}
    assert {"gap_learn", "gap_sincos2d_reptrue", "map_learn", "tok_sincos2d"} <= names
    for folder in (path.parent for path in folders):
        model = load_model(folder / "params.npz", num_heads=3, image_size=32)
        numbers = np.load(folder / "io.npz")
        images = torch.from_numpy(numbers["images"]).permute(0, 3, 1, 2)
        compare(model(images), numbers["logits"])


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_logits_equal_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=list(size),
        patch_size=8,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.1)
    ours = VisionTransformer(
        ViTConfig(
            image_size=size,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=3,
            mlp_dim=96,
            num_classes=7,
        )
    ).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict(), depth=3))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=TOLERANCE)


def from_transformers(theirs, depth):
    """Their names -> ours, whichever of their two generations of names they are in."""
    theirs = {n.removeprefix("vit."): t for n, t in theirs.items()}

    def find(*options):
        return next(theirs[o] for o in options if o in theirs)

    ours = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
        "head.weight": theirs["classifier.weight"],
        "head.bias": theirs["classifier.bias"],
    }
    for i in range(depth):
        old, new = f"encoder.layer.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [
                find(
                    f"{old}attention.attention.{long}.{kind}", f"{new}attention.{short}_proj.{kind}"
                )
                for long, short in (("query", "q"), ("key", "k"), ("value", "v"))
            ]
            block = f"blocks.{i}."
            ours[f"{block}attn.qkv.{kind}"] = torch.cat(qkv)
            ours[f"{block}attn.proj.{kind}"] = find(
                f"{old}attention.output.dense.{kind}", f"{new}attention.o_proj.{kind}"
            )
            ours[f"{block}mlp.fc1.{kind}"] = find(
                f"{old}intermediate.dense.{kind}", f"{new}mlp.fc1.{kind}"
            )
            ours[f"{block}mlp.fc2.{kind}"] = find(
                f"{old}output.dense.{kind}", f"{new}mlp.fc2.{kind}"
            )
            for n, name in (("1", "before"), ("2", "after")):
                ours[f"{block}norm{n}.{kind}"] = find(
                    f"{old}layernorm_{name}.{kind}", f"{new}layernorm_{name}.{kind}"
                )
    return ours


def test_a_new_model_guesses_uniformly_and_is_a_function_of_its_seed():
    a, b = (create_network("Pico/8", image_size=32, num_classes=5, seed=s) for s in (3, 3))
    other = create_network("Pico/8", image_size=32, num_classes=5, seed=4)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(a(images), torch.zeros(2, 5))
    assert torch.equal(a.blocks[0].attn.qkv.weight, b.blocks[0].attn.qkv.weight)
    assert not torch.equal(a.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_initial_weights_have_the_spread_of_the_official_code():
    model = create_network("B/16", num_classes=10)
    for part in model.blocks[0].attn.qkv.weight.chunk(3):
        # Xavier-uniform over 768 in, 768 out: variance 2 / (in + out).
        assert part.std().item() == pytest.approx((2 / (768 + 768)) ** 0.5, rel=0.01)
    assert_lecun_normal(model.patch_embed.proj.weight)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.cls_token.abs().max() == 0 and model.head.weight.abs().max() == 0
    assert 0 < model.blocks[0].mlp.fc1.bias.abs().max() < 1e-5


def assert_lecun_normal(weight):
    """flax's default: a normal distribution, cut at two deviations, of variance 1 / inputs."""
    inputs = weight[0].numel()
    unit = stats.truncnorm(-2, 2)
    expected = stats.truncnorm(-2, 2, scale=inputs**-0.5 / unit.std())
    assert weight.std().item() == pytest.approx(inputs**-0.5, rel=0.02)
    assert weight.abs().max().item() <= expected.support()[1] + 1e-6
    sample = weight.detach().flatten()[:20_000].double().numpy()
    assert stats.kstest(sample, expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["L/16", "L/32", "R50+B/16"])
def test_the_patch_projection_starts_as_in_flax(name):
    """FINDINGS of issue 14: Xavier gave 0.93, 1.22 and 1.07 of these deviations."""
    with torch.device("meta"):
        wide = from_config(parse_variant(name)).patch_embed.proj.weight.shape
    config = parse_variant(name, depth=1, embed_dim=256, num_heads=4, representation_size=512)
    model = from_config(config).init_weights(torch.Generator().manual_seed(0))
    assert model.patch_embed.proj.weight[0].shape == wide[1:]
    assert_lecun_normal(model.patch_embed.proj.weight)
    assert_lecun_normal(model.pre_logits.fc.weight)
    assert not model.pre_logits.fc.bias.any() and not model.patch_embed.proj.bias.any()


def test_map_starts_as_in_big_vision():
    """Query, key and value are Xavier-uniform D -> D each; so is the probe, (1, 1, D)."""
    config = parse_variant("B/16", depth=1, pool="map", class_token=False)
    pool = from_config(config).init_weights(torch.Generator().manual_seed(0)).attn_pool
    bound = (6 / (768 + 768)) ** 0.5
    for part in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight):
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert 0.99 * bound < part.abs().max().item() <= bound
    bound = (6 / (1 + 768)) ** 0.5
    assert pool.latent.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0.95 * bound < pool.latent.abs().max().item() <= bound
    assert 0 < pool.mlp.fc1.bias.abs().max() < 1e-5 and not pool.kv.bias.any()


def test_initial_weights_of_the_options():
    def fresh(**settings):
        config = {"image_size": (64, 64), "patch_size": 4, "embed_dim": 256, "num_heads": 2}
        config |= {"mlp_dim": 512, "depth": 2, "num_classes": 3}
        model = VisionTransformer(ViTConfig(**{**config, **settings}))
        return model.init_weights(torch.Generator().manual_seed(0))

    model = fresh(
        distillation_token=True,
        pool="distilled",
        distillation_head=True,
        mlp="swiglu",
        position="learned2d",
        position_at="every",
    )
    for table in ("dist_token", "pos_embed_x", "pos_embed_y", "block_pos_embed_x"):
        assert getattr(model, table).std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head_dist.weight.any() and not model.head_dist.bias.any()
    for half in model.blocks[0].mlp.fc1.weight.chunk(2):  # 256 in, 512 out, each by itself
        assert half.std().item() == pytest.approx((2 / (256 + 512)) ** 0.5, rel=0.02)
    relative = fresh(position="relative").blocks[1].attn.rel_pos
    assert relative.std().item() == pytest.approx(0.02, rel=0.05)
    hybrid = fresh(stem=(1,), patch_size=2)
    unit = hybrid.patch_embed.backbone.stages[0].blocks[0]
    assert not unit.norm3.weight.any() and unit.conv1.weight.any()
    assert_lecun_normal(hybrid.patch_embed.proj.weight)


def test_a_header_of_before_the_options_still_loads():
    """As `to_dict` wrote it when there were no more settings than these."""
    old = {
        "image_size": [32, 48],
        "patch_size": 8,
        "num_channels": 3,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 32,
        "num_classes": 5,
        "pool": "token",
        "class_token": True,
        "num_registers": 0,
        "position": "learned",
        "position_covers_prefix": True,
        "representation_size": None,
        "qkv_bias": True,
        "qk_norm": False,
        "layer_scale": None,
        "gelu": "exact",
        "norm_eps": 1e-6,
        "norm_after_pool": False,
        "dropout_rate": 0.0,
        "drop_path_rate": 0.0,
    }
    model = VisionTransformer(ViTConfig.from_dict(old))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 25, 16) and shapes["head.weight"] == (5, 16)
    assert len(shapes) == 2 + 2 + 2 * 12 + 2 + 2


@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
def test_other_sizes_than_the_configured_one_pass(position):
    model = create_network(
        "Pico/8",
        image_size=32,
        num_classes=5,
        pool="quadrants",
        class_token=False,
        position=position,
    )
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        at_48 = model(torch.ones(1, 3, 48, 16))
    assert at_48.shape == (1, 5) and torch.isfinite(at_48).all()


def test_no_positions_means_that_order_does_not_matter():
    model = create_network("Pico/8", image_size=32, pool="mean", class_token=False, position="none")
    images = torch.randn(1, 3, 32, 32)
    turned = torch.cat([images[..., 16:], images[..., :16]], dim=-1)  # patches change places
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(turned), rtol=0, atol=1e-5)


def test_dropout_is_off_in_eval_and_on_in_training():
    model = create_network("Pico/8", image_size=32, num_classes=5, dropout_rate=0.5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
