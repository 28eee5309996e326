"""A diffusers pipeline of configuration files alone: phantoms for models, and tokenizers even without their files.

Its figures depend on the tokenizer by the length alone that the pipeline pads prompts to.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch

from branchtree_adapters.any_pipeline.byte_tokenizer import CHAT, SPECIAL, byte_tokenizer
from branchtree_adapters.any_pipeline.phantom import phantom
from branchtree_adapters.pipeline.blueprint import Blueprint
from branchtree_adapters.pipeline.components import (
    INDEX,
    Component,
    component_class,
    is_component,
    is_present,
    left_out,
    load_component,
    wanted_classes,
)

SCHEDULER = "scheduler/scheduler_config.json"
"""A file that the blueprint is to hold; the defaults of the scheduler's class stand for one that it does not."""
MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Tokens that mark images in a prompt, by what an encoder's configuration calls their numbers."""
TEXT_LENGTH = 512
"""Tokens that a tokenizer without files takes where nothing says how many its encoder does."""


def unloaded_pipeline(kind: Any, blueprint: Blueprint, folder: Path | None = None) -> Any:
    """Return ``kind``, a diffusers class, with phantoms of the blueprint's components.

    Args:
        kind: The class.
        blueprint: Its configuration files; those of the scheduler and of tokenizers are used if they are there.
        folder: The pipeline's own, from which tokenizers, processors and the like are loaded if they are there.
    """
    index = blueprint.configs.get(INDEX, {})
    components: dict[str, Any] = {name: phantom(partial(blueprint.build, name)) for name in blueprint.classes}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        entry = index.get(name)
        if name in components or name in left_out(kind):
            continue
        if name in index and not is_component(entry):  # a setting
            components[name] = entry
        elif is_present(entry) or (parameter.default is parameter.empty and name not in index):
            wanted = component_class(kind, name, entry, INDEX) if entry else wanted_classes(kind, name)[0]
            components[name] = _without_weights(name, wanted, blueprint, folder, components)
        elif parameter.default is parameter.empty:
            components[name] = None
    return kind(**components, **left_out(kind))


def _without_weights(
    name: str, kind: Any, blueprint: Blueprint, folder: Path | None, components: dict[str, Any]
) -> Any:
    """Return a scheduler, tokenizer or processor: its own, or one that does as well for sizes."""
    from tokenizers.processors import TemplateProcessing

    if folder is not None and (folder / name).is_dir():
        return load_component(Component(name, kind, folder / name), torch.float32)
    if name == "scheduler":
        return kind.from_config(dict(blueprint.configs.get(SCHEDULER, {})))
    if not (name.startswith("tokenizer") or _takes_text(kind)):
        return kind()
    encoder = components.get(name.replace("tokenizer", "text_encoder").replace("processor", "text_encoder"))
    settings = blueprint.configs.get(f"{name}/tokenizer_config.json", {})
    longest = settings.get(
        "model_max_length", getattr(getattr(encoder, "config", None), "max_position_embeddings", TEXT_LENGTH)
    )
    tokenizer = byte_tokenizer(int(min(longest, 2**20)))
    if settings.get("add_bos_token"):
        marks = [(SPECIAL[0], tokenizer.convert_tokens_to_ids(SPECIAL[0]))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=marks)
    return _processor(kind, tokenizer, encoder) if _takes_text(kind) else tokenizer


def _takes_text(kind: Any) -> bool:
    """Whether a class is of processors of images and text."""
    import transformers

    return issubclass(kind, transformers.ProcessorMixin)


def _processor(kind: Any, tokenizer: Any, encoder: Any) -> Any:
    """Return a processor of images and text; ``encoder`` finds images in prompts by this tokenizer's numbers."""
    import transformers

    for name, piece in MARKS.items():
        if hasattr(encoder, "config") and hasattr(encoder.config, name):
            setattr(encoder.config, name, tokenizer.convert_tokens_to_ids(piece))
    return kind(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )
