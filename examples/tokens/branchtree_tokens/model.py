"""The model families ``tokens_sudoku`` and ``tokens_addition``: the start is all unknown.

A state (2, n) has the tokens, and of each how many steps it has been known, which ``unmask`` counts.

Axis letters: B rows, P prompts, n positions, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from branchtree.plugins import Condition, Conditioning, ModelBase
from branchtree_tokens.network import CAP, Transformer
from branchtree_tokens.samples import Grids, Texts
from branchtree_tokens.tasks import CELLS, DIGITS, MASK, VOCABULARY, Puzzle, Sum, tokens_of, unknown

CERTAIN = 4 * CAP
"""How far a given token's logit is above all others: more than any two of the network's are apart."""


class TokenConfig(BaseModel, extra="forbid", frozen=True):
    """``path``: a folder that a run exported, ``bundled`` for the committed weights, or none for fresh ones."""

    path: Path | Literal["bundled"] | None = "bundled"
    width: int = Field(default=64, ge=4, multiple_of=4)
    depth: int = Field(default=3, ge=1)


class TokenModel(ModelBase):
    """A masked-diffusion transformer; a subclass says what is asked and what comes out."""

    prediction = "logits"
    task: type[Puzzle] | type[Sum]
    samples: type[Grids] | type[Texts]
    coordinates: Tensor
    weights: str

    def __init__(self, config: TokenConfig) -> None:
        if config.path == "bundled":
            config = config.model_copy(update={"path": Path(__file__).parent / "weights" / self.weights})
        super().__init__(config)

    @property
    def tokens(self) -> int:
        """The positions."""
        return self.latent_shape[1]

    def build_denoiser(self) -> nn.Module:
        """Return a transformer, its first weights those of a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Transformer(self.coordinates, self.config.width, self.config.depth, heads=4)

    def check(self, condition: Condition) -> None:
        """Refuse metadata that ask nothing of this task."""
        condition.read(self.task)

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode what is given, (P, n): tokens as floats, ``MASK`` where none is."""
        return {"given": tokens_of([each.read(self.task).text for each in conditions]).float()}

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Return a start where nothing is known, (2, n) int64."""
        return unknown(self.tokens)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Return logits (B, n, V) for states (B, 2, n) at sigma (B,); a given token is certain."""
        given = conditioning["given"].to(latents.device).long()
        known = given != MASK
        logits = (denoiser or self.denoiser)(torch.where(known, given, latents[:, 0]), sigma).float()
        chosen = nn.functional.one_hot(given, MASK + 1)[..., : len(VOCABULARY)]
        return torch.where(known[..., None], CERTAIN * (chosen - 1), logits)

    def decode(self, latents: Tensor) -> Grids | Texts:
        """Return the tokens as they are, and how long they have been known."""
        return self.samples(*latents.cpu().unbind(1))


class Sudoku(TokenModel):
    """4x4 sudoku."""

    modality, latent_shape, weights = "grid", (2, 16), "sudoku"
    task, samples, coordinates = Puzzle, Grids, CELLS


class Addition(TokenModel):
    """Three-digit addition, in 12 positions: ``123+456=0579``."""

    modality, latent_shape, weights = "text", (2, 12), "addition"
    task, samples, coordinates = Sum, Texts, DIGITS
