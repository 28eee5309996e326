"""Devices by the names that a command line gives them."""

from __future__ import annotations

import torch

from branchtree.errors import RecipeError


def named_device(name: str) -> torch.device:
    """The device called ``cpu``, ``cuda``, ``cuda:1`` and so on; ``auto`` is CUDA where there is one.

    It has an index where it is CUDA. Raises RecipeError for another name, and for CUDA where it cannot be used.
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
    """The same device with an index: a CUDA device without one is the current one.

    Where no index is given torch takes the calling thread's current device; ``set_device`` refuses it.
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
