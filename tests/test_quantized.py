"""Weights that LoRA freezes, kept in fewer bits: their arithmetic, what trains on them, and what a plan counts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from branchtree_adapters.pipeline.denoisers import block_layers
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_runs import SMALL, largest_difference, metrics, weights

from branchtree import load_recipe, plan, train
from branchtree.cli.display import print_plan
from branchtree.errors import ModelError, RecipeError
from branchtree.plugins import Condition, quantized
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.quantized import BLOCK, FORMATS, QuantizedLinear
from branchtree.recipe.build import make_model
from branchtree.training.loading import load_model

CPU = torch.device("cpu")
LORA = {**SMALL, "model.height": 32, "model.width": 32, "lora.rank": 2, "optim.lr": 1e-3}
KINDS = pytest.mark.parametrize("kind", FORMATS)


def normal(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype) / 10


def kept(weight: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return FORMATS[kind].unpack(FORMATS[kind].pack(weight), weight.shape, dtype)


def worst(weight: Tensor, kind: str) -> Tensor:
    """How far a number may be from what is kept of it, (out, in) in float64, by the format's definition."""
    exact = weight.double()
    blocks = exact.reshape(-1, BLOCK)
    if kind == "int8":  # half a step, of which 127 reach from 0 to the row's largest number
        return (exact.abs().amax(1, keepdim=True) / 127 / 2).expand_as(exact)
    if kind == "int4":  # half a step, of which 15 reach from a block's least number to its largest
        steps = (blocks.amax(1) - blocks.amin(1)) / 15 / 2
    else:  # half the widest gap of nf4's levels, -1 and -.6962, of the block's largest number, which is rounded too
        steps = blocks.abs().amax(1) * (1 - 0.6962) / 2 * 1.1
    return steps[:, None].expand_as(blocks).reshape(exact.shape)


@KINDS
@given(rows=st.integers(1, 6), columns=st.sampled_from([64, 96, 192]), seed=st.integers(0, 2**31))
def test_what_is_kept_of_a_weight_is_within_half_a_step(kind: str, rows: int, columns: int, seed: int) -> None:
    weight = normal(2 * rows, columns, seed)
    assert ((kept(weight, kind) - weight).abs() <= worst(weight, kind) * (1 + 1e-5)).all()


@KINDS
def test_zeros_and_equal_numbers_are_kept(kind: str) -> None:
    weight = torch.zeros(4, BLOCK)
    weight[1] = 0.25
    torch.testing.assert_close(kept(weight, kind), weight, rtol=0.02, atol=0)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_weight_that_it_keeps_and_saves_no_other(kind: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(96, 64, dtype=dtype).requires_grad_(False)
    layer = QuantizedLinear(linear, kind, CPU)
    plain = nn.Linear(96, 64, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(kept(linear.weight, kind, dtype))
    plain.bias.copy_(linear.bias)
    inputs = normal(3, 96, 1, dtype).requires_grad_()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(inputs)
    assert torch.equal(output, plain(inputs))
    gradient = normal(3, 64, 2, dtype)
    assert torch.equal(*(torch.autograd.grad(each, inputs, gradient)[0] for each in (output, plain(inputs))))
    assert {tensor.data_ptr() for tensor in saved} <= {parameter.data_ptr() for parameter in layer.parameters()}


def loaded(kind: str | None, precision: str = "fp32") -> ModelAdapter:
    recipe = load_recipe("quickstart", {**LORA, "model.quantize": kind, "run.precision": precision})
    model = make_model(recipe)
    load_model(recipe, model, CPU)
    return model


def predicted(model: ModelAdapter) -> Tensor:
    conditioning = model.encode([Condition("a seven"), Condition("a three")])
    noise = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)])
    return model.predict(noise, torch.tensor([0.9, 0.4]), conditioning)


@KINDS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_model_has_its_blocks_in_fewer_bits_and_trains_lora_alone(kind: str, precision: str) -> None:
    whole, model = loaded(None, precision), loaded(kind, precision)
    layers = {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, QuantizedLinear)}
    names = {name.replace(".base_layer", "") for name in layers}
    assert names == {name.replace(".base_layer", "") for name in block_layers(whole.denoiser) if "lora_" not in name}
    assert len(names) == 20
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8 if kind == "int8" else torch.uint8}
    before, after = predicted(whole), predicted(model)
    apart = {"int8": 0.01, "int4": 0.06, "nf4": 0.06}[kind]
    assert 0 < (after - before).norm() / before.norm() < apart
    with model.without_lora(model.denoiser), torch.no_grad():
        assert torch.equal(predicted(model), after.detach())  # B is zero at the start
    after.square().mean().backward()
    trained = {name for name, value in model.denoiser.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in model.denoiser.named_parameters() if "lora_" in name}
    assert {model.denoiser.get_parameter(name).dtype for name in trained} == {torch.float32}


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_counts_the_bytes_that_are_kept(kind: str, precision: str) -> None:
    changes = {**LORA, "model.quantize": kind, "run.precision": precision}
    parameters = loaded(kind, precision).denoiser.named_parameters()
    stored = sum(value.nbytes for name, value in parameters if "lora_" not in name)
    estimate = plan("quickstart", changes).memory
    assert estimate.weights == stored
    assert estimate.dequantized == 96 * 6 * 96 * (4 + (2 if precision == "bf16" else 4))  # a modulation
    assert plan("quickstart", {**changes, "model.quantize": None}).memory.dequantized == 0
    text = io.StringIO()
    print_plan(Console(file=text), plan("quickstart", changes))
    assert f"Quantised to {kind}: " in text.getvalue()


