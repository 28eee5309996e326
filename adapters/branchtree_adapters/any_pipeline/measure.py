"""A model's sizes and operations, measured on a pipeline of phantoms: no weights, no formulas of a family's own.

Figures of a row are what a second row adds, so that weights, their copies in autocast's precision, and tables that rows
share are not in them. A number is as large as one of the precision: where a model works on float32 copies under
bfloat16 autocast, each of their numbers counts as two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from branchtree.plugins import DecoderFootprint, Footprint
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.any_pipeline.phantom import Call, first_call, recorded_calls
from branchtree_adapters.any_pipeline.recording import GROUP, SHAPES
from branchtree_adapters.any_pipeline.substitutes import rows_of_call
from branchtree_adapters.pipeline.blueprint import count_parameters, largest_block
from branchtree_adapters.pipeline.denoisers import quantizable_footprint

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION = (CPU_ATTENTION, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
"""Products of activations: attention, whether it is one operation or two."""

Calls = Sequence[tuple[Any, Call]]
"""Denoisers' calls in one prediction."""


def measure(driver: PipelineDriver, asked: Asked, dtype: torch.dtype, source: str) -> Footprint:
    """Return a model's sizes.

    The numbers alive in a forward and a decoding are measured by following every tensor; a convolution's workspace is
    not in them, and attention is taken to be one operation. Decoding is without autocast. ``lora_parameters_per_rank``
    is 0.

    Args:
        driver: Of a pipeline whose components with weights are phantoms; it has learnt its layout.
        asked: A prompt.
        dtype: The precision of a run; under autocast where it is not float32.
        source: Where the configuration comes from, in words.
    """
    denoisers = list(driver.denoisers.values())
    packed = driver.encode(asked)
    one, two = (_prediction(denoisers, driver, packed, rows) for rows in (1, 2))
    operations = count_operations(lambda: [denoiser.dry_run(call) for denoiser, call in one])
    rows = sum(_rows(call) for _, call in one)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        kept, more = (kept_for_backward(calls) for calls in (one, two))
        alive = _alive_per_row(one, two)
    unit = dtype.itemsize
    others = [module for module in driver.pipeline.components.values() if isinstance(module, nn.Module)]
    return Footprint(
        denoiser_parameters=sum(map(count_parameters, denoisers)),
        frozen_parameters=sum(count_parameters(module) for module in others if module not in denoisers),
        latent_shape=driver.state_shape,
        activation_numbers_per_row=(more.full - kept.full) // (rows * unit),
        checkpointed_numbers_per_row=(more.checkpointed - kept.checkpointed) // (rows * unit),
        forward_flops_per_row=operations.total / rows,
        rows_per_prediction=rows,
        lora_parameters_per_rank=0,
        source=source,
        forward_numbers_per_row=int(alive / unit),
        conditioning_numbers=sum(value.numel() for name, value in packed.items() if name not in {SHAPES, GROUP}),
        attention_flops_per_row=operations.attention / rows,
        largest_block_parameters=max(map(largest_block, denoisers)),
        quantizable=quantizable_footprint(denoisers),
        decoder=measure_decoder(driver, packed),
    )


@torch.no_grad()
def _prediction(denoisers: Iterable[Any], driver: PipelineDriver, packed: Mapping[str, Tensor], rows: int) -> Calls:
    """Return the denoisers' calls in a prediction of the same row, several times."""
    state = torch.zeros(rows, *driver.state_shape)
    several = {name: value.repeat(rows, *(1,) * (value.ndim - 1)) for name, value in packed.items()}
    with ExitStack() as recording:
        recorded = {denoiser: recording.enter_context(recorded_calls(denoiser)) for denoiser in denoisers}
        driver.predict(state, torch.full((rows,), 0.5), several)
    return [(denoiser, call) for denoiser, own in recorded.items() for call in own]


def _rows(call: Call) -> int:
    return rows_of_call(call.args, call.kwargs)


@torch.no_grad()
def measure_decoder(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> DecoderFootprint | None:
    """Return the sizes of a VAE's decoder at work on one row; None for a pipeline that decodes without a VAE."""
    vae: Any = getattr(driver.pipeline, "vae", None)
    call = None if vae is None else first_call(vae, lambda: driver.decode(torch.zeros(1, *driver.state_shape), packed))
    if call is None:
        return None
    outputs: list[Any] = []
    with PeakMemory() as memory:
        operations = count_operations(lambda: outputs.append(vae.dry_run(call)))
    media = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return DecoderFootprint(
        parameters=count_parameters(vae),
        numbers_per_row=memory.peak // 4,
        flops_per_row=operations.total,
        media_numbers_per_row=media.numel(),
    )


# Operations


@dataclass(frozen=True)
class Operations:
    """Operations of a computation, a multiplication and an addition counted as two."""

    total: float
    attention: float


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of attention of these shapes, which torch's counter does not know of on a CPU."""
    count: int = sdpa_flop_count(query, key, value)
    return count


@torch.no_grad()
def count_operations(run: Callable[[], Any]) -> Operations:
    """Count the operations of ``run``: products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention}) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    return Operations(counter.get_total_flops(), sum(counts.get(kind, 0) for kind in ATTENTION))


# Memory


class PeakMemory(TorchDispatchMode):
    """Follows the storage of every tensor that is made. ``peak``: bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, storage: int) -> None:
        self._now -= self._alive.pop(storage)


@torch.no_grad()
def _alive_per_row(one: Calls, two: Calls) -> float:
    """Bytes that a further row of the fullest call adds to what is alive at once in a forward without gradients."""
    peaks: list[int] = []
    for calls in (one, two):
        with PeakMemory() as memory:
            for denoiser, call in calls:
                denoiser.dry_run(call)
        peaks.append(memory.peak)
    fewer, more = (max(_rows(call) for _, call in calls) for calls in (one, two))
    return (peaks[1] - peaks[0]) / (more - fewer) if more > fewer else peaks[0] / fewer


Storages = dict[int, Tensor]
"""A tensor of each storage, which keeps it alive, by the storage."""


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for a backward pass, weights and their copies among them."""

    full: int
    checkpointed: int  # with the model's own gradient checkpointing, while its largest block is computed again


@dataclass
class _Block:
    inputs: Storages
    kept: Storages = field(default_factory=dict)


@torch.enable_grad()
def kept_for_backward(calls: Calls) -> Kept:
    """Measure what autograd saves in denoisers' calls, block by block of the model's own gradient checkpointing.

    A model that gives its blocks other inputs under checkpointing, as diffusers' Chroma, is measured with those.
    """
    blocks: list[_Block] = []
    outside: Storages = {}

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        blocks.append(_Block(_storages(tree_leaves((args, kwargs)))))
        with _saved(blocks[-1].kept):
            return function(*args, **kwargs)

    with _saved(outside):
        outputs = []
        for denoiser, call in calls:
            can = denoiser._supports_gradient_checkpointing
            if can:
                denoiser.enable_gradient_checkpointing(checkpoint)
            try:
                outputs.append(denoiser.dry_run(call))
            finally:
                if can:
                    denoiser.disable_gradient_checkpointing()
    full, inputs = dict(outside), dict(outside)
    for block in blocks:
        full |= block.kept
        inputs |= block.inputs
    again = max((_bytes(inputs | block.kept) for block in blocks), default=_bytes(inputs))
    return Kept(_bytes(full), again)


@contextmanager
def _saved(storages: Storages) -> Any:
    """A context in which what autograd saves is added to ``storages``."""

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _storages(leaves: Iterable[Any]) -> Storages:
    return {leaf.untyped_storage()._cdata: leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _bytes(storages: Storages) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
