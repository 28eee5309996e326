"""What one step of a small pipeline's own call is compared with, and the recipe that trains it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.small.pipelines import Small
from small_pipelines import picture
from torch import Tensor

from branchtree.plugins import Condition
from branchtree.testing import AdapterCase

PROMPTS = ("a red three", "seven blue digits")
SIZES = {"height", "width", "num_frames"}


def section(family: Small, path: str) -> dict[str, Any]:
    """The section ``model`` for a small pipeline at ``path``."""
    model = {
        "adapter": "diffusers",
        "path": path,
        "height": family.call["height"],
        "width": family.call["width"],
        "negative_prompt": family.negative,
        "call": {name: value for name, value in family.call.items() if name not in SIZES},
    }
    frames = {"frames": family.call["num_frames"]} if "num_frames" in family.call else {}
    return {**model, **frames, **({"images": family.images} if family.images else {})}


def case_of(family: Small, path: str, folder: Path) -> AdapterCase:
    """A recipe's model, reward and prompts; images are written to ``folder``."""
    prompts: str | Sequence[str] = PROMPTS
    if family.images:
        rows = []
        for prompt in PROMPTS:
            picture(prompt).save(folder / f"{prompt}.png")
            rows.append({"prompt": prompt, "image": f"{prompt}.png"})
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        prompts = str(folder / "prompts.jsonl")
    return AdapterCase(model=section(family, path), reward={"reward": "digits"}, prompts=prompts)


@dataclass
class Steps:
    """What a pipeline gave its scheduler, call by call."""

    outputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


class _StopError(Exception):
    pass


@contextmanager
def watched(pipeline: Any, answer: Callable[[int, Tensor], Tensor] | None = None) -> Iterator[Steps]:
    """A context in which a pipeline's scheduler keeps what it is given, and gives ``answer`` of call and sample."""
    steps = Steps()

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.outputs.append(model_output)
        steps.samples.append(sample)
        given = sample if answer is None else answer(len(steps.samples) - 1, sample)
        return (given, given)

    pipeline.scheduler.step = step
    try:
        yield steps
    finally:
        del pipeline.scheduler.step


def keywords(family: Small, condition: Condition) -> dict[str, Any]:
    """What a condition is to the pipeline's own call."""
    from PIL import Image

    image = {} if condition.image is None else {"image": Image.open(condition.image).convert("RGB")}
    negative = {} if family.negative is None else {"negative_prompt": family.negative}
    return {"prompt": condition.prompt, "return_dict": False, **family.call, **image, **negative}


def own_step(family: Small, pipeline: Any, condition: Condition, steps: int, seed: int) -> Steps:
    """Run the first of a pipeline's own steps with gradients."""
    with watched(pipeline) as taken:
        inspect.unwrap(type(pipeline).__call__)(
            pipeline,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **keywords(family, condition),
        )
    return taken


def joined(driver: PipelineDriver, samples: Sequence[Tensor]) -> Tensor:
    """The library's state of what a scheduler is given."""
    states = driver.layout.states
    taken = [state.of_prediction(sample.float()) for state, sample in zip(states, samples, strict=False)]
    return taken[0] if len(taken) == 1 else torch.cat([each.flatten(1) for each in taken], 1)


def own_picture(pipeline: Any, family: Small, condition: Condition, steps: int = 2) -> Tensor:
    """What the pipeline's own call makes."""
    with torch.no_grad():
        made: Tensor = pipeline(
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **keywords(family, condition),
        )[0]
    return made


def gradients_of(module: torch.nn.Module, output: Tensor) -> Mapping[str, Tensor]:
    """Gradients of a fixed sum over an output, by parameter."""
    module.zero_grad()
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weight).sum().backward()
    return {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}


def predicted(model: Diffusers, state: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """One row's prediction."""
    return model.predict(state, sigma.reshape(1), model.encode([condition]))
