"""Checks of a batch: samples that cannot be scored are masked, each with a reason, and no model sees them."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.files.reading import half_character
from branchtree.plugins import Condition, Media, Samples

MAX_ASPECT = 200  # Qwen's own limit; past it, resizing makes sides of no pixel at all, or pictures of gigabytes
NOT_FINITE = "pixels are not finite"
NO_PIXELS = "there are no pixels"


def spans(length: int, size: int) -> list[slice]:
    """Return consecutive slices of at most ``size`` that cover ``length``."""
    return [slice(start, start + size) for start in range(0, length, size)]


def with_pixels(media: Media, pixels: Tensor) -> Media:
    """Return media of the same kind and frame rate that hold ``pixels``."""
    return Media(images=pixels) if media.modality == "image" else Media(videos=pixels, fps=media.fps)


def check_batch(media: Samples, conditions: Sequence[Condition], modalities: Collection[str]) -> None:
    """Raise ValueError for what a program got wrong: another modality, other axes, or not one condition a sample."""
    if media.modality not in modalities:
        raise ValueError(f"this reward scores {' and '.join(sorted(modalities))}, not {media.modality}")
    axes = "(B, C, H, W)" if media.modality == "image" else "(B, F, C, H, W)"
    if isinstance(media, Media) and media.pixels.ndim != len(axes.split(",")):
        raise ValueError(f"{media.modality}s must be {axes}, not {tuple(media.pixels.shape)}")
    if len(media) != len(conditions):
        raise ValueError(f"{len(media)} samples came with {len(conditions)} conditions; each needs its own")


def find_flaws(
    media: Media,
    conditions: Sequence[Condition],
    shape_flaw: Callable[[Media], str | None],
    condition_flaw: Callable[[Condition], str | None],
) -> dict[int, str]:
    """Return why samples cannot be scored, by row.

    Args:
        media: B samples of one shape.
        conditions: B conditions.
        shape_flaw: Says why no sample of this shape, length and frame rate can be scored.
        condition_flaw: Says why no sample of a condition can be scored, such as that its prompt cannot be read.
    """
    flaw = NO_PIXELS if 0 in media.pixels.shape[1:] else shape_flaw(media)
    if flaw:
        return dict.fromkeys(range(len(media)), flaw)
    finite = media.pixels.flatten(1).isfinite().all(dim=1).tolist()
    reasons = {row: NOT_FINITE for row, good in enumerate(finite) if not good}
    for row, condition in enumerate(conditions):
        if row not in reasons and (flaw := condition_flaw(condition)):
            reasons[row] = flaw
    return reasons


def score_rest(
    media: Media,
    conditions: Sequence[Condition],
    reasons: Mapping[int, str],
    score: Callable[[Media, Sequence[Condition]], Scores],
) -> Scores:
    """Score the samples that no reason speaks against, as if the others were not there, and mark those as not valid.

    Args:
        media: B samples.
        conditions: B conditions.
        reasons: Why samples cannot be scored, by row.
        score: Scores at least one sample.

    Returns:
        Scores (B,), NaN where a reason speaks against a sample.
    """
    rows = [row for row in range(len(media)) if row not in reasons]
    if not rows:
        return invalid_scores(len(media), reasons)
    if not reasons:
        return score(media, conditions)
    scores = score(with_pixels(media, media.pixels[rows]), [conditions[row] for row in rows])

    def spread(figure: Tensor, filler: float) -> Tensor:
        whole = figure.new_full((len(media),), filler)
        whole[rows] = figure
        return whole

    return Scores(
        values=spread(scores.values, torch.nan),
        valid=spread(scores.valid, False),
        raw=None if scores.raw is None else spread(scores.raw, torch.nan),
        details={name: spread(figure, torch.nan) for name, figure in scores.details.items()},
        reasons={**reasons, **{rows[row]: reason for row, reason in scores.reasons.items()}},
    )


def invalid_scores(count: int, reasons: Mapping[int, str]) -> Scores:
    """Return the scores of ``count`` samples of which none is valid, with their reasons by row."""
    return Scores(torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.bool), reasons=dict(reasons))


def elongated(media: Media) -> str | None:
    """Say that pictures are too elongated for any vision encoder, if they are."""
    height, width = media.pixels.shape[-2:]
    if max(height, width) <= MAX_ASPECT * min(height, width):
        return None
    return f"a picture of {width}x{height} is too elongated: one side is more than {MAX_ASPECT} times the other"


def unreadable(prompt: str) -> str | None:
    """Say why a prompt is no text that can be tokenised, if it is none."""
    if "\0" in prompt:
        return "the prompt holds a NUL character"
    half = half_character(prompt)
    return half and f"the prompt holds {half}, which is half of a character"


def unreadable_or_empty(prompt: str) -> str | None:
    """Say why there is nothing to read in a prompt, if there is nothing."""
    return unreadable(prompt) or (None if prompt.strip() else "the prompt is empty")
