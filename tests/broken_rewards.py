"""A distribution of rewards: three that keep every promise, and others that each break one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import DataError
from branchtree.plugins import Condition, Media, RewardCard
from branchtree.plugins.hookspecs import hookimpl


class Config(BaseModel, extra="forbid"):
    scale: float = 1.0


class Plain:
    """Brightness and the length of the prompt."""

    modalities = frozenset({"image"})

    def __init__(self, config: Config) -> None:
        self.config = config
        self.weight: Tensor | None = None

    def load(self, device: torch.device) -> None:
        self.weight = torch.tensor(self.config.scale, device=device)

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.require(media, conditions)
        if self.weight is None:
            raise RuntimeError("not loaded: call load(device) first")
        return self.judge(media, conditions)

    def require(self, media: Media, conditions: Sequence[Condition]) -> None:
        if media.modality not in self.modalities:
            raise ValueError(f"no {media.modality}")
        if len(media) != len(conditions):
            raise ValueError(f"{len(media)} samples, {len(conditions)} conditions")

    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        values = self.weight * media.pixels.flatten(1).mean(dim=1)
        valid = values.isfinite()
        values = values + torch.tensor([len(condition.prompt) / 100 for condition in conditions])
        bad = [int(row) for row in (~valid).nonzero()]
        return Scores(values, valid, raw=2 * values, reasons=dict.fromkeys(bad, "not finite"))


class PlainVideos(Plain):
    modalities = frozenset({"image", "video"})


class Compares(Plain):
    """How far a sample's brightness is from that of its prompt's valid samples."""

    groupwise = True

    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        bright = media.pixels.flatten(1).mean(dim=1)
        return Scores((bright - bright[bright.isfinite()].mean()).abs(), bright.isfinite())


class NeedsNothing(Plain):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.load(torch.device("cpu"))


class Leaves(Plain):
    def release(self) -> None:
        pass

    def fingerprint(self) -> str:
        return "the same"


class SaysMoreLater(Plain):
    def load(self, device: torch.device) -> None:
        super().load(device)
        self.modalities = frozenset({"image", "video"})


class BreaksUnloaded(Plain):
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.require(media, conditions)
        assert self.weight is not None
        return self.judge(media, conditions)


class GuessesUnloaded(Plain):
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.require(media, conditions)
        self.weight, weight = torch.tensor(0.5) if self.weight is None else self.weight, self.weight
        scores = self.judge(media, conditions)
        self.weight = weight
        return scores


class GivesColumns(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values[:, None])


class GivesDoubles(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values.double())


class FlagsByNumbers(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, valid=scores.valid.float())


class KeepsGradients(Plain):
    def load(self, device: torch.device) -> None:
        super().load(device)
        self.weight.requires_grad_(True)


class TakesVideosToo(Plain):
    def require(self, media: Media, conditions: Sequence[Condition]) -> None:
        if len(media) != len(conditions):
            raise ValueError("count")


class SpreadsOnePrompt(Plain):
    def require(self, media: Media, conditions: Sequence[Condition]) -> None:
        if media.modality != "image" or len(conditions) not in {1, len(media)}:
            raise ValueError("count")


class CutsToBytes(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        return super().judge(Media(images=media.pixels.nan_to_num(0, 1, 0).clamp(0, 1)), conditions)


class SpoilsTheBatch(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        finite = bool(media.pixels.isfinite().all())
        scores = super().judge(media, conditions)
        return scores if finite else replace(scores, valid=torch.zeros_like(scores.valid))


class MeasuresAgainstTheBatch(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values - 0.01 * scores.values[scores.valid].mean())


class TakesTheFirstPrompt(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        return super().judge(media, [conditions[0]] * len(conditions))


class LosesTheOrder(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values.sort().values)


class PrefersTheFirst(Compares):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values + 0.01 * torch.arange(len(scores)))


class Drifts(Plain):
    calls = 0

    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.calls += 1
        scores = super().judge(media, conditions)
        return replace(scores, values=scores.values + 1e-6 * self.calls)


class WritesIntoSamples(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        scores = super().judge(media, conditions)
        media.pixels.mul_(0.5)
        return scores


class ForgetsOnRelease(Leaves):
    def release(self) -> None:
        self.weight = torch.tensor(0.5)


class SeedsTorch(Plain):
    def load(self, device: torch.device) -> None:
        torch.manual_seed(0)
        super().load(device)


class DrawsFromNumpy(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        np.random.rand()
        return super().judge(media, conditions)


class DrawsFromPython(Plain):
    def judge(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        random.random()
        return super().judge(media, conditions)


class SignsByItsAddress(Leaves):
    def fingerprint(self) -> str:
        return str(id(self))


class RefusesItsOwn(Plain):
    def check(self, condition: Condition) -> None:
        raise DataError(f"{condition}: not to my taste")


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    card = RewardCard(frozenset({"image"}), "none", 0, "Apache-2.0", False, "made for the tests")
    for build in (PlainVideos, NeedsNothing, Compares, Leaves, *_broken(Plain)):
        register(build.__name__, build=build, config=Config, summary="For tests.", card=None)
    register("MisreadCard", build=PlainVideos, config=Config, summary="For tests.", card=card)


def _broken(base: type[Plain]) -> list[type[Plain]]:
    sound = {"PlainVideos", "NeedsNothing", "Compares", "Leaves"}
    found = [build for build in base.__subclasses__() if build.__name__ not in sound]
    return found + [build for one in (Compares, Leaves) if base is Plain for build in one.__subclasses__()]
