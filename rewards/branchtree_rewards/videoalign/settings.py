"""Settings of a VideoAlign checkpoint, from its `model_config.json`."""

import math
from dataclasses import dataclass
from pathlib import Path

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree_rewards.shared.source import cause
from branchtree_rewards.videoalign.frames import Sampling

DIMENSIONS = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment; in the order of the model's outputs
# Mean and standard deviation of the publisher's own scores on its validation set, for a file that gives none.
PUBLISHED = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
# What the inputs built here follow; a checkpoint trained otherwise would score something else.
EXPECTED: dict[str, dict[str, object]] = {
    "data_config": {"eval_dim": list(DIMENSIONS), "prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "model_config": {"use_special_tokens": True, "reward_token": "special"},
}


@dataclass(frozen=True)
class Lora:
    """Low-rank weights beside a linear layer: W + scale B A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class VideoAlignSettings:
    """How a checkpoint was trained, and how its scores are normalised."""

    sampling: Sampling
    lora: Lora | None
    mean: tuple[float, ...]  # by dimension
    std: tuple[float, ...]


def read_settings(file: Path) -> VideoAlignSettings:
    """Read `model_config.json`. Raises RewardError for one that is damaged or asks for another kind of input."""
    try:
        content = read_json_object(file, RewardError)
        for section, wanted in EXPECTED.items():
            for key, value in wanted.items():
                if content[section][key] != value:
                    raise RewardError(
                        f"'{file}' has {section}.{key} = {content[section][key]!r}; this reward reads checkpoints "
                        f"trained with {value!r}"
                    )
        data, low_rank, norms = content["data_config"], content["peft_lora_config"], content.get("inference_config")
        frames, lora = data.get("num_frames"), None
        if low_rank["lora_enable"]:
            rank = int(low_rank["lora_r"])
            # Rank-stabilised LoRA divides by the square root of the rank (arXiv 2312.03732).
            lora = Lora(rank, low_rank["lora_alpha"] / (math.sqrt(rank) if low_rank.get("use_rslora") else rank))
        return VideoAlignSettings(
            sampling=Sampling(
                fps=float(data["fps"]),
                max_pixels=int(data["max_frame_pixels"]),
                frames=None if frames is None else int(frames),
            ),
            lora=lora,
            mean=tuple(float(norms[f"{name}_mean"]) if norms else PUBLISHED[name][0] for name in DIMENSIONS),
            std=tuple(float(norms[f"{name}_std"]) if norms else PUBLISHED[name][1] for name in DIMENSIONS),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewardError(
            f"'{file}' is not the model_config.json of a VideoAlign checkpoint ({cause(error)})"
        ) from error