def test_nf4_takes_a_little_more_than_half_a_byte() -> None:
    model = loaded("nf4")
    stored = sum(v.nbytes for name, v in model.denoiser.named_parameters() if "lora_" not in name)
    tables = 20 * 4 * (16 + 256 + 1)  # of each layer: the levels of codes and of scales, and the scales' offset
    assert 0 <= stored - tables - plan("quickstart", {**LORA, "model.quantize": "nf4"}).memory.weights < 20 * 5


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_resumes_to_the_byte_and_its_lora_is_read_by_the_pipeline(kind: str, tmp_path: Path) -> None:
    changes = {**LORA, "model.quantize": kind, "loss.kl": 0.1, "optim.steps_per_iteration": 2, "run.iterations": 3}
    train("quickstart", changes, output=tmp_path / "whole")
    train("quickstart", {**changes, "run.iterations": 1}, output=tmp_path / "halted")
    train("quickstart", changes, output=tmp_path / "halted", resume=True)
    whole, halted = (tmp_path / name for name in ("whole", "halted"))
    assert metrics(whole) == metrics(halted)
    files = [file.relative_to(whole) for file in sorted((whole / "final").rglob("*.safetensors"))]
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors"]  # the base is not written
    assert largest_difference(weights(whole), weights(halted)) == 0
    held = [file.name for file in (whole / "checkpoints").rglob("model/**/*.safetensors")]
    assert set(held) == {"pytorch_lora_weights.safetensors"}
    pipeline = FluxPipeline.from_pretrained(make_model(load_recipe("quickstart", LORA))._source.folder)  # type: ignore[attr-defined]
    pipeline.load_lora_weights(whole / "final")
    assert any("lora_A" in name for name, _ in pipeline.transformer.named_parameters())


def test_a_run_in_eight_bits_learns_what_one_in_full_learns(tmp_path: Path) -> None:
    for kind in (None, "int8"):
        train("quickstart", {**LORA, "model.quantize": kind}, output=tmp_path / str(kind))
    full, eight = (weights(tmp_path / str(kind)) for kind in (None, "int8"))
    assert largest_difference(full, eight) > 0
    changes = [
        torch.cat([found[name].flatten() for name in sorted(full) if "lora_B" in name]) for found in (full, eight)
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9


@pytest.mark.parametrize("name", ["sd35_t2i_branchgrpo_24gb", "wan_t2v_motion_24gb"])
def test_other_families_train_on_quantised_weights(name: str, tmp_path: Path) -> None:
    changes = {"tree.steps": 3, "tree.splits": [0], "batch.prompts": 1, "evaluation": None, "run.sample_prompts": 1}
    changes |= {"run.iterations": 1, "model.quantize": load_recipe(name).model.quantize}
    assert train(name, changes, smoke=True, output=tmp_path / "run").finished
    assert metrics(tmp_path / "run")[0]["grad_norm"] > 0


# What is refused


def test_training_all_weights_is_refused_by_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quickstart\nmodel:\n  quantize: int8\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml.*model\.quantize: int8 is for weights that a LoRA freezes"):
        load_recipe(file)


def test_a_model_that_cannot_is_refused() -> None:
    recipe = load_recipe("quickstart", {**LORA, "model.quantize": "int8"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("branchtree_adapters.flux.Flux.quantizations", frozenset())
        with pytest.raises(RecipeError, match=r"model\.quantize: models of the family 'flux' take no int8"):
            make_model(recipe)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes.*branchtree-grpo\[quantize\].*int4"):
        loaded("nf4")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even, self.norm1 = nn.Linear(9, 7), nn.Linear(16, 8), nn.Linear(16, 8)


class Model(nn.Module):
    _repeated_blocks = ("Block",)
    _keep_in_fp32_modules = ("norm1",)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.outside = Block(), nn.Linear(64, 64)


def test_layers_outside_of_blocks_delicate_ones_and_odd_ones_stay() -> None:
    assert list(block_layers(Model())) == ["block.even"]
