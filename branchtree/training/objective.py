"""What a gradient pass minimises: the protocol of objectives, and what they are given and write down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.rollout import CleanSamples, VelocityFunction
from branchtree.core.tree import BranchTree, Topology
from branchtree.training.limits import RowLimit

_ON_HOST = ("grad_norms", "depth")
"""Lists of an UpdateRecord that are never on the device."""


@dataclass
class UpdateRecord:
    """What one process saw in the gradient pass of an iteration."""

    rows: int = 0
    rescored_rows: int = 0
    reference_rows: int = 0
    steps: int = 0
    skipped_steps: int = 0  # no edge was trained on any process
    refused_steps: int = 0  # the gradient was not finite, or too large
    grad_norms: list[float] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)  # (E,) per batch
    kl: list[Tensor] = field(default_factory=list)  # (E,)
    deviation: list[Tensor] = field(default_factory=list)  # (E,) |rho - 1|
    first_deviation: list[Tensor] = field(default_factory=list)  # the same at the first optimiser step
    clipped: list[Tensor] = field(default_factory=list)  # (E,) bool
    mismatch: list[Tensor] = field(default_factory=list)  # (E,) |log p rollout - log p training|, same weights
    error: list[Tensor] = field(default_factory=list)  # (E,) mean square error of a noised leaf's prediction
    preference: list[Tensor] = field(default_factory=list)  # (E,) how strongly a leaf is wanted, 0 to 1
    depth: list[Tensor] = field(default_factory=list)  # (E,) of the child

    def add(self, other: UpdateRecord) -> None:
        """Append what was seen after this."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def on_host(self) -> UpdateRecord:
        """Return the record off the device, in one copy: each makes the host wait until the device is done."""
        names = [name for name, kept in vars(self).items() if isinstance(kept, list) and name not in _ON_HOST]
        tensors = [tensor for name in names for tensor in getattr(self, name)]
        if not tensors or tensors[0].device.type == "cpu":
            return self
        flat = [tensor.float() for tensor in tensors]
        copied = torch.cat(flat).cpu().split([len(tensor) for tensor in tensors])
        back = iter([copy.to(tensor.dtype) for copy, tensor in zip(copied, tensors, strict=True)])
        record = replace(self)
        for name in names:
            setattr(record, name, [next(back) for _ in getattr(self, name)])
        return record


@dataclass(frozen=True)
class Policies:
    """The policies under one iteration's prompts."""

    trained: VelocityFunction
    reference: VelocityFunction | None  # the frozen start policy, where there is a KL term
    old: VelocityFunction | None = None  # the averaged policy, where a forward objective compares with it


@dataclass(frozen=True)
class OptimiserStep:
    """What all terms of an optimiser step's loss have in common."""

    tree: BranchTree
    policies: Policies
    first: bool = True  # of its iteration: the trained policy is still that of the rollout


class Work(Protocol):
    """Rows of the denoiser and the terms of the loss that follow from each: terms are ordered by row."""

    @property
    def prompt(self) -> Tensor:
        """The prompt of each row, (F,) int64."""

    def __len__(self) -> int:
        """Rows, F."""

    @property
    def edges(self) -> int:
        """Terms of the loss, E."""

    def select(self, index: Tensor) -> Self:
        """Some of the rows, ``index`` (F',) ascending."""

    def within(self, topology: Topology, first: int) -> Self:
        """Return the work of prompts ``first`` and after, collected from them alone, by their indices among all."""

    def owned(self, whole: Topology, share: Topology) -> Self:
        """Return what a process does that has a ``share`` of the ``whole`` trees, by indices in the share."""


AnyWork = TypeVar("AnyWork", bound=Work)


@dataclass(frozen=True)
class Earlier:
    """What the policy predicted before an iteration's first optimiser step, where later steps need it."""

    rows: Tensor | None  # (F, ...) of each row
    terms: Tensor  # (E, ...) of each term

    def of(self, rows: slice, terms: slice) -> Earlier:
        """Return what concerns some rows and their terms."""
        return Earlier(None if self.rows is None else self.rows[rows], self.terms[terms])

    @staticmethod
    def concatenate(each: Sequence[Earlier]) -> Earlier:
        """Return that of several batches, in their order."""
        rows = [one.rows for one in each if one.rows is not None]
        return Earlier(torch.cat(rows) if rows else None, torch.cat([one.terms for one in each]))


class Objective(Protocol[AnyWork]):
    """A loss over scored trees."""

    @property
    def looks_back(self) -> bool:
        """Whether steps after an iteration's first need ``earlier``."""

    @property
    def clean(self) -> CleanSamples | None:
        """What predictions say of clean samples, where trees must keep that of every node."""

    def work(self, credit: Credit, topology: Topology, ids: Sequence[int], iteration: int) -> AnyWork:
        """Return what is differentiated of some prompts' trees; ``ids`` (P,) are their addresses for noise."""

    def prepare(
        self, step: OptimiserStep, work: AnyWork, earlier: Earlier | None, record: UpdateRecord, limit: RowLimit
    ) -> AnyWork:
        """Return a step's work with what its terms need to know of each other, before it is cut into batches.

        A process makes forwards of its own here: none where they are calls that all processes make together.
        """

    def losses(self, step: OptimiserStep, work: AnyWork, earlier: Earlier | None, record: UpdateRecord) -> Tensor:
        """Return the loss of each term, (E,), and write what is seen into ``record``."""

    def earlier(self, tree: BranchTree, work: AnyWork, policies: Policies) -> Earlier:
        """Return what the trained policy predicts as it is, without gradients."""

    def without_terms(self, tree: BranchTree, policies: Policies) -> Tensor:
        """Return a loss whose gradient is zero, from as many forwards as a batch's."""


def empty_loss(tree: BranchTree, policies: Policies, device: torch.device) -> Tensor:
    """Return a loss whose gradient is zero, from one row under each policy."""
    latents = tree.states[0][:1].to(device)
    sigma, root = tree.sigmas[:1].to(latents.device), torch.zeros(1, dtype=torch.int64, device=latents.device)
    prediction = policies.trained(latents, sigma, root)
    if policies.reference is not None:
        with torch.no_grad():
            policies.reference(latents, sigma, root)
    return prediction.sum() * 0
