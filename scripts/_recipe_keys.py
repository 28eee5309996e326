"""A recipe's keys as Markdown tables, read from the classes that validate them and from the comments beside them."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

NOTES: Mapping[str, str] = {
    "name": "The run's name, and that of its directory under `runs/`. It is not inherited.",
    "description": "One line, shown by `branchtree recipes`. It is not inherited.",
    "seed": "Seed of everything drawn but the initial noise: edges, drawn splits, prompt order, LoRA's start.",
    "model": "The model and its options.",
    "model.adapter": "The model family's name; `branchtree plugins` lists them.",
    "model.start": "",
    "lora": "Train low-rank weights; the whole denoiser by default.",
    "lora.rank": "Rank of the update.",
    "lora.alpha": "Its scale,",
    "lora.targets": "Which layers get it:",
    "tree": "The shape of the tree.",
    "tree.steps": "T, the number of denoising steps in a rollout and in an evaluation.",
    "tree.splits": "Steps at which every node gets several children:",
    "tree.branches": "K,",
    "tree.draw": "Where drawn splits fall.",
    "tree.draw.first": "The earliest place, as a part of `tree.steps`.",
    "tree.draw.last": "The latest place.",
    "tree.siblings": "How the noises of one parent's children relate.",
    "tree.strength": "Siblings' noises correlate by 1 / (1 + s^2);",
    "tree.sde": "",
    "tree.window": "The sliding window.",
    "tree.window.size": "Steps in the window.",
    "tree.window.start": "Its first step at the start of training.",
    "tree.window.every": "How long it stays in one place:",
    "tree.window.stop": "Where it stops:",
    "tree.continuation": "",
    "tree.solver": "",
    "tree.continuation_check": "",
    "tree.timestep_fraction": "",
    "tree.noise_seed": "Seed",
    "sampler": "The stochastic step and the time grid.",
    "sampler.kind": "The transition kernel. `ddim` is for models that predict noise or v, the others for velocity.",
    "sampler.eta": "The noise level of a stochastic step;",
    "sampler.grid": "`linear` is an even grid, shifted;",
    "sampler.shift": "The time shift s",
    "sampler.log_prob": "An edge's log-density is averaged or summed",
    "rewards": "What is optimised; at least one.",
    "rewards.reward": "The reward's name; `branchtree plugins` lists them.",
    "rewards.weight": "Its weight when advantages, or raw rewards, are added;",
    "rewards.label": "Unique within its list;",
    "credit": "From leaf rewards to advantages.",
    "credit.beta": "Fusion's temperature; 0 is the plain mean over leaves.",
    "credit.path_scale": "The scale of path log-densities in fusion.",
    "credit.advantage": "The estimator: `depth` is the paper's, `leaf` is leave-one-out, `sibling` compares siblings.",
    "credit.combine": "Several rewards: add their weighted advantages, or add the weighted raw rewards first.",
    "credit.eps": "Added to the deviation that advantages are divided by.",
    "credit.clip": "Each reward's advantages are clipped to plus and minus this, before its weight.",
    "pruning": "Edges left out of the gradient pass.",
    "pruning.kind": "The rule; `parent_top1` and `extreme` are the paper's width pruning.",
    "pruning.count": "",
    "pruning.size": "",
    "pruning.every": "",
    "pruning.stop": "",
    "loss": "The clipped objective.",
    "loss.clip_range": "The ratio's clip: it may leave 1 by this much.",
    "loss.kl_every": "",
    "loss.weighting": "",
    "loss.kl": "Where above 0,",
    "loss.old_log_prob": "",
    "optim": "The optimiser.",
    "optim.lr": "Learning rate.",
    "optim.weight_decay": "AdamW's decoupled decay.",
    "optim.betas": "AdamW's moment decays.",
    "optim.eps": "AdamW's epsilon.",
    "optim.max_grad_norm": "The gradient is scaled down to this norm.",
    "optim.refuse_above": "",
    "optim.max_refused": "",
    "optim.schedule": "From `lr` down to 0 at the last planned optimiser step, taken or not, or constant.",
    "optim.warmup": "Linear warm-up, no longer than the run, in",
    "optim.steps_per_iteration": "Optimiser steps that one rollout's edges are dealt out to.",
    "optim.ema": "Decay of a moving average of the trained weights, reached over the first steps; `final/`, held-out "
    "figures and sample grids are of the average.",
    "batch": "How much at a time.",
    "batch.prompts": "Prompts",
    "batch.rollout_rows": "Rollout:",
    "batch.update_rows": "Gradient pass:",
    "batch.decode_rows": "",
    "batch.rollout_prompts": "",
    "batch.states": "",
    "batch.processes_per_prompt": "Processes",
    "scoring": "How leaves are scored, and when failing rewards end the run.",
    "scoring.overlap": "",
    "scoring.max_invalid": "",
    "scoring.window": "",
    "data": "The prompts to train on.",
    "data.prompts": "",
    "data.column": "The key or column that holds the prompt, in .jsonl, .parquet and hub data.",
    "data.split": "The split of a hub dataset.",
    "data.folder": "The data folder: paths of images and videos are relative to it and may not leave it;",
    "data.shuffle": "Permute the prompts anew in each pass.",
    "evaluation": "Held-out figures; none by default.",
    "evaluation.prompts": "As `data.prompts`.",
    "evaluation.column": "As `data.column`.",
    "evaluation.split": "As `data.split`.",
    "evaluation.folder": "As `data.folder`.",
    "evaluation.rewards": "Rewards that judge; they need not be those that are trained.",
    "evaluation.limit": "",
    "evaluation.noises": "",
    "evaluation.every": "How often, in",
    "evaluation.rows": "",
    "evaluation.seed": "Seed of the samples' starting noise.",
    "run": "Length, precision, output.",
    "run.iterations": "Rollouts in all.",
    "run.precision": "`bf16` computes in bfloat16; weights that are trained, latents and densities stay float32.",
    "run.tf32": "Allow TF32 in float32 matrix products on CUDA.",
    "run.gradient_checkpointing": "Recompute activations in the backward pass: less memory, about a third more work.",
    "run.compile": "",
    "run.embeddings": "",
    "run.embeddings_gib": "",
    "run.checkpoint_every": "In iterations; the last one is always saved.",
    "run.keep_checkpoints": "Older ones are deleted.",
    "run.checkpoint_async": "Write them in the background, from a copy in host memory; the same bytes.",
    "run.sample_every": "Iterations between sample grids.",
    "run.sample_prompts": "Samples in a grid.",
    "run.tree_every": "",
    "run.trackers": "Experiment trackers,",
    "run.threads": "CPU threads of PyTorch; its own choice by default.",
    "run.timeout": "",
    "callbacks": "Callbacks by name.",
    "callbacks.callback": "The callback's name; `branchtree plugins` lists them.",
}
"""What a key means, where its name does not say it; the comment beside it in the schema follows."""

FILLED_IN: Mapping[str, str] = {"name": "the file's name"}
"""Required keys that are filled in before a recipe is checked."""

PLAIN = {int: "integer", float: "number", str: "text", bool: "boolean", Path: "path", type(None): "null"}


def recipe_tables(root: type[BaseModel]) -> str:
    """One table for the top level, then one per section, in the order of the schema."""
    parts = [_table(root, "", root)]
    for key, section in _sections(root, ""):
        parts.append(f"### `{key}`\n\n{_lead(section)}\n\n{_table(section, key, root)}")
    return "\n\n".join(parts)


def recipe_keys(root: type[BaseModel]) -> list[str]:
    """Every dotted key."""
    sections = [("", root), *_sections(root, "")]
    return [_join(prefix, name) for prefix, section in sections for name in section.model_fields]


def option_table(config: type[BaseModel]) -> str:
    """A plug-in's own keys; their meaning is told by the docstring above the table."""
    rows = [f"| `{name}` | {_type(field)} | {_default(field)} |" for name, field in config.model_fields.items()]
    return "\n".join([_prose(config), "", "| key | type | default |", "| --- | --- | --- |", *rows])


