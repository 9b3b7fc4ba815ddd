"""Files of timm's relatives: DeiT, DINO, DINOv2, MAE, and what is none of them."""

import re

import pytest
import torch
from safetensors.torch import save_file
from support.timm_files import read, tiny

from vitcli.errors import VitcliError
from vitcli.vit.resnet import ResNet, ResNetConfig
from vitcli.weights.load import load_model


def dinov2(net, chunk: int) -> dict[str, torch.Tensor]:
    """The names of facebookresearch/dinov2: its blocks in chunks, its SwiGLU and its registers.

    Its positions have an entry for the class token, and the registers come in after them.
    """
    renamed = {"mask_token": torch.zeros(1, 48)}
    for name, tensor in net.state_dict().items():
        if match := re.match(r"blocks\.(\d+)\.(.+)", name):
            inner = match[2].replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            name = f"blocks.{int(match[1]) // chunk}.{match[1]}.{inner}"
        renamed[name.replace("reg_token", "register_tokens")] = tensor
    entry = torch.randn(1, 1, 48)
    renamed["cls_token"] = net.network.cls_token.detach() - entry
    renamed["pos_embed"] = torch.cat([entry, net.network.pos_embed.detach()], dim=1)
    return renamed


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_dinov2(chunk):
    net = tiny(
        mlp="swiglu", num_registers=4, position_covers_prefix=False, layer_scale=1e-5, num_classes=0
    )
    back = read(dinov2(net, chunk), num_heads=3)
    assert back.config == net.config
    assert back.load_report.status["mask_token"][0] == "dropped"
    assert torch.allclose(back.network.cls_token, net.network.cls_token)
    for name, tensor in net.state_dict().items():
        assert name == "cls_token" or torch.equal(back.state_dict()[name], tensor), name


def test_unpacked_swiglu_and_deit3():
    net = tiny(mlp="swiglu", layer_scale=1e-5, position_covers_prefix=False)
    renamed = {}
    for name, tensor in net.state_dict().items():
        if ".mlp.fc1." in name:
            gate, value = tensor.chunk(2)  # silu(x1) * x2: the first half is the gate
            renamed[name.replace("fc1", "fc1_x")] = value
            renamed[name.replace("fc1", "fc1_g")] = gate
        else:
            renamed[re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)] = tensor
    back = read(renamed, num_heads=3)
    assert back.config == net.config
    assert torch.equal(back.network.blocks[1].mlp.fc1.weight, net.network.blocks[1].mlp.fc1.weight)


def test_the_root_alone_has_a_shorter_name():
    net = tiny(stem=(), stem_width=0.5, image_size=(32, 64))
    long = "patch_embed.backbone.stem."
    renamed = {n.replace(long, "patch_embed.backbone."): t for n, t in net.state_dict().items()}
    assert read(renamed, num_heads=3, image_size=(32, 64)).config == net.config


def test_bit():
    config = ResNetConfig((64, 48), 1, (1, 2), 0.5, 4, "timm")
    net = ResNet(config).init_weights(torch.Generator().manual_seed(0)).eval()
    torch.nn.init.normal_(net.head.weight)
    state = net.state_dict()
    renamed = {n: t for n, t in state.items() if not n.startswith("head.")}
    renamed["head.fc.weight"] = state["head.weight"][:, :, None, None]
    renamed["head.fc.bias"] = state["head.bias"]
    hub = {"architecture": "resnetv2_50x1_bit", "pretrained_cfg": {"input_size": [1, 64, 48]}}
    back = read(renamed, hub=hub)
    assert back.config == config
    images = torch.randn(2, 1, 64, 48)
    assert torch.equal(back(images), net(images))
    assert "assumed images of 224x224 px" in read(renamed).load_report.notes[0]


@pytest.mark.parametrize(
    "left",
    ["decoder_embed.weight", "decoder_blocks.0.norm1.weight", "mask_token", "head.mlp.0.weight",
     "head.last_layer.weight_v", "head.0.weight", "fc.weight", "optimizer.x", "n_averaged",
     "blocks.0.attn.total_ops"],
)  # fmt: skip
def test_leftovers_are_dropped_by_name(left):
    net = tiny(num_classes=0)
    back = read({**net.state_dict(), left: torch.zeros(2)}, num_heads=3)
    assert back.config == net.config and back.load_report.status[left][0] == "dropped"


def test_student_and_teacher_with_their_heads():
    net = tiny(num_classes=0)
    state = {f"student.backbone.{n}": torch.zeros_like(t) for n, t in net.state_dict().items()}
    state |= {f"teacher.backbone.{n}": t for n, t in net.state_dict().items()}
    state |= {
        "teacher.head.mlp.0.weight": torch.zeros(2),
        "student.head.mlp.0.weight": torch.ones(2),
    }
    back = read(state, num_heads=3)
    assert torch.equal(back.network.pos_embed, net.network.pos_embed)
    assert "loaded the weights under `teacher.backbone.`" in back.load_report.notes[0]
    assert back.preprocess.mean == (0.485, 0.456, 0.406)  # DINO's files use ImageNet's
    two = {n.replace("teacher", "other"): t for n, t in state.items()}
    with pytest.raises(VitcliError, match=r"holds 2 networks, under `student\.backbone\.` and"):
        read(two, num_heads=3)


def without(net, *names):
    return {n: t for n, t in net.state_dict().items() if n not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"layers.0.blocks.0.attn.relative_position_bias_table": s["pos_embed"],
                    "patch_embed.proj.weight": s["patch_embed.proj.weight"]},
         r"no `blocks\.0\.mlp\.fc1\.weight`.*it has `layers\.0\.blocks\.0\.attn\.relative"),
        (lambda s: {**s, "blocks.0.attn.relative_position_bias_table": torch.zeros(9, 3)},
         "another shape: `blocks.0.attn.rel_pos_bias.relative_position_bias_table is"),
        (lambda s: {**s, "blocks.0.attn.q_bias": torch.zeros(48)},
         "missing: `blocks.0.attn.v_bias`"),
        (lambda s: {n.replace("norm1", "ln_1"): t for n, t in s.items()},
         "not part of the model: `blocks.0.ln_1"),
        (lambda s: {n: t for n, t in s.items() if "norm2.bias" not in n},
         "missing: `blocks.0.norm2"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(48, 3, 8, 4)}, "8x4 pixels"),
        (lambda s: {**s, "patch_embed.backbone.conv1.0.weight": torch.zeros(8, 3, 3, 3)},
         "is not a plain hybrid"),
        (lambda s: {**s, "blocks.0.0.norm1.weight": torch.zeros(48)}, "two tensors for"),
        (lambda s: {**s, "dist_token": torch.zeros(1, 1, 48)}, "17 positions"),
        (lambda s: {"layer1.0.conv1.weight": torch.zeros(3)}, "does not hold"),
    ],
)  # fmt: skip
def test_another_architecture_is_named(tmp_path, change, words):
    save_file(change(tiny().state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(VitcliError, match=words) as error:
        load_model(tmp_path / "w.safetensors", num_heads=3)
    assert error.value.hint
