"""A new run from the weights of another: a run, a checkpoint, a LoRA's file or folder, or all of a model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_flux import tiny_flux
from training_runs import largest_difference, metrics, small, weights

from branchtree import evaluate, load_recipe, train
from branchtree.errors import CheckpointError, RecipeError
from branchtree.run.start import find_start
from branchtree.training.loading import frozen_copy

LORA = "pytorch_lora_weights.safetensors"
HELD_OUT = {"prompts": ["a one"], "rewards": [{"reward": "digits"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("model"))


def lora(model: Path, **changes: Any) -> dict[str, Any]:
    return small(model, **{"lora": {"rank": 2}, "optim__lr": 1e-2, "evaluation": HELD_OUT, **changes})


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two iterations."""
    return train("quickstart", lora(model), output=tmp_path_factory.mktemp("first") / "run").output


def test_a_run_starts_from_anothers_lora_and_its_kl_is_to_that_start(model: Path, first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train("quickstart", lora(model, loss__kl=0.1), output=run, start=first)
    rows = [json.loads(line) for line in (first / "evaluation.jsonl").read_text().splitlines()]
    assert done.before is not None
    assert done.before["digits"].mean == rows[-1]["figures"]["digits"]["mean"]  # where the first run ended
    assert rows[0]["figures"] != rows[-1]["figures"]
    assert [row["iteration"] for row in metrics(run)] == [0, 1]
    assert metrics(run)[0]["kl"] == 0.0 < metrics(run)[1]["kl"]
    assert largest_difference(weights(first), weights(run)) > 0
    summary = json.loads((run / "summary.json").read_text())["start"]
    assert summary["path"] == str(first / "final") == load_recipe(run / "recipe.yaml").model.start
    assert list(summary["files"]) == ["README.md", "manifest.json", LORA, "reward_curve.png", "samples.png"]
    judged = evaluate(run, output=tmp_path / "judged").rewards["digits"]
    assert judged.base.mean == done.before["digits"].mean


def test_it_is_resumed_to_the_bit_without_naming_the_start_again(model: Path, first: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    changes = lora(model, loss__kl=0.1, evaluation=None)
    train("quickstart", changes, output=whole, start=first / "checkpoints/iteration_000002")
    train("quickstart", {**changes, "run.iterations": 1}, output=parted, start=first / "checkpoints/iteration_000002")
    train("quickstart", changes, output=parted, resume=True)
    assert (whole / "metrics.jsonl").read_bytes() == (parted / "metrics.jsonl").read_bytes()
    assert largest_difference(weights(whole), weights(parted)) == 0
    with pytest.raises(CheckpointError, match=r"model\.start was .*iteration_000002/model\" and is .*iteration_000001"):
        again = first / "checkpoints/iteration_000001"
        train("quickstart", {**changes, "run.iterations": 3}, output=parted, resume=True, start=again)


def test_the_start_of_a_run_is_told_by_the_command_and_from_a_recipe(
    model: Path, first: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in lora(model, evaluation=None, run__iterations=1).items()]
    done = command("train", "quickstart", *words, "--from", str(first), "--output", str(tmp_path / "a"), "--no-report")
    assert done.code == 0, done.err
    (first / "mine.yaml").write_text("extends: quickstart\nmodel: {start: final}\n")
    named = load_recipe(first / "mine.yaml", lora(model, evaluation=None, run__iterations=1))
    assert named.model.start == str(first / "final")
    train(named, output=tmp_path / "b")
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0


def test_what_a_path_stands_for(first: Path, tmp_path: Path) -> None:
    assert find_start(first) == first / "final"
    assert find_start(first / "checkpoints/iteration_000001") == first / "checkpoints/iteration_000001/model"
    assert find_start(first / "final" / LORA) == first / "final" / LORA
    early = tmp_path / "early"
    shutil.copytree(first, early, ignore=shutil.ignore_patterns("final"))
    assert find_start(early) == early / "checkpoints/iteration_000002/model"
    shutil.rmtree(early / "checkpoints")
    with pytest.raises(CheckpointError, match=r"neither final/ nor a checkpoint"):
        find_start(early)
    with pytest.raises(RecipeError, match=r"model\.start: there is no file or folder"):
        find_start(tmp_path / "nowhere")


def flux(model: Path, **changes: Any) -> Any:
    """A loaded model as a run begins with it."""
    from branchtree.recipe.build import make_model
    from branchtree.training.loading import load_model

    recipe = load_recipe("quickstart", lora(model, **changes))
    adapter = make_model(recipe)
    load_model(recipe, adapter, torch.device("cpu"))
    return adapter


def change(adapter: Any) -> dict[str, torch.Tensor]:
    """What the LoRA adds to each layer's weight."""
    from peft.tuners.lora import Linear

    layers = {name: module for name, module in adapter.denoiser.named_modules() if isinstance(module, Linear)}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def test_a_lora_of_another_precision_and_scale_acts_as_its_file_says(model: Path, first: Path, tmp_path: Path) -> None:
    wanted = change(flux(model, model__start=str(first)))
    assert max(float(delta.abs().max()) for delta in wanted.values()) > 0
    rescaled = change(flux(model, model__start=str(first), lora={"rank": 2, "alpha": 16.0}))
    assert all(torch.allclose(rescaled[name], wanted[name], rtol=1e-5, atol=1e-9) for name in wanted)
    tensors = load_file(first / "final" / LORA)
    plain = {name: value.to(torch.bfloat16) for name, value in tensors.items() if not name.endswith(".alpha")}
    save_file(plain, tmp_path / "bare.safetensors")  # without a word of its alpha: the tensors have the whole strength
    bare = change(flux(model, model__start=str(tmp_path / "bare.safetensors")))
    for name, delta in wanted.items():
        assert float((bare[name] - delta).norm()) <= 0.02 * float(delta.norm())
    with_alpha = {
        f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0) for name in plain if "lora_A" in name
    }
    save_file({**plain, **with_alpha}, tmp_path / "told.safetensors")
    told = change(flux(model, model__start=str(tmp_path / "told.safetensors")))
    assert all(torch.allclose(told[name], bare[name] * 3, rtol=1e-5, atol=1e-9) for name in wanted)


def test_a_lora_that_does_not_fit_is_one_message_that_says_what_would(model: Path, first: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit: it has rank 2 and lora\.rank is 4; set lora\.rank=2$"):
        flux(model, model__start=str(first), lora={"rank": 4})
    with pytest.raises(
        CheckpointError, match=r"is on layers that the recipe's is not on \(.*; set lora\.targets$"
    ) as told:
        flux(model, model__start=str(first), lora={"rank": 2, "targets": ["attn.to_q"]})
    assert str(told.value).startswith("model.start: the LoRA '") and "\n" not in str(told.value)
    with pytest.raises(CheckpointError, match=r"is a LoRA.*the recipe trains all weights; add a lora section"):
        flux(model, model__start=str(first), lora=None)
    with pytest.raises(
        CheckpointError, match=r"holds no pytorch_lora.*name the folder of a whole model as model\.path"
    ):
        flux(model, model__start=str(model))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.start: cannot read trained weights from '.*bad\.safetensors'"):
        flux(model, model__start=str(tmp_path / "bad.safetensors"))
    with pytest.raises(RecipeError, match=r"model\.start: there is no file or folder .*nowhere"):
        train("quickstart", lora(model), output=tmp_path / "run", start=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_all_weights_start_from_a_full_fine_tune(model: Path, tmp_path: Path) -> None:
    changes = small(model, optim__lr=1e-3, run__iterations=1)
    train("quickstart", changes, output=tmp_path / "first")
    again = train("quickstart", {**changes, "loss.kl": 0.1}, output=tmp_path / "again", start=tmp_path / "first")
    assert again.finished and metrics(tmp_path / "again")[0]["kl"] == 0.0
    for start in (
        tmp_path / "first",
        tmp_path / "first/checkpoints/iteration_000001",
        tmp_path / "first/final/transformer",
    ):
        began = flux(model, model__start=str(start), lora=None).denoiser.state_dict()
        assert largest_difference(weights(tmp_path / "first"), dict(began)) == 0
    with pytest.raises(
        CheckpointError, match=r"model\.start: the weights in .* do not belong to this model: 0 missing"
    ):
        flux(tiny_flux(tmp_path / "other", guidance_embeds=False), model__start=str(tmp_path / "first"), lora=None)


def test_weights_that_are_not_as_their_run_wrote_them_are_refused(model: Path, first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(first, run)
    (file,) = (run / "final").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    changes = lora(model)
    for start in (run, run / "final", file):
        with pytest.raises(CheckpointError, match=rf"model\.start: {file}: is damaged or was changed"):
            flux(model, **{**changes, "model.start": str(start)})


def test_the_card_of_the_run_that_it_starts_from_may_be_edited(model: Path, first: Path, tmp_path: Path) -> None:
    before, run = tmp_path / "before", tmp_path / "run"
    shutil.copytree(first, before)
    changes = lora(model, evaluation=None)
    for iterations in (1, 2):
        with (before / "final/README.md").open("a") as card:
            card.write("Made for my friends.\n")
        train("quickstart", {**changes, "run.iterations": iterations}, output=run, start=before, resume=iterations == 2)
    assert [row["iteration"] for row in metrics(run)] == [0, 1]


def test_a_frozen_copy_has_the_frozen_weights_in_common(model: Path) -> None:
    adapter = flux(model)
    copy = frozen_copy(adapter.denoiser)
    theirs = dict(copy.named_parameters())
    for name, value in adapter.denoiser.named_parameters():
        assert (theirs[name] is value) is not value.requires_grad
        assert not theirs[name].requires_grad and torch.equal(theirs[name], value)


def test_a_model_without_the_ability_is_given_what_it_saved(
    guest_site: Path, plug: Callable[[Path], None], tmp_path: Path
) -> None:
    plug(guest_site)
    changes = {"run.iterations": 1, "tree.steps": 4, "tree.splits": [0], "callbacks": [], "run.sample_prompts": 1}
    first = train("guest", changes, output=tmp_path / "first")
    second = train("guest", changes, output=tmp_path / "second", start=tmp_path / "first")
    assert first.after == second.before
    with pytest.raises(
        CheckpointError, match=r"model\.start: cannot read trained weights from .*denoiser\.safetensors"
    ):
        train("guest", changes, output=tmp_path / "third", start=tmp_path)
