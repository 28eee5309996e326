"""Flow-GRPO's configurations: functions of ``config/grpo.py`` that fill in an ``ml_collections`` configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchtree.migration.converted import Conversion, ConvertedConfig, choose_base, guidance_key, same_name
from branchtree.migration.python_config import PythonConfig, read_python_config
from branchtree.recipe.load import builtin_folder
from branchtree.recipe.schema import Recipe

RENAMED = {
    "seed": "seed",
    "num_epochs": "run.iterations",
    "save_freq": "run.checkpoint_every",
    "eval_freq": "evaluation.every",
    "num_checkpoint_limit": "run.keep_checkpoints",
    "sample.num_steps": "tree.steps",
    "sample.num_image_per_prompt": "tree.branches",
    "sample.noise_level": "sampler.eta",
    "sample.test_batch_size": "evaluation.rows",
    "train.batch_size": "batch.update_rows",
    "train.learning_rate": "optim.lr",
    "train.adam_weight_decay": "optim.weight_decay",
    "train.adam_epsilon": "optim.eps",
    "train.max_grad_norm": "optim.max_grad_norm",
    "train.adv_clip_max": "credit.clip",
    "train.clip_range": "loss.clip_range",
    "height": "model.height",
    "width": "model.width",
    "frames": "model.frames",
}
REWARDS: Mapping[str, Mapping[str, Any]] = {
    "pickscore": {"reward": "pickscore", "scale": "div26"},
    "ocr": {"reward": "ocr"},
    "geneval": {"reward": "geneval"},
    "imagereward": {"reward": "imagereward"},
    "aesthetic": {"reward": "aesthetic"},
    "clipscore": {"reward": "clip"},
    "image_similarity": {"reward": "clip_similarity"},
    "unifiedreward": {"reward": "unifiedreward", "scale": "div5"},
}
"""Its rewards that are here, by its names."""
LORA = {"sd35": (32, 64), "flux": (64, 128), "qwen": (64, 128), "wan": (32, 64)}
"""Rank and alpha that its scripts have for a model, by the beginning of the recipe's name."""
DATA = {"general_ocr": ("train.txt", "test.txt"), "geneval": ("train_metadata.jsonl", "test_metadata.jsonl")}
"""The files of a dataset's folder by the prompt function."""
PROMPTS = ("data.prompts", "evaluation.prompts")
WINDOW = ("sample.sde_window_size", "sample.sde_window_range")
EMA_DECAY, EMA_EVERY = 0.9, 8
"""Its moving average: the decay, and the optimiser steps between two updates."""


def convert_flow_grpo(path: Path, name: str | None, base: str | None, gpus: int | None) -> ConvertedConfig:
    """Return a recipe for a function of a configuration file; see ``branchtree.convert_config``."""
    config = read_python_config(path, name)
    found = Conversion(f"{path}:{name}", "Flow-GRPO", dict(config.values))
    model = str(found.take("pretrained.model", ""))
    recipe = choose_base(model, base, f"{path}:{name}")
    if not same_name(model, recipe.model.options.get("path")):
        found.keys["model.path"] = model
    found.rename({name: key for name, key in RENAMED.items() if name not in ("sample.num_image_per_prompt",)})
    method = _tree(found, config)
    _batch(found, config, gpus)
    _weights(found, recipe)
    _sizes(found, recipe)
    _rewards(found, recipe)
    _data(found)
    found.drop(("per_prompt_stat_tracking",) if found.settings.get("per_prompt_stat_tracking") is True else ())
    found.drop(name for name in ("prompt_fn_kwargs", "reward_fn") if not found.settings.get(name, True))
    return found.finish(str(name), f"{_named(recipe, base)}+{method}")


def _named(recipe: Recipe, base: str | None) -> str:
    return base or recipe.name


