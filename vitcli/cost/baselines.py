"""Models of other libraries in the shape of ours, for `vitcli bench --against`.

The one place where they are loaded, and only when asked for: the package needs none of them.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from vitcli.errors import VitcliError, nearest
from vitcli.vit import ViTConfig

# Ours -> theirs: how each library calls the two kinds of attention.
TRANSFORMERS_ATTENTION = {"auto": "sdpa", "fused": "sdpa", "explicit": "eager"}


class Logits(nn.Module):
    """A model of transformers, whose output is an object, as one that gives logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K)."""
        logits: Tensor = self.inner(images).logits
        return logits


def of_transformers(config: ViTConfig, attention: str) -> nn.Module:
    """`ViTForImageClassification`."""
    library = _library("transformers")
    theirs = library.ViTConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        num_labels=config.num_classes,
        attn_implementation=TRANSFORMERS_ATTENTION[attention],
    )
    return Logits(library.ViTForImageClassification(theirs))


def of_timm(config: ViTConfig, attention: str) -> nn.Module:
    """`timm.models.VisionTransformer`."""
    models = _library("timm.models.vision_transformer")
    _library("timm.layers").set_fused_attn(attention != "explicit")
    model: nn.Module = models.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.embed_dim,
        global_pool="token",
    )
    return model


CONTENDERS = {"transformers": of_transformers, "timm": of_timm}


def contender(name: str, config: Any, attention: str) -> nn.Module:
    """The model of library `name` in the shape of `config`, with random weights.

    Raises:
        VitcliError: an unknown library, one that is not installed, or a shape that it has not.
    """
    if name not in CONTENDERS:
        close = nearest(name, list(CONTENDERS))
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(CONTENDERS)}"
        raise VitcliError(f"`--against {name}`: no such library is known here", hint)
    if not isinstance(config, ViTConfig) or not is_plain(config):
        raise VitcliError(
            f"`--against {name}` compares plain Vision Transformers, and this model is another one",
            "a variant such as `S/16`",
        )
    return CONTENDERS[name](config, attention)


def is_plain(config: ViTConfig) -> bool:
    """Whether it is the paper's model: a class token, learned positions, no ResNet, no extras."""
    plain = ViTConfig(
        **{
            name: getattr(config, name)
            for name in ("image_size", "patch_size", "num_channels", "embed_dim", "depth")
        },
        num_heads=config.num_heads,
        mlp_dim=config.mlp_dim,
        num_classes=config.num_classes,
        gelu=config.gelu,
        norm_eps=config.norm_eps,
        dropout_rate=config.dropout_rate,
        drop_path_rate=config.drop_path_rate,
    )
    return plain == config


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise VitcliError(
            f"`--against {top}` needs {top}, which cannot be imported here: {error}",
            f"`pip install {top}`, or leave `--against` out",
        ) from None
