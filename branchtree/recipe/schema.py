"""The keys of a recipe, their types, defaults and meaning. Every key can be overridden; unknown ones are errors."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)

from branchtree.core.schedule import PRESET_SPLITS
from branchtree.files.names import checked_name
from branchtree.files.paths import LocalPath, PathKey

LARGEST_ETA = 10
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PromptFile = Annotated[str, PathKey(always=True, names=("hub:",))]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Eta = Annotated[float, Field(ge=1e-8, le=LARGEST_ETA)]

MOST_LEAVES = 2**16
"""Leaves that one prompt's tree may have."""
MOST_NODES = 2**19
"""Nodes that all trees of an iteration may have; planning already needs memory for their indices."""


class Section(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginSection(BaseModel):
    """A choice of plug-in; keys that are not listed here belong to the plug-in, which validates them."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's own keys."""
        return dict(self.model_extra or {})


class Choice(PluginSection):
    """``name``: a rule of the method that a plug-in registers; other keys belong to the rule."""

    name: str = Field(description="The rule's name; `branchtree plugins` lists them.")


class ModelSection(PluginSection):
    """``model``: the model family; other keys (path, size, guidance) belong to the adapter."""

    adapter: str = Field(description="The model family's name; `branchtree plugins` lists them.")
    start: LocalPath | None = Field(
        default=None, description="Weights to start from: a run, one of its checkpoints, a LoRA's file or folder."
    )
    quantize: Literal["int8", "int4", "nf4"] | None = Field(
        default=None,
        description="The bits of the weights that `lora` freezes, in the linear layers of the denoiser's blocks; "
        "all bits of `run.precision` by default.",
    )


class RewardSection(PluginSection):
    """An entry of ``rewards``: a reward by name and its weight; other keys belong to the reward."""

    reward: str = Field(description="The reward's name; `branchtree plugins` lists them.")
    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="The weight of its advantage, or of its raw reward; a reward of weight 0 is only observed.",
    )
    label: str | None = Field(
        default=None, description="Its name in metrics, unique within its list; the reward's name by default."
    )


class CallbackSection(PluginSection):
    """An entry of ``callbacks``: a callback by name; other keys belong to the callback."""

    callback: str = Field(description="The callback's name; `branchtree plugins` lists them.")


class LoraSection(Section):
    """``lora``: train low-rank weights; leave the section out, or null, to train the whole denoiser."""

    rank: int = Field(ge=1, le=4096, description="Rank of the update.")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="The update is scaled by alpha over rank; twice the rank by default."
    )
    targets: tuple[str, ...] | None = Field(
        default=None, description="Names of the modules that are trained; the adapter chooses by default."
    )


class DrawSection(Section):
    """``tree.draw``: the range from which a split is drawn, as fractions of the steps."""

    first: float = Field(
        default=0.3, ge=0, lt=1, description="The earliest step that can be drawn, as a fraction of `tree.steps`."
    )
    last: float = Field(default=0.75, gt=0, lt=1, description="The latest step that can be drawn, as such a fraction.")

    @model_validator(mode="after")
    def _in_order(self) -> DrawSection:
        if self.first > self.last:
            raise ValueError(f"first is {self.first}, after last, {self.last}")
        return self


class AdaptiveSection(Section):
    """``tree.adaptive``: how trees split under ``tree.splits: adaptive``."""

    explore: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="The share of the splits that are drawn evenly over the steps of `tree.draw`.",
    )
    memory: int = Field(default=40, ge=1, description="Trees over which the spread at a step is averaged.")
    most: int | None = Field(
        default=None, ge=2, description="The most children of a split; twice `tree.branches` by default."
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        description="The most predictions of an iteration's rollouts; by default those of `tree.branches` children for "
        "each prompt at the step where they take least.",
    )
    by_prompt: bool = Field(default=True, description="Give more children to prompts whose siblings spread more.")
    drop: float | None = Field(
        default=0.05,
        gt=0,
        le=10,
        description="The noise of a split is moved until its children's mean reward lies this fraction of their spread "
        "below that of a child that takes the deterministic step; null leaves it at `sampler.eta`.",
    )


