"""LoRA files of every common kind: read as the programs that they are for read them, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.lora_file import LORA_FILE
from branchtree_adapters.wan import Wan, WanConfig
from diffusers import FluxPipeline, WanPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_flux import tiny_flux
from tiny_wan import FRAMES, SIZE, Kind, tiny_wan
from torch import Tensor, nn
from training_runs import arguments, small

from branchtree import evaluate, train
from branchtree.errors import CheckpointError, RecipeError
from branchtree.plugins import Condition, Conditioning, LoraSettings, LoraSummary
from branchtree.plugins.protocols import LoadsLora

CPU = torch.device("cpu")
TOLERANCE = 2e-6
TARGETS = {"flux": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"), "wan": ("attn1.to_q", "ffn.net.2")}
PIPELINES = {"flux": FluxPipeline, "wan": WanPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    wan = tiny_wan(tmp_path_factory.mktemp("wan"), Kind(image_to_video=False))
    return {"flux": tiny_flux(tmp_path_factory.mktemp("flux")), "wan": wan}


@cache
def loaded(family: str, folder: Path) -> tuple[Flux | Wan, Conditioning]:
    path = str(folder)
    if family == "flux":
        adapter: Flux | Wan = Flux(FluxConfig(path=path, height=32, width=32))
    else:
        sizes = {"task": "text_to_video", "height": SIZE, "width": SIZE, "frames": FRAMES, "guidance": 1.0}
        adapter = Wan(WanConfig.model_validate({"path": path, **sizes}))
    adapter.load(CPU, torch.float32, torch.float32)
    conditioning = adapter.encode([Condition("a red three")])
    adapter.drop_encoders()
    return adapter, conditioning


def adapter_of(family: str, folders: Mapping[str, Path]) -> Flux | Wan:
    """A loaded model as no other test has it."""
    return copy.deepcopy(loaded(family, folders[family])[0])


@torch.no_grad()
def velocity(adapter: Flux | Wan, denoiser: nn.Module | None = None) -> Tensor:
    family = "flux" if isinstance(adapter, Flux) else "wan"
    conditioning = loaded(family, Path(adapter.config.path))[1]
    latents = adapter.initial_noise(torch.Generator().manual_seed(3))[None]
    return adapter.predict(latents, torch.tensor([0.7]), conditioning, denoiser)


@cache
def read(family: str, folder: Path) -> Any:
    """diffusers' own pipeline, whose transformer is only copied."""
    return PIPELINES[family].from_pretrained(folder)


def by_diffusers(family: str, folders: Mapping[str, Path], source: Path) -> nn.Module:
    """The transformer of diffusers' own pipeline with the LoRA."""
    whole = read(family, folders[family])
    pipeline = type(whole)(**{**whole.components, "transformer": copy.deepcopy(whole.transformer)})
    pipeline.load_lora_weights(source)
    transformer: nn.Module = pipeline.transformer
    return transformer


