"""Runs that two processes make together, one after the other: a list of them in JSON is the only argument.

An entry with ``precision`` is no run: it shards a Wan model under bf16 and writes in what dtypes it computes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from branchtree_adapters.wan import Wan, WanConfig
from tiny_wan import FRAMES, SIZE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from branchtree import load_recipe, train
from branchtree.plugins import Condition
from branchtree.run.directory import RunDirectory
from branchtree.testing.probe import randomise
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import load_model, make_accelerator, open_session
from branchtree.training.sharding import make_engine


def main() -> None:
    """Make the runs, and write beside each what the processes found."""
    PartialState.destroy_process_group = lambda state, group=None: None  # the next run needs it
    for run in json.loads(sys.argv[1]):
        if "precision" in run:
            compute_in_bf16(run)
            continue
        os.environ["ACCELERATE_USE_FSDP"] = "true" if run["sharded"] else "false"
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(run.get("reshard", True)).lower()
        train(run.get("recipe", "quickstart"), run["overrides"], output=Path(run["output"]), resume=run["resume"])
        if run["looked_at"]:
            look(run)


def compute_in_bf16(run: dict[str, Any]) -> None:
    """Predict and differentiate before and after sharding; write what the weights were gathered in, and the answers."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    lora = run["precision"] == "lora"
    recipe = load_recipe("quickstart", {"run.precision": "bf16", **({"lora.rank": 2} if lora else {})})
    accelerator = make_accelerator(recipe)
    sizes = {"height": SIZE, "width": SIZE, "frames": FRAMES, "task": "text_to_video", "guidance": 1.0}
    model = Wan(WanConfig.model_validate({"path": run["path"], **sizes}))
    load_model(recipe, model, accelerator.device)
    randomise(model.denoiser)
    latents = model.initial_noise(torch.Generator().manual_seed(3))[None]
    encoded = model.encode([Condition("a red three")])

    def predicted(denoiser: nn.Module) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.autocast):
            return model.predict(latents, torch.tensor([0.7]), encoded, denoiser)

    with torch.no_grad():
        whole = predicted(model.denoiser)
    engine = make_engine(recipe, accelerator, model.denoiser, None, torch.optim.AdamW)
    gathered: dict[str, str] = {}

    def see(name: str, module: nn.Module) -> None:
        own = dict(module.named_parameters(recurse=False))
        gathered.update({f"{name}.{key}".lstrip("."): str(value.dtype) for key, value in own.items()})
        assert not any(isinstance(value, DTensor) for value in own.values()), name

    for name, module in model.denoiser.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: see(name, module))
    sharded = predicted(engine.module)
    engine.backward(sharded.square().mean())
    with torch.no_grad():
        again = predicted(engine.module)
    gradients = [value.grad for value in engine.parameters.values() if value.grad is not None]
    facts = {
        "gathered": gathered,
        "trained": list(engine.parameters),
        "gradients": sorted({str(gradient.dtype) for gradient in gradients}),
        "difference": float((sharded - whole).norm() / whole.norm()),
        "repeated": float((again - sharded).abs().max()),
    }
    if accelerator.is_main_process:
        (Path(run["output"]) / "precision.json").write_text(json.dumps(facts))


def look(run: dict[str, object]) -> None:
    """Write how a session of this run lays out its weights on this process."""
    recipe = load_recipe("quickstart", run["overrides"])  # type: ignore[arg-type]
    output = Path(str(run["output"]))
    accelerator = make_accelerator(recipe)
    session = open_session(read_inputs(recipe), RunDirectory(output), accelerator)
    parameters = dict(session.inputs.model.denoiser.named_parameters())
    facts = {
        "processes": accelerator.num_processes,
        "sharded": all(isinstance(value, DTensor) for value in parameters.values()),
        "numbers": sum(value.numel() for value in parameters.values()),
        "here": sum(value.to_local().numel() for value in parameters.values() if isinstance(value, DTensor)),
    }
    (output / f"facts_{accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