class WindowSection(Section):
    """``tree.window``: the sliding window of SDE steps under ``tree.sde: window``."""

    size: int = Field(default=4, ge=1, description="Steps in the window.")
    start: int = Field(default=0, ge=0, description="The step at which the window starts when training begins.")
    every: int = Field(default=30, ge=1, description="Iterations before the window moves one step deeper.")
    stop: int | None = Field(
        default=None,
        ge=0,
        description="The deepest step at which the window may start; as deep as the grid allows by default.",
    )

    @model_validator(mode="after")
    def _moves_deeper(self) -> WindowSection:
        if self.stop is not None and self.stop < self.start:
            raise ValueError(f"a window cannot start at step {self.start} and stop before it, at {self.stop}")
        return self


class TreeSection(Section):
    """``tree``: the shape of the tree."""

    steps: int = Field(
        default=20, ge=2, le=1000, description="T, the number of denoising steps in a rollout and in an evaluation."
    )
    splits: str | tuple[int, ...] = Field(
        default="dense",
        description="Steps at which every node gets several children: `dense`, `mixed`, `sparse`, "
        "`single`, `window`, `adaptive`, or a list of steps.",
    )
    branches: int | tuple[int, ...] = Field(
        default=2, description="K, the children of a node at a split: one number for all splits, or one for each."
    )
    draw: DrawSection = Field(default=DrawSection(), description="The range from which a split is drawn.")
    adaptive: AdaptiveSection = Field(default=AdaptiveSection(), description="Splits that follow from earlier ones.")
    join: int | tuple[int, ...] = Field(
        default=1,
        description="How many of the grid's steps the stochastic step of a split takes as one: one number for all "
        "splits, or one for each.",
    )
    siblings: Literal["correlated", "independent", "simplex"] = Field(
        default="correlated", description="How the noises of one parent's children relate to each other."
    )
    strength: float = Field(
        default=4.0, gt=0, le=1e3, description="s: the correlation of `correlated` siblings' noises is 1 / (1 + s^2)."
    )
    sde: Literal["all", "splits", "window"] = Field(
        default="all",
        description="Which steps are stochastic: `all` but the last, only the `splits`, or the splits and a sliding "
        "`window`.",
    )
    window: WindowSection = Field(default=WindowSection(), description="The sliding window.")
    continuation: int | None = Field(
        default=None,
        ge=3,
        description="How many of the grid's steps are taken after a prompt's last stochastic one, evenly "
        "spaced; all of them by default.",
    )
    solver: Literal["euler", "dpm2m"] = Field(
        default="euler",
        description="The solver of the steps after a prompt's last stochastic one: Euler's method, or "
        "`dpm2m`, DPM-Solver++(2M).",
    )
    continuation_check: int = Field(
        default=20, ge=1, description="Iterations between comparisons of a shortened continuation with the whole grid."
    )
    timestep_fraction: float = Field(
        default=1.0, gt=0, le=1, description="The fraction of its stochastic steps that each trajectory trains."
    )
    noise_seed: Seed = Field(default=1223627, description="Seed of the initial noise.")
    split_rule: Choice | None = Field(
        default=None, description="A rule for where trees split, by name, instead of `splits`."
    )
    sibling_noise: Choice | None = Field(
        default=None, description="A relation between siblings' noises, by name, instead of `siblings`."
    )

    @field_validator("splits")
    @classmethod
    def _known_preset(cls, splits: str | tuple[int, ...]) -> str | tuple[int, ...]:
        names = [*PRESET_SPLITS, "single", "window", "adaptive"]
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

    @field_validator("join")
    @classmethod
    def _at_least_itself(cls, join: int | tuple[int, ...]) -> int | tuple[int, ...]:
        lengths = (join,) if isinstance(join, int) else join
        if any(length < 1 for length in lengths):
            raise ValueError("a split takes at least its own step")
        return join

    @model_validator(mode="after")
    def _joins_between_splits(self) -> TreeSection:
        splits = self.split_steps
        if not isinstance(self.join, int) and len(self.join) != max(len(splits), 1):
            raise ValueError(f"{len(splits)} splits need as many lengths in join, not {len(self.join)}")
        lengths = (self.join,) * len(splits) if isinstance(self.join, int) else self.join
        for split, length, following in zip(splits, lengths, (*splits[1:], self.steps - 1), strict=False):
            if length > 1 and split + length > following:
                end = "the next split" if following in splits else "the last step, which is deterministic"
                raise ValueError(f"join: {length} steps from split {split} reach beyond step {following}, {end}")
        return self

    @model_validator(mode="after")
    def _splits_once(self) -> TreeSection:
        if self.splits != "adaptive":
            return self
        if self.sde != "splits":
            raise ValueError(
                f"splits: adaptive compares siblings of one stochastic step: sde is 'splits', not '{self.sde}'"
            )
        if not isinstance(self.branches, int):
            raise ValueError("splits: adaptive takes one number of branches, which it varies")
        if not self.least_children <= self.branches <= self.most_children:
            raise ValueError(
                f"branches: adaptive splits have from {self.least_children} to {self.most_children} children, and "
                f"{self.branches} on average cannot be; change branches or adaptive.most"
            )
        return self

    @property
    def least_children(self) -> int:
        """The fewest children of an adaptive split: two that can be compared, and a deterministic one."""
        return 2 if self.adaptive.drop is None else 3

    @property
    def most_children(self) -> int:
        """The most children of an adaptive split."""
        branches = self.branches if isinstance(self.branches, int) else max(self.branches)
        return 2 * branches if self.adaptive.most is None else self.adaptive.most

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
    def _limits_leaves(self) -> TreeSection:
        factors = list(self.factors.values())
        leaves = math.prod(factors)
        if leaves > MOST_LEAVES:
            product = " x ".join(map(str, factors[:6])) + (" x ..." if len(factors) > 6 else "")
            shown = f"{product} = {leaves}" if len(factors) > 1 and leaves < 10**15 else product
            raise ValueError(f"branches: {shown} leaves for each prompt are too many; at most {MOST_LEAVES}")
        return self

    @property
    def factors(self) -> dict[int, int]:
        """The split steps and their branch factors; a split that is drawn or slides counts as one at step 0."""
        steps = self.split_steps or (() if self.splits == () and self.split_rule is None else (0,))
        branches = (self.branches,) * len(steps) if isinstance(self.branches, int) else self.branches
        if self.splits == "adaptive" and self.split_rule is None:
            branches = (self.most_children,)
        return dict(zip(steps, branches, strict=False))

    @property
    def most_nodes(self) -> int:
        """The nodes of one prompt's tree; where its split is drawn or slides, the largest number possible."""
        factors, width, nodes = self.factors, 1, 1
        for step in range(self.steps):
            width *= factors.get(step, 1)
            nodes += width
        return nodes

    @property
    def split_steps(self) -> tuple[int, ...]:
        """The fixed split steps; empty where splits are drawn, or chosen by a plug-in's rule."""
        if self.split_rule is not None:
            return ()
        if isinstance(self.splits, str):
            return PRESET_SPLITS.get(self.splits, ())
        return self.splits


