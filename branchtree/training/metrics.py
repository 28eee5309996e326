"""The figures of an iteration, exact over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.fusion import TIE
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.segments import segment_count, segment_size, segment_std, segment_sum
from branchtree.core.tree import Topology, grow
from branchtree.core.variance import split_spread, split_variance
from branchtree.training.iteration import Iteration
from branchtree.training.objective import UpdateRecord
from branchtree.training.session import Session

GRADIENT_COST = 3
"""A row with its backward pass costs about three forward rows."""


@dataclass(frozen=True)
class ShareRecord:
    """What one process knows of an iteration: everything but the states."""

    plans: tuple[TreePlan, ...]
    scores: Mapping[str, Scores]
    credit: Credit
    rollout_rows: int  # predictions that its rollouts took
    update: UpdateRecord


def merge(shares: Sequence[ShareRecord], members: int = 1) -> ShareRecord:
    """Return the whole iteration, from the shares of all processes in the order of their prompts.

    ``members`` consecutive processes have the same prompts, and each knows all of their trees.
    """
    if len(shares) == 1:
        return shares[0]
    first = shares[0].update
    update = UpdateRecord(
        steps=first.steps,
        skipped_steps=first.skipped_steps,
        refused_steps=first.refused_steps,
        grad_norms=first.grad_norms,
    )
    for share in shares:
        update.rows += share.update.rows
        update.rescored_rows += share.update.rescored_rows
        update.reference_rows += share.update.reference_rows
        for name in ("loss", "kl", "deviation", "first_deviation", "clipped", "mismatch", "depth"):
            getattr(update, name).extend(getattr(share.update, name))
    distinct = shares[::members]
    return ShareRecord(
        plans=tuple(plan for share in distinct for plan in share.plans),
        scores={label: Scores.concatenate([share.scores[label] for share in distinct]) for label in shares[0].scores},
        credit=Credit.concatenate([share.credit for share in distinct]),
        rollout_rows=sum(share.rollout_rows for share in shares),
        update=update,
    )


def gather_metrics(session: Session, done: Iteration) -> dict[str, float]:
    """Return an iteration's figures over all processes, which call this together."""
    from accelerate.utils import gather_object

    group = done.group
    share = ShareRecord(group.topology.plans, group.scores, done.credit, done.tree.topology.rollout_rows, done.update)
    whole = merge(gather_object([share]), session.team.members)
    metrics = iteration_metrics(whole, session.inputs.model.rows_per_prediction)
    return {**metrics, **done.comparison, "lr": float(session.updater.optimizer.param_groups[0]["lr"])}


def iteration_metrics(whole: ShareRecord, rows_per_prediction: int) -> dict[str, float]:
    """Return all figures of one iteration by name, from what all processes know; those without a value are left out."""
    topology, scores, credit, update = grow(whole.plans), whole.scores, whole.credit, whole.update
    metrics = {
        **_reward_metrics(topology, scores, credit),
        **_cost_metrics(topology, whole, rows_per_prediction),
        **_update_metrics(update),
        **_depth_metrics(credit, update),
        **_split_metrics(topology, credit),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _reward_metrics(topology: Topology, scores: Mapping[str, Scores], credit: Credit) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for label, score in scores.items():
        values, prompts = score.values[score.valid].double(), topology.leaf_root[score.valid]
        metrics[f"reward/{label}/invalid"] = float((~score.valid).sum())
        if not values.numel():
            continue
        metrics[f"reward/{label}/mean"] = float(values.mean())
        metrics[f"reward/{label}/std"] = float(segment_std(values, prompts, topology.prompts).mean())
        rounding = TIE * segment_size(values, prompts, topology.prompts)
        tied = segment_std(values, prompts, topology.prompts, rounding) == 0
        compared = segment_count(prompts, topology.prompts) > 1
        metrics[f"reward/{label}/tied_prompts"] = float((tied & compared).sum())
        further = {"raw": score.raw, **score.details}
        for name, figure in further.items():
            if figure is not None:
                metrics[f"reward/{label}/{name}"] = float(figure[score.valid].double().nanmean())
    valid_leaves = segment_sum(credit.valid.double(), topology.leaf_root, topology.prompts)
    metrics["reward/valid_fraction"] = float(credit.valid.double().mean())
    metrics["reward/skipped_prompts"] = float((valid_leaves == 0).sum())
    return metrics


def _cost_metrics(topology: Topology, whole: ShareRecord, factor: int) -> dict[str, float]:
    update, rollout = whole.update, factor * whole.rollout_rows
    gradient = factor * update.rows
    return {
        "rows/rollout": float(rollout),
        "rows/gradient": float(gradient),
        "rows/reference": float(factor * update.reference_rows),
        "rows/rescored": float(factor * update.rescored_rows),
        "rows/equivalent": float(rollout + GRADIENT_COST * gradient),
        "leaves/scored": float(topology.width(topology.steps)),
        "edges/trained": float(sum(losses.numel() for losses in update.loss)),
        "steps/taken": float(update.steps),
        "steps/skipped": float(update.skipped_steps),
        "steps/refused": float(update.refused_steps),
    }


def _update_metrics(update: UpdateRecord) -> dict[str, float]:
    metrics = {
        "loss": _mean(update.loss),
        "ratio/max_deviation": _max(update.deviation),
        "ratio/first_step_max_deviation": _max(update.first_deviation),
        "ratio/clipped_fraction": _mean(update.clipped),
        "log_prob/mismatch_mean": _mean(update.mismatch),
        "log_prob/mismatch_max": _max(update.mismatch),
        "grad_norm": sum(update.grad_norms) / max(len(update.grad_norms), 1),
    }
    return {**metrics, "kl": _mean(update.kl)} if update.kl else metrics


def _mean(batches: Sequence[Tensor]) -> float:
    return float(torch.cat(list(batches)).double().mean()) if batches else math.nan


def _max(batches: Sequence[Tensor]) -> float:
    return float(torch.cat(list(batches)).max()) if batches else math.nan


def _depth_metrics(credit: Credit, update: UpdateRecord) -> dict[str, float]:
    """Return, per depth of the child, the mean |advantage| of kept edges and their share of the loss's magnitude."""
    metrics: dict[str, float] = {}
    loss = torch.cat(update.loss).abs().double() if update.loss else torch.zeros(0, dtype=torch.float64)
    depth = torch.cat(update.depth) if update.depth else torch.zeros(0, dtype=torch.int64)
    total = float(loss.sum())
    for at, (advantage, keep) in enumerate(zip(credit.advantages, credit.keep, strict=True)):
        if bool(keep.any()):
            metrics[f"advantage/abs_mean/depth_{at:02d}"] = float(advantage[keep].abs().mean())
            metrics[f"loss_share/depth_{at:02d}"] = float(loss[depth == at].sum()) / total if total else math.nan
    return metrics


def _split_metrics(topology: Topology, credit: Credit) -> dict[str, float]:
    """Return where the variance of the first reward that has a weight arises, and how far siblings lie apart."""
    label = next(iter(credit.rewards))
    spread = split_spread(topology, credit.values[label])
    figures = {"spread": spread.spread, "ties": spread.ties}
    variance = split_variance(topology, credit.rewards[label], credit.valid)
    if variance is not None:
        figures |= {
            "variance/share": variance.share,
            "variance/independent_share": variance.independent_share,
            "variance/component": variance.component,
        }
    return {f"{name}/split_{i}": float(value) for name, values in figures.items() for i, value in enumerate(values)}
