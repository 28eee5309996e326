"""An estimate of a run's memory, from its recipe and the sizes of its model and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from branchtree.core.cost import Cost
from branchtree.plugins.quantized import quantized_bytes
from branchtree.plugins.values import Footprint
from branchtree.recipe.build import make_edge_rules
from branchtree.recipe.schema import Recipe

MASTER = 4  # bytes of a number in float32, in which trained weights and decoded samples are kept
ADAM_BYTES = 12
"""Bytes per trained parameter beside its weight: the float32 gradient and AdamW's two moments.

The moments are allocated in the first optimiser step. AdamW's fused kernel makes no temporary tensors, and clipping
scales the gradients themselves, so the first step needs no more memory than later ones.
"""
PIECES = 4
"""Decoded batches in memory at once: two that wait to be scored, one being decoded, and its copy as one tensor."""


@dataclass(frozen=True)
class Surroundings:
    """What else is on a process's device, and how many processes share the work."""

    rewards: int = 0  # bytes of reward models that stay on the device
    offloaded_rewards: int = 0  # bytes of reward models that are on the device only while they score
    processes: int = 1
    sharded: bool = False  # whether FSDP2 shards weights, gradients and optimiser state over the processes
    gathered_whole: bool = False  # whether sharding gathers all weights at once, or keeps them after the forward


ALONE = Surroundings()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at its peak, and on the host.

    Kernels' workspaces, the encoders' activations and those of the reward models are not counted.
    """

    weights: int  # of the denoiser, with autocast's copies where all are trained under bf16
    optimizer: int  # gradients and moments, under LoRA with the low-rank weights
    buckets: int  # the copy of the gradients that DDP sends
    gathered: int  # blocks whose sharded weights are gathered at the same time
    dequantized: int  # the largest quantised weight while it is multiplied by
    reference: int  # the frozen copy of the start policy that a KL term needs without LoRA
    old: int  # the copy of the trained weights that holds their average under a forward objective
    rewards: int  # reward models that stay on the device
    activations: int  # of one gradient batch
    forward: int  # activations of one batch of a rollout or an evaluation, if the model knows
    states: int  # of the tree, and old predictions that a rule compares with; wherever they are kept
    states_on_host: bool
    conditioning: int  # encodings of an iteration's prompts, if the model knows
    frozen: int  # encoders and decoder, on the device only while they encode
    absent: int  # weights of the denoiser that leave the device to the encoders
    decoder: int  # weights, on the device from the first leaves until all are scored
    decoding: int  # the decoder's activations for one batch
    media: int  # decoded samples that are not scored yet
    offloaded: int  # reward models that leave the device while nothing is scored
    average: int  # moving average of the trained weights, on the host

    @property
    def resident(self) -> int:
        """Bytes that are always on the device."""
        states = 0 if self.states_on_host else self.states
        denoiser = self.weights + self.optimizer + self.buckets + self.gathered + self.reference + self.old
        denoiser += self.dequantized
        return denoiser + self.rewards + states + self.conditioning

    @property
    def device(self) -> int:
        """Peak on the device: encoding, gradients, rollout and decoding alternate; scoring overlaps the last two."""
        scoring = self.offloaded + max(self.forward, self.decoding)
        return self.resident + max(
            self.frozen - self.absent, self.decoder + self.media + max(self.activations, scoring)
        )

    @property
    def host(self) -> int:
        """Bytes on the host."""
        states = self.states if self.states_on_host else 0
        return self.frozen + self.absent + self.offloaded + self.average + states

    @property
    def needs(self) -> Mapping[str, int]:
        """The device's memory by purpose, in words: first what is always there, then what comes and goes."""
        named = {
            "denoiser weights": self.weights,
            "gradients and optimiser": self.optimizer,
            "copy of the gradients that DDP sends": self.buckets,
            "weights gathered by FSDP2": self.gathered,
            "the largest weight, dequantised": self.dequantized,
            "start policy, for the KL term": self.reference,
            "averaged policy, for the forward objective": self.old,
            "reward models": self.rewards,
            "tree states": 0 if self.states_on_host else self.states,
            "encoded prompts": self.conditioning,
            "activations of a gradient batch": self.activations,
            "activations of a rollout or evaluation batch": self.forward,
            "encoders and decoder, on the device while they encode": self.frozen,
            "decoder, while leaves are decoded and scored": self.decoder,
            "activations of the decoder": self.decoding,
            "decoded samples": self.media,
            "reward models that leave the device between their calls": self.offloaded,
        }
        return {words: size for words, size in named.items() if size}