class SamplerSection(Section):
    """``sampler``: the stochastic step and the time grid."""

    kind: Literal["dance", "flow", "cps", "ddim"] = Field(
        default="dance",
        description="The transition kernel. `ddim` is for models that predict noise or v, the others for velocity.",
    )
    eta: Eta | Annotated[tuple[Eta, ...], Field(min_length=1)] = Field(
        default=0.3,
        description="The noise level of a stochastic step; at most 1 under `cps` and `ddim`. A list has one for each "
        "split: a stochastic step without a split takes that of the last split before it, or else the first.",
    )
    grid: Literal["linear", "pipeline"] = Field(
        default="linear",
        description="`linear` is an even grid, shifted; `pipeline` is the model's own schedule, shift included.",
    )
    shift: float = Field(default=3.0, ge=0.01, le=100, description="The time shift s of the linear grid.")
    log_prob: Literal["mean", "sum"] = Field(
        default="mean", description="Whether an edge's log-density is averaged or summed over latent dimensions."
    )
    transition: Choice | None = Field(default=None, description="A transition, by name, instead of `kind`.")

    @field_validator("eta")
    @classmethod
    def _at_most_all_noise(cls, eta: float | tuple[float, ...], info: ValidationInfo) -> float | tuple[float, ...]:
        kind = info.data.get("kind")
        if kind in {"cps", "ddim"} and max((eta,) if isinstance(eta, float) else eta) > 1:
            raise ValueError(f"{kind} takes an eta up to 1, at which all noise of a step is fresh")
        return eta

    @property
    def level(self) -> float:
        """The kernel's own noise level: eta, or the mean of a list."""
        return self.eta if isinstance(self.eta, float) else sum(self.eta) / len(self.eta)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise of each split over the kernel's own; empty where all have that."""
        return () if isinstance(self.eta, float) else tuple(eta / self.level for eta in self.eta)


