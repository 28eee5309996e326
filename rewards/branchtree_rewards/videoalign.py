"""The `videoalign` reward: motion quality, visual quality and text alignment of videos, by VideoAlign's VideoReward.

VideoReward (arXiv 2501.13918) is Qwen2-VL-2B with low-rank weights and a linear head, trained on human preferences. The
repository was published as KwaiVGI/VideoReward, which is now KlingTeam/VideoReward; the code is KwaiVGI/VideoAlign.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree.hookspecs import hookimpl
from branchtree.paths import PathOrName
from branchtree.protocols import Condition, Media, RewardCard
from branchtree_rewards._footprints import QWEN2_VL_2B, Skeleton, build_qwen2_vl, settings_file, skeleton
from branchtree_rewards._model_reward import Measured, ModelReward, ModelRewardConfig, Opened
from branchtree_rewards._small_videoalign import write_small
from branchtree_rewards._source import Source, locate
from branchtree_rewards._videoalign_frames import Patches, frame_indices, patches
from branchtree_rewards._videoalign_network import VideoAlignNetwork
from branchtree_rewards._videoalign_settings import DIMENSIONS, Settings, read_settings
from branchtree_rewards._videoalign_text import Questions, open_tokenizer
from branchtree_rewards._videoalign_weights import reward_weights
from branchtree_rewards._weights import build_pretrained, read_weights, state_dict

BASE = "Qwen/Qwen2-VL-2B-Instruct"
PUBLISHED_STEP = 11352


def dimensions(measure: str) -> tuple[str, ...]:
    """The dimensions that a measure adds up. Raises ValueError for one that names none, or one twice."""
    names = DIMENSIONS if measure == "overall" else tuple(part.strip() for part in measure.split("+"))
    if not set(names) <= set(DIMENSIONS) or len(set(names)) < len(names):
        raise ValueError(f"'{measure}' is no measure; write MQ, VQ, TA, a sum such as VQ+MQ, or overall for all three")
    return names


def _known(measure: str) -> str:
    dimensions(measure)
    return measure


class VideoAlignConfig(ModelRewardConfig, frozen=True):
    """Settings of the `videoalign` reward.

    Attributes:
        path: A hub id, a folder that holds `model_config.json` and `checkpoint-*`, or "random:small".
        checkpoint: Which step's checkpoint; by default the highest of a folder, and 11352 of a hub id.
        base: The model that was fine-tuned, a hub id or a folder. Its `config.json` alone is read, unless a checkpoint
            folder brings its own; and its tokenizer, if the checkpoint has none.
        measure: "MQ" (motion quality), "VQ" (visual quality), "TA" (text alignment), a sum of them such as "VQ+MQ", or
            "overall" for the sum of all three. Each is normalised before it is added.
        fps: Frames per second at which the videos play; by default what the media say.
        dtype: Of the backbone, "bfloat16" or "float32". "auto" is bfloat16, as the publisher runs it, and float32 on a
            CPU. The head is in float32 always.
        batch: Videos sent through the model at a time.
    """

    path: PathOrName = "KlingTeam/VideoReward"
    checkpoint: int | None = pydantic.Field(default=None, ge=0, lt=2**31)
    base: PathOrName = BASE
    measure: Annotated[str, pydantic.AfterValidator(_known)] = "MQ"
    fps: float | None = pydantic.Field(default=None, ge=0.1, le=1000)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    batch: int = pydantic.Field(default=2, ge=1, le=10_000)


class VideoAlign(ModelReward[VideoAlignConfig]):
    """Scores videos by VideoReward, normalised with the publisher's mean and standard deviation."""

    modalities = frozenset({"video"})
    _dtype: torch.dtype
    _settings: Settings
    _questions: Questions

    def load(self, device: torch.device) -> None:
        """Load the model and put it on ``device``; see `ModelReward.load`. Raises RewardError."""
        on_cpu = "float32" if device.type == "cpu" else "bfloat16"
        self._dtype = getattr(torch, on_cpu if self._config.dtype == "auto" else self._config.dtype)
        super().load(device)

    def _open(self) -> Opened:
        config = self._config
        source = locate(config.path, config.revision, write_small)
        if source.only is not None:
            raise RewardError(
                f"path '{config.path}' is a file; give the folder with model_config.json and checkpoint-*"
            )
        base = locate(config.base, None, _no_small_base)
        step = f"checkpoint-{config.checkpoint if config.checkpoint is not None else _latest(source)}"
        settings = read_settings(source.find("model_config.json"))
        file = _weights_file(source, step)
        weights = reward_weights(state_dict(read_weights(file), file), settings.lora, self._dtype, str(file))
        architecture = _architecture(source, base, weights.vocabulary)
        questions = Questions(
            open_tokenizer(source, f"{step}/tokenizer", base), weights.vocabulary, architecture.video_token_id
        )
        backbone = build_pretrained(_backbone(), architecture, weights.backbone, str(file), self._dtype)
        self._settings, self._questions = settings, questions
        return Opened(VideoAlignNetwork(backbone, weights.head, questions.reward_ids), {"model.pth": file})

    def fingerprint(self) -> str:
        """A digest of the weights and of all settings that change a score, those of `model_config.json` included."""
        return hashlib.sha256(f"{super().fingerprint()} {self._settings} {self._dtype}".encode()).hexdigest()

    def _skeleton(self) -> Skeleton:
        config = self._config
        own = settings_file(config.path, None, "config.json")
        path = config.path if own else config.base
        found = skeleton(build_qwen2_vl, path, None, (BASE, QWEN2_VL_2B))
        return replace(found, number_bytes=4 if config.dtype == "float32" else 2)

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        reasons: dict[int, str] = {}
        for row, condition in enumerate(conditions):
            if token := self._questions.injected(condition.prompt):
                reasons[row] = f"the prompt holds the special token {token}, which would break the model's question"
        videos = media.pixels
        try:
            looks = self._look(videos, media.fps)
        except ValueError as error:
            reasons, looks = dict.fromkeys(range(len(media)), str(error)), []
        scores = videos.new_full((len(media), len(DIMENSIONS)), torch.nan)
        if kept := [row for row in range(len(media)) if row not in reasons]:
            rows = [self._questions.encode(conditions[row].prompt, looks[row].tokens) for row in kept]
            ids, mask = self._questions.batch(rows, videos.device)
            scores[kept] = network(ids, mask, [looks[row] for row in kept])
        return self._measured(scores, reasons)

    def _look(self, videos: Tensor, media_fps: float | None) -> list[Patches]:
        """What the model sees of videos (B, F, C, H, W). Raises ValueError if it cannot be shown them."""
        fps = self._config.fps or media_fps
        if fps is None:
            raise ValueError("the frame rate of the videos is not known, and the score depends on it; set fps")
        sampling = self._settings.sampling
        chosen = frame_indices(videos.shape[1], fps, sampling)
        return [patches(video[chosen], sampling.max_pixels) for video in videos]

    def _measured(self, scores: Tensor, reasons: dict[int, str]) -> Measured:
        mean, std = scores.new_tensor(self._settings.mean), scores.new_tensor(self._settings.std)
        normalised = dict(zip(DIMENSIONS, ((scores - mean) / std).unbind(1), strict=True))
        unnormalised = {f"{name}_unnormalised": scores[:, place] for place, name in enumerate(DIMENSIONS)}
        chosen = [normalised[name] for name in dimensions(self._config.measure)]
        return Measured(torch.stack(chosen).sum(0), {**normalised, **unnormalised}, reasons)


