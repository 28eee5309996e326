"""From leaves to rewards: decoding and scoring in runs that fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from branchtree.assembly import NamedReward
from branchtree.errors import RewardError
from branchtree.protocols import Condition, Media, ModelAdapter, Scores
from branchtree.rollout import chunks
from branchtree.training.timing import Stopwatch


def score_latents(
    model: ModelAdapter,
    rewards: Sequence[NamedReward],
    latents: Tensor,
    conditions: Sequence[Condition],
    rows: int | None,
    watch: Stopwatch,
    keep: int = 0,
) -> tuple[dict[str, Scores], list[Media]]:
    """Decode clean latents (L, *latent) and score sample i against condition i; L leaves, ``rows`` at a time.

    Returns each reward's scores (L,) by label, and the first ``keep`` samples' media in order, on the CPU. Raises
    RewardError if a reward fails or returns something that is not one number per sample.
    """
    media: list[Media] = []
    parts: dict[str, list[Scores]] = {reward.label: [] for reward in rewards}
    for span in chunks(len(latents), rows):
        with watch.phase("decode"):
            decoded = model.decode(latents[span.start : span.stop])
        with watch.phase("reward"):
            for reward in rewards:
                parts[reward.label].append(checked_scores(reward, decoded, conditions[span.start : span.stop]))
        if span.start < keep:
            media.append(_on_cpu(decoded[: keep - span.start]))
    with watch.phase("decode"):
        model.release_frozen()
    return {label: joined(scores) for label, scores in parts.items()}, media


def checked_scores(reward: NamedReward, media: Media, conditions: Sequence[Condition]) -> Scores:
    """One reward's scores on the CPU; a value that is not finite is marked invalid."""
    try:
        with torch.no_grad():
            scores = reward.adapter.score(media, conditions)
    except Exception as error:
        # A reward is a plug-in and can raise anything; the run must end with a message that names it.
        raise RewardError(f"reward '{reward.label}' failed: {type(error).__name__}: {error}") from error
    if scores.values.shape != (len(media),) or scores.valid.shape != (len(media),):
        raise RewardError(
            f"reward '{reward.label}' must give {len(media)} values and valid flags for as many samples, "
            f"not {tuple(scores.values.shape)} and {tuple(scores.valid.shape)}"
        )
    values = scores.values.detach().float().cpu()
    return Scores(values, scores.valid.detach().cpu() & values.isfinite())


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of consecutive samples as one."""
    return Scores(torch.cat([part.values for part in parts]), torch.cat([part.valid for part in parts]))


def require_some_valid(accelerator: Any, scores: Mapping[str, Scores]) -> None:
    """Raise RewardError if a reward is valid on no sample of any process: something is broken."""
    from accelerate.utils import gather_object

    shares: list[dict[str, bool]] = gather_object([{label: bool(score.valid.any()) for label, score in scores.items()}])
    for label in scores:
        if not any(share[label] for share in shares):
            raise RewardError(
                f"reward '{label}' gave no valid value on any sample of an iteration (all NaN, infinite, or marked "
                "invalid); check its inputs with a few samples before training"
            )


def _on_cpu(media: Media) -> Media:
    if media.images is None:
        return Media(videos=media.pixels.cpu(), fps=media.fps)
    return Media(images=media.pixels.cpu())
