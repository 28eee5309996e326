"""Well-known GPUs and their memory, to say which of them a plan fits on."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

USABLE = 0.92
"""The part of a GPU's memory that a plan may fill: the rest, by rule of thumb, goes to the CUDA context, the libraries'
workspaces, and memory that the allocator holds in pieces too small to use."""


@dataclass(frozen=True)
class Gpu:
    """A card and its whole memory in GiB, as PyTorch reports it: less than its name says, and it varies a little."""

    name: str
    memory: float

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * USABLE * GIB)


GPUS = (
    Gpu("RTX 4090 (24 GB)", 23.6),
    Gpu("L40S (48 GB)", 44.3),
    Gpu("RTX 6000 Ada (48 GB)", 47.4),
    Gpu("A100 (80 GB)", 79.1),
    Gpu("H100 (80 GB)", 79.1),
    Gpu("H200 (141 GB)", 139.7),
    Gpu("B200 (180 GB)", 178.3),
)
"""From the smallest to the largest. Memory: "total capacity" in PyTorch's out-of-memory messages, rounded down."""
