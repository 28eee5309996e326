"""Memory of well-known GPUs, to find those that a plan fits on, and of the accelerator of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

GIB = 2**30

USABLE = 0.92
"""The fraction of a GPU's memory that a plan may fill. The remainder is a rule of thumb for the CUDA context, the
libraries' workspaces, and memory that the allocator holds in pieces too small to use."""


@dataclass(frozen=True)
class Gpu:
    """A card and its memory in GiB as PyTorch reports it, which is less than its name says and varies a little."""

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


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of an accelerator, in bytes."""

    name: str
    total: int
    free: int  # including what this process has reserved and does not use

    @property
    def usable(self) -> int:
        """The free bytes that a plan may fill."""
        return int(self.free * USABLE)


def device_memory() -> DeviceMemory | None:
    """Return the memory of this process's accelerator; None without one, or if it does not report its memory."""
    if not torch.accelerator.is_available():
        return None
    # As accelerate assigns them.
    return _memory_of(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def all_device_memory() -> list[DeviceMemory]:
    """Return the memory of each accelerator that reports it."""
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return [memory for index in range(count) if (memory := _memory_of(index)) is not None]


def _memory_of(index: int) -> DeviceMemory | None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    library = torch.get_device_module(accelerator)
    try:
        free, total = library.mem_get_info(index)
        kept = library.memory_reserved(index) - library.memory_allocated(index)
    except (AttributeError, RuntimeError):  # not every kind of device reports its memory
        return None
    return DeviceMemory(f"{accelerator.type}:{index}", total, free + kept)
