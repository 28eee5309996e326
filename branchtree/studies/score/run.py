"""Scoring a list of files: everything is checked, then the rewards are loaded, then batches are read and scored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from branchtree.core.rollout import chunks
from branchtree.core.scores import Scores
from branchtree.errors import DataError, OutputError, RecipeError, RewardError, refuse
from branchtree.files.reading import whole_text
from branchtree.planning.devices import named_device
from branchtree.plugins.protocols import ChecksConditions, ReleasesMemory
from branchtree.plugins.scores import NamedReward, ask, needs_prompt
from branchtree.studies.common.output import Advance, as_lines, check_file, counter, write_lines
from branchtree.studies.common.rewards import Spec, make_named
from branchtree.studies.score.items import Given, Item, list_items
from branchtree.studies.score.media import Form, SavedSamples, find_forms, read

NUMBERS = 2**28
"""A batch is cut short before it holds more numbers than this, 1 GiB of them; one sample is always read whole."""
SHOWN = 5
"""How many files one message lists."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FileScore:
    """One reward's verdict on one file. Numbers are the float32 ones, exactly; None stands for one there is not."""

    value: float | None  # what training would use; None if not valid
    raw: float | None  # the published model's own number, where ``value`` is a transform of it
    valid: bool
    reason: str | None = None  # why it is not valid
    details: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredFile:
    """A sample in a file, what it was asked to show, and its scores by the rewards' labels."""

    file: str  # as it was given; from a .jsonl, with the folder of that; of several samples in a file, with [N]
    kind: str  # "image", "video", or the modality of samples of another kind
    prompt: str
    metadata: Mapping[str, Any]
    scores: Mapping[str, FileScore]


def file_scores(scores: Scores) -> list[FileScore]:
    """Return each sample's score."""
    return [
        FileScore(
            value=_number(scores.values[row]) if valid else None,
            raw=_number(scores.raw[row]) if valid and scores.raw is not None else None,
            valid=valid,
            reason=None if valid else whole_text(scores.reasons.get(row, "the reward gives no reason")),
            details={name: _number(figure[row]) for name, figure in scores.details.items()},
        )
        for row, valid in enumerate(scores.valid.tolist())
    ]


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def score_files(
    files: Given | Sequence[Given],
    rewards: Spec | Sequence[Spec],
    *,
    prompt: str | None = None,
    device: str = "auto",
    batch: int = 8,
    output: Path | None = None,
    advance: Advance | None = None,
) -> list[ScoredFile]:
    """Score files, in the order given; ``branchtree.score`` says what the arguments are."""
    if batch < 1:
        raise RecipeError(f"batch: at least 1 sample is scored at a time, not {batch}")
    target, named = named_device(device), make_named(rewards)
    items = list_items(files, prompt)
    if output is not None:
        entries = [files] if isinstance(files, str | Path | Mapping) else files
        lists = [Path(entry) for entry in entries if isinstance(entry, str | Path)]
        check_file(output, [*lists, *(item.path for item in items)])
    saved = SavedSamples()
    forms = find_forms(items, _mismatches(items, named), saved)
    for reward in named:
        reward.adapter.load(target)
    refuse(_mismatches(items, named))  # again: what a remote reward scores and reads is known once it is loaded
    found: list[dict[str, FileScore]] = [{} for _ in items]
    count = counter(advance, len(items) * len(named))
    for task in _tasks(named, items, forms, batch):
        for label, scores in _scored(task, items, forms, saved, share=len(named) > 1).items():
            for index, score in zip(task.indices, scores, strict=True):
                found[index][label] = score
        count(len(task.indices) * len(task.rewards))
    scored = [
        ScoredFile(
            file=item.name,
            kind=item.kind,
            prompt=item.condition.prompt,
            metadata=item.condition.metadata,
            scores={reward.label: scores[reward.label] for reward in named},
        )
        for item, scores in zip(items, found, strict=True)
    ]
    if output is not None:
        try:
            write_lines(output, map(asdict, scored))
        except OutputError as error:  # the work is done: what cannot be written is shown
            raise OutputError(f"{error}. The scores are:\n{as_lines(map(asdict, scored))}") from None
    return scored


@dataclass(frozen=True)
class _Task:
    """Files that are read at once, by their indices in the list, and the rewards they go to."""

    indices: Sequence[int]
    rewards: Sequence[NamedReward]


def _tasks(named: Sequence[NamedReward], items: Sequence[Item], forms: Sequence[Form], batch: int) -> list[_Task]:
    """Return batches of one form for the rewards that judge each sample alone; whole prompts for those that compare."""
    alone = [reward for reward in named if not reward.groupwise]
    comparing = [reward for reward in named if reward.groupwise]
    tasks: list[_Task] = []
    if alone:
        for like, indices in _grouped(forms).items():
            size = max(1, min(batch, NUMBERS // like.numbers))
            tasks += [_Task(indices[span.start : span.stop], alone) for span in chunks(len(indices), size)]
    if comparing:
        for prompt, indices in _grouped(item.condition.prompt for item in items).items():
            different = list(dict.fromkeys(forms[index] for index in indices))
            if len(different) > 1:
                raise DataError(
                    f"reward '{comparing[0].label}' compares the samples of a prompt, so those of '{prompt}' must be "
                    f"alike; there are {' and '.join(map(str, different[:SHOWN]))}"
                )
            tasks.append(_Task(indices, comparing))
    return tasks


def _grouped(keys: Iterable[Key]) -> Mapping[Key, list[int]]:
    """Return the indices of each key, keys in the order in which they come first."""
    indices: dict[Key, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        indices[key].append(index)
    return indices


def _scored(
    task: _Task, items: Sequence[Item], forms: Sequence[Form], saved: SavedSamples, share: bool
) -> dict[str, list[FileScore]]:
    """Read and score a task's files. Where rewards ``share`` the device, one that can leave it makes room."""
    chosen = [items[index] for index in task.indices]
    media = read(chosen, forms[task.indices[0]], saved)
    scores: dict[str, list[FileScore]] = {}
    for reward in task.rewards:
        try:
            scores[reward.label] = file_scores(
                ask(reward.label, reward.adapter, media, [item.condition for item in chosen])
            )
        except RewardError as error:
            more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
            listed = ", ".join(f"'{item.name}'" for item in chosen[:SHOWN])
            raise RewardError(f"{error} (scoring {listed}{more})") from error
        if share and isinstance(reward.adapter, ReleasesMemory):
            reward.adapter.release()
    return scores


def _mismatches(items: Sequence[Item], named: Sequence[NamedReward]) -> list[str]:
    """Name the files of another kind than a reward scores, and those without the prompt that it reads."""
    return [reason for reward in named for item in items if (reason := _mismatch(item, reward)) is not None]


def _mismatch(item: Item, reward: NamedReward) -> str | None:
    takes = reward.adapter.modalities
    if item.kind not in takes:
        kinds = " and ".join(f"{kind}s" for kind in sorted(takes))
        return f"{item.at}reward '{reward.label}' scores {kinds}, but '{item.name}' is a {item.kind}"
    if needs_prompt(reward.adapter) and not item.condition.prompt.strip():
        where = 'as "prompt" in its row, or ' if item.condition.location else ""
        return (
            f"{item.at}reward '{reward.label}' reads the prompt, and '{item.name}' has none; give one {where}with "
            "--prompt (prompt=... in Python) for all that have none"
        )
    if isinstance(reward.adapter, ChecksConditions):
        try:
            reward.adapter.check(item.condition)
        except DataError as error:
            return f"{error} (scoring '{item.name}')"
    return None
