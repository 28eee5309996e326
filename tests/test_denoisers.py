"""Pipelines with a U-Net or two transformers, and weights without effect: what is saved, read, and trained together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.any_pipeline.substitutes import Wrapped
from branchtree_adapters.pipeline.denoisers import Denoisers
from branchtree_adapters.small.pipelines import PIPELINES
from diffusers.utils import convert_state_dict_to_kohya
from forked import Python, end_together, shared_environment
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_runs import metrics

from branchtree import train
from branchtree.errors import CheckpointError, ModelError
from branchtree.plugins import Condition, LoraSettings
from branchtree.testing.probe import randomise
from branchtree.training.loading import train_all

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")

CPU, SINGLE = torch.device("cpu"), torch.float32
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA = LoraSettings(rank=2, alpha=3.0)
UNUSED = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Layers of the last block of Qwen-Image, which work on text that nothing reads."""


def section(name: str) -> dict[str, Any]:
    """The section ``model`` for a small pipeline, without its adapter."""
    family = PIPELINES[name]
    call = dict(family.call)
    sizes = {"height": call.pop("height"), "width": call.pop("width")}
    if "num_frames" in call:
        sizes["frames"] = call.pop("num_frames")
    return {"path": f"small:{name}", **sizes, "negative_prompt": family.negative, "call": call}


def loaded(name: str, lora: LoraSettings | None = None, seed: int = 5) -> Diffusers:
    """A small pipeline's adapter, all of its weights or a LoRA moved."""
    adapter = Diffusers(DiffusersConfig.model_validate(section(name)))
    adapter.load(CPU, SINGLE, SINGLE)
    if lora is None:
        train_all(adapter)
    else:
        adapter.add_lora(lora, seed=0)
    randomise(adapter.denoiser, seed)
    return adapter


def drawn(name: str, pipeline: Any) -> Tensor:
    """What a pipeline's own call makes of a prompt, before it is decoded."""
    family = PIPELINES[name]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    result: Tensor = pipeline(
        "a cat",
        negative_prompt=family.negative,
        num_inference_steps=3,
        output_type="latent",
        return_dict=False,
        generator=generator,
        **family.call,
    )[0]
    return result


def require_same(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) < 1e-5 * scale


def read_by_diffusers(name: str, folder: Path) -> Any:
    """The pipeline with a LoRA, loaded as its documentation says."""
    pipeline = PIPELINES[name].build()
    pipeline.load_lora_weights(folder)
    if (folder / "transformer_2").is_dir():
        pipeline.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)
    return pipeline


