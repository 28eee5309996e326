"""Devices by the names that are used on a command line."""

from __future__ import annotations

import torch

from branchtree.errors import RecipeError


def named_device(name: str) -> torch.device:
    """Return the device called ``cpu``, ``cuda``, ``cuda:1`` and so on; ``auto`` is CUDA where available.

    A CUDA device has an index. Raises RecipeError for another name, and for CUDA where it cannot be used.
    """
    if name == "auto":
        return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device '{name}': write auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device '{name}': no CUDA device can be used here; write cpu or auto")
    return indexed(device)


def indexed(device: torch.device) -> torch.device:
    """Return the same device with an index: a CUDA device without one becomes the current one.

    Without an index torch uses the calling thread's current device, and ``set_device`` refuses it.
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
