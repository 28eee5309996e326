"""One of two processes that run random schedules of a toy model through the real rollout and gradient pass."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from branchtree import load_recipe
from branchtree.core.families import collect_families
from branchtree.core.gaussian import DanceSde
from branchtree.core.loss import ClippedLoss, EdgeRules, plain_ratio
from branchtree.core.noise import IndependentSiblings, NoiseSource
from branchtree.core.rollout import Sampler, forwards, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.tree import grow
from branchtree.errors import RewardError
from branchtree.recipe.schema import LossSection, OptimSection
from branchtree.training.conditioning import ConditioningCache
from branchtree.training.learning_rate import LearningRate
from branchtree.training.limits import RowLimit
from branchtree.training.objective import Policies
from branchtree.training.path import PathObjective
from branchtree.training.policy import Policy
from branchtree.training.processes import Processes
from branchtree.training.sharding import make_engine
from branchtree.training.update import UpdateGuard, Updater, partition

LATENT = 3
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)
"""Those of torch.distributed that gradients, weights and counts go through; versions of torch have some of them."""
Schedule = dict[str, Any]


class Block(nn.Module):
    """What is gathered at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, LATENT)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.linear(rows).tanh()


class Toy(nn.Module):
    """A velocity of latents (B, LATENT)."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, LATENT)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.calls = 0

    def forward(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        self.calls += 1
        rows: Tensor = latents + self.time(sigma[:, None])
        for block in self.blocks:
            rows = block(rows)
        return rows


def serve(rank: int, port: int, pipe: Connection) -> None:
    """Run the schedules that come through a pipe, and answer with what happened or a traceback."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    calls = recorded(COLLECTIVES)
    while True:
        schedule = pipe.recv()
        try:
            calls.clear()
            answer: Any = (
                failed(Processes(accelerator, schedule["sharded"]), schedule["errors"][rank])
                if "errors" in schedule
                else {**run(accelerator, schedule, schedule["ranks"][rank]), "collectives": calls}
            )
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)


def failed(processes: Processes, error: str | None) -> dict[str, str]:
    """What comes of a work that both processes do together, and that raises this kind of error here."""
    try:
        with processes.together():
            if error is not None:
                raise {"reward": RewardError, "value": ValueError}[error]("no judge")
    except Exception as raised:
        return {"came": f"{type(raised).__name__}: {raised}"}
    return {"came": "done"}


class ToyModel:
    """The toy as a policy asks for it."""

    def __init__(self, toy: Toy) -> None:
        self.denoiser = toy

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(LATENT)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Any, denoiser: Any = None) -> Tensor:
        prediction: Tensor = self.denoiser(latents, sigma, conditioning["index"])
        return prediction


def recorded(names: Sequence[str]) -> list[tuple[str, int]]:
    """Have every later call of these functions of torch.distributed written down: its name and its tensors' size."""
    calls: list[tuple[str, int]] = []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            calls.append((name, sum(tensor.numel() for tensor in tensors)))
            return function(*args, **kwargs)

        return call

    for name in (name for name in names if hasattr(torch.distributed, name)):
        setattr(torch.distributed, name, recording(name, getattr(torch.distributed, name)))
    return calls


def run(accelerator: Any, schedule: Schedule, mine: Schedule) -> dict[str, Any]:
    """An iteration of this process's trees under a schedule of both."""
    os.environ["ACCELERATE_USE_FSDP"] = "true" if schedule["sharded"] else "false"
    torch.manual_seed(1)
    toy = Toy()
    reference = copy.deepcopy(toy).requires_grad_(False) if schedule["kl"] else None
    recipe = load_recipe("quickstart", {"lora.rank": 4} if schedule["reduce_once"] else {})
    engine = make_engine(recipe, accelerator, toy, reference, lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    processes = Processes(accelerator, engine.joint)
    plans = [TreePlan(tuple(p["factors"]), tuple(p["stochastic"]), tuple(p["stochastic"])) for p in mine["plans"]]
    topology = grow(plans)
    sampler = Sampler(DanceSde(0.5), IndependentSiblings(), torch.linspace(1, 0, topology.steps + 1))
    model: Any = ToyModel(toy)
    policy = Policy(
        model,
        ConditioningCache(model),
        sampler,
        False,
        accelerator.device,
        conditioning={"index": torch.arange(len(plans))},
    )
    with policy.in_step(processes.most(forwards(topology, schedule["rollout_rows"]))) as in_step:
        tree = rollout(
            in_step,
            sampler,
            topology,
            torch.randn(len(plans), LATENT),
            NoiseSource(0, 0),
            range(len(plans)),
            max_rows=schedule["rollout_rows"],
        )
    source = torch.Generator().manual_seed(mine["seed"])
    advantages = [torch.randn(len(level), generator=source) for level in tree.log_prob]
    trained = [topology.per_edge(step, plans_stochastic(plans, step)) for step in range(topology.steps)]
    keep = [torch.zeros(len(plans), dtype=torch.bool)] + [
        flags & (torch.rand(len(flags), generator=source) < mine["kept"]) for flags in trained
    ]
    parts = partition(collect_families(topology, advantages, keep), schedule["steps"], 0, 0, range(len(plans)), 0)
    loss = LossSection(kl=0.1 * schedule["kl"])
    rules = EdgeRules(plain_ratio, ClippedLoss(0.5), recomputed=schedule["old_log_prob"] == "recomputed")
    updater = Updater(
        accelerator=accelerator,
        engine=engine,
        scheduler=LearningRate(engine.optimizer, OptimSection(), schedule["steps"]),
        objective=PathObjective(sampler, loss, accelerator.device, rules),
        max_grad_norm=1.0,
        limit=RowLimit("batch.update_rows", schedule["update_rows"]),
        guard=UpdateGuard(OptimSection()),
        average=None,
    )
    record = updater.run(tree, parts, Policies(engine.module, reference), 0)
    state = engine.denoiser_state()
    weights = {name: value.detach() for name, value in toy.named_parameters()} if state is None else state
    return {
        "calls": (toy.calls, reference.calls if reference is not None else 0),
        "steps": (record.steps, record.skipped_steps),
        "edges": sum(part.edges for part in parts),
        "sharded": all(isinstance(value, DTensor) for value in toy.parameters()),
        "weights": {name: value.tolist() for name, value in weights.items()},
    }


def plans_stochastic(plans: list[TreePlan], step: int) -> list[bool]:
    """Whether a step is stochastic, by prompt."""
    return [plan.stochastic[step] for plan in plans]
