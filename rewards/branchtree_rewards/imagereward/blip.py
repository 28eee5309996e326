"""ImageReward's network, of transformers' BLIP classes and five linear layers, and the published names of its tensors.

Axis letters: B pairs of a picture and a prompt, T tokens. Architecture: BLIP (arXiv 2201.12086) as ImageReward uses it
(arXiv 2304.05977): the prompt, read in both directions, attends to the picture, and the head reads its first token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree_rewards.shared.weights import check_fit, renamed, without

DROPPED = frozenset(
    {
        "blip.text_encoder.embeddings.position_ids",  # 0, 1, 2, ...
        "blip.vision_proj.weight",  # these four belong to BLIP's pre-training and take no part in the score
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
    }
)
PREFIXES = {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.layers.": "head."}
VISION_NAMES = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
VISION_HEAD = 64  # width of an attention head in every published BLIP vision encoder (ViT-B and ViT-L)
VISION_EPS = 1e-6  # the publisher's layer norms; transformers' BLIP has 1e-5 by default
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_norm_eps",
    "hidden_act",
)
BERT_BASE: Mapping[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
"""The published med_config.json, as far as it is used."""
VISION_WIDTH = 1024
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published head; dropouts stand between the first four


def our_name(published: str) -> str:
    """The name in `BlipReward` of a published tensor; an unknown one keeps its name, and then fits nowhere."""
    for prefix, ours in PREFIXES.items():
        if published.startswith(prefix):
            rest = published.removeprefix(prefix)
            return ours + (_vision_name(rest) if ours == "vision." else rest)
    return published


def _vision_name(rest: str) -> str:
    for pattern, replacement in VISION_NAMES:
        name, count = re.subn(f"^{pattern}", replacement, rest)
        if count:
            return name
    return rest


class BlipReward(nn.Module):
    """A picture and a prompt's tokens to one number, before ImageReward's mean and deviation are applied."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    @property
    def image_size(self) -> int:
        """Height and width of the pictures it takes."""
        config: Any = self.vision.config
        return int(config.image_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), normalised, with token ids and attention mask (B, T), to (B,)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        scored: Tensor = self.head(read[:, 0])
        return scored.squeeze(1)


def build_network(published: Mapping[str, Tensor], med_config: Mapping[str, Any], where: str) -> BlipReward:
    """The network that holds exactly the published tensors, in float32 on the CPU.

    Raises RewardError for a missing, an unknown or a wrongly shaped tensor.
    """
    state = renamed(without(published, DROPPED), our_name)
    network = blip_skeleton(state, med_config, where)
    check_fit(state, network.state_dict(), where)
    network.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in state.items()}, assign=True)
    positions = torch.arange(med_config["max_position_embeddings"])[None]
    network.text.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    return network


def published_skeleton(med_config: Mapping[str, Any] | None) -> BlipReward:
    """The published network without weights: BLIP's ViT-L/16 at 224 pixels, and BERT's base size by default."""
    width = VISION_WIDTH
    shapes = {
        "vision.embeddings.position_embedding": (1, (224 // 16) ** 2 + 1, width),
        "vision.embeddings.patch_embedding.weight": (width, 3, 16, 16),
        "vision.encoder.layers.0.mlp.fc1.weight": (4 * width, width),
        "vision.encoder.layers.23.mlp.fc1.weight": (4 * width, width),
    }
    text = med_config or BERT_BASE
    widths = (text["hidden_size"], *HEAD_WIDTHS)
    shapes |= {f"head.{place}.weight": (widths[at + 1], widths[at]) for at, place in enumerate(HEAD_PLACES)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return blip_skeleton(state, text, "the published checkpoint")


def blip_skeleton(state: Mapping[str, Tensor], med_config: Mapping[str, Any], where: str) -> BlipReward:
    """The network without weights, on the meta device.

    Sizes come from the shapes of ``state``, and those of the text encoder from the published med_config.json. Raises
    RewardError if a tensor that tells a size is missing.
    """
    try:
        with torch.device("meta"):
            return BlipReward(_vision(state), _text(state, med_config), _head(state))
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise RewardError(
            f"the weights and settings of '{where}' are not ImageReward's ({type(error).__name__}: {error})"
        ) from error


def _vision(state: Mapping[str, Tensor]) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    _, positions, width = state["vision.embeddings.position_embedding"].shape
    patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(state, "vision.encoder.layers."),
        num_attention_heads=width // VISION_HEAD,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=VISION_EPS,
    )
    model: nn.Module = BlipVisionModel(config)
    return model


def _text(state: Mapping[str, Tensor], med_config: Mapping[str, Any]) -> nn.Module:
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        **{name: med_config[name] for name in TEXT_SIZES},
        encoder_hidden_size=state["vision.embeddings.position_embedding"].shape[-1],
        is_decoder=True,  # makes the layers that attend to the picture; the forward pass reads in both directions
        use_cache=False,
        bos_token_id=None,  # the defaults are ids of the full vocabulary, and only generation uses them
        sep_token_id=None,
    )
    model: nn.Module = BlipTextModel(config, add_pooling_layer=False)
    return model


def _head(state: Mapping[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Identity() for _ in range(HEAD_PLACES[-1] + 1)]
    for place in HEAD_PLACES:
        out, width = state[f"head.{place}.weight"].shape
        layers[place] = nn.Linear(width, out)
    return nn.Sequential(*layers)


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are, by the highest number among the names."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
