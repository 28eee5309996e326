import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from branchtree_adapters.any_pipeline.measure import PeakMemory
from branchtree_adapters.flux import FLUX_DEV, LORA_TARGETS, Flux, FluxConfig, register_models
from branchtree_adapters.pipeline import sources
from branchtree_adapters.pipeline.blueprint import count_parameters
from branchtree_adapters.pipeline.lora_file import LORA_FILE
from diffusers import FluxPipeline
from garbage import no_collection
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import T5_TOKENS, tiny_flux
from torch import Tensor, nn

from branchtree.errors import CheckpointError, DataError, ModelError
from branchtree.plugins import Condition, LoraSettings, ModelAdapter
from branchtree.testing.probe import randomise, require_equal, state

CPU = torch.device("cpu")
PROMPTS = ("a red digit 3", "seven blue")
CONDITIONS = [Condition(prompt) for prompt in PROMPTS]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[bool, bool], Path] = {}

    def make(guidance_embeds: bool = True, dynamic_shift: bool = False) -> Path:
        key = (guidance_embeds, dynamic_shift)
        if key not in made:
            target = tmp_path_factory.mktemp("flux")
            made[key] = tiny_flux(target, guidance_embeds=guidance_embeds, dynamic_shift=dynamic_shift)
        return made[key]

    return make


def load(path: Path, dtype: torch.dtype = torch.float32, height: int = 32, width: int = 32) -> Flux:
    adapter = Flux(FluxConfig(path=str(path), height=height, width=width))
    adapter.load(CPU, dtype, dtype)
    return adapter


@pytest.fixture
def adapter(folder: Callable[..., Path]) -> Flux:
    return load(folder())


def noise(adapter: Flux, rows: int = 2) -> Tensor:
    return torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(rows)])


def prediction(adapter: Flux, denoiser: nn.Module | None = None) -> Tensor:
    return adapter.predict(noise(adapter), torch.tensor([0.9, 0.3]), adapter.encode(CONDITIONS), denoiser)


@torch.no_grad()
def rollout(adapter: Flux) -> Tensor:
    latents, conditioning, sigmas = noise(adapter), adapter.encode(CONDITIONS), adapter.sigmas(STEPS)
    for here, there in itertools.pairwise(sigmas):
        latents = latents + (there - here) * adapter.predict(latents, here.expand(2), conditioning)
    return latents


def reference(path: Path, output_type: str, height: int = 32, width: int = 32) -> Tensor:
    """What FluxPipeline makes by itself of the same two prompts and seeds."""
    pipeline = FluxPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    call = partial(pipeline, num_inference_steps=STEPS, max_sequence_length=T5_TOKENS, output_type=output_type)
    images: Tensor = call(list(PROMPTS), height=height, width=width, generator=generators).images
    return images


