"""timm's class Eva (EVA-02, DINOv3), against the equations of the papers in plain torch."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vitcli.errors import VitcliError
from vitcli.weights.load import load_model

D, HEADS, HIDDEN, PATCH, DEPTH = 24, 2, 40, 8, 2
E = D // HEADS
TOLERANCE = 5e-5


def random_tensors(shapes, seed=0):
    """Weights that are nowhere 0 or 1; those of a norm are around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def linear(name, rows, cols, *, bias=True):
    return {f"{name}.weight": (rows, cols)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name, width=D):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def file_of(kind):
    """Tensors as timm or the authors write them, for a grid of 4x4 patches."""
    shapes = {"cls_token": (1, 1, D), "patch_embed.proj.weight": (D, 3, PATCH, PATCH)}
    shapes |= {"patch_embed.proj.bias": (D,)}
    dino, meta = "dinov3" in kind, kind == "dinov3 of Meta"
    shapes |= {("storage_tokens" if meta else "reg_token") if dino else "pos_embed": (1, 4, D)}
    if not dino:
        shapes["pos_embed"] = (1, 1 + 16, D)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        shapes |= norm(f"{block}norm1") | norm(f"{block}norm2")
        shapes |= linear(f"{block}attn.proj", D, D)
        if kind in ("eva02 B", "eva02 CLIP"):
            for part in "qkv":
                shapes |= linear(f"{block}attn.{part}_proj", D, D, bias=part != "k")
        else:
            shapes |= linear(f"{block}attn.qkv", 3 * D, D, bias=meta)
        if kind in ("eva02 Ti", "dinov3 S+"):
            shapes |= {f"{block}attn.q_bias": (D,), f"{block}attn.v_bias": (D,)}
        if kind == "eva02 CLIP":
            shapes |= norm(f"{block}attn.norm")
        if dino:
            names = ("ls1.gamma", "ls2.gamma") if meta else ("gamma_1", "gamma_2")
            shapes |= {block + name: (D,) for name in names}
        if kind in ("eva02 B", "eva02 CLIP", "dinov3 S+", "dinov3 of Meta"):
            gate, value, out = ("w1", "w2", "w3") if meta else ("fc1_g", "fc1_x", "fc2")
            shapes |= linear(f"{block}mlp.{gate}", HIDDEN, D) | linear(
                f"{block}mlp.{value}", HIDDEN, D
            )
            shapes |= linear(f"{block}mlp.{out}", D, HIDDEN)
        else:
            width = 2 * HIDDEN if kind == "eva02 Ti" else HIDDEN
            shapes |= linear(f"{block}mlp.fc1", width, D) | linear(f"{block}mlp.fc2", D, HIDDEN)
        if kind in ("eva02 B", "eva02 CLIP"):
            shapes |= norm(f"{block}mlp.norm", HIDDEN)
    shapes |= norm("fc_norm" if kind in ("eva02 Ti", "eva02 B") else "norm")
    if not dino:
        shapes |= linear("head", 5, D)
    tensors = random_tensors(shapes)
    if meta:
        mask = torch.cat([torch.ones(D), torch.zeros(D), torch.ones(D)])
        tensors |= {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(DEPTH)}
        periods = 100 ** (torch.arange(E // 4) / (E // 4))
        tensors |= {
            "rope_embed.periods": periods.to(torch.bfloat16),
            "mask_token": torch.ones(1, D),
        }
    return tensors


ARCHITECTURES = {
    "eva02 Ti": ("eva02_tiny_patch14_224", "avg"),
    "eva02 B": ("eva02_base_patch14_448", "avg"),
    "eva02 CLIP": ("eva02_base_patch16_clip_224", "token"),
    "dinov3 S": ("vit_small_patch16_dinov3", "avg"),
    "dinov3 S+": ("vit_small_plus_patch16_dinov3_qkvb", "token"),
    "dinov3 of Meta": (None, "token"),
}


def write(folder, kind, **arguments):
    """A folder with the file, and timm's config.json if it is timm's."""
    save_file(file_of(kind), folder / "model.safetensors")
    architecture, pool = ARCHITECTURES[kind]
    if architecture is not None:
        described = {
            "architecture": architecture,
            "global_pool": pool,
            "model_args": {"num_heads": HEADS, **arguments},
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
        }
        (folder / "config.json").write_text(json.dumps(described))
    return folder


def turned(x, kind, grid, reference=(16, 16)):
    """(B, H, T, E) -> the patches at the end rotated, as complex numbers (Su et al., eq. 34)."""
    n = grid[0] * grid[1]
    prefix, x = x[:, :, :-n], x[:, :, -n:]
    dino = "dinov3" in kind
    powers = torch.arange(E // 4) / (E // 4)
    periods = (100.0 if dino else 1e4) ** powers
    if kind == "dinov3 of Meta":
        periods = periods.to(torch.bfloat16).float()
    angles = []
    for axis in (0, 1):
        place = torch.arange(n) // grid[1] if axis == 0 else torch.arange(n) % grid[1]
        if dino:
            place = 2 * math.pi * (2 * (place + 0.5) / grid[axis] - 1)
        else:
            place = place / grid[axis] * reference[axis]
        angles.append(place[:, None] / periods)
    turn = torch.polar(torch.ones(n, E // 2), torch.cat(angles, dim=1))
    pairs = x.unflatten(-1, (2, E // 2)).transpose(-1, -2) if dino else x.unflatten(-1, (-1, 2))
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    x = pairs.transpose(-1, -2).flatten(-2) if dino else pairs.flatten(-2)
    return torch.cat([prefix, x], dim=2)


def reference(kind, images):
    """The final tokens, and the logits or features."""
    t = file_of(kind)
    dino, meta = "dinov3" in kind, kind == "dinov3 of Meta"
    eps = 1e-5 if dino else 1e-6
    grid = images.shape[2] // PATCH, images.shape[3] // PATCH

    def normed(x, name):
        return F.layer_norm(x, (x.shape[-1],), t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def affine(x, name):
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).mT
    tokens = [t["cls_token"].expand(len(x), -1, -1)]
    if dino:
        tokens.append(t["storage_tokens" if meta else "reg_token"].expand(len(x), -1, -1))
    x = torch.cat([*tokens, x], dim=1)
    if not dino:
        cls, table = t["pos_embed"][:, :1], t["pos_embed"][:, 1:].reshape(1, 4, 4, D)
        if grid != (4, 4):
            table = F.interpolate(
                table.permute(0, 3, 1, 2), size=grid, mode="bicubic", antialias=True
            ).permute(0, 2, 3, 1)
        x = x + torch.cat([cls, table.flatten(1, 2)], dim=1)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        y = normed(x, f"{block}norm1")
        if kind in ("eva02 B", "eva02 CLIP"):
            q, k, v = (affine(y, f"{block}attn.{part}_proj") for part in "qkv")
        else:
            q, k, v = F.linear(y, t[f"{block}attn.qkv.weight"]).chunk(3, dim=-1)
        if meta:
            q = q + t[f"{block}attn.qkv.bias"][:D]
            v = v + t[f"{block}attn.qkv.bias"][2 * D :]
        elif kind in ("eva02 Ti", "dinov3 S+"):
            q, v = q + t[f"{block}attn.q_bias"], v + t[f"{block}attn.v_bias"]
        q, k, v = (z.unflatten(-1, (HEADS, E)).transpose(1, 2) for z in (q, k, v))
        q, k = turned(q, kind, grid), turned(k, kind, grid)
        y = ((q @ k.mT) / math.sqrt(E)).softmax(dim=-1) @ v
        y = y.transpose(1, 2).flatten(2)
        if kind == "eva02 CLIP":
            y = normed(y, f"{block}attn.norm")
        y = affine(y, f"{block}attn.proj")
        x = x + y * (t[f"{block}{'ls1.gamma' if meta else 'gamma_1'}"] if dino else 1.0)
        y = normed(x, f"{block}norm2")
        if kind in ("eva02 B", "eva02 CLIP", "dinov3 S+", "dinov3 of Meta"):
            gate, value, out = ("w1", "w2", "w3") if meta else ("fc1_g", "fc1_x", "fc2")
            y = F.silu(affine(y, f"{block}mlp.{gate}")) * affine(y, f"{block}mlp.{value}")
        elif kind == "eva02 Ti":
            gate, value = affine(y, f"{block}mlp.fc1").chunk(2, dim=-1)
            y, out = F.silu(gate) * value, "fc2"
        else:
            y, out = F.gelu(affine(y, f"{block}mlp.fc1")), "fc2"
        if kind in ("eva02 B", "eva02 CLIP"):
            y = normed(y, f"{block}mlp.norm")
        y = affine(y, f"{block}mlp.{out}")
        x = x + y * (t[f"{block}{'ls2.gamma' if meta else 'gamma_2'}"] if dino else 1.0)
    pool = ARCHITECTURES[kind][1]
    if kind in ("eva02 Ti", "eva02 B"):
        return x, affine(normed(x[:, 1:].mean(dim=1), "fc_norm"), "head")
    x = normed(x, "norm")
    pooled = x[:, 0] if pool == "token" else x[:, 5:].mean(dim=1)
    return x, pooled if dino else affine(pooled, "head")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_papers_equations(tmp_path, kind):
    folder = write(tmp_path, kind)
    settings = {"num_heads": HEADS, "preprocess": {"mean": 0.5, "std": 0.5}}
    for size in ((32, 32), (48, 48), (24, 40)):
        model = load_model(folder, image_size=size, **settings)
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        tokens, out = reference(kind, images)
        with torch.no_grad():
            torch.testing.assert_close(model.network.tokens(images), tokens, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(model(images), out, atol=TOLERANCE, rtol=0)
    assert not model.load_report.names("new")


@pytest.mark.parametrize("kind", ["eva02 Ti", "eva02 B", "dinov3 S"])
def test_a_file_alone_is_known_by_its_names(tmp_path, kind):
    folder = write(tmp_path, kind)
    whole = load_model(folder)
    (folder / "config.json").unlink()
    said = {"preprocess": {"mean": 0.5, "std": 0.5}, "num_heads": HEADS, "image_size": 32}
    model = load_model(folder, pool=whole.config.pool, **said)
    notes = " ".join(model.load_report.notes)
    assert f"assumed the rotary positions of {'EVA-02' if 'eva' in kind else 'DINOv3'}" in notes
    assert model.config == whole.config


def test_what_meta_says_about_training_is_kept(tmp_path):
    model = load_model(write(tmp_path, "dinov3 of Meta"), num_heads=HEADS)
    assert (model.config.rope_dtype, model.config.rope_rescale) == ("bf16", 2.0)
    assert model.config.norm_eps == 1e-5 and not model.config.key_bias
    assert model.preprocess.mean == (0.485, 0.456, 0.406)
    assert model.preprocess.image_size == (14 * PATCH, 14 * PATCH)  # no size is in the file
    dropped = model.load_report.names("dropped")
    assert "rope_embed.periods" in dropped and "blocks.0.attn.qkv.bias_mask" in dropped


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("eva02 B", {"rope_type": "mixed"}, "rope_type=mixed"),
        ("eva02 B", {"use_post_norm": True}, "use_post_norm=True"),
        ("dinov3 S", {"rope_grid_offset": 0.5}, "rope_grid_offset=0.5"),
        ("dinov3 S", {"rope_temperature": "warm"}, "config.json .* is invalid"),
        ("eva02 B", {"ref_feat_shape": [16, 0]}, "rope_grid"),
    ],
)
def test_arguments_that_change_the_computation(tmp_path, kind, arguments, words):
    with pytest.raises(VitcliError, match=words):
        load_model(write(tmp_path, kind, **arguments))


def test_arguments_that_are_computed(tmp_path):
    arguments = {"ref_feat_shape": 8, "rope_temperature": 100.0, "rope_rotate_half": True}
    config = load_model(write(tmp_path, "eva02 B", **arguments)).config
    assert (config.rope_grid, config.rope_theta, config.rope_pairs) == ((8, 8), 100.0, "halves")
    config = load_model(write(tmp_path, "dinov3 S", rope_jitter_coords=1.5)).config
    assert config.rope_jitter == 1.5 and config.num_registers == 4


@pytest.mark.parametrize("kind", ["eva02 B", "dinov3 S+", "dinov3 of Meta"])
@pytest.mark.parametrize("damage", ["missing", "shape", "foreign"])
def test_a_damaged_file_is_refused_in_words(tmp_path, kind, damage):
    folder = write(tmp_path, kind)
    tensors = file_of(kind)
    name = next(n for n in tensors if n.startswith("blocks.1.attn.") and n.endswith("weight"))
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors["blocks.1.attn.rope.table"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VitcliError, match=r"does not fit|not part of the model") as error:
        load_model(folder, num_heads=HEADS, image_size=32)
    assert "blocks.1.attn" in error.value.message


def test_other_periods_are_refused(tmp_path):
    folder = write(tmp_path, "dinov3 of Meta")
    tensors = file_of("dinov3 of Meta") | {"rope_embed.periods": torch.ones(E // 4)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VitcliError, match="other periods"):
        load_model(folder, num_heads=HEADS)