def estimate_memory(
    recipe: Recipe, footprint: Footprint, cost: Cost, surroundings: Surroundings = ALONE
) -> MemoryEstimate:
    """Estimate the memory of one process of a training run; ``cost`` is that of its share of the prompts."""
    size, trained = _number_bytes(recipe), trained_numbers(recipe, footprint)
    kept = (
        footprint.checkpointed_numbers_per_row
        if recipe.run.gradient_checkpointing
        else footprint.activation_numbers_per_row
    )
    shards = surroundings.processes if surroundings.sharded else 1
    whole = surroundings.processes > 1 and not surroundings.sharded
    compared = bool(recipe.loss.kl or recipe.loss.kl_every) and not recipe.lora
    averaged = recipe.loss.is_forward and recipe.loss.old_policy == "ema"
    prompts = prompts_each(recipe, surroundings.processes)
    leaves, judged = decode_rows(recipe, cost), _evaluation_rows(recipe)
    samples = max(min(PIECES * leaves, cost.leaves + leaves), PIECES * judged)
    weights = _weights(recipe, footprint, surroundings)
    return MemoryEstimate(
        weights=weights,
        optimizer=_optimizer(recipe, footprint, surroundings),
        buckets=trained * MASTER if whole else 0,
        gathered=_gathered(recipe, footprint, surroundings),
        dequantized=_dequantized(recipe, footprint),
        reference=footprint.denoiser_parameters * MASTER // shards if compared else 0,
        old=trained * MASTER if averaged else 0,
        rewards=surroundings.rewards,
        activations=update_rows(recipe, cost) * footprint.rows_per_prediction * kept * size,
        forward=_forward(recipe, footprint, max(rollout_rows(recipe, cost), _evaluation_rows(recipe))),
        states=_states(recipe, cost) * MASTER * torch.Size(footprint.latent_shape).numel(),
        states_on_host=recipe.batch.states == "host",
        conditioning=prompts * footprint.conditioning_numbers * size,
        frozen=footprint.frozen_bytes(size),
        absent=weights if recipe.run.encode_alone and not surroundings.sharded else 0,
        decoder=_decoder(recipe, footprint),
        decoding=_decoding(recipe, footprint, max(leaves, judged)),
        media=_media(footprint, samples),
        offloaded=surroundings.offloaded_rewards,
        average=trained * MASTER // shards if recipe.optim.ema else 0,
    )


def _states(recipe: Recipe, cost: Cost) -> int:
    """Return how many latents are kept: the trees' states, clean samples predicted there, and old predictions."""
    return cost.nodes * (1 + recipe.loss.trains_inner_nodes) + _old_predictions(recipe, cost)


def _old_predictions(recipe: Recipe, cost: Cost) -> int:
    """Return the rows whose predictions are kept until the optimiser steps after an iteration's first."""
    steps = recipe.optim.steps_per_iteration
    return cost.gradient_rows * (steps - 1) // steps if make_edge_rules(recipe).compares_transitions else 0


def estimate_evaluation(
    recipe: Recipe, footprint: Footprint, rows: int, surroundings: Surroundings = ALONE
) -> MemoryEstimate:
    """Estimate the memory of one process of an evaluation, which neither trains nor shards, with ``rows`` at a time."""
    size, weights = _number_bytes(recipe), _weights(recipe, footprint, ALONE)
    return MemoryEstimate(
        weights=weights,
        optimizer=trained_numbers(recipe, footprint) * MASTER if recipe.lora else 0,
        buckets=0,
        gathered=0,
        dequantized=_dequantized(recipe, footprint),
        reference=0,
        old=0,
        rewards=surroundings.rewards,
        activations=0,
        forward=_forward(recipe, footprint, rows),
        states=rows * MASTER * torch.Size(footprint.latent_shape).numel(),
        states_on_host=False,
        conditioning=rows * footprint.conditioning_numbers * size,
        frozen=footprint.frozen_bytes(size),
        absent=weights if recipe.run.encode_alone else 0,
        decoder=_decoder(recipe, footprint),
        decoding=_decoding(recipe, footprint, rows),
        media=_media(footprint, PIECES * rows),
        offloaded=surroundings.offloaded_rewards,
        average=trained_numbers(recipe, footprint) * MASTER if recipe.optim.ema else 0,
    )


def _number_bytes(recipe: Recipe) -> int:
    return 2 if recipe.run.precision == "bf16" else MASTER


