"""Which trainer a configuration is of."""

from __future__ import annotations

from pathlib import Path

from branchtree.errors import RecipeError
from branchtree.files.reading import require_file
from branchtree.migration.converted import PAGE, ConvertedConfig
from branchtree.migration.dance_grpo import convert_dance_grpo
from branchtree.migration.flow_grpo import convert_flow_grpo


def convert_file(path: Path, config: str | None, base: str | None, gpus: int | None) -> ConvertedConfig:
    """Return a recipe for a configuration file; see ``branchtree.convert_config``. Raises RecipeError."""
    if config is None and not path.exists() and ":" in path.name:  # as Flow-GRPO's scripts are given it
        file, _, config = str(path).rpartition(":")
        path = Path(file)
    require_file(path, RecipeError(f"no configuration file {path}"))
    if path.suffix == ".py":
        return convert_flow_grpo(path, config, base, gpus)
    if path.suffix == ".sh":
        if config is not None:
            raise RecipeError("--config names a function of a Python file, and a shell script has none; leave it out")
        return convert_dance_grpo(path, base, gpus)
    raise RecipeError(
        f"{path}: is neither a Python file of Flow-GRPO nor a shell script of DanceGRPO or MixGRPO; {PAGE} has a table "
        "for other trainers"
    )
