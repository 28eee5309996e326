"""What one row costs a Wan2.1 transformer: numbers kept and alive, and operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from branchtree_adapters.wan_layout import Layout


def work(sizes: Mapping[str, Any], layout: Layout, text: int, image: int, texts: int) -> dict[str, Any]:
    """Return what one row costs, by the fields of a Footprint.

    There are S video tokens and C context tokens of width D, and N blocks with feed-forwards of width E. Numbers are in
    units of the compute precision. They were measured under bfloat16 autocast, where a number of 2 bytes is the unit:
    Wan's norms, modulations and residual sums work on float32 copies, and each counts as two.

    - The backward pass keeps N (34 S D + 2 S E + 6 C D) + 7 S D + 4 C D; image attention adds 2 N S D. Measured with
      torch's saved_tensors_hooks for full fine-tuning. In units of 4 bytes float32 keeps 22, 2, 4 in a block and 4, 3
      outside; LoRA on bfloat16 weights keeps 25, 2, 6 and 2, 0 in units of 2 bytes.
    - Gradient checkpointing keeps the input S D of each block, one block computed again, and the ends.
    - Without gradients S max(14 D, 7 D + 2 E) + 2 C D are alive at once, in the modulation or the feed-forward.
      Measured by following every tensor of a forward pass on a CPU.
    - A block takes 12 S D^2 (projections of video tokens) + 4 S D E (feed-forward) + 4 C D^2 (keys and values of the
      context) + 4 S (S + C) D (attention) operations, a multiplication and an addition counted as two. Embedding text,
      image, time and patches, and the output, are added.

    Args:
        sizes: The transformer's configuration.
        layout: The sizes of the video.
        text: Tokens of one text.
        image: Tokens of the conditioning images.
        texts: How many texts a condition is encoded with.
    """
    tokens, context, blocks = layout.tokens, text + image, sizes["num_layers"]
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    per_token = (34 if sizes["added_kv_proj_dim"] is None else 36) * width + 2 * sizes["ffn_dim"]
    block = tokens * per_token + 6 * context * width
    ends = (7 * tokens + 4 * context) * width
    attention = blocks * 4 * tokens * width * (tokens + context)
    keys = 4 * width * (text * width + image * (sizes["added_kv_proj_dim"] or width))
    products = blocks * (12 * tokens * width**2 + 4 * tokens * width * sizes["ffn_dim"] + keys)
    products += 2 * tokens * width * math.prod(sizes["patch_size"]) * (sizes["in_channels"] + sizes["out_channels"])
    products += 2 * text * width * (sizes["text_dim"] + width) + 2 * width * (sizes["freq_dim"] + 7 * width)
    image_dim = sizes["image_dim"] or 0
    if image:
        products += 2 * image * image_dim * (image_dim + width)
    # The channels beside the latents are float32, so that each number counts twice.
    given = (sizes["in_channels"] - layout.latent[0]) * math.prod(layout.latent[1:])
    return {
        "activation_numbers_per_row": blocks * block + ends,
        "checkpointed_numbers_per_row": blocks * tokens * width + block + ends,
        "forward_numbers_per_row": tokens * max(14 * width, 7 * width + 2 * sizes["ffn_dim"]) + 2 * context * width,
        "forward_flops_per_row": float(products + attention),
        "attention_flops_per_row": float(attention),
        "conditioning_numbers": texts * text * sizes["text_dim"] + image * image_dim + 2 * given,
    }
