"""DanceGRPO's configurations: flags in a shell script. MixGRPO's scripts have the same flags and some more."""

from __future__ import annotations

from pathlib import Path

from branchtree.errors import RecipeError
from branchtree.migration.converted import Conversion, ConvertedConfig, choose_base, guidance_key
from branchtree.migration.shell_flags import ShellCommand, read_shell_command
from branchtree.recipe.schema import Recipe

RENAMED = {
    "seed": "seed",
    "max_train_steps": "run.iterations",
    "checkpointing_steps": "run.checkpoint_every",
    "checkpoints_total_limit": "run.keep_checkpoints",
    "learning_rate": "optim.lr",
    "lr_warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.max_grad_norm",
    "weight_decay": "optim.weight_decay",
    "h": "model.height",
    "w": "model.width",
    "sampling_steps": "tree.steps",
    "num_generations": "tree.branches",
    "timestep_fraction": "tree.timestep_fraction",
    "eta": "sampler.eta",
    "shift": "sampler.shift",
    "clip_range": "loss.clip_range",
    "adv_clip_max": "credit.clip",
    "kl_coeff": "loss.kl",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
}
MODELS = {
    "qwenimage_edit": "Qwen-Image-Edit",
    "qwenimage": "Qwen-Image",
    "wan_2_1": "Wan2.1-T2V",
    "flux": "FLUX.1",
}
"""The model that a program trains, by a piece of its name."""
REWARDS = {"use_hpsv2": "hps", "use_pickscore": "pickscore", "use_videoalign": "videoalign"}
"""Rewards by the flag that asks for them."""
MIXED = {"hps": "hps", "clip_score": "clip", "image_reward": "imagereward", "pick_score": "pickscore"}
"""MixGRPO's rewards by its names."""
MIX_ALL = "multi_reward"
HERE = ("ignore_last", "use_group", "init_same_noise", "use_same_noise")
"""Flags that say what always holds here."""
NO_SOLVER = ("null", "")
"""What its scripts say where no other solver is used."""


def convert_dance_grpo(path: Path, base: str | None, gpus: int | None) -> ConvertedConfig:
    """Return a recipe for a shell script; see ``branchtree.convert_config``."""
    command = read_shell_command(path)
    trainer = "MixGRPO" if "training_strategy" in command.flags else "DanceGRPO"
    found = Conversion(str(path), trainer, dict(command.flags))
    piece = next((name for name in MODELS if name in Path(command.program).stem), None)
    if piece is None and base is None:
        raise RecipeError(
            f"{path}: no bundled recipe is about the model that {command.program} trains; name the nearest with "
            "--base RECIPE"
        )
    recipe = choose_base(MODELS.get(piece or "", ""), base, str(path))
    found.keys["sampler.grid"] = "linear"
    found.rename(RENAMED)
    method = _tree(found)
    _batch(found, command, gpus)
    _weights(found)
    _model(found, recipe, piece)
    _rewards(found, recipe)
    return found.finish(path.stem, f"{base or recipe.name}+{method}")