def _backbone() -> Any:
    from transformers import Qwen2VLModel

    return Qwen2VLModel


def _no_small_base(folder: Path) -> None:
    raise RewardError("base 'random:small' is no model; only 'path' can be random, and then brings its own config.json")


def _latest(source: Source) -> int:
    """The step of the highest `checkpoint-*`; on the hub, the published one. Raises RewardError if there is none."""
    if source.folder is None:
        return PUBLISHED_STEP
    steps = [path.name.removeprefix("checkpoint-") for path in source.folder.glob("checkpoint-*") if path.is_dir()]
    numbers = [int(step) for step in steps if step.isdecimal()]
    if not numbers:
        raise RewardError(f"'{source.name}' holds no folder checkpoint-*, with a step for the star")
    return max(numbers)


def _weights_file(source: Source, step: str) -> Path:
    name = f"{step}/model.pth"
    if (file := source.maybe(name)) is not None:
        return file
    if source.maybe(f"{step}/adapter_model.safetensors") is not None:
        raise RewardError(
            f"'{source.name}' holds low-rank weights alone in {step}; this reward reads a whole state dict, model.pth"
        )
    raise RewardError(f"'{source.name}' holds no '{name}'; set 'checkpoint' to a step that is there")


def _architecture(source: Source, base: Source, vocabulary: int) -> Any:
    """The configuration of Qwen2-VL with the checkpoint's vocabulary, the reward tokens included."""
    from transformers import Qwen2VLConfig

    own = source.maybe("config.json") if source.folder is not None else None
    file = own or base.find("config.json")
    try:
        architecture = Qwen2VLConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except Exception as error:  # the configuration's own checks raise many kinds
        raise RewardError(f"'{file}' is no configuration of Qwen2-VL ({type(error).__name__}: {error})") from error
    architecture.text_config.vocab_size = vocabulary
    return architecture


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `videoalign` reward to the registry."""
    register(
        "videoalign",
        build=VideoAlign,
        config=VideoAlignConfig,
        summary="Motion quality, visual quality or text alignment of a video, by VideoAlign's VideoReward.",
        card=RewardCard(
            modalities=frozenset({"video"}),
            checkpoint="KlingTeam/VideoReward: checkpoint-11352/model.pth",
            size=5_031_072_529,
            licence="Apache-2.0, by a public copy of its model card",
            non_commercial=False,
            source="arXiv 2501.13918; github.com/KwaiVGI/VideoAlign",
        ),
    )
