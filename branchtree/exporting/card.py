"""The card of a trained model: ``README.md`` in its folder, with a curve of the rewards and the last samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from branchtree.errors import BranchTreeError
from branchtree.exporting.curve import reward_curve
from branchtree.exporting.lora import finished_model
from branchtree.files.checksums import CARD
from branchtree.files.writing import writing
from branchtree.plugins.protocols import DescribesItself
from branchtree.plugins.registry import registry
from branchtree.plugins.values import ModelCard
from branchtree.recipe import load_recipe
from branchtree.recipe.build import make_model
from branchtree.recipe.paths import local_paths
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import write_yaml
from branchtree.report.curves import evaluation_labels
from branchtree.report.files import content
from branchtree.report.markup import number, signed
from branchtree.report.read import Run, SampleGrid, read_run
from branchtree.run.directory import RunDirectory

CURVE, SAMPLES = "reward_curve.png", "samples.png"
LICENCES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "creativeml open rail-m": "creativeml-openrail-m",
    "creativeml open rail++-m": "openrail++",
}
"""The hub's names of licences by ours, in lower case."""
LARGEST_GRID = 50 * 2**20
"""Bytes of a picture of samples above which it is left out."""


def write_card(run: Path) -> Path:
    """Write the card of a finished run's model, and its pictures, into ``final/``; returns the card's path.

    Raises CheckpointError if the run is not finished, and OutputError for files that cannot be written.
    """
    directory = RunDirectory(run)
    final = finished_model(directory)
    found, recipe = read_run(run), load_recipe(directory.recipe_file)
    pictures: dict[str, bytes] = {}
    if (curve := reward_curve(found)) is not None:
        pictures[CURVE] = curve
    if found.samples and (grid := content(found.samples[-1].image, run, LARGEST_GRID)) is not None:
        pictures[SAMPLES] = grid
    text = render_card(found, recipe, pictures)
    with writing(final):
        directory.ledger.add_files(final, {CARD: text.encode(), **pictures})
    return final / CARD


def render_card(run: Run, recipe: Recipe, pictures: Mapping[str, bytes]) -> str:
    """Return the card as Markdown with YAML in front, as the hub reads it; ``pictures`` are those beside it."""
    model = model_card(recipe)
    sections = [
        f"# {_plain(recipe.name)}",
        _plain(recipe.description),
        _origin(run, recipe, model),
        _use(recipe, model),
        _held_out(run),
        _rewards(recipe, CURVE in pictures),
        _samples(run.samples[-1]) if SAMPLES in pictures else "",
        _licences(recipe, model),
        f"## Recipe\n\n```yaml\n{_recipe(recipe)}```",
    ]
    return f"---\n{write_yaml(front_matter(recipe, model))}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def model_card(recipe: Recipe) -> ModelCard:
    """Return what the recipe's model says of itself; little for a plug-in that says nothing."""
    try:
        model = make_model(recipe)
        if isinstance(model, DescribesItself):
            return model.card()
    except BranchTreeError:
        pass  # a model folder that is gone by now; the run is finished all the same
    return ModelCard(None, "not given by its plug-in", "branchtree")


def front_matter(recipe: Recipe, model: ModelCard) -> dict[str, object]:
    """Return what the hub reads of a card."""
    matter: dict[str, object] = {"library_name": model.library}
    if model.base is not None:
        matter |= {"base_model": model.base, "base_model_relation": "adapter" if recipe.lora else "finetune"}
    licence = LICENCES.get(model.licence.lower())
    matter["license"] = licence or "other"
    if licence is None and model.base is not None:
        matter |= {"license_name": "base-model", "license_link": f"https://huggingface.co/{model.base}"}
    matter["tags"] = ["branchtree", "reinforcement-learning", *(["lora"] if recipe.lora else [])]
    return matter


def _origin(run: Run, recipe: Recipe, model: ModelCard) -> str:
    base = f"[{model.base}](https://huggingface.co/{model.base})" if model.base else f"`{_name(recipe)}`"
    kind = f"A LoRA of rank {recipe.lora.rank}" if recipe.lora else "All weights"
    steps = f"{run.done} iterations" if run.done != 1 else "1 iteration"
    return f"{kind} trained from {base} for {steps} with branchtree {version('branchtree-grpo')}."


def _use(recipe: Recipe, model: ModelCard) -> str:
    if model.library != "diffusers":
        return ""
    base, lora = (model.base or "BASE", True) if recipe.lora else ("THIS/MODEL", False)
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)')
    lines += ['pipeline.load_lora_weights("THIS/MODEL")'] if lora else []
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _held_out(run: Run) -> str:
    if len(run.evaluations) < 2:
        return ""
    first, last = run.evaluations[0], run.evaluations[-1]
    rows = []
    for label in evaluation_labels([first, last]):
        before, after = (one.mean(label) for one in (first, last))
        change = None if before is None or after is None else after - before
        rows.append([label, number(before), number(after), signed(change)])
    when = [f"after {one.iteration} iterations" if one.iteration else "before training" for one in (first, last)]
    lead = "Means over samples of prompts that were not trained on, from the same noises each time."
    return f"## Held-out figures\n\n{lead}\n\n{_table(['reward', *when, 'change'], rows)}"


def _rewards(recipe: Recipe, curve: bool) -> str:
    rows = []
    for reward in recipe.rewards:
        entry = registry().rewards.get(reward.reward)
        rows.append([reward.label or reward.reward, f"{reward.weight:g}", entry.summary if entry else ""])
    picture = f"\n\n![The mean reward of each iteration's samples]({CURVE})" if curve else ""
    return f"## Trained on\n\n{_table(['reward', 'weight', 'what it is'], rows)}{picture}"


def _samples(grid: SampleGrid) -> str:
    prompts = "\n".join(f"{index}. {_plain(prompt)}" for index, prompt in enumerate(grid.prompts, 1))
    listed = f"\n\nPrompts, row by row:\n\n{prompts}" if prompts else ""
    return f"## Samples\n\n![Samples after {grid.iteration} iterations]({SAMPLES}){listed}"


def _licences(recipe: Recipe, model: ModelCard) -> str:
    judges = recipe.evaluation.rewards if recipe.evaluation else ()
    rows = [[_name(recipe), "base model", model.licence]]
    for name in dict.fromkeys(reward.reward for reward in (*recipe.rewards, *judges)):
        entry = registry().rewards.get(name)
        rows.append([name, "reward", entry.card.licence if entry and entry.card else "not given by its plug-in"])
    return f"## Licences\n\n{_table(['weights', 'what for', 'licence'], rows)}"


def _name(recipe: Recipe) -> str:
    """Return what the recipe calls its base model; of a folder, its name."""
    path = str(recipe.model.options.get("path") or recipe.model.adapter)
    return Path(path).name if Path(path).is_absolute() else path


def _recipe(recipe: Recipe) -> str:
    """Return the recipe with the names of files instead of their paths, which are private."""
    data = recipe.model_dump(mode="json")
    hidden = {str(path): path.name for path in local_paths(data).values()}
    text: str = write_yaml(data)
    for path in sorted(hidden, key=len, reverse=True):
        text = text.replace(path, hidden[path])
    return text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Return a text on one line, without what Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
