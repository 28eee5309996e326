"""Attention back-ends and compiled blocks: what they refuse, and that they change nothing but speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import small

from branchtree import train
from branchtree.errors import ModelError
from branchtree.protocols import Condition, LoraSettings
from branchtree.testing.probe import randomise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def load(path: Path, attention: str | None = None) -> Flux:
    adapter = Flux(FluxConfig(path=str(path), height=16, width=16, attention=attention))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter


def predicted(adapter: Flux) -> Tensor:
    latents = torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)])
    conditioning = adapter.encode([Condition("a three"), Condition("a seven")])
    return adapter.predict(latents, torch.tensor([0.9, 0.4]), conditioning)


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
