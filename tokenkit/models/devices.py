"""Devices that are not here: what their makers' data sheets say, and what of it a run may count on.

Peaks are of dense products; a sheet that gives one for sparse matrices alone is halved. Float32 products are those of
the plain units: torch does not use TF32 unless it is told to. The figures were compared with published copies of the
sheets, and nothing in this file was measured by us.
"""

from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.models.rates import Rates

PRODUCTS, MEMORY, LINKS = 0.5, 0.8, 0.7  # of the peaks in the sheets, that a run is assumed to reach
STARTS = 1.25e5  # operations a second that a host starts, one after the other
ENTRY_BYTES = 32  # that a logit in a tile is read and written with, from the product to the score


@dataclass(frozen=True)
class DataSheet:
    """One device: bytes, and peaks a second."""

    memory: float
    """Bytes."""
    half: float
    """Floating-point operations in 16 bits, added up in 32."""
    single: float
    """In float32."""
    bandwidth: float
    """Bytes between its memory and its cores."""
    link: float
    """Bytes in each direction between devices of one host."""
    network: float = 50e9
    """Bytes in each direction from a device to those of other hosts: a port of 400 Gbit/s for each is assumed."""
    per_host: int = 8
    """Devices of a host."""

    def rates(self) -> Rates:
        """Speeds to count with."""
        return Rates(
            flops={4: PRODUCTS * self.single, 2: PRODUCTS * self.half},
            bytes_per_second=MEMORY * self.bandwidth,
            starts_per_second=STARTS,
            scored_per_second=MEMORY * self.bandwidth / ENTRY_BYTES,
        )

    def linked(self, processes: int) -> float:
        """Bytes a second in each direction that so many processes can count on: the network's where one host is not
        enough for them."""
        return LINKS * (self.link if processes <= self.per_host else min(self.link, self.network))


SHEETS = {
    "a100-40": DataSheet(40e9, 312e12, 19.5e12, 1.555e12, 300e9),  # SXM
    "a100-80": DataSheet(80e9, 312e12, 19.5e12, 2.039e12, 300e9),  # SXM
    "h100": DataSheet(80e9, 989e12, 67e12, 3.35e12, 450e9),  # SXM
    "h200": DataSheet(141e9, 989e12, 67e12, 4.8e12, 450e9),  # SXM
    "b200": DataSheet(180e9, 2250e12, 80e12, 8e12, 900e9),  # HGX
    "mi300x": DataSheet(192e9, 1307e12, 163.4e12, 5.3e12, 448e9),
    "l40s": DataSheet(48e9, 362e12, 91.6e12, 0.864e12, 32e9),  # PCIe 4.0
    "rtx4090": DataSheet(24e9, 165e12, 82.6e12, 1.008e12, 32e9),  # PCIe 4.0
}


def data_sheet(name: str) -> DataSheet:
    """What is known of a device; UserError for one that is not in the table."""
    if name not in SHEETS:
        raise UserError(f"--on: {name!r} is no device whose data sheet is known here; write one of {', '.join(SHEETS)}")
    return SHEETS[name]
