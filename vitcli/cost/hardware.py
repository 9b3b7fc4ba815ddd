"""Devices that `plan --device` knows, and their data sheets; this module is light."""

from dataclasses import dataclass

from vitcli.errors import unknown

TERA, GIB = 1e12, 2**30
# MFU that an estimate assumes, from and to. It holds for ViTs in mixed precision whose data keeps
# up with the GPU; small models stay below it.
ASSUMED_MFU = (0.25, 0.5)
# TPUv3: exaFLOPs of the paper's table 6 over the core-days of its table 2 are 26.7 (L/16, JFT),
# 23.8 (L/16, ImageNet-21k) and 19.7 (H/14) TFLOP/s of 61.5 per core.
PAPER_MFU = (0.32, 0.44)


@dataclass(frozen=True)
class Hardware:
    """The data sheet of a device.

    Attributes:
        peak_flops: FLOP/s of dense bf16 products (T4: fp16), without sparsity.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        source: of these figures.
        mfu: the lowest and highest MFU that an estimate assumes.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    source: str
    mfu: tuple[float, float] = ASSUMED_MFU

    def seconds(self, flops: float, mfu: float) -> float:
        """The time of `flops` operations at a fraction `mfu` of the peak."""
        return flops / (self.peak_flops * mfu)


HARDWARE = {
    "t4": Hardware("T4", 65 * TERA, 16 * GIB, 320e9, "NVIDIA T4 datasheet (fp16)"),
    "l4": Hardware("L4", 121 * TERA, 24 * GIB, 300e9, "NVIDIA L4 datasheet"),
    "rtx4090": Hardware(
        "RTX 4090", 165.2 * TERA, 24 * GIB, 1008e9, "NVIDIA Ada whitepaper, fp32 accumulation"
    ),
    "a100": Hardware("A100 80GB SXM", 312 * TERA, 80 * GIB, 2039e9, "NVIDIA A100 datasheet"),
    "h100": Hardware("H100 SXM", 989 * TERA, 80 * GIB, 3350e9, "NVIDIA H100 datasheet"),
    "h200": Hardware("H200 SXM", 989 * TERA, 141 * GIB, 4800e9, "NVIDIA H200 datasheet"),
    "tpuv3": Hardware(
        "TPUv3 core",
        61.5 * TERA,
        16 * GIB,
        450e9,
        "Google Cloud TPU v3 documentation: 123 TFLOP/s, 32 GiB and 900 GB/s per chip of two cores",
        PAPER_MFU,
    ),
}
ALIASES = {"4090": "rtx4090", "rtx-4090": "rtx4090", "tpuv3-core": "tpuv3", "tpu-v3": "tpuv3"}
THIS_MACHINE = ("this", "here", "cpu")  # measured, not estimated


def find_hardware(names: str) -> list[Hardware]:
    """`h100`, `a100,h100`, `all` -> devices; the names of `THIS_MACHINE` are skipped.

    Raises:
        VitcliError: an unknown name.
    """
    if names.strip().lower() == "all":
        return list(HARDWARE.values())
    found = []
    for name in names.lower().replace(" ", "").split(","):
        if name in THIS_MACHINE:
            continue
        key = ALIASES.get(name, name)
        if key not in HARDWARE:
            raise unknown("device", name, [*HARDWARE, "cpu", "all"])
        found.append(HARDWARE[key])
    return found


def includes_this_machine(names: str | None) -> bool:
    """True if `--device` includes this machine; without the option it does."""
    return names is None or names.lower() == "all" or any(n in names.lower() for n in THIS_MACHINE)
