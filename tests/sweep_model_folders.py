"""Damage every file of the bundled models in turn, and see whether a damaged folder is refused or computes as before.

Run it as a script for all files: ``python tests/sweep_model_folders.py [--flips 8]``. It prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.wan import Wan, WanConfig
from PIL import Image
from torch import Tensor

import branchtree
from branchtree.errors import BranchTreeError
from branchtree.files.checksums import SUMS
from branchtree.plugins import Condition

ASSETS = Path(__file__).parents[1] / "adapters/branchtree_adapters/assets"
MODELS = ("digits_flux", "moving_digits_wan")
CPU = torch.device("cpu")
STEPS = 3


def flipped(content: bytes, name: str, number: int = 0) -> bytes:
    """The content with one bit flipped, the same for every run."""
    draw = random.Random(f"{name} {number}")
    position = draw.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << draw.randrange(8))]) + content[position + 1 :]


DAMAGE: dict[str, Callable[[bytes, str], bytes | None]] = {
    "deleted": lambda content, name: None,
    "truncated": lambda content, name: content[: len(content) // 2],
    "emptied": lambda content, name: b"",
    "zeroed": lambda content, name: bytes(len(content)),
    "flipped": flipped,
}


@dataclass(frozen=True)
class Case:
    """One damaged file of one model."""

    model: str
    file: str
    kind: str
    listed: bool  # whether the folder has its list of digests
    number: int = 0  # of the flipped bit

    def __str__(self) -> str:
        return f"{self.model}/{self.file} {self.kind}{'' if self.listed else ' unlisted'}"


@dataclass(frozen=True)
class Outcome:
    """``refused``, ``right`` (computes what the whole folder does), ``wrong`` or ``traceback``; and what was said."""

    kind: str
    message: str = ""


def files(model: str) -> list[str]:
    """All files of a bundled model but the list of digests."""
    root = ASSETS / model
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != SUMS)


def damaged(case: Case, folder: Path) -> Path:
    """Write the model's folder with the damage; whole files are links to the bundled ones."""
    source = ASSETS / case.model
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_file() and (case.listed or path.name != SUMS):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:  # another file system
                shutil.copyfile(path, target)
    if case.kind != "whole":
        target, content = folder / case.file, (source / case.file).read_bytes()
        target.unlink()
        new = (
            flipped(content, case.file, case.number)
            if case.kind == "flipped"
            else DAMAGE[case.kind](content, case.file)
        )
        if new is not None:
            target.write_bytes(new)
    return folder


@torch.no_grad()
def computed(model: str, folder: Path, image: Path) -> list[Tensor]:
    """All that a run takes from a model: encodings, the time grid, a prediction and its decoded samples."""
    adapter: Any
    if model == "digits_flux":
        adapter = Flux(FluxConfig(path=str(folder), height=32, width=32, guidance=0.0))
        conditions = [Condition("a handwritten seven"), Condition("the digit two")]
    else:
        adapter = Wan(WanConfig(path=str(folder), height=32, width=32, frames=5, guidance=1.0))
        conditions = [Condition("a seven moving left", image=image), Condition("a two moving up", image=image)]
    adapter.footprint()
    adapter.load(CPU, torch.float32, torch.float32)
    encoded = adapter.encode(conditions)
    noise = torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    velocity = adapter.predict(noise, torch.tensor([0.7, 0.2]), encoded)
    return [*encoded.values(), adapter.sigmas(STEPS), velocity, adapter.decode(noise).pixels]


def write_image(folder: Path) -> Path:
    """A first frame for videos."""
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(folder / "frame.png")
    return folder / "frame.png"


class Sweep:
    """Judges cases; keeps what the whole models compute."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._image = write_image(folder)
        self._whole: dict[str, list[Tensor]] = {}

    def judge(self, case: Case) -> Outcome:
        """Compute with a damaged folder, and compare with the whole one."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            found = computed(case.model, damaged(case, folder), self._image)
        except BranchTreeError as error:
            return Outcome("refused", str(error))
        except Exception:
            return Outcome("traceback", traceback.format_exc())
        finally:
            shutil.rmtree(folder)
        if case.model not in self._whole:
            self._whole[case.model] = computed(case.model, ASSETS / case.model, self._image)
        whole = self._whole[case.model]
        same = len(found) == len(whole) and all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
        return Outcome("right" if same else "wrong")


def trained(case: Case, folder: Path) -> None:
    """One iteration of training with a damaged folder."""
    short = {"tree.steps": 3, "tree.splits": [0], "evaluation": None, "run.iterations": 1, "run.sample_prompts": 1}
    changes = {**short, "model.path": str(damaged(case, folder / "model"))}
    recipe = "quickstart" if case.model == "digits_flux" else "wan_quickstart"
    branchtree.train(recipe, changes, output=folder / "run")


def cases(listed: bool, flips: int = 1) -> Iterator[Case]:
    """Every file and kind of damage."""
    for model in MODELS:
        for file in files(model):
            for kind in DAMAGE:
                yield from (Case(model, file, kind, listed, n) for n in range(flips if kind == "flipped" else 1))


def table(results: Sequence[tuple[Case, Outcome]]) -> str:
    """Count the outcomes of each kind of damage."""
    counts = Counter((case.listed, case.kind, outcome.kind) for case, outcome in results)
    kinds = ("refused", "right", "wrong", "traceback")
    lines = [f"{'digests':8} {'damage':10}" + "".join(f"{kind:>10}" for kind in kinds)]
    for listed in (True, False):
        for damage in DAMAGE:
            row = "".join(f"{counts[listed, damage, kind]:>10}" for kind in kinds)
            lines.append(f"{'listed' if listed else 'none':8} {damage:10}{row}")
    return "\n".join(lines)


def main() -> None:
    """Judge every case, print the table, and what was neither refused nor right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1, help="flipped bits of each file, one at a time")
    flips = parser.parse_args().flips
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder))
        results = [(case, sweep.judge(case)) for listed in (True, False) for case in cases(listed, flips)]
    for case, outcome in results:
        named = outcome.kind == "right" or Path(case.file).parts[0] in outcome.message
        if outcome.kind in {"wrong", "traceback"} or not named:
            print(f"{case}: {outcome.kind} {outcome.message[-600:]}")
    print(table(results))


if __name__ == "__main__":
    main()
