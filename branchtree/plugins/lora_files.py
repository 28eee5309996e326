"""LoRA files of other programs: what a model adapter says of one that it read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file as it was understood."""

    path: str
    kind: str  # how its keys are named
    layers: int
    ranks: tuple[int, ...]  # all that there are, ascending
    strengths: tuple[float, ...]  # factors of B A, alpha over rank in most files, ascending
    targets: Mapping[str, int]  # by ending of the layers' names, how many layers

    def __str__(self) -> str:
        """Return one line for a person."""
        targets = ", ".join(f"{name} ({count})" for name, count in self.targets.items())
        ranks, strengths = (", ".join(f"{one:.6g}" for one in values) for values in (self.ranks, self.strengths))
        return f"{self.path}: {self.kind}, rank {ranks}, strength {strengths}, on {self.layers} layers: {targets}"


@runtime_checkable
class LoadsLora(Protocol):
    """A model that can take a LoRA file of any common kind, whatever the recipe trains."""

    def load_lora(self, source: Path) -> LoraSummary:
        """Put a LoRA file, or a folder with one, on the loaded model in place of any other LoRA.

        The model then acts as the program that the file is for has it act; ``without_lora`` switches it off. Raises
        CheckpointError for a file that is damaged, or has keys that fit nothing in the model.
        """