def fill(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that change what a model does, the same ones for the same names."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in sorted(tensors.items())}


def module_of(family: str, folders: Mapping[str, Path], **config: Any) -> nn.Module:
    """A transformer as peft wraps it, with LoRA weights that are not zero."""
    transformer = copy.deepcopy(read(family, folders[family]).transformer)
    model = get_peft_model(transformer, LoraConfig(target_modules=list(TARGETS[family]), **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    return model


def require_equal(adapter: Flux | Wan, source: Path, expected: Tensor) -> LoraSummary:
    base = velocity(adapter)
    assert isinstance(adapter, LoadsLora)
    summary = adapter.load_lora(source)
    found = velocity(adapter)
    assert (found - expected).abs().max() <= TOLERANCE < 100 * TOLERANCE < (found - base).abs().max()
    with adapter.without_lora(adapter.denoiser):
        assert torch.equal(velocity(adapter), base)
    return summary


# --- the kinds ---


@pytest.mark.parametrize("alpha", [8.0, 3.0])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_what_this_library_exports(family: str, alpha: float, folders: dict[str, Path], tmp_path: Path) -> None:
    trained = adapter_of(family, folders)
    trained.add_lora(LoraSettings(4, alpha, TARGETS[family]), 0)
    for parameter in trained.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    (trained.save if alpha == 3 else trained.export)(tmp_path)
    expected = velocity(adapter_of(family, folders), by_diffusers(family, folders, tmp_path))
    assert (expected - velocity(trained)).abs().max() <= TOLERANCE
    summary = require_equal(adapter_of(family, folders), tmp_path / LORA_FILE, expected)
    assert (summary.kind, summary.ranks, summary.strengths) == ("diffusers", (4,), (0.75,) if alpha == 3 else (1.0,))
    again = adapter_of(family, folders)
    again.add_lora(LoraSettings(2, 1.0, ()), 0)  # the LoRA of a recipe goes
    require_equal(again, tmp_path, expected)


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 12}, "rank_pattern": {"to_q": 3}},
    ],
)
def test_an_adapter_folder_of_peft(
    family: str, config: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    module_of(family, folders, **config).save_pretrained(tmp_path / "peft")
    transformer = copy.deepcopy(read(family, folders[family]).transformer)
    expected = velocity(adapter_of(family, folders), PeftModel.from_pretrained(transformer, tmp_path / "peft"))
    summary = require_equal(adapter_of(family, folders), tmp_path / "peft", expected)
    assert summary.kind == "peft adapter" and len(summary.strengths) == (2 if "alpha_pattern" in config else 1)
    require_equal(adapter_of(family, folders), tmp_path / "peft" / "adapter_model.safetensors", expected)
    if "alpha_pattern" not in config:  # a run trains one rank
        begun = adapter_of(family, folders)
        begun.add_lora(LoraSettings(4, 8.0, TARGETS[family]), 0)
        begun.start_from(tmp_path / "peft")
        assert (velocity(begun) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_what_diffusers_saves_with_metadata(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 12}, "rank_pattern": {"to_q": 3}}
    model: Any = module_of(family, folders, **config)
    weights = get_peft_model_state_dict(model)
    weights = {name.removeprefix("base_model.model."): value.contiguous() for name, value in weights.items()}
    metadata = model.peft_config["default"].to_dict()
    PIPELINES[family].save_lora_weights(
        tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )
    expected = velocity(adapter_of(family, folders), by_diffusers(family, folders, tmp_path))
    summary = require_equal(adapter_of(family, folders), tmp_path, expected)
    assert summary.ranks == (3, 4) and summary.strengths == (0.5, 4.0)
    assert str(summary).startswith(f"{tmp_path / LORA_FILE}: diffusers, rank 3, 4, strength 0.5, 4, on ")


def kohya_flux() -> dict[str, Tensor]:
    """The names of sd-scripts for the double blocks of the small model: queries, keys and values in one."""
    sizes = {"img_attn_qkv": (32, 96), "txt_attn_qkv": (32, 96), "img_attn_proj": (32, 32), "img_mlp_0": (32, 128)}
    named = {f"lora_unet_double_blocks_0_{name}": size for name, size in sizes.items()}
    tensors = {f"{name}.lora_down.weight": torch.empty(4, inputs) for name, (inputs, _) in named.items()}
    tensors |= {f"{name}.lora_up.weight": torch.empty(outputs, 4) for name, (_, outputs) in named.items()}
    return {**fill(tensors), **{f"{name}.alpha": torch.tensor(3.0) for name in named}}


def kohya_wan(dotted: bool) -> dict[str, Tensor]:
    """The names of musubi-tuner, or of ComfyUI, for the small model."""
    layers = {f"{attn}_attn.{one}": (24, 24) for attn in ("self", "cross") for one in "qkvo"}
    layers |= {"ffn.0": (24, 48), "ffn.2": (48, 24)}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for block in range(2):
        for name, (inputs, outputs) in layers.items():
            whole = f"blocks.{block}.{name}"
            module = f"diffusion_model.{whole}" if dotted else f"lora_unet_{whole.replace('.', '_')}"
            tensors[f"{module}.lora_down.weight"] = torch.empty(4, inputs)
            tensors[f"{module}.lora_up.weight"] = torch.empty(outputs, 4)
            alphas[f"{module}.alpha"] = torch.tensor(2.0)
    return {**fill(tensors), **alphas}


KINDS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "kohya flux": ("flux", kohya_flux),
    "kohya wan": ("wan", lambda: kohya_wan(False)),
    "comfy wan": ("wan", lambda: kohya_wan(True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_names(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, make = KINDS[kind]
    save_file(make(), tmp_path / "mine.safetensors")
    expected = velocity(adapter_of(family, folders), by_diffusers(family, folders, tmp_path / "mine.safetensors"))
    summary = require_equal(adapter_of(family, folders), tmp_path / "mine.safetensors", expected)
    assert summary.kind == "converted by diffusers"
    assert (summary.ranks, summary.strengths) == ((4,), (0.75,) if family == "flux" else (0.5,))


def test_alpha_tensors_under_diffusers_names(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers reads them for FLUX alone, so this library's own files have alpha equal to the rank, and no such."""
    for family in ("flux", "wan"):
        trained = adapter_of(family, folders)
        trained.add_lora(LoraSettings(4, 8.0, TARGETS[family]), 0)
        trained.export(tmp_path / family)
        tensors = fill(load_file(tmp_path / family / LORA_FILE))
        alphas = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0) for name in tensors if "A" in name}
        assert not any(name.endswith(".alpha") for name in tensors)
        save_file({**tensors, **alphas}, tmp_path / f"{family}.safetensors")
    expected = velocity(adapter_of("flux", folders), by_diffusers("flux", folders, tmp_path / "flux.safetensors"))
    assert require_equal(adapter_of("flux", folders), tmp_path / "flux.safetensors", expected).strengths == (1.5,)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        by_diffusers("wan", folders, tmp_path / "wan.safetensors")
    assert adapter_of("wan", folders).load_lora(tmp_path / "wan.safetensors").strengths == (1.5,)


# --- what is refused ---


def test_keys_that_fit_nothing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = kohya_flux()
    to_q = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 32)}
    plain = {**to_q, "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(32, 2)}
    unknown = {name.replace("blocks.0", "blocks.7"): value for name, value in plain.items()}
    encoder = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    both = {f"{encoder}.lora_down.weight": torch.ones(4, 24), f"{encoder}.lora_up.weight": torch.ones(32, 4)}
    stray = {"lora_unet_double_blocks_9_img_stray.lora_down.weight": torch.ones(4, 32)}
    for name, (tensors, message) in {
        "one half": (to_q, "A and B of 'transformer_blocks.0.attn.to_q' do not go together"),
        "another layer": (unknown, r"does not fit the model: 'transformer_blocks\.7\.attn\.to_q' \(no such linear"),
        "another size": (
            {**to_q, "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(31, 2)},
            r"of size \(31, 32\), the model's is \(32, 32\)",
        ),
        "bias": ({**plain, "transformer_blocks.0.attn.to_q.lora_B.bias": torch.ones(32)}, "LoRA"),
        "dora": ({**whole, "lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(32)}, "fit nothing"),
        "text encoder": ({**whole, **both}, "text_encoder"),
        "stray": ({**whole, **stray}, "lora_unet_double_blocks_9_img_stray"),
        "stray alpha": ({**whole, "lora_unet_other.alpha": torch.tensor(1.0)}, "lora_unet_other"),
        "no lora": ({"weight": torch.ones(2, 2)}, "mine.safetensors'"),
        "empty": ({}, "holds no LoRA weights"),
        "nan": ({**plain, "transformer_blocks.0.attn.to_q.alpha": torch.tensor(float("nan"))}, "no strength"),
    }.items():
        save_file(tensors, tmp_path / "mine.safetensors")
        with pytest.raises(CheckpointError, match=message):
            adapter_of("flux", folders).load_lora(tmp_path / "mine.safetensors")
        assert name


def test_metadata_and_configurations_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_of("flux", folders)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    plain = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    said = {"transformer.r": 2, "transformer.lora_alpha": 4}
    for metadata, message in {
        "{": "not valid JSON",
        '{"transformer.r": 2, "transformer.r": 4}': "the key 'transformer.r' is given twice",
        "[1]": "is not a JSON object",
        json.dumps({**said, "transformer.use_dora": True}): "DoRA",
        json.dumps({**said, "transformer.init_lora_weights": "pissa"}): "began from changed weights",
        json.dumps(said): r"alpha of .* is 6\.0 by its tensor and 4 by the settings",
    }.items():
        tensors = {**plain, f"{layer}.alpha": torch.tensor(6.0)}
        save_file(tensors, tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": metadata})
        with pytest.raises(CheckpointError, match=message):
            adapter.load_lora(tmp_path)
    save_file(plain, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json beside it"):
        adapter.load_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "mine.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file"):
        adapter.load_lora(tmp_path / "mine.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no pytorch_lora_weights.safetensors and no adapter_model"):
        adapter.load_lora(tmp_path / "empty")


# --- the command ---

HELD_OUT = {"prompts": ["a one", "a two"], "rewards": [{"reward": "digits"}]}


def test_a_lora_is_judged_against_the_base_as_its_run_is(
    folders: dict[str, Path], tmp_path: Path, command: Callable[..., Any]
) -> None:
    changes = small(folders["flux"], lora={"rank": 2}, optim__lr=1e-2, evaluation=HELD_OUT)
    run = train("quickstart", changes, output=tmp_path / "run").output
    own = evaluate(run, output=tmp_path / "own").rewards["digits"]
    plain = small(folders["flux"], evaluation=HELD_OUT)
    for number, (subject, overrides) in enumerate([("quickstart", plain), (run, None)]):
        found = evaluate(subject, overrides, lora=run if number else run / "final", output=tmp_path / str(number))
        one = found.rewards["digits"]
        assert one.base == own.base and own.trained is not None and one.trained is not None
        assert one.trained.mean == pytest.approx(own.trained.mean, abs=1e-5) and one.difference != 0
        assert found.lora is not None and found.lora.ranks == (2,) and found.iteration is None and not found.alone
    record = json.loads((tmp_path / "0/evaluation.json").read_text())
    assert record["lora"]["kind"] == "diffusers" and record["lora"]["strengths"] == [1.0]
    words = ["evaluate", "quickstart", *arguments(plain), "--output", str(tmp_path / "told")]
    done = command(*words, "--lora", str(run / "final" / LORA_FILE))
    assert done.code == 0, done.err
    assert "the LoRA against the base" in done.out and "diffusers, rank 2, strength 1, on " in done.out
    done = command(*words, "--lora", str(tmp_path / "nowhere"))
    assert done.code == 2 and f"lora: there is no file or folder {tmp_path / 'nowhere'}" in done.err
    with pytest.raises(CheckpointError, match=r"lora: '.*' holds no pytorch_lora_weights"):
        evaluate("quickstart", plain, lora=folders["wan"], output=tmp_path / "told")
    with pytest.raises(RecipeError, match="lora: a checkpoint of the run is judged, or a LoRA"):
        evaluate(run, lora=run, checkpoint=1)
    with pytest.raises(RecipeError, match=r"lora: the recipe starts from a LoRA of its own.*model\.start=null"):
        evaluate("quickstart", {**changes, "model.start": str(run)}, lora=run)
