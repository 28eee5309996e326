"""The `geneval` reward: whether a picture holds what its prompt names, by GenEval's rules (arXiv 2310.11513).

What a picture must hold is in its condition's metadata; see `check.py`. GenEval finds objects by Mask2Former, which
knows 80 classes and needs mmdetection 2. Here OWLv2 finds them, which takes any class and comes with transformers; so
figures are not comparable with GenEval's.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import nn

from branchtree.errors import DataError
from branchtree.files.paths import PathOrName
from branchtree.files.reading import user_path
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.network import load_clip
from branchtree_rewards.clip.text import CLIP_TOKENIZER, check_end
from branchtree_rewards.geneval.check import COUNTING, SceneCheck, read_check
from branchtree_rewards.geneval.colours import ColourNamer
from branchtree_rewards.geneval.detector import QUERY, Limits, find_objects
from branchtree_rewards.geneval.rules import judge
from branchtree_rewards.shared.footprints import Skeleton, skeleton
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_weights
from branchtree_rewards.shared.tokenizers import own_token
from branchtree_rewards.shared.weights import load_folder
from branchtree_rewards.small.clip import CLIP, write_clip_folder
from branchtree_rewards.small.geneval import CLIP_SEED, write_small_geneval

HUB_ID = "google/owlv2-base-patch16-ensemble"
HUB_CLIP = "openai/clip-vit-large-patch14"


class GenevalConfig(ModelRewardConfig, frozen=True):
    """Settings of the `geneval` reward, further to those of every reward with published weights.

    Attributes:
        path: The OWLv2 that finds objects: a hub id, a folder, or "random:small".
        clip: Hub id or folder of the CLIP that names colours. By default the folder "clip" beside the detector, if
            there is one, and otherwise "openai/clip-vit-large-patch14".
        strict: Whether a picture scores 1 only where all that its condition asks for holds, and 0 otherwise; by default
            the score is the share that holds.
        threshold: The least confidence of an object.
        counting_threshold: The least confidence where the metadata have the tag "counting".
        overlap: How much two boxes of a class may overlap, as intersection over union, before the less sure one is
            dropped; with 1 none is.
        batch: Pictures sent through the detector at a time.
    """

    path: PathOrName = HUB_ID
    clip: PathOrName | None = None
    strict: bool = False
    threshold: float = pydantic.Field(default=0.2, ge=0, lt=1)
    counting_threshold: float = pydantic.Field(default=0.3, ge=0, lt=1)
    overlap: float = pydantic.Field(default=0.5, gt=0, le=1)
    batch: int = pydantic.Field(default=4, ge=1, le=10_000)


class Geneval(ModelReward[GenevalConfig]):
    """Scores the share of what a condition's metadata ask for that each picture holds, from 0 to 1."""

    name = "geneval"
    reads_prompt = False
    _namer: ColourNamer
    _context: int

    def check(self, condition: Condition) -> None:
        """Refuse a condition whose metadata do not say what a picture must hold. Raises DataError."""
        try:
            read_check(condition)
        except ValueError as error:
            raise DataError(f"{condition}: {self.name}: {error}") from None

    def _open(self) -> Opened:
        from transformers import Owlv2ForObjectDetection

        config = self._config
        source = locate_weights(config.path, config.revision, write_small_geneval)
        detector, file = load_folder(Owlv2ForObjectDetection, source)
        self._tokenizer = CLIP_TOKENIZER.choose(source, None, source.location)
        self._context = detector.config.text_config.max_position_embeddings
        check_end(self._tokenizer, detector.config.text_config, source.name, highest=True)
        write_small_clip = partial(write_clip_folder, seed=CLIP_SEED)
        clip_source = locate_weights(_clip_of(config, source.folder), None, write_small_clip)
        clip, clip_file = load_clip(clip_source)
        clip_tokenizer = CLIP_TOKENIZER.choose(clip_source, None, clip_source.location)
        check_end(clip_tokenizer, clip.config.text_config, clip_source.name)
        self._namer = ColourNamer(clip_tokenizer)
        return Opened(nn.ModuleList([detector, clip]), {file.name: file, f"{CLIP}/{clip_file.name}": clip_file})

    def _skeleton(self) -> Skeleton:
        config = self._config
        detector = skeleton(config.path, config.revision, HUB_ID, "AutoModelForZeroShotObjectDetection")
        clip = skeleton(_clip_of(config), None, HUB_CLIP)
        both = {"detector": sum(detector.numbers.values()), "clip": sum(clip.numbers.values())}
        return replace(detector, numbers=both)

    def _condition_flaw(self, condition: Condition) -> str | None:
        try:
            names = read_check(condition).names
        except ValueError as error:
            return str(error)
        return next((f"class '{name}': {flaw}" for name in names if (flaw := self._name_flaw(name))), None)

    def _name_flaw(self, name: str) -> str | None:
        """Say why the detector cannot be asked for a class, if it cannot be."""
        if flaw := own_token(self._tokenizer, name):
            return flaw.replace("the prompt", "the name")
        tokens = len(self._tokenizer(QUERY.format(name), verbose=False)["input_ids"])
        if tokens <= self._context:
            return None
        return f"the name is too long: with the question it has {tokens} tokens, and the detector reads {self._context}"

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        detector, clip = network
        checks = [read_check(condition) for condition in conditions]
        names, limits = [check.names for check in checks], [self._limits(check) for check in checks]
        found = find_objects(detector, self._tokenizer, media.pixels, names, limits)
        shares = []
        for picture, check, objects in zip(to_pil(media.pixels), checks, found, strict=True):
            held = judge(check, objects, partial(self._namer.name, clip, picture))
            shares.append(sum(held) / len(held))
        share = torch.tensor(shares)
        correct = (share == 1).float()
        return Measured(correct if self._config.strict else share, {"share": share, "correct": correct})

    def _limits(self, check: SceneCheck) -> Limits:
        config = self._config
        threshold = config.counting_threshold if check.tag == COUNTING else config.threshold
        return Limits(threshold, config.overlap)


def _clip_of(config: GenevalConfig, folder: Path | None = None) -> str:
    """Return the hub id or folder of the CLIP; ``folder`` holds the detector, by default at ``config.path``."""
    beside = (folder or user_path(config.path)) / CLIP
    return config.clip or (str(beside) if beside.is_dir() else HUB_CLIP)


register_rewards = reward_hook((Geneval, GenevalConfig))
