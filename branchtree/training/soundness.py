"""Whether the weights have diverged: found out before they are saved, and when a run fails for whatever reason."""

from __future__ import annotations

import torch
from torch import Tensor

from branchtree.training.engine import local
from branchtree.training.faults import find_faults
from branchtree.training.policy import Policy
from branchtree.training.session import Session

EXPLODED = 1e3
"""How many times its noise's root mean square a sample's may be; no decoder was made for larger ones."""


def find_divergence(session: Session, policy: Policy, together: bool) -> str | None:
    """Return what shows that the weights have diverged, or None if they make a sample of the policy's first prompt.

    With ``together`` all processes call this, and get the same answer. Sharded weights need that.
    """
    weights, sample = _weights_problem(session), _sample_problem(session, policy)
    found = session.processes.everyone(weights or sample) if together else [weights or sample]
    return next((problem for problem in found if problem is not None), None)


@torch.no_grad()
def find_fault(session: Session, policy: Policy) -> str | None:
    """Return which component of a model that is not trained yet makes no finite sample, or None if all do."""
    _, sample = _noise_and_sample(session, policy)
    decoded = policy.encoded([0]).decode(session.inputs.model, sample.to(session.device))
    return find_faults(session.inputs.model, sample, decoded).get(0)


@torch.no_grad()
def _weights_problem(session: Session) -> str | None:
    finite = [local(value).isfinite().all() for value in session.trained.engine.parameters.values()]
    return None if bool(torch.stack(finite).all()) else "they are not all finite"


@torch.no_grad()
def _sample_problem(session: Session, policy: Policy) -> str | None:
    noise, sample = _noise_and_sample(session, policy)
    if not bool(sample.isfinite().all()):
        return "they make samples that are not finite"
    if _size(sample) > EXPLODED * _size(noise):
        return f"they make samples of {_size(sample):.3g} on average, where the noise is of {_size(noise):.3g}"
    return None


def _noise_and_sample(session: Session, policy: Policy) -> tuple[Tensor, Tensor]:
    """Return starting noise (1, *latent) and the clean latents it leads to, on the CPU."""
    noise = policy.initial(session.recipe.tree.noise_seed, 0, [(0, 0)])
    return noise.cpu(), policy.first().sample(noise).cpu()


def _size(values: Tensor) -> float:
    """Return the root mean square."""
    return float(values.double().square().mean().sqrt())
