"""Damage each file of each reward's small checkpoint in turn, load what is left, and ask for scores.

A damaged file may be refused, with an error that is raised on purpose, or it may not matter: then the scores are those
of the whole folder. Anything else is a fault. Run as a program, it sweeps everything and prints the counts:

    python tests/sweep_reward_folders.py [--sums] [REWARD ...]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from branchtree_rewards.shared.source import RANDOM_SMALL

from branchtree.errors import BranchTreeError
from branchtree.files.checksums import write_checksums
from branchtree.plugins import Condition, Media, RewardAdapter
from branchtree.recipe.build import make_reward

CPU = torch.device("cpu")
REWARDS: Mapping[str, Mapping[str, Any]] = {
    "geneval": {},
    "hps": {},
    "hpsv3": {},
    "clip": {},
    "clip-dfn5b": {"variant": "dfn5b"},
    "clip_similarity": {},
    "pickscore": {},
    "imagereward": {},
    "aesthetic": {},
    "unifiedreward": {"template": "score"},
    "videoalign": {"measure": "overall"},
    "vbench_aesthetic": {},
    "vbench_background": {},
    "vbench_dynamic": {"measure": "share", "updates": 1},
    "vbench_imaging": {},
}
OBJECTS = {"include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2}]}  # for geneval
FRAMES = Path(__file__).parents[1] / "recipes/prompts/moving_digits"
CONDITIONS = [
    Condition(prompt, image=FRAMES / f"train_{row:03d}.png", metadata=OBJECTS)
    for row, prompt in enumerate(("a red cat", "two blue dogs, running"))
]


def _deleted(content: bytes) -> bytes | None:
    return None


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _emptied(content: bytes) -> bytes:
    return b""


def _zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def _flipped(quarter: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        place = len(content) * quarter // 4
        return content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :] if content else b"\x20"

    return flip


DAMAGES: Mapping[str, Callable[[bytes], bytes | None]] = {
    "deleted": _deleted,
    "cut": _cut,
    "emptied": _emptied,
    "zeroed": _zeroed,
    "flipped at 1/4": _flipped(1),
    "flipped at 1/2": _flipped(2),
    "flipped at 3/4": _flipped(3),
}


@dataclass(frozen=True)
class Trial:
    """What came of one damaged file."""

    reward: str
    file: str
    damage: str
    outcome: str  # "refused", "same scores", "masked", "other scores", or "crashed"
    detail: str


@dataclass(frozen=True)
class Folder:
    """A whole small checkpoint, and what it scores."""

    reward: str
    path: Path
    values: torch.Tensor

    def files(self) -> list[str]:
        """The names of its files."""
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def trial(self, file: str, damage: str) -> Trial:
        """Damage one file, load the folder and score; the folder is left whole."""
        damaged, content = self.path / file, (self.path / file).read_bytes()
        left = DAMAGES[damage](content)
        damaged.unlink()  # a file may be mapped into memory: it is replaced, never written over
        if left is not None:
            damaged.write_bytes(left)
        try:
            outcome, detail = self._outcome()
        finally:
            damaged.unlink(missing_ok=True)
            damaged.write_bytes(content)
        return Trial(self.reward, file, damage, outcome, detail)

    def _outcome(self) -> tuple[str, str]:
        try:
            reward = load(self.reward, self.path)
            scores = reward.score(samples(reward), CONDITIONS)
        except BranchTreeError as error:
            return "refused", str(error)
        except Exception as error:  # what is looked for
            return "crashed", f"{type(error).__name__}: {error}"
        if not scores.valid.any():
            return "masked", str(scores.reasons)
        same = torch.equal(scores.values, self.values)
        return "same scores" if same else "other scores", f"{scores.values.tolist()} for {self.values.tolist()}"


def load(name: str, path: Path) -> RewardAdapter:
    """A reward of a folder, on the CPU."""
    return _loaded(name, str(path))


def _loaded(name: str, path: str) -> RewardAdapter:
    reward, _ = make_reward(name.partition("-")[0], {"path": path, **REWARDS[name]}, ("reward",))
    reward.load(CPU)
    return reward


def samples(reward: RewardAdapter) -> Media:
    """Two samples of smooth noise, of the kind that the reward scores."""
    coarse = torch.rand(2, 3, 3, 5, 6, generator=torch.Generator().manual_seed(7))
    fine = torch.nn.functional.interpolate(coarse.flatten(0, 1), (128, 128), mode="bilinear").unflatten(0, (2, 3))
    return Media(videos=fine, fps=8.0) if "video" in reward.modalities else Media(images=fine[:, 0])


def folder_of(name: str, at: Path, sums: bool) -> Folder:
    """A copy at ``at`` of the folder that ``random:small`` writes, with its SHA256SUMS if ``sums``."""
    made = _written(name)
    shutil.copytree(made, at)
    if sums:
        write_checksums(at)
    reward = load(name, at)
    scores = reward.score(samples(reward), CONDITIONS)
    assert bool(scores.valid.all()), scores.reasons
    return Folder(name, at, scores.values)


def _written(name: str) -> Path:
    """The folder that loading ``random:small`` leaves until the process ends."""
    reward: Any = _loaded(name, RANDOM_SMALL)
    files: Mapping[str, Path] = reward._backend._files if name == "unifiedreward" else reward._opened.files
    parents = next(iter(files.values())).parents
    return next(parent for parent in parents if parent.name.startswith("branchtree-small-"))


def sweep(folder: Folder, damages: Sequence[str] = tuple(DAMAGES)) -> Iterator[Trial]:
    """All trials of a folder."""
    return (folder.trial(file, damage) for file in folder.files() for damage in damages)


def main(words: Sequence[str]) -> None:
    """Sweep all rewards, or those named, and print what came of it."""
    sums = "--sums" in words
    names = [word for word in words if not word.startswith("-")] or list(REWARDS)
    counts: Counter[tuple[str, str]] = Counter()
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            for trial in sweep(folder_of(name, Path(scratch) / "folder", sums)):
                counts[trial.damage.partition(" ")[0], trial.outcome] += 1
                if trial.outcome in {"other scores", "crashed", "masked"}:
                    print(
                        f"{trial.reward} {trial.file} {trial.damage}: {trial.outcome}: {trial.detail[:300]}", flush=True
                    )
    for (damage, outcome), count in sorted(counts.items()):
        print(f"{damage:10} {outcome:14} {count}")


if __name__ == "__main__":
    main(sys.argv[1:])
