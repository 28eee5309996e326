"""Frozen linear layers whose weights are kept in 8 or 4 bits, for ``model.quantize``.

torch's product keeps the weight that it multiplies by for the backward pass, which would hold every layer's dequantised
weight at once. Here the backward pass dequantises it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import ModelError
from branchtree.plugins.values import QuantizableFootprint

BLOCK = 64
"""Numbers of a weight that share a scale under 4 bits; layers whose weights are no multiple of it stay as they are."""
NESTED_BLOCK = 256
"""Scales under nf4 that share one of their own."""


@dataclass(frozen=True)
class Format:
    """A way to keep a weight (out, in) in fewer bits."""

    pack: Callable[[Tensor], tuple[Tensor, ...]]  # to codes, and the tensors that scale them
    unpack: Callable[[tuple[Tensor, ...], torch.Size, torch.dtype], Tensor]
    stored: Callable[[int, int, int], float]  # bytes, from the numbers, their rows and their size in bytes


def _pack_int8(weight: Tensor) -> tuple[Tensor, ...]:
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).round().to(torch.int8), scale


def _unpack_int8(tensors: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    codes, scale = tensors
    return (codes * scale).to(dtype)


def _pack_int4(weight: Tensor) -> tuple[Tensor, ...]:
    blocks = weight.reshape(-1, BLOCK)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(torch.finfo(weight.dtype).tiny)
    codes = ((blocks.float() - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, low


def _unpack_int4(tensors: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    packed, scale, low = tensors
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return torch.addcmul(low.to(dtype), codes.to(dtype), scale.to(dtype)).view(shape)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    from bitsandbytes import functional

    # In rows of one block: the CPU's kernel is wrong for rows that end inside of a block.
    blocks = weight.reshape(-1, BLOCK)
    codes, state = functional.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return codes, state.absmax, state.offset.reshape(1), state.code, state.state2.absmax, state.state2.code


def _unpack_nf4(tensors: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    codes, scales, offset, code, nested_scales, nested_code = tensors
    blocks = torch.Size((shape.numel() // BLOCK, BLOCK))
    nested = functional.QuantState(nested_scales, code=nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = functional.QuantState(
        scales, blocks, code, blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=offset, state2=nested
    )
    weight: Tensor = functional.dequantize_4bit(codes, state)
    return weight.view(shape)


FORMATS: Mapping[str, Format] = {
    "int8": Format(_pack_int8, _unpack_int8, lambda numbers, rows, size: numbers + 4 * rows),
    "int4": Format(_pack_int4, _unpack_int4, lambda numbers, rows, size: numbers / 2 + 2 * size * numbers / BLOCK),
    "nf4": Format(
        _pack_nf4, _unpack_nf4, lambda numbers, rows, size: numbers / 2 + numbers / BLOCK * (1 + 4 / NESTED_BLOCK)
    ),
}
"""The values of ``model.quantize``: a scale for each row of int8, a scale and a least number for each block of int4,
and bitsandbytes' 4-bit numbers spaced as those of a normal distribution, with their scales in 8 bits."""


class _Product(torch.autograd.Function):
    """Inputs (..., in) times a quantised weight, with a gradient for the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bias: Tensor | None, kind: str, shape: torch.Size, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kind, ctx.shape = kind, shape
        return nn.functional.linear(inputs, FORMATS[kind].unpack(tensors, shape, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        weight = FORMATS[ctx.kind].unpack(tensors, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, *(None for _ in tensors)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps its weight in fewer bits and computes in its input's dtype."""

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device) -> None:
        """Take the weight of ``linear``, quantised on ``device``."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.kind, self.shape = kind, linear.weight.shape
        codes, *scales = FORMATS[kind].pack(linear.weight.detach().to(device))
        self.weight = _frozen(codes)
        self.scales = [f"scale_{i}" for i in range(len(scales))]
        for name, scale in zip(self.scales, scales, strict=True):
            self.register_parameter(name, _frozen(scale))
        if linear.bias is not None:
            self.bias = _frozen(linear.bias.detach().to(device))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the dequantised weight to ``input``."""
        scales = map(self.get_parameter, self.scales)
        product: Tensor = _Product.apply(input, self.bias, self.kind, self.shape, self.weight, *scales)
        return product


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def check_quantization(kind: str) -> None:
    """Raise ModelError for a kind whose library is not installed."""
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantize: nf4 needs bitsandbytes: pip install 'branchtree-grpo[quantize]'; or set it to int4 or "
            "int8, which need no other library"
        )


@torch.no_grad()
def quantize_layers(module: nn.Module, names: Iterable[str], kind: str, device: torch.device) -> None:
    """Put quantised layers on ``device`` in place of linear ones, one after the other, each freed when it is done."""
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, last, QuantizedLinear(getattr(owner, last), kind, device))


def quantized_bytes(kind: str, layers: QuantizableFootprint, size: int) -> int:
    """Return the bytes of quantised layers' weights and scales where a number of the run's precision takes ``size``."""
    return int(FORMATS[kind].stored(layers.parameters, layers.rows, size))
