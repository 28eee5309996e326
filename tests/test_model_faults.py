"""Numbers that are not finite: found in weights when they are read, and named as the model's where it makes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from safetensors.torch import load_file, save_file
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import small

from branchtree import evaluate, train
from branchtree.core.scores import Scores
from branchtree.errors import BranchTreeError, ModelError
from branchtree.plugins import Condition, Media
from branchtree.training.conditioning import ConditioningCache
from branchtree.training.faults import find_faults, mask_faults

CPU = torch.device("cpu")
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, ending: str, edit: Callable[[Tensor], Tensor]) -> None:
    state = load_file(file)
    name = next(name for name in state if name.endswith(ending))
    state[name] = edit(state[name].clone())
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("component", "value"),
    [("transformer", "nan"), ("vae", "-inf"), ("text_encoder", "inf"), ("text_encoder_2", "nan")],
)
def test_weights_that_are_not_finite_are_refused(folder: Path, component: str, value: str) -> None:
    change(folder / WEIGHTS[component], "weight", lambda tensor: tensor.index_fill(0, torch.tensor([1]), float(value)))
    adapter = Flux(FluxConfig(path=str(folder), height=16, width=16))
    with pytest.raises(ModelError, match=rf"weights in '{folder}/{component}' hold NaN or infinity.* in 1 of \d+"):
        adapter.load(CPU, torch.float32, torch.float32)
        adapter.encode([Condition("a")])


def test_weights_too_large_for_the_precision_are_refused(folder: Path) -> None:
    change(folder / WEIGHTS["vae"], "conv_out.weight", lambda tensor: tensor + 1e5)
    with pytest.raises(ModelError, match="read as float16"):
        Flux(FluxConfig(path=str(folder), height=16, width=16)).load(CPU, torch.float16, torch.float32)


OVERFLOWS = {
    "transformer": ("transformer", "proj_out.weight", "denoiser gave latents", "transformer"),
    "vae": ("vae", "decoder.conv_in.weight", "decoder gave samples", "vae"),
}


@pytest.mark.parametrize("case", OVERFLOWS)
@pytest.mark.parametrize("way", ["train", "evaluate"])
def test_a_model_that_makes_nan_is_named_and_no_reward(folder: Path, tmp_path: Path, case: str, way: str) -> None:
    component, ending, gave, where = OVERFLOWS[case]
    change(folder / WEIGHTS[component], ending, lambda tensor: tensor.sign() * 3e38)
    held_out = {"prompts": ["a seven"], "noises": 1, "every": None, "rewards": [{"reward": "digits"}]}
    overrides = small(folder, evaluation=held_out if way == "evaluate" else None)
    run = evaluate if way == "evaluate" else train
    with pytest.raises(BranchTreeError) as caught:
        run("quickstart", overrides=overrides, output=tmp_path / "run")
    message = str(caught.value)
    assert f"the model's {gave} that are not finite (weights: {folder}/{where})" in message
    assert "get its files again" in message and "Mend" not in message and "Fix the reward" not in message


def test_an_encoder_that_gives_nan_is_named(folder: Path) -> None:
    change(folder / WEIGHTS["text_encoder_2"], "wo.weight", lambda tensor: tensor.sign() * 3e38)
    adapter = Flux(FluxConfig(path=str(folder), height=16, width=16))
    adapter.load(CPU, torch.float32, torch.float32)
    with pytest.raises(ModelError, match=rf"the encoder in '{folder}/text_encoder_2' gives embeddings that are not"):
        adapter.encode([Condition("a")])


def test_an_encoding_that_is_not_finite_is_not_trained_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Flux(FluxConfig(path=str(folder), height=16, width=16))
    adapter.load(CPU, torch.float32, torch.float32)
    encode = adapter.encode

    def spoiled(conditions: list[Condition]) -> dict[str, Tensor]:
        return {name: value / (name != "prompt_embeds") for name, value in encode(conditions).items()}

    monkeypatch.setattr(adapter, "encode", spoiled)
    with pytest.raises(ModelError, match=r"'a seven'.*encoders gave numbers in 'prompt_embeds' that are not finite"):
        ConditioningCache(adapter).get([Condition("a seven")], CPU)


def test_only_the_spoiled_samples_are_masked_with_the_component(folder: Path) -> None:
    adapter = Flux(FluxConfig(path=str(folder), height=16, width=16))
    adapter.load(CPU, torch.float32, torch.float32)
    latents, pixels = torch.zeros(3, 4, 16), torch.zeros(3, 3, 8, 8)
    latents[1, 0, 0], pixels[1:, 0, 0, 0] = torch.nan, torch.nan
    faults = find_faults(adapter, latents, Media(images=pixels))
    assert "denoiser gave latents" in faults[1] and "decoder gave samples" in faults[2] and len(faults) == 2
    scores = Scores(torch.arange(3.0), torch.tensor([True, True, True]), reasons={1: "pixels are not finite"})
    masked = mask_faults(scores, faults)
    assert masked.valid.tolist() == [True, False, False] and masked.reasons == faults
    assert mask_faults(scores, {}) is scores
