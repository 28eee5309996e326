"""Noise addressed by what it is for, not by when it is drawn, and the noises of siblings.

Every tensor is a function of (seed, iteration, prompt, depth, node) and a purpose. So a tree does not depend
on batch sizes, on which prompts share a batch, on the number of processes, or on a restart; drawing happens on
the CPU so that it does not depend on the device either.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

_ADDRESS = struct.Struct("<qqqqqq")


class Purpose(IntEnum):
    """What a noise tensor is for; part of its address."""

    INITIAL = 0
    EDGE = 1
    SHARED = 2
    PERMUTATION = 3
    RESAMPLING = 4


def generator(seed: int, iteration: int, prompt: int, depth: int, node: int, purpose: Purpose) -> torch.Generator:
    """A CPU generator whose whole stream belongs to one address."""
    return torch.Generator().manual_seed(_hashed(seed, iteration, prompt, depth, node, purpose))


def _hashed(*address: int) -> int:
    return int.from_bytes(hashlib.blake2b(_ADDRESS.pack(*address), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class NoiseSource:
    """All noise of one iteration's edges."""

    seed: int
    iteration: int

    def normal(self, purpose: Purpose, prompt: int, depth: int, nodes: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal noise for some nodes of one prompt and depth: (len(nodes), *shape) float32, CPU."""
        noise, source = torch.empty(len(nodes), *shape), torch.Generator()
        for row, node in zip(noise.unbind(), nodes, strict=True):
            source.manual_seed(_hashed(self.seed, self.iteration, prompt, depth, node, purpose))
            row.normal_(generator=source)
        return noise


class Siblings(Protocol):
    """How the noises of one parent's K children relate. Each child's noise must be exactly N(0, I)."""

    @property
    def shares(self) -> bool:
        """Whether ``combine`` wants a noise shared by the siblings."""

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """The siblings' noises (F, K, *latent), from independent ones of that shape and shared ones (F, 1, *latent)."""


@dataclass(frozen=True)
class CorrelatedSiblings:
    """xi_b = (xi_0 + s * eta_b) / sqrt(1 + s^2): siblings correlate by 1 / (1 + s^2) (arXiv 2509.06040, eq. 2)."""

    strength: float = 4.0  # s

    @property
    def shares(self) -> bool:
        """See Siblings."""
        return True

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See Siblings."""
        if shared is None:
            raise ValueError("correlated siblings need a shared noise")
        return (shared + self.strength * own) / math.sqrt(1 + self.strength**2)


@dataclass(frozen=True)
class IndependentSiblings:
    """Siblings whose noises are independent: the limit of large s."""

    @property
    def shares(self) -> bool:
        """See Siblings."""
        return False

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See Siblings."""
        return own


@dataclass(frozen=True)
class SimplexSiblings:
    """sqrt(K / (K - 1)) * (eta_b - mean): siblings' noises sum to 0, so each pair correlates by -1 / (K - 1).

    For K = 2 the siblings are mirror images. The marginals stay N(0, I): eta_b minus the mean of K has variance
    (K - 1) / K.
    """

    @property
    def shares(self) -> bool:
        """See Siblings."""
        return False

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See Siblings."""
        branches = own.shape[1]
        return math.sqrt(branches / (branches - 1)) * (own - own.mean(dim=1, keepdim=True))


def child_noise(
    source: NoiseSource,
    siblings: Siblings,
    prompt: int,
    depth: int,
    parents: range,
    branches: int,
    shape: Sequence[int],
) -> Tensor:
    """Noise of the children, at ``depth``, of some parents of one prompt: (len(parents) * branches, *shape).

    ``parents`` are the parents' places among the prompt's nodes of the depth before; child b of parent p is
    node p * branches + b of its own depth.
    """
    children = range(parents.start * branches, parents.stop * branches)
    own = source.normal(Purpose.EDGE, prompt, depth, children, shape)
    if branches == 1:
        return own
    families = own.view(len(parents), branches, *shape)
    shared = None
    if siblings.shares:
        shared = source.normal(Purpose.SHARED, prompt, depth, parents, shape).unsqueeze(1)
    return siblings.combine(families, shared).reshape(own.shape)