class CreditSection(Section):
    """``credit``: from leaf rewards to advantages."""

    beta: float = Field(default=1.0, ge=0, le=1e6, description="Fusion's temperature; 0 is the plain mean over leaves.")
    path_scale: Literal["mean", "sum", "standardised"] = Field(
        default="mean", description="The scale of path log-densities in fusion."
    )
    advantage: Literal["depth", "leaf", "sibling"] = Field(
        default="depth",
        description="The estimator: `depth` is the paper's, `leaf` is leave-one-out, `sibling` compares siblings.",
    )
    baseline: Literal["group", "probe"] = Field(
        default="group",
        description="What a return is compared with: what `advantage` says of the `group`, or the score of a `probe`, "
        "the deterministic continuation of the edge's parent; then `advantage` is not used.",
    )
    returns: Literal["leaf", "step"] = Field(
        default="leaf",
        description="Under `baseline: probe`, what is compared: the fused rewards of the `leaf` samples below an edge, "
        "or, per `step`, the probe of the edge's end (DenseGRPO; biased).",
    )
    combine: Literal["advantages", "rewards"] = Field(
        default="advantages",
        description="What is added where there are several rewards: their weighted `advantages`, or their weighted raw "
        "`rewards` before advantages are computed.",
    )
    batch_normalise: bool = Field(
        default=False,
        description="Normalise the sum of all rewards' advantages once more, over all prompts of an iteration (GDPO); "
        "then the gradient pass waits for the last prompt's scores.",
    )
    eps: float = Field(default=1e-8, gt=0, le=1e6, description="Added to the deviation that advantages are divided by.")
    clip: float = Field(
        default=5.0,
        gt=0,
        le=1e6,
        description="Each reward's advantages are clipped to plus and minus this, before its weight.",
    )
    estimator: Choice | None = Field(
        default=None, description="An estimator of advantages, by name, instead of `advantage`."
    )


class PruningSection(Section):
    """``pruning``: edges left out of the gradient pass."""

    kind: Literal["none", "parent_top1", "extreme", "depth"] = Field(
        default="none", description="The rule; `parent_top1` and `extreme` are the paper's width pruning."
    )
    count: int = Field(default=4, ge=1, description="`extreme`: leaves kept at each end.")
    size: int = Field(default=4, ge=1, description="`depth`: steps in the window.")
    every: int = Field(default=30, ge=1, description="`depth`: iterations before the window moves one step deeper.")
    stop: int = Field(default=15, ge=0, description="`depth`: the deepest step at which the window may start.")
    rule: Choice | None = Field(default=None, description="A pruning rule, by name, instead of `kind`.")


FORWARD: dict[str, dict[str, Any]] = {
    "nft": {"error": "adaptive"},
    "awm": {},
    "vgrpo": {"error": "adaptive", "share_draws": "group"},
    "crd": {"share_draws": "group"},
}
"""The forward objectives, and the keys that each changes unless a recipe sets them."""


class GateSection(Section):
    """``loss.gate``: which leaves the KL term acts on; leave the section out, or null, for all of them."""

    share: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="The share of an iteration's leaves that the KL term acts on: those that the trained rewards rank "
        "the furthest above what rewards of weight 0 do.",
    )
    adapts: bool = Field(
        default=True,
        description="Raise the share by a tenth where the rankings disagree more than in each of the last 20 "
        "iterations, and lower it where less; up to twice and down to a fifth of `share`.",
    )