def comments(section: type[BaseModel]) -> dict[str, str]:
    """The comment beside or above each key of a class."""
    source = textwrap.dedent(inspect.getsource(section))
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").strip()
            (above if token.line.strip().startswith("#") else beside)[token.start[0]] = text
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in above:
                first -= 1
            block = " ".join(above[line] for line in range(first, node.lineno))
            found[node.target.id] = f"{block} {beside.get(node.end_lineno or node.lineno, '')}".strip()
    return found


def _sections(model: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            found.append((_join(prefix, name), section))
            found += _sections(section, _join(prefix, name))
    # Entries of `evaluation.rewards` are those of `rewards`, described there.
    return [(key, section) for key, section in found if key != "evaluation.rewards"]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section(part)) is not None), None)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _lead(section: type[BaseModel]) -> str:
    """A section's docstring, without the key that it opens with."""
    text = _prose(section)
    head, separator, rest = text.partition(": ")
    text = rest if separator and "`" in head else text
    return text[0].upper() + text[1:]


def _prose(section: type[BaseModel]) -> str:
    """A docstring as Markdown; its list of attributes, if any, as a list."""
    text, _, attributes = (inspect.getdoc(section) or "").partition("\nAttributes:\n")
    entries = re.sub(r"\n {5,}", " ", attributes)
    items = [re.sub(r"^ *(\w+):", r"- `\1`:", line) for line in entries.splitlines()]
    return re.sub(r"``(.+?)``", r"`\1`", "\n".join([text, *items]))


