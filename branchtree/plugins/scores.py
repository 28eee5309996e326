"""Asking a reward for scores, and checking them: a reward is a plug-in, and can raise and return anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins.protocols import GroupReward, ReadsPrompt, RewardAdapter
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Condition

NOT_FINITE = "the value is not finite"


@dataclass(frozen=True)
class NamedReward:
    """A reward with its label and weight in a recipe."""

    label: str
    weight: float
    adapter: RewardAdapter
    described: str = ""  # its name and settings

    @property
    def groupwise(self) -> bool:
        """Return whether it must get all samples of a prompt at once; known once it is loaded."""
        return isinstance(self.adapter, GroupReward) and self.adapter.groupwise


def ask(label: str, adapter: RewardAdapter, media: Samples, conditions: Sequence[Condition]) -> Scores:
    """Return a reward's checked scores of some samples. Raises RewardError, naming the reward, if it fails."""
    try:
        with torch.no_grad():
            returned = adapter.score(media, conditions)
    except Exception as error:
        raise RewardError(f"reward '{label}' failed: {type(error).__name__}: {error}") from error
    return check_scores(label, returned, len(media))


def check_scores(label: str, returned: object, count: int) -> Scores:
    """Return the scores of ``count`` samples as float32 and bool on the CPU, without gradients.

    A value that is not finite is marked invalid. Raises RewardError, naming the reward and what is wrong, for anything
    but ``Scores`` with one number and one flag for each sample.
    """
    problem = _problem(returned, count)
    if problem is not None or not isinstance(returned, Scores):
        raise RewardError(
            f"reward '{label}' must give {count} values and valid flags for as many samples, as "
            f"branchtree.plugins.Scores says, but {problem}"
        )
    values = _numbers(returned.values)
    finite = values.isfinite()
    not_finite = [int(row) for row in (~finite).nonzero().flatten()]
    return Scores(
        values=values,
        valid=returned.valid.detach().cpu() & finite,
        raw=None if returned.raw is None else _numbers(returned.raw),
        details={name: _numbers(figure) for name, figure in returned.details.items()},
        reasons={**dict.fromkeys(not_finite, NOT_FINITE), **{int(row): why for row, why in returned.reasons.items()}},
    )


def needs_prompt(reward: RewardAdapter) -> bool:
    """Return whether a reward reads prompts, or compares samples that have a prompt in common."""
    compares = isinstance(reward, GroupReward) and reward.groupwise
    return compares or not isinstance(reward, ReadsPrompt) or reward.reads_prompt


def failed_scores(count: int, reason: str) -> Scores:
    """Return the scores of ``count`` samples of which none could be scored."""
    nothing = torch.full((count,), torch.nan)
    return Scores(nothing, torch.zeros(count, dtype=torch.bool), reasons=dict.fromkeys(range(count), reason))


def _numbers(figure: Tensor) -> Tensor:
    return figure.detach().float().cpu()


def _problem(returned: object, count: int) -> str | None:
    """Say what is wrong with what a reward returned; None if nothing is."""
    if not isinstance(returned, Scores):
        return f"it gave {_kind(returned)}"
    if not isinstance(returned.details, Mapping):
        return f"its 'details' is {_kind(returned.details)}, not tensors by name"
    figures = {"values": returned.values, "valid": returned.valid}
    if returned.raw is not None:
        figures["raw"] = returned.raw
    figures |= {f"details.{name}": figure for name, figure in returned.details.items()}
    wrong = [problem for name, figure in figures.items() if (problem := _wrong_figure(name, figure, count)) is not None]
    return wrong[0] if wrong else _wrong_reasons(returned.reasons, count)


def _wrong_figure(name: str, figure: object, count: int) -> str | None:
    if not isinstance(figure, Tensor):
        return f"its '{name}' is {_kind(figure)}, not a tensor"
    if figure.shape != (count,):
        return f"its '{name}' has the shape {tuple(figure.shape)}, not ({count},)"
    if name == "valid" and figure.dtype != torch.bool:
        return f"its 'valid' holds {_name(figure.dtype)}, not flags (bool)"
    if figure.is_complex() or (name in {"values", "raw"} and not figure.is_floating_point()):
        return f"its '{name}' holds {_name(figure.dtype)}, not float32 numbers"
    return None


def _wrong_reasons(reasons: object, count: int) -> str | None:
    if not isinstance(reasons, Mapping):
        return f"its 'reasons' is {_kind(reasons)}, not texts by row"
    for row, reason in reasons.items():
        if not isinstance(row, Integral) or isinstance(row, bool) or not 0 <= int(row) < count:
            return f"its 'reasons' name the row {row!r}, and rows are numbers from 0 to {count - 1}"
        if not isinstance(reason, str):
            return f"its reason for row {row} is {_kind(reason)}, not a text"
    return None


def _kind(value: object) -> str:
    """Name a value's type, with the shape where it has one."""
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    shown = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"a {type(value).__name__}{shown}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
