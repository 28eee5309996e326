"""Scoring a list of files: everything is checked, then the rewards are loaded, then batches are read and scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from branchtree.core.rollout import chunks
from branchtree.errors import DataError, RecipeError, RewardError, refuse
from branchtree.planning.devices import named_device
from branchtree.plugins.protocols import ReleasesMemory
from branchtree.plugins.scores import ask, needs_prompt
from branchtree.recipe.build import NamedReward
from branchtree.studies.score.items import Given, Item, list_items
from branchtree.studies.score.media import Form, find_forms, read
from branchtree.studies.score.results import FileScore, ScoredFile, check_output, file_scores
from branchtree.studies.score.specs import Spec, make_named

NUMBERS = 2**28
"""A batch is cut short before it holds more numbers than this, 1 GiB of them; one sample is always read whole."""
SHOWN = 5
"""How many files one message lists."""

Key = TypeVar("Key", bound=Hashable)

Advance = Callable[[int, int], None]
"""Told how many scores there are, and how many there will be."""


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
    """Score files, in the order given; ``branchtree.score`` says what the arguments are.

    ``output`` is where the caller means to write: it is looked at before the work is done, and not written.
    """
    if batch < 1:
        raise RecipeError(f"batch: at least 1 sample is scored at a time, not {batch}")
    target, named = named_device(device), make_named(rewards)
    items = list_items(files, prompt)
    if output is not None:
        check_output(output, [*_paths(files), *(item.path for item in items)])
    forms = find_forms(items, _mismatches(items, named))
    for reward in named:
        reward.adapter.load(target)
    refuse(_mismatches(items, named))  # again: what a remote reward scores and reads is known once it is loaded
    found: list[dict[str, FileScore]] = [{} for _ in items]
    for task in _tasks(named, items, forms, batch):
        for label, scores in _scored(task, items, forms, share=len(named) > 1).items():
            for place, score in zip(task.places, scores, strict=True):
                found[place][label] = score
        if advance is not None:
            advance(sum(map(len, found)), len(items) * len(named))
    return [_result(item, scores, named) for item, scores in zip(items, found, strict=True)]


def _result(item: Item, scores: Mapping[str, FileScore], named: Sequence[NamedReward]) -> ScoredFile:
    in_order = {reward.label: scores[reward.label] for reward in named}
    return ScoredFile(str(item.path), item.kind, item.condition.prompt, item.condition.metadata, in_order)


@dataclass(frozen=True)
class _Task:
    """Files that are read at once, by their places in the list, and the rewards they go to."""

    places: Sequence[int]
    rewards: Sequence[NamedReward]


def _tasks(named: Sequence[NamedReward], items: Sequence[Item], forms: Sequence[Form], batch: int) -> list[_Task]:
    """Batches of one form for the rewards that judge each sample alone; whole prompts for those that compare."""
    alone = [reward for reward in named if not reward.groupwise]
    comparing = [reward for reward in named if reward.groupwise]
    tasks: list[_Task] = []
    if alone:
        for like, places in _grouped(forms).items():
            size = max(1, min(batch, NUMBERS // like.numbers))
            tasks += [_Task(places[span.start : span.stop], alone) for span in chunks(len(places), size)]
    if comparing:
        for prompt, places in _grouped(item.condition.prompt for item in items).items():
            different = list(dict.fromkeys(forms[place] for place in places))
            if len(different) > 1:
                raise DataError(
                    f"reward '{comparing[0].label}' compares the samples of a prompt, so those of '{prompt}' must be "
                    f"alike; there are {' and '.join(map(str, different[:SHOWN]))}"
                )
            tasks.append(_Task(places, comparing))
    return tasks


def _grouped(keys: Iterable[Key]) -> Mapping[Key, list[int]]:
    """The places of each key, keys in the order in which they come first."""
    places: dict[Key, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return places


def _scored(task: _Task, items: Sequence[Item], forms: Sequence[Form], share: bool) -> dict[str, list[FileScore]]:
    """Each reward's scores of a task's files. ``share``: rewards that can leave the device make room for the next."""
    chosen = [items[place] for place in task.places]
    media = read(chosen, forms[task.places[0]])
    scores: dict[str, list[FileScore]] = {}
    for reward in task.rewards:
        try:
            scores[reward.label] = file_scores(
                ask(reward.label, reward.adapter, media, [item.condition for item in chosen])
            )
        except RewardError as error:
            raise RewardError(f"{error} (scoring {_listed(chosen)})") from error
        if share and isinstance(reward.adapter, ReleasesMemory):
            reward.adapter.release()
    return scores


def _listed(items: Sequence[Item]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(f"'{item.path}'" for item in items[:SHOWN]) + more


def _mismatches(items: Sequence[Item], named: Sequence[NamedReward]) -> list[str]:
    """Name the files of another kind than a reward scores, and those without the prompt that it reads."""
    return [reason for reward in named for item in items if (reason := _mismatch(item, reward)) is not None]


def _mismatch(item: Item, reward: NamedReward) -> str | None:
    takes = reward.adapter.modalities
    if item.kind not in takes:
        kinds = " and ".join(f"{kind}s" for kind in sorted(takes))
        return f"{item.at}reward '{reward.label}' scores {kinds}, but '{item.path}' is a {item.kind}"
    if needs_prompt(reward.adapter) and not item.condition.prompt.strip():
        where = 'as "prompt" in its row, or ' if item.condition.place else ""
        return (
            f"{item.at}reward '{reward.label}' reads the prompt, and '{item.path}' has none; give one {where}with "
            "--prompt (prompt=... in Python) for all that have none"
        )
    return None


def _paths(files: Given | Sequence[Given]) -> list[Path]:
    entries = [files] if isinstance(files, str | Path | Mapping) else files
    return [Path(entry) for entry in entries if isinstance(entry, str | Path)]
