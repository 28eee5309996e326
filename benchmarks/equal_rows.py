"""What a budget of denoiser rows buys: `single`, Dense, and 16 trajectories on the small FLUX, several seeds.

A row of the rollout counts as 1, a trained row (forward and backward) as 3. Every variant gets the same prompts,
optimiser and budget, and so as many iterations as the budget allows.

    python benchmarks/equal_rows.py --rows 93760 --seeds 3
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from branchtree.cli.compare import sheet_table
from branchtree.studies.compare import Budget, ComparisonRequest, Row, run_comparison
from branchtree.studies.compare.table import reward_sheet, work_sheet

QUIET = {"run.checkpoint_every": 10**6, "run.sample_every": 10**6, "run.tree_every": 10**6}
ROWS = (
    Row("16 trajectories", "quickstart", {"tree.splits": [0], "tree.branches": 16, "tree.siblings": "independent"}),
    Row("Dense", "quickstart"),
    Row("single", "quickstart_single"),
)


def main() -> None:
    """Print one line per run and tables of means and standard deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=93_760)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    request = ComparisonRequest(ROWS, tuple(range(arguments.seeds)), Budget(rows=arguments.rows), QUIET)
    with tempfile.TemporaryDirectory() as folder:
        comparison = run_comparison(request, Path(folder), tell=lambda line: print(line, flush=True))
    for sheet in (*work_sheet(comparison).split(6), *reward_sheet(comparison).split(3)):
        console.print(sheet_table(sheet))


if __name__ == "__main__":
    main()