def _tree(found: Conversion, config: PythonConfig) -> str:
    """Fill in the tree and the sampler; returns the method."""
    steps = found.keys.get("tree.steps", 20)
    kind = found.take("sample.sde_type", "sde")
    found.keys["sampler.kind"] = "cps" if kind == "cps" else "flow"
    if found.keys["sampler.kind"] == "cps" and found.keys.get("sampler.eta", 0) > 1:
        found.note("sample.noise_level", "above 1, which cps does not take; 1 here")
        found.keys["sampler.eta"] = 1.0
    found.keys["sampler.grid"] = "pipeline"
    if found.take("sample.same_latent", False) is not True:
        found.notes["sample.same_latent"] = (
            "each sample has a noise of its own there; a group starts from one noise here"
        )
    if found.take("sample.global_std", False) is True:
        found.notes["sample.global_std"] = (
            "advantages are divided by the deviation of the whole batch there, by that of the group here"
        )
    if (weight := found.number("train.beta", 0.0)) > 0:
        found.keys["loss.kl"] = weight / steps
        found.notes["train.beta"] = (
            f"{weight} there, where the divergence of a step is not divided by the step's length; its mean is 1 over "
            f"{steps} steps, and so is the weight here"
        )
    trained = int(steps * found.number("train.timestep_fraction", 1.0))
    if trained < steps - 1:
        found.keys["tree.timestep_fraction"] = round(trained / (steps - 1), 4)
        found.notes["train.timestep_fraction"] = f"the first {trained} steps are trained there, as many drawn ones here"
    if "sample.sde_window_size" not in config.own:
        found.drop(WINDOW)  # the default of base.py, which only some of the scripts read
        return "flowgrpo"
    size, limits = found.number("sample.sde_window_size", 0), found.take("sample.sde_window_range")
    if not size:
        return "flowgrpo"
    first, last = limits if isinstance(limits, list) and len(limits) == 2 else (0, steps)
    found.keys["tree.window.size"] = size
    found.keys["tree.window.start"] = first
    found.keys["tree.window.stop"] = max(min(last, steps - 1) - size, first)
    found.notes["sample.sde_window_range"] = (
        "the window is drawn in each batch there; here it moves one step deeper every tree.window.every iterations"
    )
    return "mixgrpo"