def trained_numbers(recipe: Recipe, footprint: Footprint) -> int:
    """Return how many numbers are trained: those of the LoRA, or all of the denoiser."""
    return footprint.lora_parameters_per_rank * recipe.lora.rank if recipe.lora else footprint.denoiser_parameters


def _weights(recipe: Recipe, footprint: Footprint, around: Surroundings) -> int:
    """Return the bytes of the denoiser; trained weights, and each process's share of sharded ones, are in float32."""
    size, whole = _number_bytes(recipe), footprint.denoiser_parameters
    if recipe.lora:
        return frozen_weights(recipe, footprint) // (around.processes if around.sharded else 1)
    if around.sharded:
        return whole * MASTER // around.processes
    # Autocast keeps its bfloat16 copy of each trained weight until the forward ends.
    return whole * (MASTER + (size if size < MASTER else 0))


def frozen_weights(recipe: Recipe, footprint: Footprint) -> int:
    """Return the bytes of the weights that LoRA freezes: quantised ones with their scales, the others as they are."""
    size, layers = _number_bytes(recipe), footprint.quantizable
    if recipe.model.quantize is None or layers is None:
        return footprint.denoiser_parameters * size
    kept = (footprint.denoiser_parameters - layers.parameters) * size
    return kept + quantized_bytes(recipe.model.quantize, layers, size)


def _dequantized(recipe: Recipe, footprint: Footprint) -> int:
    """Return the bytes of the largest quantised weight while it is multiplied by: in float32, and in the precision."""
    layers = footprint.quantizable if recipe.model.quantize else None
    return layers.largest * (MASTER + _number_bytes(recipe)) if layers else 0


def _optimizer(recipe: Recipe, footprint: Footprint, around: Surroundings) -> int:
    trained = trained_numbers(recipe, footprint)
    masters = MASTER if recipe.lora else 0
    if not around.sharded:
        return trained * (masters + ADAM_BYTES)
    # A gradient is whole until it is reduced: under LoRA until the step ends, otherwise for two blocks at a time.
    unreduced = trained if recipe.lora else min(2 * _block(footprint), trained)
    return trained * (masters + ADAM_BYTES) // around.processes + unreduced * MASTER


def _gathered(recipe: Recipe, footprint: Footprint, around: Surroundings) -> int:
    """Return the bytes of the block that computes and the next one, or of all blocks."""
    if not around.sharded:
        return 0
    whole = footprint.denoiser_parameters
    gathered = whole if around.gathered_whole else min(2 * _block(footprint), whole)
    if recipe.lora:
        return gathered * frozen_weights(recipe, footprint) // whole
    return gathered * _number_bytes(recipe)


def _block(footprint: Footprint) -> int:
    return footprint.largest_block_parameters or footprint.denoiser_parameters


def _forward(recipe: Recipe, footprint: Footprint, rows: int) -> int:
    return rows * footprint.rows_per_prediction * footprint.forward_numbers_per_row * _number_bytes(recipe)


def _decoder(recipe: Recipe, footprint: Footprint) -> int:
    decoder = footprint.decoder
    return decoder.parameters * (decoder.number_bytes or _number_bytes(recipe)) if decoder else 0


def _decoding(recipe: Recipe, footprint: Footprint, rows: int) -> int:
    """Return the bytes of the decoder's activations for ``rows`` at a time."""
    decoder = footprint.decoder
    if decoder is None:
        return 0
    size = decoder.number_bytes or _number_bytes(recipe)
    return min(rows, decoder.rows or rows) * decoder.numbers_per_row * size


def _media(footprint: Footprint, samples: int) -> int:
    return samples * footprint.decoder.media_numbers_per_row * MASTER if footprint.decoder else 0


def _evaluation_rows(recipe: Recipe) -> int:
    return recipe.evaluation.rows if recipe.evaluation else 0


def prompts_each(recipe: Recipe, processes: int) -> int:
    """Return the most prompts of an iteration that one process has."""
    return -(-recipe.batch.prompts // processes)


def update_rows(recipe: Recipe, cost: Cost) -> int:
    """Return the number of families in the largest batch of the gradient pass."""
    return min(recipe.batch.update_rows or cost.gradient_rows, cost.gradient_rows)


def rollout_rows(recipe: Recipe, cost: Cost) -> int:
    """Return the number of predictions in the largest batch of a rollout; no depth is wider than the leaves."""
    return min(recipe.batch.rollout_rows or cost.leaves, cost.leaves)


def decode_rows(recipe: Recipe, cost: Cost) -> int:
    """Return the most leaves that are decoded at a time."""
    return min(recipe.batch.decode_rows or cost.leaves, cost.leaves)
