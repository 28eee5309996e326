"""Rows and indices on their way from the host to the device, which the host need not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``.

    From the host to a GPU it goes by pinned memory, from which the copy runs on its own while the host goes on; torch
    keeps that memory until the copy is done.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch_rows(states: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Some rows of ``states`` (N, *latent) on ``device``; ``rows`` (B,) may lie anywhere.

    From the host to a GPU they are gathered straight into pinned memory; see ``send``.
    """
    index = send(rows, states.device)
    if states.device.type != "cpu" or device.type != "cuda":
        return states[index].to(device)
    pinned = torch.empty((len(index), *states.shape[1:]), dtype=states.dtype, pin_memory=True)
    return torch.index_select(states, 0, index, out=pinned).to(device, non_blocking=True)
