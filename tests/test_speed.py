"""Attention back-ends and compiled blocks: what they refuse, and that they change nothing but speed; bf16."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.adapter import PipelineAdapter
from branchtree_adapters.wan_layout import WanConfig
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from random_models import SMALL_FLUX, SMALL_WAN, Execution, RandomFlux, RandomWan, write_configs
from tiny_flux import tiny_flux
from torch import Tensor
from traffic import Operation, Traffic, forward_traffic
from training_runs import small

from branchtree import load_recipe, train
from branchtree.errors import ModelError
from branchtree.plugins import Condition, LoraSettings
from branchtree.run.directory import RunDirectory
from branchtree.testing.probe import randomise
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.trainer import Trainer

CPU = torch.device("cpu")
HALF = torch.bfloat16
BF16_LORA: dict[str, Any] = {"run.precision": "bf16", "lora.rank": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def load(path: Path, attention: str | None = None) -> Flux:
    adapter = Flux(FluxConfig(path=str(path), height=16, width=16, attention=attention))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter


def predicted(adapter: Flux, denoiser: Any = None) -> Tensor:
    latents = torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)])
    conditioning = adapter.encode([Condition("a three"), Condition("a seven")])
    return adapter.predict(latents, torch.tensor([0.9, 0.4]), conditioning, denoiser)


def test_an_attention_backend_is_used_by_one_model_alone(model: Path) -> None:
    before = _AttentionBackendRegistry.get_active_backend()[0]
    adapter, plain = load(model, "_native_math"), load(model)
    chosen = {block.attn.processor._attention_backend for block in adapter.denoiser.transformer_blocks}  # type: ignore[union-attr]
    assert chosen == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    with torch.no_grad():
        torch.testing.assert_close(predicted(adapter), predicted(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("natve", "attention 'natve' is no back-end of diffusers; did you mean 'native'"),
        ("sage", "attention 'sage' has no backward pass"),
        ("_native_npu", "attention '_native_npu' cannot be used here: .* Those that can: .*native"),
    ],
)
def test_an_attention_backend_that_cannot_be_used_is_refused(model: Path, backend: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(model, backend)


def test_an_unknown_compiler_is_refused(model: Path, tmp_path: Path) -> None:
    changes = {**small(model), "run.compile": "inducter"}
    with pytest.raises(ModelError, match="no back-end 'inducter'; did you mean 'inductor'"):
        train("quickstart", changes, output=tmp_path / "run")


# torch's own capture looks at gradients of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled_blocks_give_the_same_with_lora_and_checkpointing(model: Path) -> None:
    answers = []
    for compiled in (False, True):
        adapter = load(model)
        adapter.add_lora(LoraSettings(rank=2, alpha=4.0), seed=0)
        adapter.enable_gradient_checkpointing()
        randomise(adapter.denoiser)
        if compiled:
            # The capture alone: generating code takes minutes on a CPU.
            adapter.compile_blocks(adapter.denoiser, "eager")
        with torch.no_grad(), adapter.without_lora(adapter.denoiser):
            without = predicted(adapter)
        output = predicted(adapter)
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in adapter.denoiser.named_parameters() if p.grad is not None}
        answers.append({"without": without, "with": output.detach(), **gradients})
    plain, fast = answers
    assert plain.keys() == fast.keys() and not torch.equal(plain["with"], plain["without"])
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-6, msg=name)
    blocks = [block for block in adapter.denoiser.modules() if block._compiled_call_impl is not None]
    assert len(blocks) == 3  # one double-stream and two single-stream blocks


@pytest.mark.parametrize("lora", [True, False])
def test_autocast_is_for_float32_weights_alone(model: Path, tmp_path: Path, lora: bool) -> None:
    """Through an iteration of the trainer: in the rollout and in the gradient pass, to the float32 masters."""
    changes = BF16_LORA if lora else {"run.precision": "bf16"}
    recipe, directory = load_recipe("quickstart", {**small(model), **changes}), RunDirectory(tmp_path / "run")
    inputs = read_inputs(recipe)
    directory.claim(resume=False)
    session = open_session(inputs, directory, make_accelerator(recipe))
    seen: set[tuple[bool, bool, torch.dtype]] = set()
    denoiser: Any = inputs.model.denoiser
    denoiser.single_transformer_blocks[0].norm.register_forward_pre_hook(
        lambda _, inputs: seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), inputs[0].dtype))
    )
    trained = session.updater.engine.parameters
    before = {name: value.detach().clone() for name, value in trained.items()}
    Trainer(session, [])._iteration(0)
    assert {grad for grad, _, _ in seen} == {True, False}
    assert {enabled for _, enabled, _ in seen} == {not lora}
    if lora:
        assert {dtype for _, _, dtype in seen} == {HALF}
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
    (row,) = directory.rows("metrics.jsonl")
    assert row["ratio/max_deviation"] == 0.0


def test_a_base_with_fresh_lora_is_the_bf16_pipeline_to_the_bit(model: Path) -> None:
    adapter = Flux(FluxConfig(path=str(model), height=16, width=16))
    adapter.load(CPU, HALF, HALF)
    adapter.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
    pipeline = FluxPipeline.from_pretrained(model, dtype=HALF)
    with torch.no_grad():
        assert torch.equal(predicted(adapter), predicted(adapter, pipeline.transformer))


def random_model(kind: str, folder: Path, attention: str | None = None) -> PipelineAdapter:
    """A small FLUX or Wan of the published kinds of layers, whose weights take no memory."""
    if kind == "flux":
        flux = FluxConfig(path=write_configs(folder, SMALL_FLUX), height=64, width=64, attention=attention)
        return RandomFlux(flux, Execution(attention))
    sizes = {"height": 32, "width": 32, "frames": 5, "task": "text_to_video", "max_sequence_length": 16}
    return RandomWan(
        WanConfig.model_validate({"path": write_configs(folder, SMALL_WAN), **sizes}), Execution(attention)
    )


def widened(traffic: Traffic) -> Counter[tuple[int, ...]]:
    """The sizes of what was cast from bfloat16 to float32."""
    casts = [each for each in traffic.operations if each.name == "_to_copy"]
    return Counter(
        each.outputs[0].shape
        for each in casts
        if each.inputs[0].dtype == HALF and each.outputs[0].dtype == torch.float32
    )


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_lora_over_a_bf16_base_widens_no_activation(kind: str, tmp_path: Path) -> None:
    """What is cast to float32 is what the plain pipeline casts; A and B are cast once; attention gets bfloat16."""
    base, _ = forward_traffic(random_model(kind, tmp_path), None, under_autocast=False)
    model = random_model(kind, tmp_path)
    lora, attention = forward_traffic(model, 4, under_autocast=load_recipe("quickstart", BF16_LORA).autocast)
    assert widened(lora) == widened(base)
    weights = {p.untyped_storage()._cdata for p in model.denoiser.parameters() if p.requires_grad}

    def of_weights(each: Operation) -> bool:
        return each.name == "_to_copy" and each.inputs[0].untyped_storage()._cdata in weights

    casts = Counter(each.inputs[0].untyped_storage()._cdata for each in filter(of_weights, lora.operations))
    assert casts == dict.fromkeys(weights, 1)
    assert len(attention.dtypes) > 0 and set(attention.dtypes) == {(HALF, HALF, HALF)}
    added = Counter(each.name for each in lora.operations) - Counter(each.name for each in base.operations)
    layers = len(weights) // 2
    assert added == {"mul": layers, "add": layers, "_to_copy": 2 * layers}


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """What flash_attn_func refuses and returns."""
    if {q.dtype, k.dtype, v.dtype} - {torch.float16, HALF}:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return torch.empty_like(q)


@pytest.mark.parametrize("kind", ["flux", "wan"])
@pytest.mark.parametrize("lora", [True, False])
def test_flash_attention_gets_bf16_from_lora_and_from_full_training(
    kind: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = "diffusers.models.attention_dispatch."
    monkeypatch.setattr(f"{dispatch}_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(f"{dispatch}flash_attn_func", flash_attention)
    recipe = load_recipe("quickstart", BF16_LORA if lora else {"run.precision": "bf16"})
    _, attention = forward_traffic(
        random_model(kind, tmp_path, "flash"),
        4 if lora else None,
        under_autocast=recipe.autocast,
        dtype=HALF if lora else torch.float32,
    )
    assert not attention.dtypes  # torch's own was not used
