"""What a finished run is taken elsewhere as: a LoRA under other programs' names, a model card, a model on the hub."""

from typing import Literal

Format = Literal["diffusers", "kohya", "comfyui"]
"""How a LoRA's layers are named in a file."""
