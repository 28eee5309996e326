"""Samples and encodings that the model itself spoiled: which component gave values that are not finite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from branchtree.core.finite import finite_rows, is_finite
from branchtree.core.scores import Scores
from branchtree.errors import ModelError
from branchtree.plugins.protocols import LocatesWeights, ModelAdapter
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Condition

MARK = "the model's "
REMEDY = "the model is at fault, not the reward: get its files again, or use a wider run.precision"


def describe_fault(model: ModelAdapter, component: str, gave: str) -> str:
    """Say which component gave values that are not finite, and where its weights are."""
    where = f" (weights: {model.weights_of(component)})" if isinstance(model, LocatesWeights) else ""
    return f"{MARK}{component} gave {gave} that are not finite{where}"


def find_faults(model: ModelAdapter, latents: Tensor, samples: Samples) -> dict[int, str]:
    """Return, by row, what spoiled a sample that is not finite after decoding."""
    sound = samples.is_finite()
    if bool(sound.all()):
        return {}
    denoised = finite_rows(latents)
    reasons = {
        True: describe_fault(model, "decoder", "samples"),
        False: describe_fault(model, "denoiser", "latents"),
    }
    return {row: reasons[bool(denoised[row])] for row, good in enumerate(sound.tolist()) if not good}


def mask_faults(scores: Scores, faults: Mapping[int, str]) -> Scores:
    """Mark the scores of spoiled samples as invalid, for that reason, whatever a reward made of them."""
    here = {row: reason for row, reason in faults.items() if row < len(scores)}
    if not here:
        return scores
    valid = scores.valid.clone()
    valid[list(here)] = False
    return replace(scores, valid=valid, reasons={**scores.reasons, **here})


def are_faults(reasons: Collection[str]) -> bool:
    """Return whether all of some reasons for invalid samples are the model's."""
    return bool(reasons) and all(reason.startswith(MARK) for reason in reasons)


def require_finite_encoding(model: ModelAdapter, condition: Condition, row: Mapping[str, Tensor]) -> None:
    """Raise ModelError if a condition's encoding holds values that are not finite."""
    for name, value in row.items():
        if not is_finite(value):
            fault = describe_fault(model, "encoders", f"numbers in '{name}'")
            raise ModelError(f"{condition}: {fault}; get the model's files again, or use a wider run.precision")
