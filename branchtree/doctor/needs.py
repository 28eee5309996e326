"""What a recipe needs beside a device: prompts, weights, disk space, and licences that suit its use."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from branchtree.data.prompts import HUB, held_out_conditions, training_conditions
from branchtree.doctor.check import Check
from branchtree.doctor.hub import GB, Hub, Repository, cache_folder, is_hub_id, look_up
from branchtree.files.names import default_output
from branchtree.planning.memory import trained_numbers
from branchtree.planning.plan import RunPlan
from branchtree.plugins.protocols import SizedReward
from branchtree.plugins.registry import registry
from branchtree.plugins.values import RewardCard
from branchtree.recipe import Recipe
from branchtree.recipe.build import make_reward
from branchtree.recipe.schema import RewardSection

PUBLISHED_BYTES = 2  # of a number in most published weights
CHECKPOINT_NUMBERS = 3  # for each trained one: the weight and AdamW's two moments; a moving average is one more
NUMBER_BYTES = 4
ROOM = 10**8
"""What a run's pictures, logs and report take, at least."""


def check_prompts(recipe: Recipe) -> Iterator[Check]:
    """Read the prompts. Raises DataError for one that cannot be used."""
    for name, section in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        if section is None:
            continue
        if isinstance(section.prompts, str) and section.prompts.startswith(HUB):
            installed = importlib.util.find_spec("datasets") is not None
            text = f"{name}: {section.prompts} is read when the run starts"
            remedy = "" if installed else "pip install 'branchtree-grpo[hub]', for the package datasets"
            yield Check("prompts", "ok" if installed else "fail", text, remedy)
            continue
        where = section.prompts if isinstance(section.prompts, str) else "the recipe"
        count = len(training_conditions(recipe.data) if name == "data" else held_out_conditions(recipe.evaluation))
        yield Check("prompts", "ok", f"{name}: {count} prompts in {where}")


def check_plan(plan: RunPlan) -> Check:
    """Say what an iteration is, which is known once model, prompts and rewards fit together."""
    work = f"{plan.rollout_rows} rollout rows and {plan.gradient_rows} gradient rows an iteration"
    return Check("plan", "ok", f"{plan.recipe.name}: {work}")


def _reward_sections(recipe: Recipe) -> list[RewardSection]:
    """Return the rewards of a recipe, those with the same settings once."""
    sections = [*recipe.rewards, *(recipe.evaluation.rewards if recipe.evaluation else ())]
    return list({f"{section.reward} {sorted(section.options.items())!r}": section for section in sections}.values())


def check_rewards(recipe: Recipe) -> Iterator[Check]:
    """Name each reward's checkpoint and licence. Raises PluginError for one that is not installed."""
    for section in _reward_sections(recipe):
        card = registry().reward(section.reward).card
        if card is None:
            yield Check("reward", "warn", f"{section.reward}: its plug-in states no licence", "ask its authors")
            continue
        yield _licence(section, card)


def _licence(section: RewardSection, card: RewardCard) -> Check:
    own = section.options.get("path")
    checkpoint = f"{own} in place of {card.checkpoint}" if own else card.checkpoint
    text = f"{section.reward}: checkpoint {checkpoint}; licence {card.licence}"
    if card.non_commercial:
        return Check("reward", "warn", f"{text} (non-commercial)", "do not use what it trains commercially")
    if card.non_commercial is None:
        return Check("reward", "warn", f"{text} (may be non-commercial)", "look at the licence before commercial use")
    return Check("reward", "ok", text)


def repositories(recipe: Recipe, plan: RunPlan, hub: Hub) -> Iterator[Repository]:
    """Look up the repositories that a recipe reads: its model's, and those of its rewards."""
    path, revision = recipe.model.options.get("path"), recipe.model.options.get("revision")
    if is_hub_id(path):
        numbers = plan.footprint.denoiser_parameters + plan.footprint.frozen_parameters
        yield look_up(hub, str(path), revision, numbers * PUBLISHED_BYTES, whole=True)
    for section in _reward_sections(recipe):
        adapter, config = make_reward(section.reward, section.options, (section.reward,))
        path = getattr(config, "path", None)
        if is_hub_id(path):
            card = registry().reward(section.reward).card
            size = card.size if card is not None else None
            if size is None and isinstance(adapter, SizedReward) and (footprint := adapter.footprint()) is not None:
                size = footprint.weights
            yield look_up(hub, str(path), getattr(config, "revision", None), size or 0, whole=False)


def check_disk(recipe: Recipe, plan: RunPlan, downloads: int) -> Iterator[Check]:
    """Compare free disk space with what is still to be downloaded, and with the checkpoints of a run."""
    trained = trained_numbers(recipe, plan.footprint)
    kept = recipe.run.keep_checkpoints + 1  # an older one is deleted once the newer is whole
    numbers = CHECKPOINT_NUMBERS + bool(recipe.optim.ema)
    needs = [
        _Need("downloads", cache_folder(), downloads, "set HF_HOME to a larger disk"),
        _Need(
            f"{kept} checkpoints",
            default_output(recipe.name),
            trained * numbers * NUMBER_BYTES * kept + ROOM,
            "give --output on a larger disk, or lower run.keep_checkpoints",
        ),
    ]
    disks: dict[int, list[_Need]] = {}
    for need in (need for need in needs if need.size):
        disks.setdefault(need.existing.stat().st_dev, []).append(need)
    for together in disks.values():
        yield _space(together)


@dataclass(frozen=True)
class _Need:
    what: str
    folder: Path
    size: int
    remedy: str

    @property
    def existing(self) -> Path:
        """The folder, or the innermost one around it that is there."""
        whole = self.folder.absolute()
        return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def _space(needs: Sequence[_Need]) -> Check:
    """Compare what is needed on one disk with its free space."""
    free = shutil.disk_usage(needs[0].existing).free
    named = " and ".join(f"{need.what} need about {need.size / GB:.1f} GB" for need in needs)
    folders = " and ".join(dict.fromkeys(str(need.existing) for need in needs))
    text = f"{free / GB:.1f} GB are free in {folders}; {named}"
    if free >= sum(need.size for need in needs):
        return Check("disk", "ok", text)
    return Check("disk", "fail", text, f"free space there, or {'; or '.join(need.remedy for need in needs)}")