def _tree(found: Conversion) -> str:
    """Fill in the tree and the sampler; returns the method."""
    order = found.number("sampler_seed")
    if order is not None:  # `seed` orders the prompts here, and `tree.noise_seed` is the initial noise's
        found.keys["tree.noise_seed"] = found.keys.get("seed", 42)
        found.keys["seed"] = order
    if "init_same_noise" not in found.settings and "use_same_noise" not in found.settings:
        found.notes["init_same_noise"] = "is not set: each sample has a noise of its own there, a group one noise here"
    if "use_group" not in found.settings:
        found.notes["use_group"] = "is not set: advantages are over the whole batch there, over a prompt's group here"
    found.drop(HERE)
    best = found.number("bestofn")
    if best is not None and best < found.keys.get("tree.branches", 0):
        found.keys |= {"pruning.kind": "extreme", "pruning.count": max(best // 2, 1)}
    flow = found.take("flow_grpo_sampling") is not None
    found.keys["sampler.kind"] = "flow" if flow else "dance"
    if found.take("training_strategy") != "part":
        return "flowgrpo" if flow else "dancegrpo"
    found.rename({"group_size": "tree.window.size", "iters_per_group": "tree.window.every"})
    strategy = found.take("sample_strategy", "progressive")
    if strategy != "progressive":
        found.notes["sample_strategy"] = f"{strategy} there; here the window moves one step deeper at a time"
    solver = found.take("dpm_algorithm_type", "null")
    found.take("dpm_solver_order"), found.take("dpm_solver_type")
    if solver not in NO_SOLVER:
        found.keys["tree.solver"] = "dpm2m"
        found.notes["dpm_post_compress_ratio"] = (
            f"{found.take('dpm_post_compress_ratio')} of the steps after the window there; here as many as "
            "tree.continuation, 6 under the method mixgrpo_flash"
        )
        found.drop(["dpm_apply_strategy"])
        return "mixgrpo_flash"
    found.drop(["dpm_apply_strategy", "dpm_post_compress_ratio"])
    return "mixgrpo"


def _batch(found: Conversion, command: ShellCommand, gpus: int | None) -> None:
    """Fill in how much is done in an iteration."""
    devices = (gpus or command.devices) / found.number("sp_size", 1)
    rows = found.number("train_batch_size", 1)
    group = found.keys.get("tree.branches", 16)
    found.keys["batch.prompts"] = max(round(devices * rows), 1)
    accumulated = found.number("gradient_accumulation_steps", 1)
    found.keys["optim.steps_per_iteration"] = max(int(rows * group // max(accumulated, 1)), 1)
    found.notes["gradient_accumulation_steps"] = (
        f"counts samples of one GPU: {rows} x {group} of them make {found.keys['optim.steps_per_iteration']} optimiser "
        "steps for each rollout"
    )


def _weights(found: Conversion) -> None:
    """Fill in what is trained, its average, and its precision."""
    if "lora.rank" not in found.keys:
        found.keys["lora"] = None
    average, decay = found.take("use_ema"), found.number("ema_decay", 0.995)
    found.keys["optim.ema"] = None if average is None else decay
    precision = found.take("mixed_precision", "no")
    found.keys["run.precision"] = "fp32" if precision == "no" else "bf16"
    if precision == "fp16":
        found.notes["mixed_precision"] = "there is no fp16 here; bf16"
    found.keys["run.tf32"] = found.take("allow_tf32") is not None
    found.keys["run.gradient_checkpointing"] = found.take("gradient_checkpointing") is not None
    if (steps := found.keys.get("optim.warmup")) == 0:
        found.keys["optim.schedule"] = "constant"
    elif steps:
        found.notes["lr_warmup_steps"] = "counts optimiser steps, as optim.warmup does"


def _model(found: Conversion, recipe: Recipe, piece: str | None) -> None:
    """Fill in the model, its size and guidance, and the prompts."""
    folder = found.take("pretrained_model_name_or_path")
    found.drop(["vae_model_path"] if found.settings.get("vae_model_path") == folder else [])
    if folder is not None and (Path(folder) / "model_index.json").is_file():
        found.keys["model.path"] = str(Path(folder).absolute())
    elif folder is not None:
        kept = recipe.model.options.get("path")
        found.notes["pretrained_model_name_or_path"] = f"{folder} is no folder of a pipeline here; {kept} is kept"
    frames = found.number("t", 1)
    if "frames" in recipe.model.options:
        found.keys["model.frames"] = frames
    if (guidance := found.number("cfg_infer")) is not None:
        found.keys[guidance_key(recipe)] = float(guidance)
    elif piece == "flux":
        found.keys["model.guidance"] = 3.5  # as its program has it
    if found.number("cfg", 0.0):
        found.notes["cfg"] = "the share of prompts that its encodings leave out; none is left out here"
    prompts = found.take("data_json_path")
    if prompts is not None:
        found.notes["data_json_path"] = f"{prompts} lists encoded prompts; the recipe's own are kept, give data.prompts"


def _rewards(found: Conversion, recipe: Recipe) -> None:
    """Fill in the rewards that are here."""
    rewards = [{"reward": name} for flag, name in REWARDS.items() if found.take(flag) is not None]
    mixed = found.take("reward_model")
    if mixed is not None:
        asked = [name for name in MIXED if mixed == MIX_ALL or name in mixed or (name == "hps" and "hpsv2" in mixed)]
        rewards += [{"reward": MIXED[name], "weight": found.number(f"{name}_weight", 1.0)} for name in asked]
        together = found.take("multi_reward_mix", "advantage_aggr")
        found.keys["credit.combine"] = "rewards" if together == "reward_aggr" else "advantages"
        if mixed == MIX_ALL:
            found.notes["reward_model"] = "unifiedreward needs a server, and is left out; add it with its url"
    if rewards:
        found.keys["rewards"] = rewards
        found.keys["evaluation.rewards"] = [{"reward": reward["reward"]} for reward in rewards]
    else:
        names = ", ".join(reward.reward for reward in recipe.rewards)
        found.notes["rewards"] = f"no reward of the script is here; the recipe's is kept ({names})"
