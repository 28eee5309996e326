"""What a small pipeline's own call gives, with which the adapter ``diffusers`` is compared, and one iteration."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.any_pipeline import adapter
from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.pipeline.lora_file import LORA_FILE, METADATA
from branchtree_adapters.small.pipelines import Small
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from small_pipelines import picture
from torch import Tensor, nn

from branchtree.core.cost import count
from branchtree.plugins import Condition
from branchtree.recipe.build import make_credit_rule
from branchtree.run.directory import RunDirectory
from branchtree.testing import AdapterCase
from branchtree.testing.probe import Rows, counted_rows
from branchtree.training import inputs as training_inputs
from branchtree.training.inputs import Inputs
from branchtree.training.iteration import iterate
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.metrics import gather_metrics

PROMPTS = ("a red three", "seven blue")
STEPS = 4
"""Of a grid; Mochi's takes no fewer."""
SMALLEST = {
    "tree.steps": STEPS,
    "tree.splits": [0],
    "batch.prompts": 1,
    "sampler.grid": "pipeline",
    "run.iterations": 1,
    "run.sample_prompts": 1,
    "optim.warmup": 0,
}


def case_of(family: Small, model: Mapping[str, Any], folder: Path) -> AdapterCase:
    """The model with a reward and two prompts, whose images are written to ``folder``."""
    prompts: str | Sequence[str] = PROMPTS
    if family.images:
        rows = []
        for prompt in PROMPTS:
            names = [f"{prompt} {i}.png" for i in range(family.images)]
            for name in names:
                picture(name).save(folder / name)
            rows.append({"prompt": prompt, "image": names if len(names) > 1 else names[0]})
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        prompts = str(folder / "prompts.jsonl")
    return AdapterCase({"adapter": "diffusers", **model}, {"reward": "digits"}, prompts)


@dataclass
class Steps:
    """What a pipeline gave its scheduler, call by call."""

    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)


class _EnoughError(Exception):
    """Leaves a pipeline's call."""


@contextmanager
def watched(pipeline: Any, answer: Callable[[int, Tensor], Tensor]) -> Iterator[Steps]:
    """A context in which a pipeline's scheduler keeps what it is given, and returns ``answer(call, sample)``."""
    steps = Steps()

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        steps.outputs.append(model_output)
        steps.samples.append(sample)
        steps.times.append(timestep)
        given = answer(len(steps.samples) - 1, sample)
        return given, given

    pipeline.scheduler.step = step
    try:
        yield steps
    except _EnoughError:
        pass
    finally:
        del pipeline.scheduler.step


def keywords(family: Small, condition: Condition, **changes: Any) -> dict[str, Any]:
    """What a condition is to the pipeline's own call."""
    images = [Image.open(path).convert("RGB") for path in condition.images]
    given = {"image": images if family.image_list else images[0]} if images else {}
    negative = {} if family.negative is None else {"negative_prompt": family.negative}
    return {
        "prompt": condition.prompt,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "return_dict": False,
        **family.call,
        **given,
        **negative,
        **changes,
    }


def first_step(family: Small, pipeline: Any, condition: Condition, samples: int) -> Steps:
    """Run the first of a pipeline's own steps with gradients; ``samples`` is how many its model denoises at once."""

    def stop(call: int, sample: Tensor) -> Tensor:
        if call + 1 == samples:
            raise _EnoughError
        return sample

    with watched(pipeline, stop) as steps:
        inspect.unwrap(type(pipeline).__call__)(pipeline, **keywords(family, condition, output_type="latent"))
    return steps


def level_of(pipeline: Any, time: Any) -> Tensor:
    """The noise level of a time of a scheduler."""
    scheduler = pipeline.scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        return (1 - scheduler.alphas_cumprod[int(time)].double()).sqrt().float()
    level = scheduler.sigmas[0]
    return 1 - level if scheduler.config.get("invert_sigmas") else level


def state_of(driver: PipelineDriver, samples: Sequence[Tensor]) -> Tensor:
    """The library's state, of what a scheduler is given."""
    taken = [state.of_prediction(each.float()) for state, each in zip(driver.layout.states, samples, strict=True)]
    return taken[0] if len(taken) == 1 else torch.cat([each.flatten(1) for each in taken], 1)