def _table(section: type[BaseModel], prefix: str, root: type[BaseModel]) -> str:
    remarks = comments(section)
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        key = _join(prefix, name)
        meaning = _meaning(key, remarks.get(name, ""))
        default = FILLED_IN.get(key) or _default(field)
        lines.append(f"| `{key}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines)


def _meaning(key: str, comment: str) -> str:
    note = NOTES[key]
    if note and not note.endswith("."):
        comment = f"{note} {comment}"
    elif note:
        comment = f"{note} {comment[:1].upper()}{comment[1:]}"
    text = comment.strip()
    if not text:
        raise SystemExit(f"the recipe key '{key}' has no meaning: give it a comment in the schema, or a note here")
    text = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return text.replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    return ", ".join([_words(field.annotation), *_limits(field.metadata)])


def _limits(metadata: Iterable[Any]) -> list[str]:
    """Each bound in words."""
    marks = [mark for entry in metadata for mark in getattr(entry, "metadata", [entry])]
    return [
        f"{words} {_plain(getattr(mark, attribute))}"
        for mark in marks
        for attribute, words in (("ge", "from"), ("gt", "above"), ("lt", "below"), ("le", "to"))
        if getattr(mark, attribute, None) is not None
    ]


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is None:
        return PLAIN.get(annotation) or ("section" if _section(annotation) is not None else str(annotation))
    if origin is tuple:
        return _words_of_list(parts)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin in (Mapping, dict):
        return f"mapping to {_words(parts[1])}"
    return ", ".join([_words(parts[0]), *_limits(parts[1:])])  # what is annotated


def _words_of_list(parts: Sequence[Any]) -> str:
    kind, *limits = _words(parts[0]).split(", ")
    return ", ".join([f"{'list of' if parts[-1] is Ellipsis else len(parts)} {kind}s", *limits])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined:
        return "required"
    return "see section" if isinstance(value, BaseModel) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if value == 2**63:
        return "2^63"
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e3:
        return f"{value:g}".replace("e+0", "e").replace("e+", "e")
    return json.dumps(value) if value == "" else str(value)
