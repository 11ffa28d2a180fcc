"""GPUs by name: memory, memory bandwidth, compute capability.

Data-sheet numbers only, nothing measured here. Memory is read as decimal gigabytes: a driver
usually reports that much or a little more, so plans err on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass

from trt_razor.errors import UsageError, did_you_mean

GB = 10**9


@dataclass(frozen=True)
class GPU:
    """One GPU as its data sheet describes it.

    Attributes:
        name: the name to ask for it by.
        memory_gb: device memory in GB (10^9 bytes).
        bandwidth_tb_s: peak memory bandwidth in TB/s (10^12 bytes per second).
        compute_capability: as in ``8.9``.
    """

    name: str
    memory_gb: int
    bandwidth_tb_s: float
    compute_capability: str

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * GB

    @property
    def bandwidth_bytes_s(self) -> float:
        return self.bandwidth_tb_s * 1e12


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("t4-16gb", 16, 0.320, "7.5"),
        GPU("a100-40gb", 40, 1.555, "8.0"),
        GPU("a100-80gb", 80, 2.039, "8.0"),
        GPU("a100-pcie-80gb", 80, 1.935, "8.0"),
        GPU("a30-24gb", 24, 0.933, "8.0"),
        GPU("a10-24gb", 24, 0.600, "8.6"),
        GPU("a40-48gb", 48, 0.696, "8.6"),
        GPU("rtx-3090", 24, 0.936, "8.6"),
        GPU("l4-24gb", 24, 0.300, "8.9"),
        GPU("l40s-48gb", 48, 0.864, "8.9"),
        GPU("rtx-4090", 24, 1.008, "8.9"),
        GPU("rtx-6000-ada", 48, 0.960, "8.9"),
        GPU("h100-80gb", 80, 3.35, "9.0"),
        GPU("h100-pcie-80gb", 80, 2.0, "9.0"),
        GPU("h100-nvl-94gb", 94, 3.9, "9.0"),
        GPU("h20-96gb", 96, 4.0, "9.0"),
        GPU("gh200-96gb", 96, 4.0, "9.0"),
        GPU("h200-141gb", 141, 4.8, "9.0"),
        GPU("b200-180gb", 180, 8.0, "10.0"),
        GPU("gb200-186gb", 186, 8.0, "10.0"),
        GPU("rtx-5090", 32, 1.792, "12.0"),
        GPU("rtx-pro-6000", 96, 1.792, "12.0"),
        GPU("gb10", 128, 0.273, "12.1"),
    )
}

ALIASES: dict[str, str] = {
    "t4": "t4-16gb",
    "a10": "a10-24gb",
    "a30": "a30-24gb",
    "a40": "a40-48gb",
    "a100": "a100-80gb",
    "a100-sxm": "a100-80gb",
    "a100-pcie": "a100-pcie-80gb",
    "h100": "h100-80gb",
    "h100-sxm": "h100-80gb",
    "h100-pcie": "h100-pcie-80gb",
    "h100-nvl": "h100-nvl-94gb",
    "h20": "h20-96gb",
    "gh200": "gh200-96gb",
    "h200": "h200-141gb",
    "b200": "b200-180gb",
    "gb200": "gb200-186gb",
    "l4": "l4-24gb",
    "l40s": "l40s-48gb",
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
    "6000-ada": "rtx-6000-ada",
    "dgx-spark": "gb10",
}
"""Short names. A bare family name means its commonest data-centre part (``h100`` = SXM, 80 GB)."""


def find_gpu(name: str) -> GPU:
    """The GPU of that name or alias; case, spaces and underscores do not matter.

    Raises:
        UsageError: unknown name, with the nearest known ones.
    """
    key = "-".join(name.lower().replace("_", " ").split())
    key = ALIASES.get(key, key)
    if key not in GPUS:
        raise UsageError(f"gpu {name!r}: unknown; {did_you_mean(key, [*GPUS, *ALIASES])}")
    return GPUS[key]
