"""Have the weights diverged? Looked at before they are saved, and when a run fails for whatever reason."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from branchtree.core.noise import Purpose, generator
from branchtree.training.faults import find_faults
from branchtree.training.policy import velocity_function
from branchtree.training.sampling import denoise
from branchtree.training.session import Session
from branchtree.training.sharding import local

EXPLODED = 1e3
"""A sample whose root mean square is more than this many times its noise's is none that a decoder was made for."""


def find_divergence(session: Session, conditioning: Mapping[str, Tensor], together: bool) -> str | None:
    """What shows that the weights have diverged, or None if they make a sample of an encoded prompt.

    With ``together`` all processes call this, and get the same answer. Sharded weights need that.
    """
    weights, sample = _of_weights(session), _of_sample(session, conditioning)
    found = session.lockstep.everyone(weights or sample) if together else [weights or sample]
    return next((problem for problem in found if problem is not None), None)


@torch.no_grad()
def find_fault(session: Session, conditioning: Mapping[str, Tensor]) -> str | None:
    """Return which component of a model that is not trained yet makes no finite sample, or None if all do."""
    sample = _sample(session, conditioning)
    pixels = session.inputs.model.decode(sample.to(session.device)).pixels
    return find_faults(session.inputs.model, sample, pixels.cpu()).get(0)


@torch.no_grad()
def _of_weights(session: Session) -> str | None:
    finite = [local(value).isfinite().all() for value in session.trained.engine.parameters.values()]
    return None if bool(torch.stack(finite).all()) else "they are not all finite"


@torch.no_grad()
def _of_sample(session: Session, conditioning: Mapping[str, Tensor]) -> str | None:
    noise, sample = _noise(session), _sample(session, conditioning)
    if not bool(sample.isfinite().all()):
        return "they make samples that are not finite"
    if _size(sample) > EXPLODED * _size(noise):
        return f"they make samples of {_size(sample):.3g} on average, where the noise is of {_size(noise):.3g}"
    return None


def _noise(session: Session) -> Tensor:
    seed = session.recipe.tree.noise_seed
    return session.inputs.model.initial_noise(generator(seed, 0, 0, 0, 0, Purpose.INITIAL))[None]


def _sample(session: Session, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Clean latents (1, *latent) of an encoded prompt, on the CPU."""
    velocity = velocity_function(session.inputs.model, conditioning, session.accelerator.autocast)
    return denoise(velocity, session.sampler, _noise(session).to(session.device), session.limits.rollout).cpu()


def _size(values: Tensor) -> float:
    """The root mean square."""
    return float(values.double().square().mean().sqrt())
