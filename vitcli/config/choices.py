"""The values that named settings of the model and the preprocessing may have.

The schema checks recipes against these types. `ViTConfig`, `ResNetConfig` and `Preprocess` check
weights files and arguments against the same types. This module imports `typing` only, so that the
networks in `vit/` can use it.
"""

from typing import Literal

Pool = Literal["token", "mean", "quadrants", "map", "token_mean", "distilled"]
Position = Literal["learned", "learned2d", "relative", "sincos2d", "none"]
PositionAt = Literal["stem", "every", "shared"]
PositionBias = Literal["none", "every", "shared"]
Resize = Literal[  # of positions
    "bilinear", "bilinear_antialiased", "bicubic", "bicubic_plain", "bicubic_aligned", "computed"
]
PatchInit = Literal["random", "whitening"]
MlpKind = Literal["gelu", "swiglu"]
Gelu = Literal["exact", "tanh", "quick"]
NormKind = Literal["layer", "rms"]
Rope = Literal["centred", "index"]
RopePairs = Literal["halves", "neighbours"]
RopeDtype = Literal["fp32", "bf16"]
StemArithmetic = Literal["google", "timm"]

ResizeMode = Literal["crop", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
CropRounding = Literal["even", "down"]
