"""Devices by name: what their makers say they can do at most, and how much of it training gets."""

from dataclasses import dataclass

from vitcli.errors import VitcliError, nearest

TERA, GIGA = 1e12, 2**30
# The share of its peak that a device spends on the model (MFU). For GPUs an assumption, wide enough
# for well-fed training of ViTs in mixed precision: small models and slow data fall below it.
ASSUMED_MFU = (0.25, 0.5)
# TPUv3: what the paper's own figures imply. Exaflops of its table 6 over the core-days of its table
# 2 are 26.7 (L/16, JFT), 23.8 (L/16, ImageNet-21k) and 19.7 (H/14) TFLOP/s of 61.5 a core.
PAPER_MFU = (0.32, 0.44)


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        peak_flops: operations a second of dense bf16 (T4: fp16) products, without sparsity.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        source: where these figures stand.
        mfu: the least and the largest share of `peak_flops` that an estimate assumes.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    source: str
    mfu: tuple[float, float] = ASSUMED_MFU


HARDWARE = {
    "t4": Hardware("T4", 65 * TERA, 16 * GIGA, 320e9, "NVIDIA T4 datasheet (fp16)"),
    "l4": Hardware("L4", 121 * TERA, 24 * GIGA, 300e9, "NVIDIA L4 datasheet"),
    "rtx4090": Hardware(
        "RTX 4090", 165.2 * TERA, 24 * GIGA, 1008e9, "NVIDIA Ada whitepaper, fp32 accumulation"
    ),
    "a100": Hardware("A100 80GB SXM", 312 * TERA, 80 * GIGA, 2039e9, "NVIDIA A100 datasheet"),
    "h100": Hardware("H100 SXM", 989 * TERA, 80 * GIGA, 3350e9, "NVIDIA H100 datasheet"),
    "h200": Hardware("H200 SXM", 989 * TERA, 141 * GIGA, 4800e9, "NVIDIA H200 datasheet"),
    "tpuv3": Hardware(
        "TPUv3 core",
        61.5 * TERA,
        16 * GIGA,
        450e9,
        "Google Cloud TPU v3 documentation: 123 TFLOP/s, 32 GiB and 900 GB/s a chip of two cores",
        PAPER_MFU,
    ),
}
ALIASES = {"4090": "rtx4090", "rtx-4090": "rtx4090", "tpuv3-core": "tpuv3", "tpu-v3": "tpuv3"}
HERE = ("this", "here", "cpu")  # the machine at hand: measured, not assumed


def find_hardware(names: str) -> list[Hardware]:
    """`h100`, `a100,h100`, `all` -> devices; names of `HERE` are left out.

    Raises:
        VitcliError: an unknown name.
    """
    if names.strip().lower() == "all":
        return list(HARDWARE.values())
    found = []
    for name in names.lower().replace(" ", "").split(","):
        if name in HERE:
            continue
        key = ALIASES.get(name, name)
        if key not in HARDWARE:
            known = [*HARDWARE, "cpu", "all"]
            close = nearest(key, known)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
            raise VitcliError(f"no device `{name}` in the table", hint)
        found.append(HARDWARE[key])
    return found
