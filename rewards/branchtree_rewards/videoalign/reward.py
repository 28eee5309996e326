"""The `videoalign` reward: motion quality, visual quality and text alignment of videos, by VideoAlign's VideoReward.

VideoReward (arXiv 2501.13918) is Qwen2-VL-2B with low-rank weights and a linear head, trained on human preferences. The
repository was published as KwaiVGI/VideoReward, which is now KlingTeam/VideoReward; the code is KwaiVGI/VideoAlign.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.qwen2vl.backbone import (
    backbone_skeleton,
    locate_base,
    precision,
    read_architecture,
    round_frequencies,
)
from branchtree_rewards.qwen2vl.patches import Patches
from branchtree_rewards.qwen2vl.questions import Questions, open_tokenizer
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.frame_rates import ClipFps, NoPlainFps, SampleFps
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.samples import unreadable, unreadable_or_empty
from branchtree_rewards.shared.source import WeightsSource, locate_weights
from branchtree_rewards.shared.weights import build_pretrained, read_state_dict
from branchtree_rewards.small.videoalign import write_small_videoalign
from branchtree_rewards.videoalign.frames import frame_indices, frame_size, patches
from branchtree_rewards.videoalign.network import VideoAlignNetwork, reward_weights
from branchtree_rewards.videoalign.settings import DIMENSIONS, VideoAlignSettings, read_settings
from branchtree_rewards.videoalign.text import question_form

BASE = "Qwen/Qwen2-VL-2B-Instruct"
PUBLISHED_STEP = 11352


def dimensions(measure: str) -> tuple[str, ...]:
    """Return the dimensions that a measure adds up. Raises ValueError for one that names none, or one twice."""
    names = DIMENSIONS if measure == "overall" else tuple(name.strip() for name in measure.split("+"))
    if not set(names) <= set(DIMENSIONS) or len(set(names)) < len(names):
        raise ValueError(f"'{measure}' is no measure; write MQ, VQ, TA, a sum such as VQ+MQ, or overall for all three")
    return names


class VideoAlignConfig(NoPlainFps, ModelRewardConfig, frozen=True):
    """Settings of the `videoalign` reward.

    Attributes:
        path: A hub id, a folder that holds `model_config.json` and `checkpoint-*`, or "random:small".
        checkpoint: Which step's checkpoint; by default the highest of a folder, and 11352 of a hub id.
        base: The model that was fine-tuned, a hub id or a folder. Its `config.json` alone is read, unless a checkpoint
            folder brings its own; and its tokenizer, if the checkpoint has none.
        measure: "MQ" (motion quality), "VQ" (visual quality), "TA" (text alignment), a sum of them such as "VQ+MQ", or
            "overall" for the sum of all three. Each is normalised before it is added.
        clip_fps: Frames per second at which the videos play; by default what the media say.
        sample_fps: Frames per second that the model is shown, which the publisher's code calls `fps`; by default the
            rate that the checkpoint was trained with, 2 for the published one.
        dtype: Precision of the backbone, "bfloat16" or "float32". "auto" is bfloat16, as the publisher runs it, and
            float32 on a CPU. The head is in float32 always.
        batch: Videos sent through the model at a time.
    """

    path: PathOrName = "KlingTeam/VideoReward"
    checkpoint: int | None = pydantic.Field(default=None, ge=0, lt=2**31)
    base: PathOrName = BASE
    measure: Annotated[str, pydantic.AfterValidator(lambda measure: dimensions(measure) and measure)] = "MQ"
    clip_fps: ClipFps = None
    sample_fps: SampleFps = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    batch: int = pydantic.Field(default=2, ge=1, le=10_000)


class VideoAlign(ModelReward[VideoAlignConfig]):
    """Scores videos by VideoReward, normalised with the publisher's mean and standard deviation."""

    name = "videoalign"
    modalities = frozenset({"video"})
    _dtype: torch.dtype
    _settings: VideoAlignSettings
    _questions: Questions

    def __init__(self, config: VideoAlignConfig) -> None:
        super().__init__(config)
        # Each score is read before the prompt in the question, but that of text alignment.
        self.reads_prompt = "TA" in dimensions(config.measure)

    def load(self, device: torch.device) -> None:
        """Load the model and put it on ``device``; see `ModelReward.load`. Raises RewardError."""
        self._dtype = precision(self._config.dtype, device)
        super().load(device)

    def _open(self) -> Opened:
        from transformers import Qwen2VLModel

        config = self._config
        source = locate_weights(config.path, config.revision, write_small_videoalign)
        if source.only is not None:
            needed = "give the folder with model_config.json and checkpoint-*"
            raise RewardError(f"path '{config.path}' is a file; {needed}")
        base = locate_base(config.base, write_small_videoalign)
        step = f"checkpoint-{config.checkpoint if config.checkpoint is not None else _latest(source)}"
        settings = self._sampled(read_settings(source.find("model_config.json")))
        file = _weights_file(source, step)
        weights = reward_weights(read_state_dict(file), settings.lora, self._dtype, str(file))
        architecture = read_architecture(source, base, weights.vocabulary)
        form = question_form()
        questions = Questions(form, open_tokenizer(source, f"{step}/tokenizer/", base, form), architecture)
        backbone = build_pretrained(Qwen2VLModel, architecture, weights.backbone, str(file), self._dtype)
        if self._dtype == torch.bfloat16:
            round_frequencies(backbone)
        self._settings, self._questions = settings, questions
        return Opened(VideoAlignNetwork(backbone, weights.head, questions.reward_ids), {"model.pth": file})

    def _sampled(self, settings: VideoAlignSettings) -> VideoAlignSettings:
        """Return the checkpoint's settings with the rate of sampling that is asked for."""
        if self._config.sample_fps is None:
            return settings
        if settings.sampling.frames is not None:
            raise RewardError(
                f"sample_fps is {self._config.sample_fps:g}, but this checkpoint is shown "
                f"{settings.sampling.frames} frames of every clip, whatever their rate; remove it"
            )
        return replace(settings, sampling=replace(settings.sampling, fps=self._config.sample_fps))

    def fingerprint(self) -> str:
        """Return a digest of the weights and of all settings that change a score, of `model_config.json` too."""
        return hashlib.sha256(f"{super().fingerprint()} {self._settings} {self._dtype}".encode()).hexdigest()

    def _skeleton(self) -> Skeleton:
        config = self._config
        return backbone_skeleton(config.path, config.base, BASE, config.dtype)

    def _shape_flaw(self, media: Media) -> str | None:
        frames, height, width = (media.pixels.shape[axis] for axis in (1, -2, -1))
        try:
            self._chosen_frames(frames, media.fps)
            frame_size(height, width, self._settings.sampling.max_pixels)
        except ValueError as error:
            return str(error)
        return None

    def _prompt_flaw(self, prompt: str) -> str | None:
        flaw = unreadable_or_empty(prompt) if self.reads_prompt else unreadable(prompt)
        return flaw or self._questions.flaw(prompt)

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        looks = self._look(media.pixels, media.fps)
        pairs = zip(conditions, looks, strict=True)
        rows = [self._questions.encode(condition.prompt, look.tokens) for condition, look in pairs]
        scores = network(*self._questions.batch(rows, media.pixels.device), looks)
        mean, std = scores.new_tensor(self._settings.mean), scores.new_tensor(self._settings.std)
        normalised = dict(zip(DIMENSIONS, ((scores - mean) / std).unbind(1), strict=True))
        unnormalised = {f"{name}_unnormalised": scores[:, column] for column, name in enumerate(DIMENSIONS)}
        chosen = [normalised[name] for name in dimensions(self._config.measure)]
        return Measured(torch.stack(chosen).sum(0), {**normalised, **unnormalised})

    def _look(self, videos: Tensor, media_fps: float | None) -> list[Patches]:
        """Return what the model sees of videos (B, F, C, H, W)."""
        chosen = self._chosen_frames(videos.shape[1], media_fps)
        return [patches(video[chosen], self._settings.sampling.max_pixels) for video in videos]

    def _chosen_frames(self, total: int, media_fps: float | None) -> list[int]:
        """Return the frames that the model is shown. Raises ValueError for too few, or an unknown frame rate."""
        fps = self._config.clip_fps or media_fps
        if fps is None:
            raise ValueError("the frame rate of the videos is not known, and the score depends on it; set clip_fps")
        return frame_indices(total, fps, self._settings.sampling)


def _latest(source: WeightsSource) -> int:
    """Return the step of the highest `checkpoint-*`; on the hub, the published one. Raises RewardError without any."""
    if source.folder is None:
        return PUBLISHED_STEP
    steps = [path.name.removeprefix("checkpoint-") for path in source.folder.glob("checkpoint-*") if path.is_dir()]
    numbers = [int(step) for step in steps if step.isdecimal()]
    if not numbers:
        raise RewardError(f"'{source.name}' holds no folder checkpoint-*, with a step for the star")
    return max(numbers)


def _weights_file(source: WeightsSource, step: str) -> Path:
    if (file := source.maybe(f"{step}/model.pth")) is not None:
        return file
    if source.maybe(f"{step}/adapter_model.safetensors") is not None:
        raise RewardError(
            f"'{source.name}' holds low-rank weights alone in {step}; this reward reads a whole state dict, model.pth"
        )
    raise RewardError(f"'{source.name}' holds no '{step}/model.pth'; set 'checkpoint' to a step that is there")


register_rewards = reward_hook((VideoAlign, VideoAlignConfig))