class LossSection(Section):
    """``loss``: the objective.

    `path` trains the edges of the tree. The others are forward objectives: they train its leaves, noised again, and the
    keys from `forward` on belong to them alone. `vgrpo` and `nft` change the default of `error` to `adaptive`, `vgrpo`
    and `crd` that of `share_draws` to `group`.
    """

    kind: Literal["path", "nft", "awm", "vgrpo", "crd"] = Field(
        default="path",
        description="`path`, the clipped policy gradient over edges, or a forward objective over leaves.",
    )
    clip_range: float = Field(
        default=1e-4, gt=0, le=1e6, description="How far the probability ratio may leave 1 before it is clipped."
    )
    kl: float = Field(default=0.0, ge=0, le=1e6, description="Weight of the KL divergence to the start policy.")
    kl_every: int | None = Field(
        default=None,
        ge=1,
        description="Iterations between measurements of that KL where `loss.kl` is 0; by default it is not measured.",
    )
    gate: GateSection | None = Field(
        default=None,
        description="Limits the KL term of `loss.kl` to leaves on which the reward may be exploited (GARDO).",
    )
    ratio: Literal["plain", "centred"] = Field(
        default="plain",
        description="How an edge's new density is compared with its old one: by the `plain` ratio, or by GRPO-Guard's "
        "`centred` one, of means over dimensions whatever `sampler.log_prob` says. After an iteration's first "
        "optimiser step `centred` costs a forward, as `old_log_prob: recomputed` does.",
    )
    trust: Literal["clip", "divergence"] = Field(
        default="clip",
        description="How far an edge may move: `clip` clips its ratio at `clip_range`; `divergence`, Flow-DPPO's rule, "
        "leaves out edges that have moved beyond `max_divergence` the way their advantage favours. It costs the same "
        "forward.",
    )
    max_divergence: float = Field(
        default=1e-5,
        gt=0,
        le=1e6,
        description="`trust: divergence`: the allowed KL divergence from the old policy, as a mean over dimensions.",
    )
    weighting: Literal["none", "noise", "gradient"] = Field(
        default="none",
        description="`noise` weights each step by its noise level; `gradient`, Flash-GRPO's rule, so that no step's "
        "gradient is larger for its noise level alone; both with mean 1 over the grid.",
    )
    divide_by_dt: bool = Field(default=False, description="Divide each edge's loss by the length of its step in sigma.")
    old_log_prob: Literal["rollout", "recomputed"] = Field(
        default="rollout",
        description="Where old log-densities come from after an iteration's first optimiser step: from the `rollout`, "
        "or `recomputed` in the batches that are trained, which costs a forward and leaves no numerical mismatch.",
    )
    ratio_rule: Choice | None = Field(default=None, description="A ratio, by name, instead of `ratio`.")
    objective: Choice | None = Field(default=None, description="The loss of an edge, by name, instead of `trust`.")
    weighting_rule: Choice | None = Field(
        default=None, description="A rule that weights steps, by name, instead of `weighting`."
    )
    forward: Choice | None = Field(default=None, description="A forward objective, by name, instead of `kind`.")
    draws: int = Field(
        default=4, ge=1, le=1000, description="Pairs of a noise level and a noise at which each leaf is looked at."
    )
    inner_nodes: bool = Field(
        default=False,
        description="Train the nodes that trained edges lead to as well, each by the clean sample that the rollout "
        "predicted there and the edge's advantage.",
    )
    share_draws: Literal["leaf", "siblings", "group"] = Field(
        default="leaf",
        description="Which leaves have the same pairs: each `leaf` has its own, or they are shared by `siblings`, the "
        "leaves below one node of the last split, or by the `group` of a prompt's leaves.",
    )
    times: Literal["uniform", "stratified", "logit_normal", "grid"] = Field(
        default="stratified",
        description="How noise levels are drawn: `uniform`; `stratified`, each draw from an interval of its own; "
        "`logit_normal`, stratified as well; or from the steps of the rollout's `grid`.",
    )
    time_shift: float = Field(
        default=1.0, ge=0.01, le=100, description="The time shift of drawn noise levels, but for those of the grid."
    )
    error: Literal["velocity", "adaptive"] = Field(
        default="velocity",
        description="A prediction's error: its mean square, or `adaptive`, that of the clean sample which follows from "
        "it, over the mean absolute error.",
    )
    error_weight: Literal["none", "sigma", "sigma_squared"] = Field(
        default="none", description="The weight of that error by noise level."
    )
    beta: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="`nft`: how far the two implied policies lie from the old one, in units of the trained one's "
        "distance; `crd`: the scale of implied rewards.",
    )
    advantage_range: float = Field(
        default=5.0,
        gt=0,
        le=1e6,
        description="`nft`: the size of an advantage at which a leaf is wholly wanted, or not at all.",
    )
    old_policy: Literal["rollout", "ema"] = Field(
        default="rollout",
        description="The policy that the trained one is compared with: that of the `rollout`, or `ema`, the average of "
        "the weights under `optim.ema`.",
    )
    kl_old: float = Field(
        default=0.0, ge=0, le=1e6, description="Weight of the mean square distance of predictions to that policy's."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _complete_kind(cls, data: Any, validate: ModelWrapValidatorHandler[LossSection]) -> LossSection:
        """Fill in the keys that a forward objective changes."""
        changed = FORWARD.get(str(data.get("kind")), {}) if isinstance(data, dict) else {}
        section = validate({**changed, **data} if changed else data)
        section.model_fields_set.difference_update(changed.keys() - (data.keys() if changed else set()))
        return section

    @property
    def is_forward(self) -> bool:
        """Return whether leaves are trained, and not edges."""
        return self.name != "path"

    @property
    def trains_inner_nodes(self) -> bool:
        """Return whether inner nodes are trained beside leaves."""
        return self.is_forward and self.inner_nodes

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.forward.name if self.forward else self.kind


class OptimSection(Section):
    """``optim``: AdamW, its learning rate, and the average of the weights."""

    lr: float = Field(default=1e-5, gt=0, le=1e6, description="Learning rate.")
    weight_decay: float = Field(default=1e-4, ge=0, le=10, description="AdamW's decoupled decay.")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="AdamW's moment decays.")
    eps: float = Field(default=1e-8, ge=1e-30, le=1, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1e12, description="Larger gradients are scaled down to this norm."
    )
    refuse_above: float | None = Field(
        default=None, gt=0, le=1e12, description="An update is left out if its gradient norm before clipping is larger."
    )
    max_refused: int = Field(
        default=3,
        ge=0,
        description="How many updates in a row may be left out, for their norm or because they are not finite, "
        "before the run ends.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="`linear` and `cosine` fall from `lr` to 0 at the last planned optimiser step, taken or not.",
    )
    warmup: int = Field(
        default=0,
        ge=0,
        description="Optimiser steps over which the learning rate rises linearly; no more than the run has.",
    )
    steps_per_iteration: int = Field(
        default=1, ge=1, le=1000, description="Optimiser steps that share the edges of one rollout."
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the trained weights, reached over the first steps; "
        "`final/`, held-out figures and sample grids use the average.",
    )


