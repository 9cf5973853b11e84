"""GPUs that a run can be planned for: their memory, and how fast they multiply, by the vendors' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dspref.errors import ConfigError

# Dense bf16 matrix products, TFLOP/s, by words of the device's name, from data sheets. The first match counts.
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "GH200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989,
    "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A10G": 70, "A10": 125, "RTX A6000": 155, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "MI300X": 1307, "MI250X": 383,
}  # fmt: skip


def peak_of(name: str) -> float | None:
    """FLOP/s of a device of this name: whole words, as an RTX A1000 is no A100."""
    return next((1e12 * tflops for words, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


@dataclass(frozen=True)
class Gpu:
    """`gib`: what a program finds free on an empty card: a little less than its name says, as ECC and the driver take some.
    `mfu`: the share of the peak that is assumed of a run; an assumption, not a measurement."""

    name: str
    gib: float
    mfu: float = 0.40

    @property
    def peak(self) -> float:
        """FLOP/s in bf16, dense."""
        return peak_of(self.name) or 0.0


# Data sheets: NVIDIA H100 (80 GB HBM3, 989 TFLOP/s), H200 (141 GB), A100 (40 and 80 GB, 312), L40S (48 GB, 362), B200
# (DGX B200: 180 GB, 2.25 PFLOP/s each); "Ada GPU architecture" (RTX 4090: 24 GB, 165 with fp32 sums); AMD Instinct MI300X
# (192 GB, 1307). Memory is what torch reports as total, in GiB. Of the peak less is reached on cards whose links are PCIe.
GPUS = {
    "h100": Gpu("H100", 79.1),
    "h200": Gpu("H200", 139.8),
    "a100-80": Gpu("A100", 79.2, 0.50),
    "a100-40": Gpu("A100", 39.4, 0.50),
    "l40s": Gpu("L40S", 44.4, 0.35),
    "4090": Gpu("RTX 4090", 23.5, 0.35),
    "b200": Gpu("B200", 178.3, 0.35),
    "mi300x": Gpu("MI300X", 191.7, 0.30),
}


def find(name: str) -> Gpu:
    """Raises ConfigError for a card that is not in the table."""
    key = name.lower().replace("_", "-").removeprefix("rtx").strip("- ")
    if key not in GPUS:
        close = [other for other in GPUS if other.startswith(key)] or difflib.get_close_matches(key, GPUS, n=1, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close and key else ""
        raise ConfigError(f"--gpu: {name} is not known; {hint}choose from {', '.join(GPUS)}")
    return GPUS[key]


def chosen(name: str, gib: float | None, utilisation: float | None, ranks: int) -> Gpu:
    """A card of the table, or this machine's memory shared by `ranks` (`cpu`), with what is said of it in place of its own.

    Raises ConfigError for a card that is not in the table.
    """
    card = Gpu("CPU", machine_gib() / ranks) if name.lower() == "cpu" else find(name)
    return replace(card, gib=gib or card.gib, mfu=utilisation or card.mfu)


def machine_gib(meminfo: Path = Path("/proc/meminfo")) -> float:
    """All memory of this machine; 0 where it does not say."""
    text = meminfo.read_text(encoding="utf-8") if meminfo.exists() else ""
    found = re.search(r"MemTotal:\s+(\d+) kB", text)
    return int(found[1]) / 2**20 if found else 0.0
