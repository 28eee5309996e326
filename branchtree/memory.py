"""The memory of a run on paper, from a recipe and the sizes of its model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchtree.cost import Cost
from branchtree.protocols import Footprint
from branchtree.recipe.schema import Recipe

ADAM_BYTES = 12
"""Per trained parameter beside its weight: float32 gradient and AdamW's two moments."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at its fullest moment, and on the host. Decoder and reward models at work are not counted."""

    weights: int  # denoiser; trained in full under bf16, also the copies that autocast makes
    optimizer: int  # gradients and moments; under LoRA the low-rank weights too
    reference: int  # the frozen copy of the start policy that a KL term needs without LoRA
    activations: int  # of one gradient batch
    forward: int  # of one batch of a rollout or an evaluation, if the model knows
    states: int  # the tree's, wherever they are kept
    states_on_host: bool
    conditioning: int  # encodings of an iteration's prompts, if the model knows
    frozen: int  # encoders and decoder, on the device only while they work
    average: int  # moving average of the trained weights, on the host

    @property
    def resident(self) -> int:
        """On the device throughout."""
        states = 0 if self.states_on_host else self.states
        return self.weights + self.optimizer + self.reference + states + self.conditioning

    @property
    def device(self) -> int:
        """Peak on the device: encoding, rollout, gradient pass and decoding take turns."""
        return self.resident + max(self.activations, self.forward, self.frozen)

    @property
    def host(self) -> int:
        """Kept on the host."""
        return self.frozen + self.average + (self.states if self.states_on_host else 0)


def estimate_memory(recipe: Recipe, footprint: Footprint, cost: Cost) -> MemoryEstimate:
    """The memory of one process that does all of an iteration's prompts."""
    reduced = 2 if recipe.run.precision == "bf16" else 4
    whole = footprint.denoiser_parameters
    trained = footprint.lora_parameters_per_rank * recipe.lora.rank if recipe.lora else whole
    if recipe.lora:
        weights, optimizer = whole * reduced, trained * (4 + ADAM_BYTES)
    else:
        # Autocast keeps its bfloat16 copy of each weight that is trained until the forward ends.
        weights, optimizer = whole * (4 if reduced == 4 else 6), trained * ADAM_BYTES
    kept = (
        footprint.checkpointed_numbers_per_row
        if recipe.run.gradient_checkpointing
        else footprint.activation_numbers_per_row
    )
    return MemoryEstimate(
        weights=weights,
        optimizer=optimizer,
        reference=whole * 4 if (recipe.loss.kl or recipe.loss.kl_every) and not recipe.lora else 0,
        activations=update_rows(recipe, cost) * footprint.rows_per_prediction * kept * reduced,
        forward=forward_rows(recipe, cost)
        * footprint.rows_per_prediction
        * footprint.forward_numbers_per_row
        * reduced,
        states=cost.nodes * 4 * torch.Size(footprint.latent_shape).numel(),
        states_on_host=recipe.batch.states == "host",
        conditioning=recipe.batch.prompts * footprint.conditioning_numbers * reduced,
        frozen=footprint.frozen_parameters * reduced,
        average=trained * 4 if recipe.optim.ema else 0,
    )


def update_rows(recipe: Recipe, cost: Cost) -> int:
    """Families in the largest batch of the gradient pass."""
    return min(recipe.batch.update_rows or cost.gradient_rows, cost.gradient_rows)


def rollout_rows(recipe: Recipe, cost: Cost) -> int:
    """Predictions in the largest batch of a rollout, where no depth is wider than the leaves."""
    return min(recipe.batch.rollout_rows or cost.leaves, cost.leaves)


def forward_rows(recipe: Recipe, cost: Cost) -> int:
    """Predictions in the largest batch without gradients: of a rollout, or of an evaluation."""
    return max(rollout_rows(recipe, cost), recipe.evaluation.rows if recipe.evaluation else 0)