class BatchSection(Section):
    """``batch``: how much is done at a time. Only ``prompts`` changes results by more than rounding."""

    prompts: int = Field(default=2, ge=1, description="Prompts per iteration, over all processes.")
    rollout_rows: int | None = Field(
        default=None, ge=1, description="Predictions per forward in the rollout; all of a depth by default."
    )
    update_rows: int | None = Field(
        default=None, ge=1, description="Families per forward and backward in the gradient pass; all by default."
    )
    decode_rows: int | None = Field(
        default=None, ge=1, description="Leaves decoded and scored at a time; all by default."
    )
    rollout_prompts: int | None = Field(
        default=None, ge=1, description="Prompts whose trees grow together after the last split; all by default."
    )
    states: Literal["device", "host"] = Field(
        default="device", description="Where the tree's states are kept: on the device, or in the host's memory."
    )
    processes_per_prompt: int = Field(
        default=1,
        ge=1,
        description="Processes that share each prompt's tree; each grows, scores and trains a range of its leaves.",
    )


class ScoringSection(Section):
    """``scoring``: how leaves are scored, and when failing rewards end the run. Nothing here changes a result."""

    overlap: bool = Field(default=True, description="Decode and score while trees grow and the gradient pass begins.")
    max_invalid: float = Field(
        default=0.5, ge=0, le=1, description="The share of samples on which a reward may fail before the run ends."
    )
    window: int = Field(default=3, ge=1, le=10_000, description="Iterations over which that share is computed.")


class AlarmSection(Section):
    """``alarm``: warnings that a reward is exploited, or learning or diversity lost. Nothing here changes a result."""

    enabled: bool = Field(default=True, description="Look for what an alarm is about, and warn at its onset.")
    window: int = Field(
        default=20, ge=4, le=10_000, description="Iterations between looks, and the fewest that a trend is seen over."
    )
    confidence: float = Field(
        default=0.99,
        ge=0.5,
        lt=1,
        description="The share of runs without anything of the kind that end without an alarm, at least.",
    )


