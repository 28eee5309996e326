"""What is particular to families of pipelines, one line each; a pipeline that is not listed is driven as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from branchtree.errors import ModelError
from branchtree_adapters.any_pipeline.recording import Leaf, Rules


@dataclass(frozen=True)
class Refusal:
    """A setting under which a prediction depends on the number of the step, which a node of a tree does not have."""

    applies: Callable[[Any, Mapping[str, Any]], bool]  # of a pipeline and the keywords of its call
    remedy: str


@dataclass(frozen=True)
class Family:
    """What a pipeline's own call does not say."""

    rules: Rules = field(default_factory=Rules)
    decodes_singly: bool = False  # its decoder takes one sample at a time
    copies: str | None = None  # the keyword that makes several rows where it takes one prompt alone
    denoised: Leaf | None = None  # what a method gives that is zero where its state is given, not denoised
    refused: tuple[Refusal, ...] = ()
    untrainable: str | None = None  # why none of its models can be trained

    def check_class(self, name: str) -> None:
        """Raise ModelError if no model of the pipeline's class can be trained."""
        if self.untrainable is not None:
            raise ModelError(f"{name} cannot be trained: {self.untrainable}.")

    def check(self, pipeline: Any, call: Mapping[str, Any]) -> None:
        """Raise ModelError if a setting is refused, or if the pipeline starts from an image's noised latents."""
        takes = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
        strength = call.get("strength", takes["strength"].default) if "strength" in takes else 1
        if isinstance(strength, int | float) and strength < 1:
            raise ModelError(
                f"{type(pipeline).__name__} starts from an image with noise of its strength, and only pipelines that "
                "start from noise are trained; take the family's pipeline from text."
            )
        for refusal in (*GENERAL, *self.refused):
            if refusal.applies(pipeline, call):
                raise ModelError(
                    f"{type(pipeline).__name__} would predict something else at another step of the same noise level: "
                    f"{refusal.remedy}"
                )


def _guider_changes(pipeline: Any, call: Mapping[str, Any]) -> bool:
    guider = getattr(pipeline, "guider", None)
    if guider is None:
        return False
    whole = getattr(guider, "_start", 0.0) == 0.0 and getattr(guider, "_stop", 1.0) == 1.0
    return type(guider).__name__ != "ClassifierFreeGuidance" or not whole


def _mean_flow(pipeline: Any, call: Mapping[str, Any]) -> bool:
    return bool(pipeline.transformer.config.get("use_meanflow", False))


def _truncates_by_step(pipeline: Any, call: Mapping[str, Any]) -> bool:
    return float(call.get("cfg_trunc_ratio", 1.0)) < 1.0


def _skips_layers(pipeline: Any, call: Mapping[str, Any]) -> bool:
    return call.get("skip_guidance_layers") is not None


def _has_guidance_schedule(pipeline: Any, call: Mapping[str, Any]) -> bool:
    return call.get("guidance_schedule", "the default") is not None or call.get("guidance_scale") is None


def _has_dynamic_guidance(pipeline: Any, call: Mapping[str, Any]) -> bool:
    return bool(call.get("use_dynamic_cfg", False))


GENERAL = (
    Refusal(_guider_changes, "its guider must be ClassifierFreeGuidance with start 0 and stop 1"),
    Refusal(lambda pipeline, call: call.get("callback_on_step_end") is not None, "leave callback_on_step_end out"),
)
"""What is refused of any pipeline."""

MEAN_FLOW = Refusal(_mean_flow, "a model with use_meanflow also reads the following step's time, and cannot be trained")
DYNAMIC = Refusal(_has_dynamic_guidance, "set use_dynamic_cfg to false")
QWEN_TOKENS = Rules(masked={"encode_prompt": (0, 1)})
ONE_PROMPT = "num_images_per_prompt"

FAMILIES: dict[str, Family] = {
    "CogVideoXImageToVideoPipeline": Family(refused=(DYNAMIC,)),
    "CogVideoXPipeline": Family(refused=(DYNAMIC,)),
    "GlmImagePipeline": Family(
        untrainable="its encoder draws an image's tokens at random, and prompts of a batch change each other"
    ),
    "HiDreamImagePipeline": Family(
        untrainable="its experts are computed without gradients unless the whole model is in training mode, in which "
        "it gives something else"
    ),
    "HunyuanImagePipeline": Family(refused=(MEAN_FLOW,)),
    "HunyuanVideo15ImageToVideoPipeline": Family(decodes_singly=True, refused=(MEAN_FLOW,)),
    "HunyuanVideo15Pipeline": Family(decodes_singly=True),
    "Ideogram4Pipeline": Family(
        refused=(Refusal(_has_guidance_schedule, "set guidance_schedule to null, and guidance_scale to a number"),)
    ),
    "Lumina2Pipeline": Family(refused=(Refusal(_truncates_by_step, "set cfg_trunc_ratio to 1.0"),)),
    "QwenImageEditPlusPipeline": Family(copies=ONE_PROMPT, rules=QWEN_TOKENS),
    "QwenImagePipeline": Family(rules=QWEN_TOKENS),
    "StableDiffusion3Pipeline": Family(refused=(Refusal(_skips_layers, "leave skip_guidance_layers out"),)),
    "WanImageToVideoPipeline": Family(
        copies="num_videos_per_prompt",  # for its image encodings are repeated for each prompt
        denoised=("prepare_latents", 0, 2),
        rules=Rules(by_rows=frozenset({("encode_image", 0, 0)})),
    ),
}
"""By the name of the pipeline's class."""

PLAIN = Family()


def family_of(pipeline: type) -> Family:
    """Return the family of a pipeline's class."""
    return FAMILIES.get(pipeline.__name__, PLAIN)
