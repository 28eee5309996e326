"""The components of a pipeline that denoise: their names, and several of them as the one module that is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from branchtree.plugins import QuantizableFootprint
from branchtree.plugins.quantized import BLOCK

DENOISERS = ("transformer", "unet", "transformer_2", "unconditional_transformer")
"""Names that pipelines have for what denoises, in the order in which a prediction calls them."""


class Denoisers(nn.Module):
    """Several denoisers of a pipeline, which are trained together. A call names the one that is meant.

    Every call goes through this module's own, so that what wraps it or hooks into it sees all of them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        # How models of diffusers name their blocks, for sharding and compilation, and what they keep in float32.
        self._no_split_modules = self._named("_no_split_modules")
        self._repeated_blocks = self._named("_repeated_blocks")
        self._keep_in_fp32_modules = self._named("_keep_in_fp32_modules")

    def _named(self, attribute: str) -> list[str]:
        named = [name for module in self.children() for name in getattr(module, attribute, None) or ()]
        return list(dict.fromkeys(named))

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser ``name``."""
        return self.get_submodule(name)(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """Enable it in each."""
        for module in self.children():
            module.enable_gradient_checkpointing()  # type: ignore[operator]

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the repeated blocks of each."""
        for module in self.children():
            module.compile_repeated_blocks(**options)  # type: ignore[operator]


def together(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return the only one of some denoisers, or all of them as one module."""
    return next(iter(modules.values())) if len(modules) == 1 else Denoisers(modules)


def apart(denoiser: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the denoisers, by name, that ``together`` made one module of."""
    return {names[0]: denoiser} if len(names) == 1 else {name: denoiser.get_submodule(name) for name in names}


def split_state(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each denoiser by its own names for them, from those of what ``together`` made."""
    if len(names) == 1:
        return {names[0]: dict(state)}
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        for name in names
    }


def block_layers(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers, by name, of a denoiser's repeated blocks that can be quantised.

    Embeddings, time and output layers are outside of blocks. Layers that the model keeps in float32 are left out.
    """
    blocks = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    delicate = frozenset[str](getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    inside = [name for name, module in denoiser.named_modules() if type(module).__name__ in blocks]
    return {
        f"{block}.{name}": layer
        for block in inside
        for name, layer in denoiser.get_submodule(block).named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.numel() % BLOCK == 0 and delicate.isdisjoint(name.split("."))
    }


def quantizable_footprint(denoisers: Iterable[nn.Module]) -> QuantizableFootprint | None:
    """Return the sizes of the layers of some denoisers that can be quantised; None if there are none."""
    layers = [layer for denoiser in denoisers for layer in block_layers(denoiser).values()]
    numbers = [layer.weight.numel() for layer in layers]
    rows = sum(layer.out_features for layer in layers)
    return QuantizableFootprint(sum(numbers), rows, max(numbers)) if layers else None