def own_decoding(family: Small, pipeline: Any, driver: PipelineDriver, condition: Condition, state: Tensor) -> Tensor:
    """What a pipeline makes when the last of its steps gives a state (1, *state)."""
    sizes = [torch.Size(each.shape).numel() for each in driver.layout.states]
    pieces = state.flatten(1).split(sizes, 1)

    def final(call: int, sample: Tensor) -> Tensor:
        which = call % len(pieces)
        index = driver.layout.states[which].predicted
        value = sample.flatten(1).clone()
        value[:, slice(None) if index is None else index] = pieces[which].to(value)
        return value.reshape(sample.shape)

    with torch.no_grad(), watched(pipeline, final):
        made: Tensor = pipeline(**keywords(family, condition, output_type="pt"))[0]
    return made


def own_picture(family: Small, pipeline: Any, condition: Condition) -> Tensor:
    """What the pipeline's own call makes."""
    with torch.no_grad():
        made: Tensor = pipeline(**keywords(family, condition, output_type="pt"))[0]
    return made


def gradients_of(modules: Mapping[str, nn.Module], output: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed sum over an output, by denoiser and parameter."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    named = {f"{key}.{name}": each for key, module in modules.items() for name, each in module.named_parameters()}
    given = torch.autograd.grad((output * weight).sum(), list(named.values()), allow_unused=True)
    return {name: each for name, each in zip(named, given, strict=True) if each is not None}


@dataclass(frozen=True)
class Iterated:
    """One iteration of training: the rows that a hook saw, those that were planned, and what the run says."""

    seen: Rows
    planned: Rows
    metrics: Mapping[str, float]


def inputs_of(case: AdapterCase, model: Diffusers, changes: Mapping[str, Any], *, lora: bool = False) -> Inputs:
    """What a recipe names, with a model that is there already."""
    recipe = case.recipe({**SMALLEST, **changes}, lora=lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_inputs, "make_model", lambda recipe: model)
        return training_inputs.read_inputs(recipe)


def one_iteration(case: AdapterCase, model: Diffusers, precision: str, folder: Path, *, lora: bool) -> Iterated:
    """Train for an iteration."""
    inputs, directory = inputs_of(case, model, {"run.precision": precision}, lora=lora), RunDirectory(folder)
    directory.claim(resume=False)
    session = open_session(inputs, directory, make_accelerator(inputs.recipe))
    with counted_rows(model.denoiser) as seen:
        done = iterate(session, 0)
    cost = count([inputs.schedule.plan(0, session.order.batch(0, 1)[0])], make_credit_rule(inputs.recipe), 0)
    rows = model.rows_per_prediction
    planned = Rows(cost.rollout_rows * rows, cost.gradient_rows * rows)
    return Iterated(seen, planned, gather_metrics(session, done))


def load_lora(module: Any, folder: Path) -> None:
    """Put a LoRA file on a denoiser: by its own method, or by peft where its class has none, as PixArt's."""
    if hasattr(module, "load_lora_adapter"):
        module.load_lora_adapter(str(folder), prefix="transformer", weight_name=LORA_FILE)
        return
    with safe_open(folder / LORA_FILE, "pt") as file:
        saved = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        beside = json.loads(file.metadata()[METADATA])
    settings = {name.removeprefix("transformer."): value for name, value in beside.items()}
    inject_adapter_in_model(LoraConfig(**settings), module)
    set_peft_model_state_dict(module, saved)


@contextmanager
def planned_with_weights(family: Small) -> Iterator[None]:
    """A context in which a pipeline is planned on one with weights: one without, as test_phantom.py has, takes seconds.

    Sizes cannot be measured on it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "UNLOADED", {})
        patch.setattr(adapter, "unloaded_pipeline", lambda *_: family.build())
        yield


def another(case: AdapterCase, model: Diffusers) -> Diffusers:
    """The same model, not loaded; what was learnt of it without weights is not learnt again."""
    other = case.build()
    assert isinstance(other, Diffusers)
    other.__dict__["_unloaded"] = model._unloaded
    return other


def kept(model: Diffusers) -> Diffusers:
    """The model, which stays as it is when it is loaded again."""
    model.__dict__["load"] = lambda *args, **kwargs: None
    return model
