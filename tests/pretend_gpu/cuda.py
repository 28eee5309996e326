"""``torch.cuda`` and ``torch.accelerator`` as they answer where there is one GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch._utils import _get_device_index

from pretend_gpu.counts import Event
from pretend_gpu.tensor import DEVICE, GPU

MEMORY = 80 * 2**30
NAME = "NVIDIA H100 80GB HBM3"

_Generator = torch.Generator


class PretendGenerator(_Generator):
    """A generator of random numbers on the device: a CPU's, which says that it is elsewhere."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return _Generator()
        return _Generator.__new__(cls)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


def set_device(device: Any) -> None:
    """Refuse a device without an index, as torch does."""
    if _get_device_index(device) != DEVICE.index:
        raise RuntimeError("CUDA error: invalid device ordinal")


def synchronize(device: Any = None) -> None:
    """Wait for the device."""
    GPU.wait(Event.SYNCHRONISE)


class PretendStream:
    """A stream of work on the device, of which there is but one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> PretendStream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        synchronize()

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...


def _state(device: Any = None) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _nothing(*args: Any, **options: Any) -> None:
    return None


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args: True,
    "device_count": lambda: 1,
    "current_device": lambda: DEVICE.index,
    "set_device": set_device,
    "synchronize": synchronize,
    "empty_cache": _nothing,
    "Stream": PretendStream,
    "stream": lambda stream: stream,
    "current_stream": PretendStream,
    "is_current_stream_capturing": lambda: False,
    "mem_get_info": lambda device=None: (MEMORY - 5 * 2**30, MEMORY),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": _nothing,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
    ),
    "get_rng_state": _state,
    "get_rng_state_all": lambda: [_state()],
    "set_rng_state": _nothing,
    "set_rng_state_all": _nothing,
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
}
ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_device_index": lambda: DEVICE.index,
    "current_stream": PretendStream,
    "synchronize": synchronize,
}
