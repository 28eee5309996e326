"""Floating-point operations of a model's rows, counted on its own graph, and the rate of a device's matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from branchtree.plugins import Condition, LoraSettings, ModelAdapter

Result = TypeVar("Result")


@dataclass(frozen=True)
class Operations:
    """Count the operations of one prediction, guidance included; a multiplication and an addition are two."""

    forward: float  # in a rollout
    trained: float  # in the gradient pass: forward, recomputation and backward

    @property
    def forwards_per_trained_row(self) -> float:
        """Below 4 under LoRA: a weight that is frozen needs no gradient of its own."""
        return self.trained / self.forward


def count_operations(model: ModelAdapter, rank: int) -> Operations:
    """Count a prediction of ``model``, which is loaded here, without memory for its weights, and trained by LoRA.

    Every product that torch dispatches is counted, those of the recomputation under gradient checkpointing included.
    Attention's backward counts as twice its forward, though a fused kernel computes the forward's product once more.
    """
    meta = torch.device("meta")
    model.load(meta, torch.float32, torch.float32)
    model.denoiser.eval()
    model.add_lora(LoraSettings(rank, float(rank), None), seed=0)
    model.enable_gradient_checkpointing()
    conditioning = {name: rows.to(meta) for name, rows in model.encode([Condition("any")]).items()}
    latents = model.initial_noise(torch.Generator()).to(meta)[None]
    with FlopCounterMode(display=False) as rolled_out, torch.no_grad():
        model.predict(latents, torch.ones(1), conditioning)
    with FlopCounterMode(display=False) as trained:
        model.predict(latents, torch.ones(1), conditioning).sum().backward()
    return Operations(float(rolled_out.get_total_flops()), float(trained.get_total_flops()))


def matrix_rate(device: torch.device, size: int, repetitions: int = 10) -> float:
    """Operations a second of a product of two random bfloat16 matrices (size, size), the best of several."""
    first, second = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(repetitions + 3):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(first, second)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[3:])


def seconds_of(work: Callable[[], Result], device: torch.device | None = None) -> tuple[float, Result]:
    """What a piece of work takes, and what it returns.

    Seconds are processor time of all threads, which other programs on the machine do not touch; for work on a GPU they
    are those of the clock.
    """
    gpu = device if device is not None and device.type == "cuda" else None
    clock = time.process_time if gpu is None else time.perf_counter
    if gpu is not None:
        synchronize(gpu)
    start = clock()
    value = work()
    if gpu is not None:
        synchronize(gpu)
    return clock() - start, value


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
