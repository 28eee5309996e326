"""The grid of noise levels that a pipeline's own scheduler makes, or a refusal that names the scheduler's settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from branchtree.core.grid import check_grid
from branchtree.errors import ModelError, shortened

TIMESTEPS = 1000
"""The models of flow matching take their noise level times this."""
SHAPING: tuple[str, ...] = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_flow_sigmas",
    "use_karras_sigmas",
)
SHAPING += ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "prediction_type", "final_sigmas_type")
SHAPING += ("timestep_spacing", "num_train_timesteps")
"""Settings of schedulers that decide about the grid, for messages."""


def scheduler_grid(
    scheduler: Any, source: str, steps: int, set_timesteps: Callable[[Any], object], changes: Mapping[str, Any]
) -> Tensor:
    """Return the noise levels (steps + 1,), float32, from at most 1 to 0, of a scheduler like ``scheduler``.

    Args:
        scheduler: The one of a loaded pipeline, which is left as it is.
        source: The model's path, for messages.
        steps: How many steps the grid has.
        set_timesteps: Calls the method of that name as the pipeline does.
        changes: Settings to use in place of the scheduler's.

    Raises:
        ModelError: The grid is not one of flow matching, or the pipeline itself could not sample with it.
    """
    settings = {**scheduler.config, **changes}
    try:
        fresh = type(scheduler).from_config(settings)
        set_timesteps(fresh)
    except Exception as error:  # diffusers asserts, divides and misses packages
        raise _refusal(scheduler, settings, source, f"cannot make one: {str(error) or type(error).__name__}") from error
    sigmas, times = (getattr(fresh, name, None) for name in ("sigmas", "timesteps"))
    if not isinstance(sigmas, Tensor) or not isinstance(times, Tensor) or sigmas.shape != (steps + 1,):
        raise _refusal(scheduler, settings, source, f"has no grid of {steps} steps")
    sigmas = sigmas.detach().to("cpu", torch.float32)
    if settings.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise _refusal(scheduler, settings, source, f"takes the model for one of {settings['prediction_type']}")
    try:
        check_grid(sigmas)
    except ValueError as error:
        raise _refusal(scheduler, settings, source, str(error)) from None
    # Some schedulers round the model's time down to a whole number.
    if times.shape != (steps,) or bool((times.cpu() - TIMESTEPS * sigmas[:-1]).abs().max() > 1):
        raise _refusal(
            scheduler, settings, source, f"gives the model other times than its noise levels times {TIMESTEPS}"
        )
    return sigmas


def _refusal(scheduler: Any, settings: Mapping[str, Any], source: str, reason: str) -> ModelError:
    """Make the error for a scheduler, with those of its settings that are not its class's defaults."""
    defaults = {name: one.default for name, one in inspect.signature(type(scheduler).__init__).parameters.items()}
    changed = [f"{name}: {settings[name]}" for name in SHAPING if name in defaults and settings[name] != defaults[name]]
    because = f" Of its settings, {', '.join(changed)} shape the grid." if changed else ""
    return ModelError(
        f"sampler.grid 'pipeline': {type(scheduler).__name__} of '{source}' gives no flow-matching grid from 1 to 0: "
        f"{shortened(' '.join(reason.split()))}.{because} Set sampler.grid to 'linear', with sampler.shift, or give a "
        "model with FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with flow sigmas"
    )
