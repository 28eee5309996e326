"""The figures of an iteration, exact over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.cost import GRADIENT_COST
from branchtree.core.credit import Credit
from branchtree.core.fusion import TIE
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.segments import segment_count, segment_mean, segment_size, segment_std, segment_sum
from branchtree.core.tree import Topology, grow
from branchtree.core.variance import split_spread, split_variance
from branchtree.training.iteration import Iteration
from branchtree.training.objective import UpdateRecord
from branchtree.training.session import Session

SPREAD_RATIO = "spread_ratio"
"""The end of the name of a reward's ``spread_ratio``."""


PER_TERM = ("loss", "kl", "deviation", "first_deviation", "clipped", "mismatch", "error", "preference", "depth")
"""Lists of an UpdateRecord that hold a number for each term of the loss."""


@dataclass(frozen=True)
class ShareRecord:
    """What one process knows of an iteration: everything but the states."""

    plans: tuple[TreePlan, ...]
    scores: Mapping[str, Scores]
    credit: Credit
    rollout_rows: int  # predictions that its rollouts took
    update: UpdateRecord
    probes: int = 0  # that its nodes had
    probe_rows: int = 0  # predictions that they took
    spreads: tuple[float | None, ...] = ()  # of each prompt's leaves, where alarms are looked for


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
        for name in PER_TERM:
            getattr(update, name).extend(getattr(share.update, name))
    distinct = shares[::members]
    return ShareRecord(
        plans=tuple(plan for share in distinct for plan in share.plans),
        scores={label: Scores.concatenate([share.scores[label] for share in distinct]) for label in shares[0].scores},
        credit=Credit.concatenate([share.credit for share in distinct]),
        rollout_rows=sum(share.rollout_rows for share in shares),
        update=update,
        probes=sum(share.probes for share in shares),
        probe_rows=sum(share.probe_rows for share in shares),
        spreads=tuple(spread for share in distinct for spread in share.spreads),
    )


def gather_metrics(session: Session, done: Iteration) -> dict[str, float]:
    """Return an iteration's figures over all processes, which call this together."""
    return metrics_of(session, done, gather_record(session, done))


def gather_record(session: Session, done: Iteration) -> ShareRecord:
    """Return what all processes, which call this together, know of an iteration."""
    from accelerate.utils import gather_object

    group = done.group
    share = ShareRecord(
        group.topology.plans,
        group.scores,
        done.credit,
        done.tree.topology.rollout_rows,
        done.update,
        done.probes.count,
        done.probes.rows,
        tuple(group.spreads()),
    )
    return merge(gather_object([share]), session.team.members)


def metrics_of(session: Session, done: Iteration, whole: ShareRecord) -> dict[str, float]:
    """Return an iteration's figures, from what all processes know of it."""
    metrics = iteration_metrics(whole, session.inputs.model.rows_per_prediction)
    if session.trained.splits is not None:
        metrics |= learned_splits(whole.plans, session.recipe.sampler.level)
    if session.trained.gate is not None and whole.credit.gate is not None:
        metrics |= session.trained.gate.figures(whole.credit.gate)
    return {**metrics, **done.comparison, "lr": float(session.updater.optimizer.param_groups[0]["lr"])}


def learned_splits(plans: Sequence[TreePlan], level: float) -> dict[str, float]:
    """Return where trees split, and with what noise, on average; ``level`` is that of the kernel's own."""
    splits = [(step, plan) for plan in plans for step in plan.splits]
    if not splits:
        return {}
    return {
        "split/step": sum(step for step, _ in splits) / len(splits),
        "split/eta": level * sum(float(plan.active(step)) for step, plan in splits) / len(splits),
        "split/children": sum(plan.factors[step] for step, plan in splits) / len(splits),
    }


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
        metrics[f"reward/{label}/{SPREAD_RATIO}"] = spread_ratio(values, prompts, topology.prompts)
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


def spread_ratio(values: Tensor, group: Tensor, groups: int) -> float:
    """Return how far rewards lie apart within prompts, over how far the prompts' means do.

    It is the mean sample deviation of prompts with at least two rewards over the deviation of those prompts' means.
    NaN where there are no two such prompts, or their means agree.

    Args:
        values: Rewards, (N,) float64.
        group: The prompt of each, (N,) int64.
        groups: How many prompts there are.
    """
    several = segment_count(group, groups) > 1
    if int(several.sum()) < 2:
        return math.nan
    rounding = TIE * segment_size(values, group, groups)
    across = float(segment_mean(values, group, groups)[several].std())
    within = float(segment_std(values, group, groups, rounding)[several].mean())
    return within / across if across > float(rounding.max()) else math.nan


def _cost_metrics(topology: Topology, whole: ShareRecord, factor: int) -> dict[str, float]:
    update, rollout = whole.update, factor * whole.rollout_rows
    gradient, probes = factor * update.rows, factor * whole.probe_rows
    probing = {"rows/probes": float(probes), "leaves/probes": float(whole.probes)} if whole.probes else {}
    return {
        "rows/rollout": float(rollout),
        "rows/gradient": float(gradient),
        "rows/reference": float(factor * update.reference_rows),
        "rows/rescored": float(factor * update.rescored_rows),
        "rows/equivalent": float(rollout + probes + GRADIENT_COST * gradient),
        **probing,
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
        "forward/error": _mean(update.error),
        "forward/preference_spread": _spread(update.preference),
        "grad_norm": sum(update.grad_norms) / max(len(update.grad_norms), 1),
    }
    return {**metrics, "kl": _mean(update.kl)} if update.kl else metrics


def _mean(batches: Sequence[Tensor]) -> float:
    return float(torch.cat(list(batches)).double().mean()) if batches else math.nan


def _spread(batches: Sequence[Tensor]) -> float:
    return float(torch.cat(list(batches)).double().std(correction=0)) if batches else math.nan


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