def test_is_a_registered_model_adapter(adapter: Flux) -> None:
    registered: dict[str, object] = {}
    register_models(lambda name, build, config, summary: registered.update({name: (build, config)}))
    typed: ModelAdapter = adapter
    assert registered == {"flux": (Flux, FluxConfig)}
    assert (typed.modality, typed.prediction, typed.rows_per_prediction) == ("image", "velocity", 1)


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("dynamic_shift", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_euler_rollout_is_the_pipelines(
    folder: Callable[..., Path], guidance_embeds: bool, dynamic_shift: bool, height: int, width: int
) -> None:
    path = folder(guidance_embeds, dynamic_shift)
    ours = rollout(load(path, height=height, width=width))
    theirs = reference(path, "latent", height, width)
    assert ours.shape == theirs.shape == (2, height * width // 64, 16)
    assert (ours - theirs).abs().max() <= 1e-5


def test_dynamic_shift_depends_on_the_size(folder: Callable[..., Path]) -> None:
    small, large = (load(folder(True, True), height=size, width=size).sigmas(STEPS) for size in (16, 64))
    fixed = load(folder()).sigmas(STEPS)
    assert small.shape == (STEPS + 1,) and small.dtype == torch.float32 and small.device == CPU
    assert small[0] == 1 and small[-1] == 0 and bool((small.diff() < 0).all())
    assert bool((large[1:-1] > small[1:-1]).all())
    assert fixed.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_decoded_images_are_the_pipelines(folder: Callable[..., Path], height: int, width: int) -> None:
    adapter = load(folder(), height=height, width=width)
    images = adapter.decode(rollout(adapter)).pixels
    assert images.shape == (2, 3, height, width) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert (images - reference(folder(), "pt", height, width)).abs().max() <= 1e-5


def test_decoding_in_slices(adapter: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = noise(adapter, rows=5)
    together = adapter.decode(latents).pixels
    sizes: list[int] = []
    handle = adapter.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(Flux, "decode_pixels", 2 * 32 * 32)
    torch.testing.assert_close(adapter.decode(latents).pixels, together)
    handle.remove()
    assert sizes == [2, 2, 1]


def test_encoding_is_the_pipelines(adapter: Flux, folder: Callable[..., Path]) -> None:
    together = adapter.encode(CONDITIONS)
    pipeline = FluxPipeline.from_pretrained(folder())
    text, pooled, _ = pipeline.encode_prompt(list(PROMPTS), max_sequence_length=T5_TOKENS)
    assert together["prompt_embeds"].shape == (2, T5_TOKENS, 32)
    torch.testing.assert_close(together["prompt_embeds"], text, atol=1e-6, rtol=0)
    torch.testing.assert_close(together["pooled_prompt_embeds"], pooled, atol=1e-6, rtol=0)


def test_encoders_have_the_precision_asked_for(folder: Callable[..., Path]) -> None:
    adapter = Flux(FluxConfig(path=str(folder()), height=32, width=32))
    adapter.load(CPU, torch.bfloat16, torch.float32)
    assert {rows.dtype for rows in adapter.encode(CONDITIONS).values()} == {torch.bfloat16}


def test_a_negative_prompt_is_refused(adapter: Flux) -> None:
    with pytest.raises(DataError, match="negative prompt"):
        adapter.encode([Condition("a digit", negative_prompt="blue")])


def test_initial_noise_is_what_the_pipeline_draws(adapter: Flux, folder: Callable[..., Path]) -> None:
    pipeline = FluxPipeline.from_pretrained(folder())
    generator = torch.Generator().manual_seed(0)
    theirs, _ = pipeline.prepare_latents(1, 4, 32, 32, torch.float32, CPU, generator)
    assert torch.equal(noise(adapter, rows=1), theirs)


def lora_adapter(path: Path, dtype: torch.dtype = torch.float32) -> Flux:
    adapter = load(path, dtype)
    adapter.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
    randomise(adapter.denoiser)
    return adapter


@pytest.mark.parametrize("method", ["save", "export"])
def test_a_saved_lora_acts_in_a_fresh_pipeline(folder: Callable[..., Path], tmp_path: Path, method: str) -> None:
    adapter = lora_adapter(folder())
    {"save": adapter.save, "export": adapter.export}[method](tmp_path)
    pipeline = FluxPipeline.from_pretrained(folder())
    pipeline.load_lora_weights(tmp_path)
    difference = (prediction(adapter, pipeline.transformer) - prediction(adapter)).abs().max()
    assert difference <= 1e-6
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILE]


def adapter_of_alpha(path: Path, alpha: float, seed: int = 5) -> Flux:
    adapter = load(path)
    adapter.add_lora(LoraSettings(rank=4, alpha=alpha), seed=0)
    randomise(adapter.denoiser, seed)
    return adapter


def deltas(denoiser: nn.Module) -> dict[str, Tensor]:
    """What LoRA adds to each weight, by the weight's layer, as peft works it out."""
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("method", "alpha"), [("save", 8.0), ("save", 4.0), ("save", 2.0), *(("export", a) for a in (8.0, 4.0, 3.0, 7.3))]
)
def test_every_reader_of_a_lora_file_gets_the_trained_strength(
    folder: Callable[..., Path], tmp_path: Path, method: str, alpha: float
) -> None:
    """By diffusers, with the file's metadata and without it; by peft; and by the product of the tensors."""
    adapter = adapter_of_alpha(folder(), alpha)
    expected = deltas(adapter.denoiser)
    (adapter.save if method == "save" else adapter.export)(tmp_path / "written")
    file = tmp_path / "written" / LORA_FILE
    tensors = load_file(file)
    for name, delta in expected.items():
        a, b = (tensors[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(b @ a, delta)
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / LORA_FILE)
    for written in (file.parent, tmp_path / "bare"):
        pipeline = FluxPipeline.from_pretrained(folder())
        pipeline.load_lora_weights(written)
        assert (prediction(adapter, pipeline.transformer) - prediction(adapter)).abs().max() <= 1e-6
    with safe_open(file, framework="pt") as content:
        kept = json.loads(content.metadata()["lora_adapter_metadata"])
    fresh = FluxPipeline.from_pretrained(folder()).transformer
    config = LoraConfig(
        r=kept["transformer.r"],
        lora_alpha=kept["transformer.lora_alpha"],
        target_modules=kept["transformer.target_modules"],
    )
    inject_adapter_in_model(config, fresh)
    set_peft_model_state_dict(fresh, {name.removeprefix("transformer."): value for name, value in tensors.items()})
    for name, delta in deltas(fresh).items():
        torch.testing.assert_close(delta, expected[name])


@pytest.mark.parametrize("alpha", [8.0, 4.0, 1.0, 3.0, 7.3])
def test_lora_of_any_alpha_is_restored_to_the_bit(folder: Callable[..., Path], tmp_path: Path, alpha: float) -> None:
    adapter, fresh = (adapter_of_alpha(folder(), alpha, seed) for seed in (5, 9))
    adapter.save(tmp_path)
    fresh.restore(tmp_path)
    require_equal(state(fresh), state(adapter))


def test_lora_of_a_checkpoint_that_keeps_alpha_beside_the_weights_is_restored(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As earlier versions wrote it for every alpha."""
    adapter, fresh = (adapter_of_alpha(folder(), 8.0, seed) for seed in (5, 9))
    adapter.pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(adapter.denoiser),
        transformer_lora_adapter_metadata=adapter.denoiser.peft_config["default"].to_dict(),  # type: ignore[union-attr]
    )
    fresh.restore(tmp_path)
    require_equal(state(fresh), state(adapter))


def test_exported_replacement_weights(adapter: Flux, tmp_path: Path) -> None:
    replacement = {name: value.detach() + 0.5 for name, value in adapter.denoiser.named_parameters()}
    adapter.export(tmp_path, replacement)
    require_equal(FluxPipeline.from_pretrained(tmp_path).transformer.state_dict(), replacement)


def test_restoring_what_does_not_fit_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    adapter, half, lora = load(folder()), load(folder(), torch.bfloat16), lora_adapter(folder())
    adapter.save(tmp_path)
    with pytest.raises(CheckpointError, match="precision"):
        half.restore(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        lora.restore(tmp_path)
    with pytest.raises(CheckpointError, match="no safetensors"):
        adapter.restore(tmp_path / "nowhere")
    lora.save(tmp_path)
    other = load(folder())
    other.add_lora(LoraSettings(rank=2, alpha=8.0), seed=0)
    before = state(other)
    with pytest.raises(CheckpointError, match="shape"):
        other.restore(tmp_path)
    require_equal(state(other), before)
    (tmp_path / LORA_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot read"):
        lora.restore(tmp_path)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_footprint_counts_what_is_loaded(folder: Callable[..., Path], guidance_embeds: bool) -> None:
    config = FluxConfig(path=str(folder(guidance_embeds)), height=24, width=40)
    footprint = Flux(config).footprint()
    adapter = load(folder(guidance_embeds), height=24, width=40)
    parts = FluxPipeline.from_pretrained(folder(guidance_embeds)).components
    frozen = sum(count_parameters(parts[name]) for name in ("vae", "text_encoder", "text_encoder_2"))
    assert footprint.denoiser_parameters == count_parameters(adapter.denoiser)
    assert footprint.frozen_parameters == frozen
    assert footprint.latent_shape == adapter.initial_noise(torch.Generator()).shape == (15, 16)
    assert footprint.activation_numbers_per_row == (15 + T5_TOKENS) * 32 * (28 + 2 * 25 + 6)
    assert footprint.checkpointed_numbers_per_row == (15 + T5_TOKENS) * 32 * (3 + 28 + 6)
    adapter.add_lora(LoraSettings(rank=3, alpha=1.0), seed=0)
    added = sum(p.numel() for p in adapter.denoiser.parameters() if p.requires_grad)
    assert footprint.lora_parameters_per_rank * 3 == added
    assert str(folder(guidance_embeds)) in footprint.source
    encoded = adapter.encode(CONDITIONS[:1])
    assert footprint.conditioning_numbers == sum(rows[0].numel() for rows in encoded.values())


def test_footprint_of_a_model_not_at_hand_is_that_of_flux_dev() -> None:
    footprint = Flux(FluxConfig(path="some-org/not-in-any-cache")).footprint()
    assert footprint.denoiser_parameters == 11_901_408_320
    assert footprint.frozen_parameters == 83_819_683 + 123_060_480 + 4_762_310_656
    assert footprint.latent_shape == (45 * 45, 64)
    assert "assumed to be those of FLUX.1-dev" in footprint.source


def test_footprint_of_a_cached_hub_model(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name, **__: str(path / name))
    footprint = Flux(FluxConfig(path="org/name", height=32, width=32)).footprint()
    local = Flux(FluxConfig(path=str(path), height=32, width=32)).footprint()
    assert footprint.denoiser_parameters == local.denoiser_parameters
    assert footprint.source == "configuration files of 'org/name'"


def test_kept_activations_are_as_estimated(folder: Callable[..., Path]) -> None:
    adapter = load(folder(), height=128, width=128)
    own = {parameter.untyped_storage().data_ptr() for parameter in adapter.denoiser.parameters()}
    estimate = adapter.footprint()
    for checkpointed in (False, True):
        kept: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor),
            lambda tensor: tensor,
        )
        if checkpointed:
            adapter.enable_gradient_checkpointing()
        latents, conditioning = noise(adapter, rows=1), adapter.encode(CONDITIONS[:1])
        with hooks:
            adapter.predict(latents, torch.tensor([0.5]), conditioning)
        numbers = sum(tensor.untyped_storage().nbytes() // 4 for key, tensor in kept.items() if key not in own)
        if checkpointed:
            assert numbers < estimate.checkpointed_numbers_per_row
        else:
            assert 0.7 < numbers / estimate.activation_numbers_per_row < 1.05


@torch.no_grad()
def test_peak_of_a_forward_is_as_estimated(folder: Callable[..., Path]) -> None:
    adapter = load(folder(), torch.bfloat16, height=256, width=256)
    latents, conditioning, peaks = noise(adapter), adapter.encode(CONDITIONS), []
    for rows in (1, 2):
        with no_collection(), PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16):
            given = {name: value[:rows] for name, value in conditioning.items()}
            adapter.predict(latents[:rows], torch.full((rows,), 0.5), given)
        peaks.append(memory.peak)
    # The latents, which are not counted, weigh in where D is 32.
    assert 0.95 < (peaks[1] - peaks[0]) / 2 / adapter.footprint().forward_numbers_per_row < 1.2


def test_paths_that_cannot_be_used(folder: Callable[..., Path], tmp_path: Path) -> None:
    for path, message in (
        (str(tmp_path / "missing"), "missing' does not exist"),
        ("./missing", "does not exist"),
        (str(tmp_path), "holds no model_index.json"),
        (str(folder() / "transformer"), "holds no model_index.json"),
        ("nonsense", "neither an existing folder nor a hub id"),
        ("bundled:nonsense", "no model 'nonsense' is bundled"),
    ):
        adapter = Flux(FluxConfig(path=path))
        for call in (adapter.footprint, partial(adapter.load, CPU, torch.float32, torch.float32)):
            with pytest.raises(ModelError, match=re.escape(message)):
                call()
    with pytest.raises(ModelError, match="belongs to a hub id"):
        Flux(FluxConfig(path=str(folder()), revision="main")).footprint()


def test_a_bundled_model_is_found(folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder(), tmp_path / "assets" / "small")
    monkeypatch.setattr(sources.resources, "files", lambda package: tmp_path)
    adapter = Flux(FluxConfig(path="bundled:small", height=32, width=32))
    adapter.load(CPU, torch.float32, torch.float32)
    assert adapter.footprint().source == "configuration files of 'bundled:small'"
    require_equal(state(adapter), state(load(folder())))
    with pytest.raises(ModelError, match="did you mean 'small'"):
        Flux(FluxConfig(path="bundled:smal")).footprint()


def test_a_folder_named_like_a_hub_id_is_a_folder(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder(), tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert sources.locate_pipeline("org/name").folder == Path("org/name")
    assert sources.locate_pipeline("org/other").folder is None


def test_a_broken_folder_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((folder() / "model_index.json").read_text())
    adapter = Flux(FluxConfig(path=str(tmp_path), height=32, width=32))
    with pytest.raises(ModelError, match=re.escape(f"cannot load '{tmp_path}'")) as caught:
        adapter.load(CPU, torch.float32, torch.float32)
    assert caught.value.__cause__ is not None
    with pytest.raises(ModelError, match=r"transformer/config\.json"):
        adapter.footprint()
    for name in FLUX_DEV.configs:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"block_out_channels": 3, "num_layers": "two"}')
    with pytest.raises(ModelError, match="describes no model"):
        adapter.footprint()


def test_a_hub_model_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(FluxPipeline, "download", unreachable)
    with pytest.raises(ModelError, match=r"no route to the hub.*check the hub id, the network") as caught:
        Flux(FluxConfig(path="org/name")).load(CPU, torch.float32, torch.float32)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_size_that_does_not_fit_names_the_nearest(folder: Callable[..., Path]) -> None:
    for height, width, message in (
        (36, 32, "height 36 is not a multiple of 8; the nearest sizes are 32 or 40."),
        (32, 5, "width 5 is not a multiple of 8; the nearest sizes are 8."),
    ):
        adapter = Flux(FluxConfig(path=str(folder()), height=height, width=width))
        for call in (adapter.footprint, partial(adapter.load, CPU, torch.float32, torch.float32)):
            with pytest.raises(ModelError, match=re.escape(message)):
                call()
    for wrong in ({"height": 0}, {"width": -8}, {"max_sequence_length": 513}, {"hieght": 8}):
        with pytest.raises(ValidationError):
            FluxConfig.model_validate({"path": "org/name", **wrong})


def test_lora_mistakes(adapter: Flux) -> None:
    with pytest.raises(ModelError, match=r"target 'attn.to_qq' names no linear layer; did you mean 'attn.to_q'"):
        adapter.add_lora(LoraSettings(rank=4, alpha=8.0, targets=("attn.to_k", "attn.to_qq")), seed=0)
    with pytest.raises(ModelError, match="no LoRA layers"), adapter.without_lora(adapter.denoiser):
        pass
    adapter.add_lora(LoraSettings(rank=4, alpha=8.0, targets=("attn.to_q",)), seed=0)
    names = [name for name, p in adapter.denoiser.named_parameters() if p.requires_grad]
    assert len(names) == 6 and all(".attn.to_q.lora_" in name for name in names)
    assert "attn.to_q" in LORA_TARGETS
