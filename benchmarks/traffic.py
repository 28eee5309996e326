"""Bytes that a forward moves outside of matrix products and attention: norms, modulation, LoRA's sums, casts, copies.

Nothing is computed and no GPU is needed: torch's fake tensors carry sizes, types and a device, and autocast treats
them as it treats tensors of that device. FLUX.1-dev at 720 x 720, one row; Wan2.1-T2V-1.3B at 400 x 640 x 53, one
prediction, which is two rows under guidance. LoRA of rank 64 over bfloat16 weights.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --model flux --ways lora
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from branchtree_adapters.flux import FluxConfig
from branchtree_adapters.wan_layout import WanConfig
from random_models import Execution, RandomFlux, RandomWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from branchtree.plugins import Condition, LoraSettings, ModelAdapter

GPU, META = torch.device("cuda"), torch.device("meta")
NOT_COUNTED = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "empty", "empty_like", "empty_strided"})
WAYS = {
    "lora": "LoRA, as the library trains it",
    "autocast": "LoRA under autocast",
    "base": "without LoRA",
}
MODELS: dict[str, Callable[[], ModelAdapter]] = {
    "flux": lambda: RandomFlux(FluxConfig(path="black-forest-labs/FLUX.1-dev"), Execution()),
    "wan": lambda: RandomWan(
        WanConfig(
            path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            task="text_to_video",
            height=400,
            width=640,
            frames=53,
            guidance=5.0,
        ),
        Execution(),
    ),
}


@dataclass(frozen=True)
class Operation:
    """One operation that is neither a product nor a view."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Read and written; what a copy overwrites is not read."""
        read = self.inputs[1:] if self.name == "copy_" else self.inputs
        return sum(tensor.numel() * tensor.element_size() for tensor in (*read, *self.outputs))


class Traffic(TorchDispatchMode):
    """Records every operation that moves memory, outside of products and attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation."""
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in known for t in outputs)
        if namespace == "aten" and name not in NOT_COUNTED and not is_view:
            self.operations.append(Operation(name, inputs, outputs))
        return result

    @property
    def bytes(self) -> int:
        """Read and written by all operations."""
        return sum(operation.bytes for operation in self.operations)


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(value for value in tree_iter(tree) if isinstance(value, Tensor))


class AttentionInputs(TorchFunctionMode):
    """Records the types of queries, keys and values before autocast, and gives an empty output for the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, ...]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention."""
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs))[:3]
        self.dtypes.append(tuple(tensor.dtype for tensor in inputs))
        if torch.is_autocast_enabled(GPU.type):
            inputs = tuple(tensor.to(torch.get_autocast_dtype(GPU.type)) for tensor in inputs)
        return torch.empty_like(inputs[0])


@contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    """Autocast to bfloat16 as on a GPU; torch.autocast itself does nothing on a machine without one."""
    before = torch.is_autocast_enabled(GPU.type)
    torch.set_autocast_enabled(GPU.type, enabled)
    torch.set_autocast_dtype(GPU.type, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(GPU.type, before)


@torch.no_grad()
def forward_traffic(
    model: ModelAdapter, rank: int | None, under_autocast: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[Traffic, AttentionInputs]:
    """What one prediction of ``model``, which is loaded here in ``dtype``, moves on a GPU."""
    model.load(META, torch.bfloat16, dtype)
    model.denoiser.eval()
    if rank is not None:
        model.add_lora(LoraSettings(rank, float(rank)), seed=0)
    encoded, noise = model.encode([Condition("any")]), model.initial_noise(torch.Generator())[None]
    traffic, attention = Traffic(), AttentionInputs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.denoiser.to_empty(device=GPU)
        conditioning = {name: torch.empty_like(rows, device=GPU) for name, rows in encoded.items()}
        latents, sigma = torch.empty_like(noise, device=GPU), torch.ones(1, device=GPU)
        with attention, traffic, autocast(under_autocast):
            model.predict(latents, sigma, conditioning)
    return traffic, attention


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rank", type=int, default=64)
    arguments = parser.parse_args()
    print("| model | | GB | in casts | attention gets |\n| --- | --- | --- | --- | --- |")
    for name in MODELS if arguments.model == "both" else [arguments.model]:
        for way in arguments.ways:
            rank = None if way == "base" else arguments.rank
            traffic, attention = forward_traffic(MODELS[name](), rank, under_autocast=way == "autocast")
            casts = sum(operation.bytes for operation in traffic.operations if operation.name == "_to_copy")
            kinds = dict.fromkeys(attention.dtypes)
            shown = "; ".join(", ".join(str(dtype).removeprefix("torch.") for dtype in kind) for kind in kinds)
            print(f"| {name} | {WAYS[way]} | {traffic.bytes / 1e9:.1f} | {casts / 1e9:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