class DataSection(Section):
    """``data``: the prompts."""

    prompts: PromptFile | tuple[str, ...] = Field(
        description="A .txt, .jsonl or .parquet file, hub:org/name, or the prompts themselves."
    )
    column: str = Field(
        default="prompt", description="The key or column that holds the prompt, in .jsonl, .parquet and hub data."
    )
    split: str = Field(default="train", description="The split of a hub dataset.")
    folder: LocalPath | None = Field(
        default=None,
        description="The folder of images and videos: their paths are relative to it and may not lead out "
        "of it. The prompt file's own folder by default.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the prompts again in each pass.")


class EvaluationSection(Section):
    """``evaluation``: held-out figures, from deterministic samples of fixed noises, before and after training."""

    prompts: PromptFile | tuple[str, ...] = Field(description="As `data.prompts`.")
    column: str = Field(default="prompt", description="As `data.column`.")
    split: str = Field(default="test", description="As `data.split`.")
    folder: LocalPath | None = Field(default=None, description="As `data.folder`.")
    rewards: tuple[RewardSection, ...] = Field(
        min_length=1, description="The rewards that judge; they may differ from those that are trained on."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first prompts, as many as this.")
    noises: int = Field(default=1, ge=1, le=1000, description="Samples per prompt.")
    every: int | None = Field(
        default=None, ge=1, description="Iterations between evaluations; by default only before and after training."
    )
    rows: int = Field(default=64, ge=1, description="Samples made at a time.")
    seed: Seed = Field(default=7, description="Seed of the samples' starting noise.")


class RunSection(Section):
    """``run``: length, precision, and what is written when."""

    iterations: int = Field(
        default=300, ge=1, le=10**7, description="Number of iterations; each is a rollout and an update."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="`bf16` computes in bfloat16; weights that are trained, latents and densities stay float32.",
    )
    tf32: bool = Field(default=True, description="Allow TF32 in float32 matrix products on CUDA.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third more work."
    )
    compile: str | None = Field(
        default=None,
        description="A back-end of torch.compile for the denoiser's blocks, such as `inductor`; they are "
        "not compiled by default.",
    )
    embeddings: Annotated[str, PathKey(always=True, names=("user",))] | None = Field(
        default=None,
        description="A folder that keeps encoded prompts for later runs; `user` means a folder in the user's cache. By "
        "default nothing is kept.",
    )
    embeddings_gib: float = Field(
        default=50.0,
        gt=0,
        le=1e6,
        description="The size of that folder in GiB, above which the least recently used prompts are removed.",
    )
    encode_alone: bool = Field(
        default=False,
        description="Have the denoiser leave the device while encoders are there; not for sharded weights.",
    )
    checkpoint_every: int = Field(
        default=40, ge=1, description="Iterations between checkpoints; the last iteration is always saved."
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, description="How many of the newest checkpoints are kept; older ones are deleted."
    )
    checkpoint_async: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy in host memory; the bytes are the same.",
    )
    sample_every: int | None = Field(
        default=20, ge=1, description="Iterations between sample grids; null: none are made, at the ends neither."
    )
    sample_prompts: int = Field(default=8, ge=1, description="Samples in a grid.")
    tree_every: int | None = Field(
        default=20, ge=1, description="Iterations between recorded trees; null: none are recorded."
    )
    trackers: tuple[str, ...] = Field(
        default=(), description="Experiment trackers, by accelerate's names: tensorboard, wandb and others."
    )
    threads: int | None = Field(
        default=None, ge=1, le=256, description="Number of PyTorch's CPU threads; PyTorch chooses by default."
    )
    timeout: float = Field(
        default=120.0, gt=0, le=10080, description="The most minutes that processes wait for each other."
    )


