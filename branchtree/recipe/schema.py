"""The keys of a recipe, their types, defaults and meaning. Every key can be overridden; unknown ones are errors."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from branchtree.core.schedule import PRESET_SPLITS
from branchtree.files.names import checked_name
from branchtree.files.paths import LocalPath, PathKey

Seed = Annotated[int, Field(ge=0, lt=2**63)]
PromptFile = Annotated[str, PathKey(always=True, names=("hub:",))]
Momentum = Annotated[float, Field(ge=0, lt=1)]

MOST_LEAVES = 2**16
"""Of one prompt's tree."""
MOST_NODES = 2**19
"""Of all trees of an iteration; their indices alone are worked with before anything is planned."""


class Section(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginSection(BaseModel):
    """A choice of plug-in; keys that are not ours are the plug-in's own, and it validates them."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's own keys."""
        return dict(self.model_extra or {})


class ModelSection(PluginSection):
    """``model``: which model family; its other keys (path, size, guidance) belong to the adapter."""

    adapter: str
    start: LocalPath | None = None  # weights to start from: a run, one of its checkpoints, a LoRA's file or folder


class RewardSection(PluginSection):
    """An entry of ``rewards``: a reward by name and its weight; other keys belong to the reward."""

    reward: str
    weight: float = Field(default=1.0, ge=-1e6, le=1e6)  # at 0 the reward is only looked at
    label: str | None = None  # its name in metrics; the reward's by default


class CallbackSection(PluginSection):
    """An entry of ``callbacks``: a callback by name; other keys belong to it."""

    callback: str


class LoraSection(Section):
    """``lora``: train low-rank weights; leave the section out, or null, to train the whole denoiser."""

    rank: int = Field(ge=1, le=4096)
    alpha: float | None = Field(default=None, gt=0, le=1e6)  # twice the rank by default
    targets: tuple[str, ...] | None = None  # module names; the adapter's own by default


class DrawSection(Section):
    """``tree.draw``: where a drawn split may fall, as parts of the steps."""

    first: float = Field(default=0.3, ge=0, lt=1)
    last: float = Field(default=0.75, gt=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> DrawSection:
        if self.first > self.last:
            raise ValueError(f"first is {self.first}, after last, {self.last}")
        return self


class WindowSection(Section):
    """``tree.window``: the sliding window of SDE steps under ``tree.sde: window``."""

    size: int = Field(default=4, ge=1)
    start: int = Field(default=0, ge=0)
    every: int = Field(default=30, ge=1)  # iterations per move
    stop: int | None = Field(default=None, ge=0)  # the first step's last place; as deep as the grid allows by default

    @model_validator(mode="after")
    def _moves_deeper(self) -> WindowSection:
        if self.stop is not None and self.stop < self.start:
            raise ValueError(f"a window cannot start at step {self.start} and stop before it, at {self.stop}")
        return self


class TreeSection(Section):
    """``tree``: the shape of the tree."""

    steps: int = Field(default=20, ge=2, le=1000)
    splits: str | tuple[int, ...] = "dense"  # dense, mixed, sparse, single, window, or a list of steps
    branches: int | tuple[int, ...] = 2  # children at a split: for all, or one number per split
    draw: DrawSection = DrawSection()
    siblings: Literal["correlated", "independent", "simplex"] = "correlated"
    strength: float = Field(default=4.0, gt=0, le=1e3)  # s of correlated siblings
    sde: Literal["all", "splits", "window"] = "all"  # stochastic steps beside the splits
    window: WindowSection = WindowSection()
    # Steps of the grid that are walked after a prompt's last stochastic one, evenly spread; all of them by default.
    continuation: int | None = Field(default=None, ge=3)
    solver: Literal["euler", "dpm2m"] = "euler"  # of those steps; dpm2m is DPM-Solver++(2M)
    continuation_check: int = Field(default=20, ge=1)  # iterations between comparisons with the whole grid
    timestep_fraction: float = Field(default=1.0, gt=0, le=1)  # part of its stochastic steps that a trajectory trains
    noise_seed: Seed = 1223627  # of the initial noise

    @field_validator("splits")
    @classmethod
    def _known_preset(cls, splits: str | tuple[int, ...]) -> str | tuple[int, ...]:
        names = [*PRESET_SPLITS, "single", "window"]
        if isinstance(splits, str) and splits not in names:
            raise ValueError(f"'{splits}' is no preset; write {', '.join(names)}, or a list of steps")
        if not isinstance(splits, str) and list(splits) != sorted(set(splits)):
            raise ValueError("split steps must rise")
        return splits

    @field_validator("branches")
    @classmethod
    def _at_least_two(cls, branches: int | tuple[int, ...]) -> int | tuple[int, ...]:
        factors = (branches,) if isinstance(branches, int) else branches
        if any(factor < 2 for factor in factors):
            raise ValueError("a split needs at least 2 children")
        return branches

    @model_validator(mode="after")
    def _inside_grid(self) -> TreeSection:
        splits = self.split_steps
        outside = [step for step in splits if not 0 <= step <= self.steps - 2]
        if outside:
            raise ValueError(
                f"split step {outside[0]} lies outside the grid: with {self.steps} steps, steps 0 to {self.steps - 2} "
                "can split (the last one is deterministic)"
            )
        if self.splits == "window" and self.sde != "window":
            raise ValueError(f"splits: window splits at the first step of the SDE window, but sde is '{self.sde}'")
        if self.sde == "window" and self.window.start + self.window.size > self.steps - 1:
            raise ValueError(
                f"a window of {self.window.size} steps from step {self.window.start} does not fit: "
                f"{self.steps - 1} steps can be stochastic"
            )
        if self.sde == "window" and self.window.stop is not None and self.window.stop > self.steps - 2:
            raise ValueError(
                f"a window cannot slide down to step {self.window.stop}: steps 0 to {self.steps - 2} can be stochastic"
            )
        if not isinstance(self.branches, int) and len(self.branches) != max(len(splits), 1):
            raise ValueError(f"{len(splits)} splits need as many branch factors, not {len(self.branches)}")
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> TreeSection:
        count = {"all": self.steps - 1, "splits": max(len(self.split_steps), 1), "window": self.window.size}[self.sde]
        if int(self.timestep_fraction * count) == 0:
            raise ValueError(
                f"timestep_fraction {self.timestep_fraction} of a trajectory's {count} stochastic steps is less than "
                "one: nothing would be trained"
            )
        return self

    @model_validator(mode="after")
    def _of_bearable_size(self) -> TreeSection:
        factors = list(self.factors.values())
        leaves = math.prod(factors)
        if leaves > MOST_LEAVES:
            product = " x ".join(map(str, factors[:6])) + (" x ..." if len(factors) > 6 else "")
            shown = f"{product} = {leaves}" if len(factors) > 1 and leaves < 10**15 else product
            raise ValueError(f"branches: {shown} leaves for each prompt are too many; at most {MOST_LEAVES}")
        return self

    @property
    def factors(self) -> dict[int, int]:
        """The split steps and their branch factors; one that is drawn or slides stands at the first step."""
        steps = self.split_steps or (() if self.splits == () else (0,))
        branches = (self.branches,) * len(steps) if isinstance(self.branches, int) else self.branches
        return dict(zip(steps, branches, strict=False))

    @property
    def most_nodes(self) -> int:
        """The nodes of one prompt's tree, or as many as it can have where its split is drawn or slides."""
        factors, width, nodes = self.factors, 1, 1
        for step in range(self.steps):
            width *= factors.get(step, 1)
            nodes += width
        return nodes

    @property
    def split_steps(self) -> tuple[int, ...]:
        """The fixed split steps; none where they are drawn."""
        if isinstance(self.splits, str):
            return PRESET_SPLITS.get(self.splits, ())
        return self.splits


class SamplerSection(Section):
    """``sampler``: the stochastic step and the time grid."""

    kind: Literal["dance", "flow", "cps", "ddim"] = "dance"
    eta: float = Field(default=0.3, ge=1e-8, le=10)  # under cps and ddim at most 1
    grid: Literal["linear", "pipeline"] = "linear"  # pipeline: the model's own schedule, shift included
    shift: float = Field(default=3.0, ge=0.01, le=100)  # of the linear grid
    log_prob: Literal["mean", "sum"] = "mean"  # over latent dimensions

    @field_validator("eta")
    @classmethod
    def _at_most_all_noise(cls, eta: float, info: ValidationInfo) -> float:
        kind = info.data.get("kind")
        if kind in {"cps", "ddim"} and eta > 1:
            raise ValueError(f"{kind} takes an eta up to 1, at which all noise of a step is fresh")
        return eta


class CreditSection(Section):
    """``credit``: from leaf rewards to advantages."""

    beta: float = Field(default=1.0, ge=0, le=1e6)
    path_scale: Literal["mean", "sum", "standardised"] = "mean"
    advantage: Literal["depth", "leaf", "sibling"] = "depth"
    combine: Literal["advantages", "rewards"] = "advantages"
    eps: float = Field(default=1e-8, gt=0, le=1e6)
    clip: float = Field(default=5.0, gt=0, le=1e6)


class PruningSection(Section):
    """``pruning``: edges left out of the gradient pass."""

    kind: Literal["none", "parent_top1", "extreme", "depth"] = "none"
    count: int = Field(default=4, ge=1)  # extreme: leaves kept at each end
    size: int = Field(default=4, ge=1)  # depth: steps in the window
    every: int = Field(default=30, ge=1)  # depth: iterations per move
    stop: int = Field(default=15, ge=0)  # depth: where the window's first step stops


class LossSection(Section):
    """``loss``: the clipped objective."""

    clip_range: float = Field(default=1e-4, gt=0, le=1e6)
    kl: float = Field(default=0.0, ge=0, le=1e6)  # weight of the KL to the start policy
    kl_every: int | None = Field(default=None, ge=1)  # iterations between measurements of it where it has no weight
    weighting: Literal["none", "noise"] = "none"  # noise: each step by its noise, of mean 1 over the grid
    # Behaviour densities after an iteration's first optimiser step: those of the rollout, or computed again, at the
    # price of a forward, in the batches that are trained, which leaves no numerical mismatch.
    old_log_prob: Literal["rollout", "recomputed"] = "rollout"


class OptimSection(Section):
    """``optim``: AdamW and what surrounds it."""

    lr: float = Field(default=1e-5, gt=0, le=1e6)
    weight_decay: float = Field(default=1e-4, ge=0, le=10)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=1e-30, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e12)
    # Norm before clipping above which an update is left out.
    refuse_above: float | None = Field(default=None, gt=0, le=1e12)
    max_refused: int = Field(default=3, ge=0)  # updates left out in a row, for this or for not being finite
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)  # optimiser steps
    steps_per_iteration: int = Field(default=1, ge=1, le=1000)
    ema: float | None = Field(default=None, gt=0, lt=1)