@pytest.mark.parametrize("name", ["sdxl", "sd15", "wan_experts"])
def test_an_exported_lora_is_read_by_the_pipelines_own_loader(name: str, tmp_path: Path) -> None:
    adapter = loaded(name, LORA)
    adapter.export(tmp_path)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors")}
    assert files == {LORA_FILE, *([f"transformer_2/{LORA_FILE}"] if name == "wan_experts" else [])}
    expected = drawn(name, adapter.with_encoders())
    require_same(drawn(name, read_by_diffusers(name, tmp_path)), expected)
    assert float((drawn(name, PIPELINES[name].build()) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["sdxl", "wan_experts"])
def test_an_exported_pipeline_is_a_pipeline_of_diffusers(name: str, tmp_path: Path) -> None:
    adapter = loaded(name)
    adapter.export(tmp_path)
    assert all((tmp_path / each).is_dir() for each in adapter.denoiser_names)
    again = type(adapter.pipeline).from_pretrained(tmp_path)
    assert again.config.get("boundary_ratio") == adapter.pipeline.config.get("boundary_ratio")
    require_same(drawn(name, again), drawn(name, adapter.with_encoders()))


@pytest.mark.parametrize("name", ["sdxl", "wan_experts"])
def test_training_starts_from_a_lora(name: str, tmp_path: Path) -> None:
    source, target = loaded(name, LORA), loaded(name, LoraSettings(rank=2, alpha=8.0), seed=9)
    source.export(tmp_path)
    target.start_from(tmp_path)
    require_same(drawn(name, target.with_encoders()), drawn(name, source.with_encoders()))
    if name == "wan_experts":
        with pytest.raises(CheckpointError, match="no LoRA of transformer_2"):
            target.start_from(tmp_path / LORA_FILE)


def kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of a U-Net as other programs name its layers, with alpha 1."""
    named = {f"unet.{key}": value for key, value in tensors.items()}
    return {
        key: value if not key.endswith(".alpha") else torch.tensor(1.0)
        for key, value in convert_state_dict_to_kohya(named).items()
    }


def old(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as earlier versions of diffusers wrote it."""
    ends = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    renamed = {f"unet.{key}": value for key, value in tensors.items()}
    for new, before in ends.items():
        renamed = {key.replace(new, before): value for key, value in renamed.items()}
    return renamed


@pytest.mark.parametrize("program", [kohya, old])
def test_lora_files_of_other_programs_act_as_in_the_pipeline(program: Any, tmp_path: Path) -> None:
    source = loaded("sdxl", LORA)
    save_file(program(get_peft_model_state_dict(source.denoiser)), tmp_path / LORA_FILE)
    adapter = loaded("sdxl", LORA)
    summary = adapter.load_lora(tmp_path / LORA_FILE)
    assert summary.strengths == ((0.5,) if program is kohya else (1.0,))
    require_same(drawn("sdxl", adapter.with_encoders()), drawn("sdxl", read_by_diffusers("sdxl", tmp_path)))


def test_each_denoiser_is_called_through_the_one_module() -> None:
    """So that what wraps it, as DDP does, sees every call."""
    adapter = loaded("wan_experts")
    assert isinstance(adapter.denoiser, Denoisers)
    calls: list[str] = []
    adapter.denoiser.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    encoded = adapter.encode([Condition("a cat"), Condition("a dog")])
    latents = torch.stack([adapter.initial_noise(torch.Generator().manual_seed(row)) for row in range(2)])
    adapter.predict(latents, torch.tensor([0.9, 0.2]), encoded)
    assert calls == ["transformer"] * 2 + ["transformer_2"] * 2
    below = adapter.driver.absent_levels(torch.tensor([0.9, 0.8]))
    above = adapter.driver.absent_levels(torch.tensor([0.2]))
    assert (len(below), len(above), len(adapter.driver.absent_levels(torch.tensor([0.9, 0.2])))) == (1, 1, 0)
    assert float(below) < 0.6 < float(above)


# Weights without effect


def test_weights_without_effect_are_frozen_and_get_no_lora(tmp_path: Path) -> None:
    adapter = loaded("qwen_image")
    frozen = {key for key, value in adapter.denoiser.named_parameters() if not value.requires_grad}
    assert frozen == {f"transformer_blocks.1.{layer}.{kind}" for layer in UNUSED for kind in ("weight", "bias")}
    low_rank = loaded("qwen_image", LoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_add_out"]))
    low_rank.export(tmp_path)
    found = {key.removeprefix("transformer.").partition(".lora_")[0] for key in load_file(tmp_path / LORA_FILE)}
    assert found == {f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)} | {"transformer_blocks.0.attn.to_add_out"}
    with pytest.raises(ModelError, match="no prediction depends on"):
        loaded("qwen_image", LoraSettings(rank=2, alpha=4.0, targets=["transformer_blocks.1.attn.to_add_out"]))


def test_a_lora_on_layers_without_effect_can_be_started_from(tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, alpha=4.0, targets=["to_q", "to_add_out"])
    adapter = loaded("qwen_image", settings)
    adapter.export(tmp_path)
    layer = "transformer.transformer_blocks.1.attn.to_add_out"
    more = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file({**load_file(tmp_path / LORA_FILE), **more}, tmp_path / "other.safetensors")
    fresh = loaded("qwen_image", settings, seed=9)
    fresh.start_from(tmp_path / "other.safetensors")
    require_same(drawn("qwen_image", fresh.with_encoders()), drawn("qwen_image", adapter.with_encoders()))


# Two processes

RUN: dict[str, Any] = {
    "tree": {"steps": 3, "splits": [0, 1]},
    "sampler": {"eta": 0.7},
    "rewards": [{"reward": "digits"}],
    "data": {"prompts": ["a seven", "a three", "a one"], "shuffle": False},
    "batch": {"prompts": 3, "rollout_prompts": 1, "update_rows": 3},
    # Adam divides by the gradient's own size, which makes steps of rounding where a gradient is nothing else.
    "optim": {"lr": 1e-3, "eps": 1e-4, "steps_per_iteration": 1},
    "loss": {"clip_range": 1e-2},
    "run": {"iterations": 2, "checkpoint_every": 2, "sample_every": 100, "sample_prompts": 1},
}
LOW_RANK = {"lora": {"rank": 2}}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen_full": ("qwen_image", {}, ("ddp", "sharded")),
    "qwen_lora": ("qwen_image", LOW_RANK, ("ddp",)),
    "wan_lora": ("wan_experts", LOW_RANK, ("ddp", "sharded")),
}
"""The model, changes to the recipe, and how two processes hold the weights: whole or sharded."""
PAIRS = [f"{case}_{kind}" for case, (_, _, kinds) in CASES.items() for kind in kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: each case by one process, and by two."""
    root = tmp_path_factory.mktemp("runs")
    asked = []
    for case, (name, changes, kinds) in CASES.items():
        recipe, folder = root / f"{case}.yaml", root / name
        if not folder.is_dir():
            PIPELINES[name].build().save_pretrained(folder)
        model = {"adapter": "diffusers", **section(name), "path": str(folder)}
        recipe.write_text(yaml.safe_dump({**RUN, **changes, "name": case, "model": model}))
        train(str(recipe), output=root / f"{case}_one")
        for kind in kinds:
            run = {"recipe": str(recipe), "overrides": {}, "output": str(root / f"{case}_{kind}")}
            asked.append({**run, "sharded": kind == "sharded", "resume": False, "looked_at": False})
    script, shared = str(Path(__file__).parent / "process_runs.py"), shared_environment()
    processes = [
        Python(script, json.dumps(asked), environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert end_together(processes) == [0, 0], "".join(process.out + process.err for process in processes)
    return root


def trained(run: Path) -> dict[str, Tensor]:
    """The weights in the last checkpoint, by file and name."""
    folder = max((run / "checkpoints").iterdir()) / "model"
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.relative_to(folder)} {key}": value.double() for file in files for key, value in load_file(file).items()
    }


@pytest.mark.parametrize("other", PAIRS)
def test_two_processes_learn_what_one_does(runs: Path, other: str) -> None:
    """Though a batch of one may have rows for one expert alone, and one of the other for both."""
    case = other.rpartition("_")[0]
    one, two = trained(runs / f"{case}_one"), trained(runs / other)
    assert one.keys() == two.keys()
    flat = [torch.cat([each[key].flatten() for key in one]) for each in (one, two)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-5
    for first, second in zip(metrics(runs / f"{case}_one"), metrics(runs / other), strict=True):
        assert first["grad_norm"] > 0
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "levels", "rows"), [("aura_flow", (0.9, 0.2), "noise levels"), ("sd3", (0.9, 0.2), "")]
)
def test_rows_that_need_calls_of_their_own_are_refused_where_weights_are_sharded(
    name: str, levels: tuple[float, float], rows: str
) -> None:
    """Other processes would wait for weights in calls that this one does not make."""
    model = Diffusers(DiffusersConfig.model_validate(section(name)))
    model.load(torch.device("cpu"), torch.float32, torch.float32)
    conditioning = {key: value.expand(2, *value.shape[1:]) for key, value in model.driver.example.items()}
    wrapped = {"transformer": Wrapped(model.denoiser, model.denoiser, sharded=True)}
    state, sigma = torch.zeros(2, *model.latent_shape), torch.tensor(levels)
    with pytest.raises(ModelError, match=f"different {rows}.* under DDP") if rows else nullcontext():
        model.driver.predict(state, sigma, conditioning, wrapped)