SINGLE: dict[str, dict[str, Any]] = {
    "tree": {"branches": 16, "siblings": "independent", "sde": "splits"},
    "credit": {"advantage": "leaf"},
}
"""Keys that ``tree.splits: single`` and ``adaptive`` change, unless a recipe sets them."""


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, AfterValidator(checked_name)] = Field(
        description="The run's name, and that of its directory under `runs/`. It is not inherited."
    )
    description: str = Field(default="", description="One line, shown by `branchtree recipes`. It is not inherited.")
    seed: Seed = Field(
        default=42,
        description="Seed of everything drawn but the initial noise: edges, drawn splits, prompt order, LoRA's start.",
    )
    model: ModelSection = Field(description="The model and its options.")
    lora: LoraSection | None = Field(default=None, description="Train low-rank weights; the whole denoiser by default.")
    tree: TreeSection = Field(default=TreeSection(), description="The shape of the tree.")
    sampler: SamplerSection = Field(default=SamplerSection(), description="The stochastic step and the time grid.")
    rewards: tuple[RewardSection, ...] = Field(min_length=1, description="What is optimised; at least one.")
    credit: CreditSection = Field(default=CreditSection(), description="From leaf rewards to advantages.")
    pruning: PruningSection = Field(default=PruningSection(), description="Edges left out of the gradient pass.")
    loss: LossSection = Field(default=LossSection(), description="The objective.")
    optim: OptimSection = Field(default=OptimSection(), description="The optimiser.")
    batch: BatchSection = Field(default=BatchSection(), description="How much is done at a time.")
    scoring: ScoringSection = Field(
        default=ScoringSection(), description="How leaves are scored, and when failing rewards end the run."
    )
    alarm: AlarmSection = Field(
        default=AlarmSection(), description="Warnings that a reward is exploited, or learning or diversity lost."
    )
    data: DataSection = Field(description="The prompts to train on.")
    evaluation: EvaluationSection | None = Field(default=None, description="Held-out figures; none by default.")
    run: RunSection = Field(default=RunSection(), description="Length, precision, output.")
    callbacks: tuple[CallbackSection, ...] = Field(default=(), description="Callbacks by name.")

    @model_validator(mode="after")
    def _limits_nodes(self) -> Recipe:
        prompts, nodes = self.batch.prompts, self.tree.most_nodes
        if prompts * nodes > MOST_NODES:
            raise ValueError(
                f"batch.prompts {prompts} x {nodes} nodes of a tree = {prompts * nodes} are too many for one "
                f"iteration; at most {MOST_NODES}"
            )
        return self

    @model_validator(mode="after")
    def _quantizes_what_is_frozen(self) -> Recipe:
        if self.model.quantize is not None and self.lora is None:
            raise ValueError(
                f"model.quantize: {self.model.quantize} is for weights that a LoRA freezes, and without the section "
                "lora all weights are trained; add lora.rank=32, or leave model.quantize out"
            )
        return self

    @model_validator(mode="after")
    def _has_a_level_for_each_split(self) -> Recipe:
        eta, splits = self.sampler.eta, self.tree.split_steps
        if isinstance(eta, tuple) and len(eta) != max(len(splits), 1):
            raise ValueError(f"sampler.eta: {len(splits)} splits need as many noise levels, not {len(eta)}")
        if isinstance(eta, tuple) and self.tree.splits == "adaptive" and self.tree.split_rule is None:
            raise ValueError("sampler.eta: tree.splits: adaptive starts from one noise level, not a list")
        return self

    @model_validator(mode="after")
    def _affords_the_least(self) -> Recipe:
        tree, prompts = self.tree, self.batch.prompts
        # As wherever the split lies, the least children take no more than that many trajectories from the start.
        least = prompts * tree.least_children * tree.steps
        if tree.splits == "adaptive" and tree.adaptive.rows is not None and tree.adaptive.rows < least:
            raise ValueError(
                f"adaptive.rows: {prompts} prompts take up to {least} predictions with {tree.least_children} children "
                f"each, more than {tree.adaptive.rows}; raise it, or lower batch.prompts"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _complete_single(cls, data: Any, validate: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Fill in the keys that ``single`` and ``adaptive`` change: trees split once, and widely.

        No other step is stochastic.
        """
        tree = data.get("tree") if isinstance(data, dict) else None
        if not isinstance(tree, dict) or tree.get("splits") not in ("single", "adaptive"):
            return validate(data)
        given = {section: data.get(section) or {} for section in SINGLE}
        if not all(isinstance(keys, dict) for keys in given.values()):
            return validate(data)
        recipe = validate({**data, **{section: {**SINGLE[section], **keys} for section, keys in given.items()}})
        for section, keys in SINGLE.items():
            getattr(recipe, section).model_fields_set.difference_update(keys.keys() - given[section].keys())
        return recipe

    @property
    def autocast(self) -> bool:
        """Return whether the denoiser runs under autocast: in bfloat16 with float32 weights, which are trained in full.

        A base that LoRA freezes is in bfloat16 itself.
        """
        return self.run.precision == "bf16" and self.lora is None