class BatchSection(Section):
    """``batch``: how much at a time. Only ``prompts`` changes results by more than rounding."""

    prompts: int = Field(default=2, ge=1)  # per iteration, over all processes
    rollout_rows: int | None = Field(default=None, ge=1)  # predictions per forward; all of a depth by default
    update_rows: int | None = Field(default=None, ge=1)  # families per forward and backward; all by default
    decode_rows: int | None = Field(default=None, ge=1)  # leaves decoded and scored at a time
    rollout_prompts: int | None = Field(default=None, ge=1)  # that go on together after the last split
    states: Literal["device", "host"] = "device"  # where the tree's states are kept
    processes_per_prompt: int = Field(default=1, ge=1)  # that share each prompt's tree, every one a run of its leaves


class ScoringSection(Section):
    """``scoring``: how leaves are scored, and when failing rewards end the run. Nothing here changes a result."""

    overlap: bool = True  # decode and score while trees grow and the gradient pass begins
    max_invalid: float = Field(default=0.5, ge=0, le=1)  # share of samples a reward may fail on before the run ends
    window: int = Field(default=3, ge=1, le=10_000)  # iterations that the share is taken over


class DataSection(Section):
    """``data``: the prompts."""

    prompts: PromptFile | tuple[str, ...]  # a .txt, .jsonl or .parquet file, hub:org/name, or the prompts themselves
    column: str = "prompt"
    split: str = "train"
    folder: LocalPath | None = None  # where images and videos lie; by default the folder of the prompt file
    shuffle: bool = True


