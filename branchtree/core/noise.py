"""Noise addressed by what it is for, not by when it is drawn, and the noises of siblings.

Every tensor is a function of (seed, iteration, prompt, depth, node) and a purpose. So a tree does not depend
on batch sizes, on which prompts share a batch, on the number of processes, or on a restart; drawing happens on
the CPU so that it does not depend on the device either.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
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
    FORWARD = 5
    TIME = 6


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
    """Draws the base noise of one parent's children, which may depend on each other.

    Each child's noise alone must have the distribution that the transition's ``sample`` expects.
    """

    def draw(
        self, source: NoiseSource, prompt: int, depth: int, parents: range, branches: int, shape: Sequence[int]
    ) -> Tensor:
        """Return the noise of some parents' children at ``depth``, (len(parents) * branches, *shape), on the CPU.

        ``parents`` are indices among the prompt's nodes of the depth before; child b of parent p is node
        p * branches + b of its own depth. A node's noise may depend on nothing but its address.
        """


class NormalSiblings(ABC):
    """Siblings whose noise is standard normal, each on its own: what Gaussian transitions expect."""

    shares = False
    """Whether ``combine`` wants a noise that siblings have in common."""

    def draw(
        self, source: NoiseSource, prompt: int, depth: int, parents: range, branches: int, shape: Sequence[int]
    ) -> Tensor:
        """See Siblings."""
        children = range(parents.start * branches, parents.stop * branches)
        own = source.normal(Purpose.EDGE, prompt, depth, children, shape)
        if branches == 1:
            return own
        families = own.view(len(parents), branches, *shape)
        shared = source.normal(Purpose.SHARED, prompt, depth, parents, shape).unsqueeze(1) if self.shares else None
        return self.combine(families, shared).reshape(own.shape)

    @abstractmethod
    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """Return the siblings' noises (F, K, *latent), each N(0, I).

        ``own`` are independent ones of that shape, and ``shared`` (F, 1, *latent) those that siblings have in common.
        """


@dataclass(frozen=True)
class CorrelatedSiblings(NormalSiblings):
    """xi_b = (xi_0 + s * eta_b) / sqrt(1 + s^2): siblings correlate by 1 / (1 + s^2) (arXiv 2509.06040, eq. 2)."""

    strength: float = 4.0  # s

    shares = True

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See NormalSiblings."""
        if shared is None:
            raise ValueError("correlated siblings need a shared noise")
        return (shared + self.strength * own) / math.sqrt(1 + self.strength**2)


@dataclass(frozen=True)
class IndependentSiblings(NormalSiblings):
    """Siblings whose noises are independent: the limit of large s."""

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See NormalSiblings."""
        return own


@dataclass(frozen=True)
class SimplexSiblings(NormalSiblings):
    """sqrt(K / (K - 1)) * (eta_b - mean): siblings' noises sum to 0, so each pair correlates by -1 / (K - 1).

    For K = 2 the siblings are mirror images. The marginals stay N(0, I): eta_b minus the mean of K has variance
    (K - 1) / K.
    """

    def combine(self, own: Tensor, shared: Tensor | None) -> Tensor:
        """See NormalSiblings."""
        branches = own.shape[1]
        return math.sqrt(branches / (branches - 1)) * (own - own.mean(dim=1, keepdim=True))
