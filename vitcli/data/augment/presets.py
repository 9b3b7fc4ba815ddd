"""How strong augmentation is, by one name: the levels of AugReg, and DeiT III's 3-Augment."""

from dataclasses import dataclass, fields
from typing import Any, Self

from vitcli.config.schema import AugmentSection

# "How to train your ViT?" (Steiner et al. 2022, https://arxiv.org/abs/2106.10270), section 3.3, as
# big_vision/configs/vit_i1k.py sets it: RandAugment (layers, magnitude) and the alpha of mixup.
# `light1` is not nothing: at magnitude 0 colours fade, posterize leaves one bit, and so on.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light1": {"policy": "randaugment", "num_ops": 2, "magnitude": 0.0},
    "light2": {"policy": "randaugment", "num_ops": 2, "magnitude": 10.0, "mixup_alpha": 0.2},
    "medium1": {"policy": "randaugment", "num_ops": 2, "magnitude": 15.0, "mixup_alpha": 0.2},
    "medium2": {"policy": "randaugment", "num_ops": 2, "magnitude": 15.0, "mixup_alpha": 0.5},
    "strong1": {"policy": "randaugment", "num_ops": 2, "magnitude": 20.0, "mixup_alpha": 0.5},
    "strong2": {"policy": "randaugment", "num_ops": 2, "magnitude": 20.0, "mixup_alpha": 0.8},
    # "DeiT III" (Touvron et al. 2022, https://arxiv.org/abs/2204.07118), section 3.
    "3-augment": {"policy": "3-augment", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
}


@dataclass(frozen=True)
class Strength:
    """`AugmentSection` with its preset laid under it: nothing is left open."""

    policy: str = "none"
    num_ops: int = 2
    magnitude: float = 10.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey_rate: float = 0.0
    erase_rate: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_rate: float = 1.0
    cutmix_rate: float = 0.5

    @classmethod
    def of(cls, section: AugmentSection) -> Self:
        """What is given in the section, else what its preset says, else the default."""
        given = {f.name: getattr(section, f.name) for f in fields(cls)}
        below = PRESETS[section.preset or "none"]
        return cls(**{**below, **{k: v for k, v in given.items() if v is not None}})

    @property
    def changes_colours(self) -> bool:
        """Whether a cropped picture meets any operation but erasing."""
        jitters = self.brightness, self.contrast, self.saturation, self.hue, self.grey_rate
        return self.policy != "none" or any(jitters)

    @property
    def changes(self) -> bool:
        """Whether a cropped picture is changed at all."""
        return self.changes_colours or self.erase_rate > 0

    @property
    def mixes(self) -> bool:
        """Whether pictures of a batch are mixed at all."""
        return self.mix_rate > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