def _batch(found: Conversion, config: PythonConfig, gpus: int | None) -> None:
    """Fill in how much is done in an iteration."""
    group = found.number("sample.num_image_per_prompt", 1)
    rows = found.number("sample.train_batch_size", 1)
    each = found.number("sample.mini_num_image_per_prompt", rows)
    batches = found.number("sample.num_batches_per_epoch", 1)
    known = gpus or config.variables.get("gpu_number") or config.variables.get("num_gpus")
    devices = known if isinstance(known, int) else 1
    prompts = found.number("sample.unique_prompt_per_epoch", devices * each * batches / group)
    found.keys |= {
        "tree.branches": max(int(group), 2),
        "batch.prompts": max(round(prompts), 1),
        "batch.rollout_rows": int(each),
    }
    if group < 2:
        found.notes["sample.num_image_per_prompt"] = f"a group of {group} has no advantages; 2 here"
    if not known:
        found.notes["sample.num_batches_per_epoch"] = "is for each GPU, and read as for one; give --gpus N"
    accumulated = found.number("train.gradient_accumulation_steps", 1)
    found.keys["optim.steps_per_iteration"] = max(int(batches // max(accumulated, 1)), 1)
    if (epochs := found.number("train.num_inner_epochs", 1)) != 1:
        found.notes["train.num_inner_epochs"] = f"{epochs} passes over a rollout there, one here"


def _weights(found: Conversion, recipe: Recipe) -> None:
    """Fill in what is trained, its average, and its precision."""
    if found.take("use_lora", True) is not True:
        found.keys["lora"] = None
    else:
        sizes = next((size for name, size in LORA.items() if recipe.name.startswith(name)), None)
        if sizes is not None:
            found.keys |= {"lora.rank": sizes[0], "lora.alpha": sizes[1]}
            found.notes["use_lora"] = "rank and alpha are those in its training script"
        else:
            found.notes["use_lora"] = "rank and alpha stand in its training script; here they are the recipe's"
    if found.take("train.ema", False) is True:
        found.keys["optim.ema"] = round(EMA_DECAY ** (1 / EMA_EVERY), 4)
        found.notes["train.ema"] = (
            f"the decay is {EMA_DECAY} every {EMA_EVERY} optimiser steps there, the same for each step here"
        )
    else:
        found.keys["optim.ema"] = None
    betas = (found.number("train.adam_beta1", 0.9), found.number("train.adam_beta2", 0.999))
    found.keys["optim.betas"] = list(betas)
    precision = found.take("mixed_precision", "bf16")
    found.keys["run.precision"] = "fp32" if precision == "no" else "bf16"
    if precision == "fp16":
        found.notes["mixed_precision"] = "there is no fp16 here; bf16"
    found.keys["run.tf32"] = found.take("allow_tf32", True) is True
    if "activation_checkpointing" in found.settings:
        found.keys["run.gradient_checkpointing"] = found.take("activation_checkpointing") is True
    start = found.take("train.lora_path")
    if start:
        found.keys["model.start"] = str(start)
    found.drop(name for name in ("train.use_8bit_adam", "train.sft") if not found.settings.get(name, True))
    found.drop(["sample.kl_reward"] if found.settings.get("sample.kl_reward") == 0 else [])


def _sizes(found: Conversion, recipe: Recipe) -> None:
    """Fill in the size of samples, and guidance."""
    size = found.number("resolution")
    if size is not None and "model.height" not in found.keys:
        found.keys |= {"model.height": size, "model.width": size}
    if (guidance := found.number("sample.guidance_scale")) is not None:
        found.keys[guidance_key(recipe)] = float(guidance)
    if (judged := found.number("sample.eval_guidance_scale")) is not None and judged != guidance:
        found.notes["sample.eval_guidance_scale"] = (
            f"{judged} there; held-out samples have the training's guidance here"
        )
    if (judged := found.number("sample.eval_num_steps")) is not None and judged != found.keys.get("tree.steps"):
        found.notes["sample.eval_num_steps"] = f"{judged} there; held-out samples take tree.steps here"
    if found.take("train.cfg", True) is not True and guidance != 1:
        found.notes["train.cfg"] = "no guidance in the gradient pass there; here it predicts as the rollout does"


def _rewards(found: Conversion, recipe: Recipe) -> None:
    """Fill in the rewards that are here; others stay among the settings without a counterpart."""
    given = found.take("reward_fn", {})
    known = [
        {**REWARDS[name], "weight": float(weight)}
        for name, weight in given.items()
        if name in REWARDS and isinstance(weight, int | float)
    ]
    found.settings |= {f"reward_fn.{name}": weight for name, weight in given.items() if name not in REWARDS}
    if not known:
        names = ", ".join(reward.reward for reward in recipe.rewards)
        found.notes["reward_fn"] = f"no reward of the configuration is here; the recipe's is kept ({names})"
        return
    found.keys["rewards"] = known
    found.keys["evaluation.rewards"] = [{key: one[key] for key in one if key != "weight"} for one in known]
    if len(known) > 1:
        found.keys["credit.combine"] = "rewards"


def _data(found: Conversion) -> None:
    """Fill in the prompts, if the files are there. Where they are not, rewards that need others have none."""
    folder, kind = found.take("dataset", ""), str(found.take("prompt_fn", ""))
    files = [Path(str(folder)) / name for name in DATA.get(kind, ())]
    if files and all(file.is_file() for file in files):
        found.keys |= dict(zip(PROMPTS, map(str, files), strict=True))
        return
    missing = " and ".join(str(file) for file in files if not file.is_file()) or f"prompts of prompt_fn '{kind}'"
    found.notes["dataset"] = f"there is no {missing} here: the recipe's own prompts are kept; give data.prompts"
    asked = {one["reward"] for one in found.keys.get("rewards", ())}
    if "ocr" in asked:
        words = [str(builtin_folder() / "prompts" / name) for name in ("words_train.txt", "words_heldout.txt")]
        found.keys |= dict(zip(PROMPTS, words, strict=True))
        found.notes["dataset"] = (
            f"there is no {missing} here: words to write that come with the library; give data.prompts"
        )
    if "geneval" in asked:
        found.notes["reward_fn.geneval"] = "reads the dataset's metadata, and is left out; add it with data.prompts"
        for key in ("rewards", "evaluation.rewards"):
            left = [one for one in found.keys.pop(key) if one["reward"] != "geneval"]
            found.keys |= {key: left} if left else {}