class EvaluationSection(Section):
    """``evaluation``: held-out figures, from deterministic samples of fixed noises, before and after training."""

    prompts: PromptFile | tuple[str, ...]
    column: str = "prompt"
    split: str = "test"
    folder: LocalPath | None = None
    rewards: tuple[RewardSection, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)  # use only the first prompts
    noises: int = Field(default=1, ge=1, le=1000)  # samples per prompt
    every: int | None = Field(default=None, ge=1)  # iterations; only before and after by default
    rows: int = Field(default=64, ge=1)  # samples at a time
    seed: Seed = 7


class RunSection(Section):
    """``run``: length, precision, and what is written when."""

    iterations: int = Field(default=300, ge=1, le=10**7)
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = True
    gradient_checkpointing: bool = False
    compile: str | None = None  # torch.compile's back-end for the denoiser's blocks, such as inductor; none by default
    # Keep encoded prompts for later runs: in a folder, or, by the word user, in the user's cache folder.
    embeddings: Annotated[str, PathKey(always=True, names=("user",))] | None = None
    # The folder's size, above which the least recently used give way.
    embeddings_gib: float = Field(default=50.0, gt=0, le=1e6)
    checkpoint_every: int = Field(default=40, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    checkpoint_async: bool = False  # write them while training goes on
    sample_every: int = Field(default=20, ge=1)
    sample_prompts: int = Field(default=8, ge=1)
    tree_every: int = Field(default=20, ge=1)  # iterations between recorded trees
    trackers: tuple[str, ...] = ()  # accelerate's: tensorboard, wandb, ...
    threads: int | None = Field(default=None, ge=1, le=256)
    timeout: float = Field(default=120.0, gt=0, le=10080)  # minutes that processes wait for each other, at most


SINGLE: dict[str, dict[str, Any]] = {
    "tree": {"branches": 16, "siblings": "independent", "sde": "splits"},
    "credit": {"advantage": "leaf"},
}
"""What goes with ``tree.splits: single`` unless a recipe says otherwise."""


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, AfterValidator(checked_name)]
    description: str = ""
    seed: Seed = 42
    model: ModelSection
    lora: LoraSection | None = None
    tree: TreeSection = TreeSection()
    sampler: SamplerSection = SamplerSection()
    rewards: tuple[RewardSection, ...] = Field(min_length=1)
    credit: CreditSection = CreditSection()
    pruning: PruningSection = PruningSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    batch: BatchSection = BatchSection()
    scoring: ScoringSection = ScoringSection()
    data: DataSection
    evaluation: EvaluationSection | None = None
    run: RunSection = RunSection()
    callbacks: tuple[CallbackSection, ...] = ()

    @model_validator(mode="after")
    def _trees_of_bearable_size(self) -> Recipe:
        prompts, nodes = self.batch.prompts, self.tree.most_nodes
        if prompts * nodes > MOST_NODES:
            raise ValueError(
                f"batch.prompts {prompts} x {nodes} nodes of a tree = {prompts * nodes} are too many for one "
                f"iteration; at most {MOST_NODES}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete_single(cls, data: Any) -> Any:
        """``single`` splits once, widely, with nothing else stochastic: its other keys follow from that."""
        tree = data.get("tree") if isinstance(data, dict) else None
        if not isinstance(tree, dict) or tree.get("splits") != "single":
            return data
        given = {section: data.get(section) or {} for section in SINGLE}
        if not all(isinstance(keys, dict) for keys in given.values()):
            return data
        return {**data, **{section: {**SINGLE[section], **keys} for section, keys in given.items()}}

    @property
    def autocast(self) -> bool:
        """Whether the denoiser runs under autocast: in bfloat16 with float32 weights, which are trained in full.

        A base that LoRA freezes is in bfloat16 itself.
        """
        return self.run.precision == "bf16" and self.lora is None
