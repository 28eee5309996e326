"""Adaptive splits on a real task: where the noise ends does not depend on where it starts."""

import json
import math
from pathlib import Path
from typing import Any

from branchtree import train

QUIET = {"run.checkpoint_every": 10**6, "run.sample_every": 10**6, "run.tree_every": 10**6, "evaluation": None}


def trained(folder: Path, eta: float) -> list[dict[str, Any]]:
    """Return the metrics of 40 iterations that start with noise ``eta``."""
    train("unicycle+adaptive", {**QUIET, "sampler.eta": eta, "run.iterations": 40}, output=folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_noise_ends_at_the_same_level_from_both_sides(tmp_path: Path) -> None:
    """Starts are a factor of 10 apart, and 640 trees bring the error of each level to some tenths of itself.

    The last steps that may split spread most for their rows. With twice the noise of what is found the policy's samples
    suffer, and it learns less.
    """
    low, high = trained(tmp_path / "low", 0.3), trained(tmp_path / "high", 3.0)
    assert (low[0]["split/eta"], high[0]["split/eta"]) == (0.3, 3.0)
    level = [math.exp(sum(math.log(row["split/eta"]) for row in rows[-10:]) / 10) for rows in (low, high)]
    assert all(0.1 < each < 1.0 for each in level)
    assert abs(math.log(level[1] / level[0])) < math.log(2.5)
    assert all(sum(row["split/step"] for row in rows[-10:]) / 10 > 7 for rows in (low, high))
