"""The policy: a model under some encoded prompts, as the rollout, the gradient pass and evaluations ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.transfer import send
from branchtree.core.tree import grow
from branchtree.errors import RewardError
from branchtree.plugins.decoding import Encoded
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import Condition, Conditioning
from branchtree.training.conditioning import ConditioningCache
from branchtree.training.limits import RowLimit


@dataclass
class CallCount:
    """Forwards of the denoiser that this process has still to make, where every one is a call of all processes."""

    left: int


@dataclass(frozen=True)
class Policy:
    """A model under P encoded prompts (``under``). Calling it gives predictions, with or without gradients.

    ``denoiser`` is the module that rows are sent through, the model's own by default. Under a ``limit`` as many rows as
    fit in memory are sent at once; that needs calls without gradients. ``calls`` counts forwards down.
    """

    model: ModelAdapter
    cache: ConditioningCache
    sampler: Sampler
    autocast: bool  # whether rows are sent under autocast to bfloat16
    device: torch.device
    limit: RowLimit | None = None
    conditioning: Conditioning = field(default_factory=dict)  # P rows
    denoiser: nn.Module | None = None
    calls: CallCount | None = None

    def under(self, conditions: Sequence[Condition]) -> Policy:
        """Return the policy under these prompts, encoded. Raises DataError if one's image or video is gone."""
        return replace(self, conditioning=self.cache.get(conditions, self.device))

    def __call__(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Return the prediction (B, *latent), float32, for latents (B, *latent) at sigma (B,) under prompts (B,)."""

        def predict(rows: slice) -> Tensor:
            if self.calls is not None:
                self.calls.left -= 1
            conditioning = {name: value[prompt[rows]] for name, value in self.conditioning.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                return self.model.predict(latents[rows], sigma[rows], conditioning, self.denoiser).float()

        if self.limit is None:
            return predict(slice(None))
        pieces = list(self.limit.each(len(latents), predict))
        return pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])

    def encoded(self, prompts: Sequence[int]) -> Encoded:
        """Return what samples of these prompts (B,) are sampled under, for whoever decodes them."""
        return Encoded(self.conditioning, send(torch.tensor(prompts, dtype=torch.int64), self.device))

    def first(self) -> Policy:
        """Return the policy under the first prompt alone."""
        return replace(self, conditioning={name: value[:1] for name, value in self.conditioning.items()})

    def training(self, denoiser: nn.Module | None) -> Policy:
        """Return the policy as a gradient pass needs it: without a limit of rows, through this module."""
        return replace(self, limit=None, denoiser=denoiser)

    def initial(self, seed: int, iteration: int, addresses: Sequence[tuple[int, int]]) -> Tensor:
        """Return starting noise (B, *latent) on the device, each addressed by (prompt, draw)."""
        noises = [
            self.model.initial_noise(generator(seed, iteration, prompt, 0, draw, Purpose.INITIAL))
            for prompt, draw in addresses
        ]
        return send(torch.stack(noises), self.device)

    def sample(self, initial: Tensor) -> Tensor:
        """Return clean latents (P, *latent) along the ODE from noises (P, *latent), each under its own prompt."""
        steps, rows = self.sampler.sigmas.numel() - 1, len(initial)
        plan = TreePlan((1,) * steps, (False,) * steps, (False,) * steps)
        nothing_drawn = NoiseSource(0, 0)
        max_rows = None if self.limit is None else self.limit.rows
        return rollout(self, self.sampler, grow([plan] * rows), initial, nothing_drawn, range(rows), max_rows).leaves

    @contextmanager
    def in_step(self, calls: int) -> Iterator[Policy]:
        """Yield the policy for a block in which every process makes ``calls`` forwards; 0 where each goes its own way.

        Forwards that only other processes need are made at the end, with one row whose result is thrown away, also
        where a reward failed in the block.
        """
        count = CallCount(calls)
        try:
            yield replace(self, calls=count)
        except RewardError:
            self._fill(count)
            raise
        self._fill(count)

    @torch.no_grad()
    def _fill(self, count: CallCount) -> None:
        if count.left <= 0:
            return
        row = self.initial(0, 0, [(0, 0)])
        sigma, prompt = torch.ones(1, device=row.device), torch.zeros(1, dtype=torch.int64, device=row.device)
        for _ in range(count.left):
            self(row, sigma, prompt)
