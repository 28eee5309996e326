"""A LoRA under the names of other programs: kohya's scripts (sd-scripts, musubi-tuner) and ComfyUI.

A denoiser is there if diffusers has a converter for its names, so that what is written can be read back by it. What has
one name in the other program and several in diffusers, as queries, keys and values have, becomes one layer: A on top of
each other, B along a diagonal, which is the same sum to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError
from branchtree_adapters.pipeline.lora_file import ALPHA, LoraFile, LoraLayer, Sizes, linear_sizes, require_layers

KOHYA, COMFYUI, DIFFUSERS = "kohya", "comfyui", "diffusers"


@dataclass(frozen=True)
class Blocks:
    """The numbered blocks of a denoiser under another name, and what the layers in them are called."""

    own: str
    theirs: str
    layers: Mapping[str, Sequence[str]]  # by their name, diffusers' names of the layers that it is made of, in order


@dataclass(frozen=True)
class Naming:
    """What programs call the layers of a denoiser: in each of ``formats`` as diffusers does, or by other blocks."""

    formats: tuple[str, ...]
    kohya: tuple[Blocks, ...] = ()
    comfyui: tuple[Blocks, ...] = ()
    all_in_kohya: bool = False  # whether diffusers reads kohya's files only where every layer of every block is there


FLUX = (
    Blocks(
        "transformer_blocks",
        "double_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    Blocks(
        "single_transformer_blocks",
        "single_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
    ),
)
_WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
WAN = (
    Blocks(
        "blocks",
        "blocks",
        {
            **{f"self_attn.{theirs}": (f"attn1.{own}",) for theirs, own in _WAN_ATTENTION.items()},
            **{f"cross_attn.{theirs}": (f"attn2.{own}",) for theirs, own in _WAN_ATTENTION.items()},
            "cross_attn.k_img": ("attn2.add_k_proj",),
            "cross_attn.v_img": ("attn2.add_v_proj",),
            "ffn.0": ("ffn.net.0.proj",),
            "ffn.2": ("ffn.net.2",),
        },
    ),
)
NAMINGS: Mapping[str, Naming] = {
    "FluxTransformer2DModel": Naming((KOHYA, COMFYUI), kohya=FLUX),
    "WanTransformer3DModel": Naming((KOHYA, COMFYUI), kohya=WAN, comfyui=WAN, all_in_kohya=True),
    "SD3Transformer2DModel": Naming((COMFYUI,)),
    "QwenImageTransformer2DModel": Naming((KOHYA, COMFYUI)),
    "ZImageTransformer2DModel": Naming((KOHYA, COMFYUI)),
    "UNet2DConditionModel": Naming((KOHYA, COMFYUI)),
}
"""By the class of the denoiser in diffusers."""


def convert_names(file: LoraFile, denoiser: nn.Module, form: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA as another program reads them, with its strength multiplied into B.

    Args:
        file: The LoRA.
        denoiser: What it is on; its weights are not looked at, and may be on torch's meta device.
        form: ``kohya`` or ``comfyui``.

    Raises:
        CheckpointError: There are no such names for the denoiser, or for a layer that the LoRA is on.
    """
    require_layers(file, denoiser)
    kind = type(denoiser).__name__
    naming = NAMINGS.get(kind, Naming(()))
    if form not in naming.formats:
        known = " or ".join(f"--format {one}" for one in (DIFFUSERS, *naming.formats))
        raise CheckpointError(
            f"a LoRA on {kind} cannot be written as {form}: diffusers has no converter that would read it back; give "
            f"{known}"
        )
    if kind == "UNet2DConditionModel":
        return _of_unet(file)
    blocks = naming.kohya if form == KOHYA else naming.comfyui
    whole = form == KOHYA and naming.all_in_kohya
    layers = _renamed(file, blocks, linear_sizes(denoiser), whole) if blocks else file.layers
    if form == KOHYA:
        return _kohya(layers)
    prefix = "diffusion_model." if blocks else "transformer."  # before diffusers' names
    return {f"{prefix}{name}": value for name, value in replace(file, layers=layers).tensors().items()}


def _kohya(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Return layers under kohya's names, with alpha equal to the rank."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{module}.lora_down.weight"] = layer.down.float()
        tensors[f"{module}.lora_up.weight"] = layer.up.float() * layer.strength
        tensors[f"{module}{ALPHA}"] = torch.tensor(float(layer.rank))
    return tensors


def _of_unet(file: LoraFile) -> dict[str, Tensor]:
    """Return a U-Net's layers by diffusers' own converter, whose names ComfyUI takes too."""
    from diffusers.utils import convert_state_dict_to_kohya

    named = {f"unet.{name}": value for name, value in file.tensors().items()}
    tensors: dict[str, Tensor] = convert_state_dict_to_kohya(named)
    return {name: value.float() for name, value in tensors.items()}


def _renamed(file: LoraFile, blocks: Sequence[Blocks], sizes: Sizes, whole: bool) -> dict[str, LoraLayer]:
    """Return the layers by their names in the other program. Raises CheckpointError for one that has none.

    Under ``whole`` layers that the LoRA is not on are there too, as zeros.
    """
    renamed: dict[str, LoraLayer] = {}
    left = dict(file.layers)
    for kind in blocks:
        numbers = {int(found[1]) for name in sizes if (found := re.match(rf"{kind.own}\.(\d+)\.", name))}
        for number in sorted(numbers):
            for theirs, members in kind.layers.items():
                names = [name for member in members if (name := f"{kind.own}.{number}.{member}") in sizes]
                given = {name: left.pop(name, None) for name in names}
                if any(given.values()) or (whole and names):
                    renamed[f"{kind.theirs}.{number}.{theirs}"] = _stacked(given, sizes)
    if left:
        raise CheckpointError(
            f"'{file.path}' is on {len(left)} layers that have no name in such files, as {next(iter(left))}; "
            f"give --format {DIFFUSERS}, or train with other lora.targets"
        )
    return renamed


def _stacked(members: Mapping[str, LoraLayer | None], sizes: Sizes) -> LoraLayer:
    """Return layers with the same inputs as one that gives their outputs after each other; None changes nothing."""
    only = next(iter(members.values()))
    if len(members) == 1 and only is not None:
        return only
    outputs, inputs = sum(sizes[name][0] for name in members), sizes[next(iter(members))][1]
    present = [layer for layer in members.values() if layer is not None]
    rank = sum(layer.rank for layer in present) or 1
    down = torch.cat([layer.down.float() for layer in present]) if present else torch.zeros(rank, inputs)
    up, row, column = torch.zeros(outputs, rank), 0, 0
    for name, layer in members.items():
        if layer is not None:
            up[row : row + sizes[name][0], column : column + layer.rank] = layer.up.float() * layer.strength
            column += layer.rank
        row += sizes[name][0]
    return LoraLayer(down, up, 1.0)
