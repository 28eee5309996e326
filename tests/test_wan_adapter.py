import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from branchtree_adapters.any_pipeline.measure import PeakMemory
from branchtree_adapters.wan import LORA_TARGETS, Wan, WanConfig, register_models
from diffusers import DDIMScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from garbage import no_collection
from PIL import Image
from pydantic import ValidationError
from tiny_wan import FRAMES, IMAGE_DIM, IMAGE_TOKENS, LATENT, SIZE, Kind, tiny_wan, write_frame
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from branchtree.errors import DataError, ModelError
from branchtree.pictures.video import mp4
from branchtree.plugins import Condition, LoraSettings, ModelAdapter

CPU = torch.device("cpu")
STEPS = 3
SAME = Kind(), Kind(image_encoder=True)
TEXT = Kind(image_to_video=False)
BOTH = Kind(image_encoder=True, both_images=True)
SHARED = Kind(image_encoder=True, shared_attention=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    made: dict[Kind, Path] = {}

    def make(kind: Kind) -> Path:
        if kind not in made:
            made[kind] = tiny_wan(tmp_path_factory.mktemp("wan"), kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_frame(tmp_path_factory.mktemp("frames") / f"{seed}.png", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def conditions(frames: list[Path]) -> list[Condition]:
    """Two prompts, one with a negative prompt of its own."""
    return [
        Condition("a red three", image=frames[0], negative_prompt="blue"),
        Condition("seven blue digits", image=frames[1]),
    ]


@pytest.fixture(scope="module")
def with_last(conditions: list[Condition], frames: list[Path]) -> list[Condition]:
    return [replace(condition, last_image=frames[2]) for condition in conditions]


def build(path: Path | str, kind: Kind = SAME[0], **options: Any) -> Wan:
    task = "image_to_video" if kind.image_to_video else "text_to_video"
    sizes = {"task": task, "height": SIZE, "width": SIZE, "frames": FRAMES, "negative_prompt": "jitter"}
    return Wan(WanConfig.model_validate({"path": str(path), **sizes, **options}))


def load(path: Path, kind: Kind = SAME[0], dtype: torch.dtype = torch.float32, **options: Any) -> Wan:
    adapter = build(path, kind, **options)
    adapter.load(CPU, dtype, dtype)
    return adapter


def noise(adapter: Wan, rows: int = 2) -> Tensor:
    return torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(rows)])


@torch.no_grad()
def rollout(adapter: Wan, conditions: Sequence[Condition], denoiser: nn.Module | None = None) -> Tensor:
    """Euler's method through the adapter, all prompts in one batch."""
    latents, conditioning, sigmas = noise(adapter), adapter.encode(conditions), adapter.sigmas(STEPS)
    for here, there in itertools.pairwise(sigmas):
        latents = latents + (there - here) * adapter.predict(latents, here.expand(2), conditioning, denoiser)
    return latents


def pipeline_of(path: Path, kind: Kind) -> WanImageToVideoPipeline | WanPipeline:
    pipeline = (WanImageToVideoPipeline if kind.image_to_video else WanPipeline).from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(
    pipeline: WanImageToVideoPipeline | WanPipeline,
    conditions: Sequence[Condition],
    output_type: str = "latent",
    guidance: float = 5.0,
) -> Tensor:
    """What diffusers' pipeline makes by itself, one prompt at a time, of the same images, texts and seeds."""
    rows = []
    for seed, condition in enumerate(conditions):
        files = {"image": condition.image, "last_image": condition.last_image}
        takes = files if isinstance(pipeline, WanImageToVideoPipeline) else {}
        videos = pipeline(
            prompt=condition.prompt,
            negative_prompt=condition.negative_prompt or "jitter",
            **{name: Image.open(file) for name, file in takes.items() if file is not None},
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
        )
        rows.append(videos.frames)
    return torch.cat(rows)


def randomise(module: nn.Module) -> None:
    """Give trainable weights, LoRA's zeros among them, other values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def edited(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a pipeline folder with other entries in one of its JSON files."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(content | changes))
    return target


def test_is_a_registered_model_adapter(folder: Callable[[Kind], Path]) -> None:
    registered: dict[str, object] = {}
    register_models(lambda name, build, config, summary: registered.update({name: (build, config)}))
    typed: ModelAdapter = build(folder(SAME[0]))
    assert registered == {"wan": (Wan, WanConfig)}
    assert (typed.modality, typed.prediction) == ("video", "velocity")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", [*SAME, SHARED, TEXT])
def test_euler_rollout_is_the_pipelines(
    folder: Callable[[Kind], Path], conditions: list[Condition], kind: Kind, guidance: float
) -> None:
    if guidance == 1:
        conditions = [replace(condition, negative_prompt=None) for condition in conditions]
    adapter = load(folder(kind), kind, guidance=guidance, negative_prompt="jitter" if guidance > 1 else "")
    ours = rollout(adapter, conditions)
    theirs = reference(pipeline_of(folder(kind), kind), conditions, guidance=guidance)
    assert ours.shape == theirs.shape == (2, *LATENT)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", [SAME[0], BOTH])
def test_euler_rollout_to_a_last_frame_is_the_pipelines(
    folder: Callable[[Kind], Path],
    conditions: list[Condition],
    with_last: list[Condition],
    kind: Kind,
    guidance: float,
) -> None:
    if guidance == 1:
        with_last = [replace(condition, negative_prompt=None) for condition in with_last]
    negative = "jitter" if guidance > 1 else ""
    adapter = load(folder(kind), kind, guidance=guidance, negative_prompt=negative)
    pipeline, ours = pipeline_of(folder(kind), kind), rollout(adapter, with_last)
    assert (ours - reference(pipeline, with_last, guidance=guidance)).abs().max() <= 1e-5
    if not kind.both_images:
        assert (ours - reference(pipeline, conditions, guidance=guidance)).abs().max() > 1e-2


def test_a_last_frame_beside_the_first_ones_embedding(
    folder: Callable[[Kind], Path], conditions: list[Condition], with_last: list[Condition]
) -> None:
    """WanImageToVideoPipeline cannot do this: the last frame counts through mask and latents alone."""
    first, both = (load(folder(SAME[1])).encode(given) for given in (conditions, with_last))
    plain = load(folder(SAME[0])).encode(with_last)
    assert torch.equal(first["image_embeds"], both["image_embeds"])
    assert torch.equal(both["condition"], plain["condition"])
    assert not torch.equal(first["condition"], both["condition"])


@pytest.mark.parametrize("kind", [SAME[0], TEXT])
def test_decoded_videos_are_the_pipelines(
    folder: Callable[[Kind], Path], conditions: list[Condition], kind: Kind
) -> None:
    adapter = load(folder(kind), kind, fps=8.0)
    media = adapter.decode(rollout(adapter, conditions))
    assert media.pixels.shape == (2, FRAMES, 3, SIZE, SIZE) and media.pixels.dtype == torch.float32
    assert media.modality == "video" and media.fps == 8
    assert (media.pixels - reference(pipeline_of(folder(kind), kind), conditions, "pt")).abs().max() <= 1e-5


def test_decoding_in_slices(folder: Callable[[Kind], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, rows = load(folder(SAME[0])), []
    latents = noise(adapter, rows=5)
    together = adapter.decode(latents).pixels
    adapter.pipeline.vae.decoder.register_forward_hook(lambda module, inputs, _: rows.append(len(inputs[0])))
    for pixels, slices in ((2 * FRAMES * SIZE**2, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(Wan, "decode_pixels", pixels)
        rows.clear()
        torch.testing.assert_close(adapter.decode(latents).pixels, together)
        assert rows == [count for count in slices for _ in range(LATENT[1])]


def test_initial_noise_is_what_the_pipeline_draws(folder: Callable[[Kind], Path]) -> None:
    pipeline = pipeline_of(folder(TEXT), TEXT)
    theirs = pipeline.prepare_latents(
        1, LATENT[0], SIZE, SIZE, FRAMES, torch.float32, CPU, torch.Generator().manual_seed(0)
    )
    for kind in (TEXT, SAME[0]):
        assert torch.equal(noise(load(folder(kind), kind), rows=1), theirs)


def test_encoded_tensors(folder: Callable[[Kind], Path], conditions: list[Condition]) -> None:
    text = {"prompt_embeds": (2, 512, 32), "negative_prompt_embeds": (2, 512, 32)}
    video = {"condition": (2, 4 + LATENT[0], *LATENT[1:])}
    for kind, images in ((SAME[0], None), (SAME[1], 1), (BOTH, 2), (TEXT, None)):
        expected = text | (video if kind.image_to_video else {})
        expected |= {"image_embeds": (2, images, IMAGE_TOKENS, IMAGE_DIM)} if images else {}
        given = [replace(c, last_image=c.image if images == 2 else None) for c in conditions]
        encoded = load(folder(kind), kind).encode(given)
        assert {name: tuple(rows.shape) for name, rows in encoded.items()} == expected
        assert all(rows.device == CPU and not rows.requires_grad for rows in encoded.values())
    short = load(folder(SAME[0]), guidance=1.0, negative_prompt="", max_sequence_length=7)
    assert short.encode(conditions[1:])["prompt_embeds"].shape == (1, 7, 32)


def test_encoding_knows_no_neighbours_and_no_random_state(
    folder: Callable[[Kind], Path], conditions: list[Condition]
) -> None:
    adapter, state = load(folder(SAME[1])), torch.get_rng_state()
    together, alone = adapter.encode(conditions), adapter.encode(conditions[1:])
    assert torch.equal(torch.get_rng_state(), state)
    for name, rows in together.items():
        assert torch.equal(rows[1:], alone[name])
        assert not torch.equal(rows[0], rows[1]), name


def test_video_and_image_parts_are_float32_beside_bf16_as_in_the_pipelines_example(
    folder: Callable[[Kind], Path], conditions: list[Condition]
) -> None:
    whole, half = load(folder(SAME[1])), load(folder(SAME[1]), dtype=torch.bfloat16)
    exact, encoded = whole.encode(conditions), half.encode(conditions)
    parts = half.with_encoders()
    dtypes = {name: getattr(parts, name).dtype for name in ("vae", "image_encoder", "text_encoder", "transformer")}
    assert dtypes == {
        "vae": torch.float32,
        "image_encoder": torch.float32,
        "text_encoder": torch.bfloat16,
        "transformer": torch.bfloat16,
    }
    assert torch.equal(encoded["condition"], exact["condition"])
    assert torch.equal(encoded["image_embeds"], exact["image_embeds"].bfloat16())
    latents = noise(whole)
    assert torch.equal(half.decode(latents).pixels, whole.decode(latents).pixels)
    assert half.encoding_fingerprint() != whole.encoding_fingerprint()


def test_a_text_is_encoded_once(folder: Callable[[Kind], Path], conditions: list[Condition]) -> None:
    adapter, calls = load(folder(SAME[0])), []
    adapter.with_encoders().text_encoder.register_forward_hook(lambda *_: calls.append(1))
    adapter.encode([*conditions, *(replace(condition, negative_prompt="jitter") for condition in conditions)])
    assert len(calls) == 2 + 2  # two prompts; two negative prompts, one of them the default


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (4.0, 2)])
def test_a_prediction_is_one_call_of_guided_rows(
    folder: Callable[[Kind], Path], conditions: list[Condition], guidance: float, rows: int
) -> None:
    adapter, calls = load(folder(TEXT), TEXT, guidance=guidance, negative_prompt=""), []
    adapter.denoiser.register_forward_hook(
        lambda module, args, kwargs, _: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    encoded = adapter.encode([Condition("a"), Condition("b")])
    velocity = adapter.predict(noise(adapter), torch.tensor([0.9, 0.3]), encoded)
    assert calls == [2 * rows] and rows == adapter.rows_per_prediction == adapter.footprint().rows_per_prediction
    assert velocity.shape == (2, *LATENT) and velocity.dtype == torch.float32


@pytest.mark.parametrize("unipc", [True, False])
def test_sigmas_are_the_schedulers(folder: Callable[[Kind], Path], unipc: bool) -> None:
    path = folder(replace(TEXT, unipc=unipc))
    scheduler = pipeline_of(path, TEXT).scheduler
    scheduler.set_timesteps(6)
    own = load(path, TEXT).sigmas(6)
    assert own.dtype == torch.float32 and own.shape == (7,) and own[-1] == 0
    assert torch.equal(own, scheduler.sigmas)
    linear = np.linspace(1, 1 / 1000, 7)[:6] if unipc else np.linspace(1, 1 / 1000 * 7 / (1 + 6 / 1000), 6)
    shifted = load(path, TEXT, flow_shift=7.0).sigmas(6)
    np.testing.assert_allclose(shifted[:6], 7 * linear / (1 + 6 * linear), atol=2e-6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), UniPCMultistepScheduler()])
def test_a_scheduler_of_another_kind_is_refused(folder: Callable[[Kind], Path], scheduler: Any) -> None:
    adapter = load(folder(TEXT), TEXT)
    adapter.pipeline.scheduler = scheduler
    with pytest.raises(ModelError, match=f"{type(scheduler).__name__} of .* gives no flow-matching grid"):
        adapter.sigmas(4)


def test_a_video_gives_its_first_frame(folder: Callable[[Kind], Path], frames: list[Path], tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(mp4([Image.open(file) for file in frames[1:]], fps=8))
    with av.open(str(clip)) as container:
        next(container.decode(video=0)).to_image().save(tmp_path / "first.png")
    adapter = load(folder(SAME[0]))
    asked = Condition("a digit", video=clip), Condition("a digit", image=tmp_path / "first.png")
    ours, expected = (adapter.encode([condition])["condition"] for condition in asked)
    assert (ours - expected).abs().max() < 0.1 * expected[:, 4:].std()


@pytest.mark.parametrize("size", [(4 * SIZE, 2 * SIZE), (2 * SIZE, 4 * SIZE)])
def test_cropping_scales_to_cover_and_keeps_the_middle(
    folder: Callable[[Kind], Path], tmp_path: Path, frames: list[Path], size: tuple[int, int]
) -> None:
    picture = Image.new("RGB", size, "red")
    middle = Image.open(frames[0]).resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)
    picture.paste(middle, ((size[0] - 2 * SIZE) // 2, (size[1] - 2 * SIZE) // 2))
    picture.save(tmp_path / "long.png")
    adapter = load(folder(SAME[0]), image_fit="crop")
    cropped = adapter.encode([Condition("a", image=tmp_path / "long.png")])["condition"]
    exact = adapter.encode([Condition("a", image=frames[0])])["condition"]
    assert (cropped - exact).abs().max() < 0.3 * exact[:, 4:].std()  # scaling smooths; red would be further off


def test_conditions_that_cannot_be_taken(folder: Callable[[Kind], Path], frames: list[Path], tmp_path: Path) -> None:
    plain, text, both = build(folder(SAME[0])), build(folder(TEXT), TEXT), build(folder(BOTH))
    unguided = build(folder(TEXT), TEXT, guidance=1.0, negative_prompt="")
    wide = write_frame(tmp_path / "wide.png", 0, width=48)
    (tmp_path / "broken.png").write_bytes(frames[0].read_bytes()[:60])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    asked = Condition("a digit", location="set.jsonl:7")
    refusals: list[tuple[Wan, Condition, str]] = [
        (plain, asked, "has no first frame; give it an 'image' or a 'video'"),
        (plain, replace(asked, image=tmp_path / "none.png"), "there is no file"),
        (plain, replace(asked, image=tmp_path / "broken.png"), "cannot be read"),
        (plain, replace(asked, video=tmp_path / "broken.mp4"), "cannot be opened: it is no video"),
        (plain, replace(asked, image=wide), "its first frame is 48 x 32 pixels, and the video is 32 x 32"),
        (plain, replace(asked, image=frames[0], last_image=wide), "its last frame is 48 x 32 pixels"),
        (plain, replace(asked, image=wide), "give an image of that size, or set image_fit to 'crop'"),
        (both, replace(asked, image=frames[0]), "has no last frame, which this model needs; give it a 'last_image'"),
        (text, replace(asked, last_image=frames[0]), "last_image, which text_to_video does not take; remove it"),
        (unguided, replace(asked, negative_prompt="blue"), "guidance of 1.0 makes no use of; remove it, or raise"),
    ]
    for adapter, condition, message in refusals:
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            adapter.check(condition)
        assert str(caught.value).startswith("set.jsonl:7: 'a digit'")
    plain.check(replace(asked, image=frames[0], negative_prompt="blue"))
    text.check(asked)
    loaded = load(folder(SAME[0]))
    with pytest.raises(DataError, match="has no first frame"):
        loaded.encode([asked])


def assert_refused(adapter: Wan, message: str, condition: Condition) -> None:
    """It is refused by each method that comes before weights are read."""
    calls: list[Callable[[], Any]] = [
        adapter.footprint,
        lambda: adapter.check(condition),
        lambda: adapter.load(CPU, torch.float32, torch.float32),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SAME[0], {"frames": 10}, "frames 10 is not 1 plus a multiple of 4; the nearest sizes are 9 or 13."),
        (SAME[0], {"frames": 16}, "the nearest sizes are 13 or 17."),
        (SAME[0], {"height": 36}, "height 36 is not a multiple of 8; the nearest sizes are 32 or 40."),
        (SAME[0], {"width": 5}, "width 5 is not a multiple of 8; the nearest sizes are 8."),
        (SAME[0], {"task": "text_to_video"}, "takes 12 input channels, and text_to_video needs 4; set task to 'image_"),
        (TEXT, {"task": "image_to_video"}, "takes 4 input channels, and image_to_video needs 12; set task to 'text_"),
        (SAME[1], {"max_sequence_length": 100}, "max_sequence_length is 100"),
    ],
)
def test_videos_that_cannot_be_made(
    folder: Callable[[Kind], Path], conditions: list[Condition], kind: Kind, options: dict[str, Any], message: str
) -> None:
    assert_refused(build(folder(kind), kind, **options), message, conditions[0])


def test_models_that_are_no_wan_21(folder: Callable[[Kind], Path], conditions: list[Condition], tmp_path: Path) -> None:
    second = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    for number, (changes, message) in enumerate(
        [
            (second, "is a Wan2.2 model (its model_index.json sets transformer_2 and boundary_ratio)"),
            (
                {"expand_timesteps": True},
                "use adapter: diffusers, or give a Wan2.1 model, such as 'Wan-AI/Wan2.1-I2V-14B-480P-Diffusers'.",
            ),
        ]
    ):
        path = edited(folder(SAME[0]), tmp_path / str(number), "model_index.json", **changes)
        shutil.copytree(path / "transformer", path / "transformer_2")
        assert_refused(build(path), message, conditions[0])
    path = edited(folder(SAME[1]), tmp_path / "blind", "model_index.json", image_encoder=[None, None])
    assert_refused(build(path), "takes image embeddings, and the model has no image_encoder", conditions[0])
    path = edited(folder(SAME[0]), tmp_path / "control", "transformer/config.json", in_channels=16)
    assert_refused(build(path), "takes 16 input channels, and image_to_video needs 12; give a check", conditions[0])


def test_settings_that_cannot_be_right() -> None:
    for wrong in (
        {"frames": 0},
        {"height": -8},
        {"task": "video"},
        {"fps": 0},
        {"flow_shift": 0},
        {"image_fit": "pad"},
        {"max_sequence_length": 513},
        {"guidance": 1.0, "negative_prompt": "blue"},
        {"hieght": 8},
    ):
        with pytest.raises(ValidationError):
            WanConfig.model_validate({"path": "org/name", **wrong})


@pytest.mark.parametrize("lora", [True, False])
def test_reduced_weights_keep_their_float32_parts(
    folder: Callable[[Kind], Path], conditions: list[Condition], tmp_path: Path, lora: bool
) -> None:
    adapter, fresh = (load(folder(SAME[1]), dtype=torch.bfloat16) for _ in range(2))
    kept = {name for name, weight in adapter.denoiser.named_parameters() if weight.dtype == torch.float32}
    kinds = {re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", name) for name in kept}
    assert kinds == {
        "scale_shift_table",
        "norm2",
        *(f"condition_embedder.time_embedder.linear_{n}" for n in (1, 2)),
        *(f"condition_embedder.image_embedder.norm{n}" for n in (1, 2)),
    }
    for model in (adapter, fresh):
        if lora:
            model.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
    randomise(adapter.denoiser)
    adapter.save(tmp_path)
    fresh.restore(tmp_path)
    expected, restored = adapter.denoiser.state_dict(), fresh.denoiser.state_dict()
    for name, weight in expected.items():
        assert weight.dtype == restored[name].dtype and torch.equal(weight, restored[name]), name
    assert torch.equal(rollout(adapter, conditions), rollout(fresh, conditions))


# So diffusers says, once it has filled in zeros for the projections of image embeddings.
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize("kind", [*SAME, SHARED, TEXT])
@pytest.mark.parametrize("lora", [True, False])
def test_what_is_exported_makes_the_same_videos_in_diffusers(
    folder: Callable[[Kind], Path], conditions: list[Condition], tmp_path: Path, kind: Kind, lora: bool
) -> None:
    adapter = load(folder(kind), kind)
    base = rollout(adapter, conditions)
    if lora:
        adapter.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
    randomise(adapter.denoiser)
    adapter.export(tmp_path)
    trained = rollout(adapter, conditions)
    pipeline = pipeline_of(folder(kind) if lora else tmp_path, kind)
    if lora:
        pipeline.load_lora_weights(tmp_path)
    assert (reference(pipeline, conditions) - trained).abs().max() <= 1e-4
    assert (trained - base).abs().max() > 0.05


def test_lora_is_put_where_others_put_it(folder: Callable[[Kind], Path]) -> None:
    adapter = load(folder(SAME[1]))
    adapter.add_lora(LoraSettings(rank=3, alpha=1.0), seed=0)
    trainable = {name: p.numel() for name, p in adapter.denoiser.named_parameters() if p.requires_grad}
    sites = {re.sub(r"^blocks\.\d+\.|\.lora_.*$", "", name) for name in trainable}
    assert sites == set(LORA_TARGETS) and not any("add_k_proj" in name for name in sites)
    assert adapter.footprint().lora_parameters_per_rank * 3 == sum(trainable.values())


def test_checkpointed_gradients_are_the_same(folder: Callable[[Kind], Path], conditions: list[Condition]) -> None:
    adapter, gradients = load(folder(SAME[1])), []
    encoded = adapter.encode(conditions)
    for checkpointed in (False, True):
        if checkpointed:
            adapter.enable_gradient_checkpointing()
        adapter.denoiser.zero_grad()
        adapter.predict(noise(adapter), torch.tensor([0.9, 0.3]), encoded).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in adapter.denoiser.named_parameters()})
    for name, gradient in gradients[0].items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("kind", [*SAME, BOTH, TEXT])
def test_footprint_counts_what_is_loaded(
    folder: Callable[[Kind], Path], conditions: list[Condition], kind: Kind
) -> None:
    footprint, adapter = build(folder(kind), kind).footprint(), load(folder(kind), kind)
    parts = {name: part for name, part in adapter.with_encoders().components.items() if isinstance(part, nn.Module)}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert footprint.denoiser_parameters == counts.pop("transformer")
    assert footprint.frozen_parameters == sum(counts.values())
    assert footprint.latent_shape == noise(adapter).shape[1:]
    assert footprint.source == f"configuration files of '{folder(kind)}'"
    given = [replace(condition, last_image=condition.image if kind == BOTH else None) for condition in conditions]
    encoded = adapter.encode(given)
    numbers = {name: rows[0].numel() * (2 if name == "condition" else 1) for name, rows in encoded.items()}
    assert footprint.conditioning_numbers == sum(numbers.values())


@pytest.mark.parametrize(
    ("path", "task", "model", "parameters"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "image_to_video", "Wan2.1-I2V-14B-480P", 16_394_878_784),
        ("org/Wan2.1-Fun-1.3b-InP", "image_to_video", "Wan2.1-Fun-V1.1-1.3B-InP", 1_564_428_608),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text_to_video", "Wan2.1-T2V-1.3B", 1_418_996_800),
        ("some-org/not-in-any-cache", "text_to_video", "Wan2.1-T2V-14B", 14_288_491_584),
    ],
)
def test_footprint_of_a_model_not_at_hand(path: str, task: str, model: str, parameters: int) -> None:
    config = WanConfig.model_validate({"path": path, "task": task, "height": 400, "width": 640, "frames": 53})
    footprint = Wan(config).footprint()
    umt5, vae, clip = 5_680_910_336, 126_892_531, 630_766_080
    assert footprint.denoiser_parameters == parameters
    assert footprint.frozen_parameters == umt5 + vae + (clip if task == "image_to_video" else 0)
    assert footprint.latent_shape == (16, 14, 50, 80)
    assert f"assumed to be those of {model}, since '{path}' is not in the local cache" in footprint.source


def large(path: Path, first: Path, dtype: torch.dtype = torch.float32) -> tuple[Wan, Callable[[int, bool], object]]:
    """A model of 1200 tokens without guidance, and its prediction of some rows, under autocast or not."""
    adapter = load(path, dtype=dtype, height=160, width=160, guidance=1.0, negative_prompt="")
    latents = noise(adapter)
    encoded = adapter.encode([Condition("a", image=write_frame(first, 0, 160, 160))] * 2)

    def predict(rows: int, autocast: bool) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = {name: values[:rows] for name, values in encoded.items()}
            return adapter.predict(latents[:rows], torch.full((rows,), 0.5), given)

    return adapter, predict


def kept_bytes(predict: Callable[[], object]) -> int:
    """Bytes of all that autograd saves."""
    kept: dict[int, Tensor] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    )
    with hooks:
        result = predict()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# torch says so once, whenever float32 weights meet bfloat16 autocast in an RMS norm.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("autocast", "bounds"), [(True, (0.95, 1.05)), (False, (0.6, 0.75))])
@pytest.mark.parametrize("kind", SAME)
def test_kept_activations_are_as_estimated(
    folder: Callable[[Kind], Path], tmp_path: Path, kind: Kind, autocast: bool, bounds: tuple[float, float]
) -> None:
    adapter, predict = large(folder(replace(kind, heads=8)), tmp_path / "first.png")
    estimate, unit = adapter.footprint(), 2 if autocast else 4

    def numbers_per_row() -> float:
        """By what a second row adds, since weights, and autocast's copies of them, are kept once."""
        one, two = (kept_bytes(lambda rows=rows: predict(rows, autocast)) for rows in (1, 2))
        return (two - one) / unit

    kept = numbers_per_row()
    assert bounds[0] < kept / estimate.activation_numbers_per_row < bounds[1]
    adapter.enable_gradient_checkpointing()
    inputs = numbers_per_row()  # of the two blocks, and what is kept outside of them
    block = (kept - (inputs - 2 * 1200 * 96)) / 2
    assert bounds[0] < (inputs + block) / estimate.checkpointed_numbers_per_row < 1.01


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@torch.no_grad()
def test_peak_of_a_forward_is_as_estimated(folder: Callable[[Kind], Path], tmp_path: Path) -> None:
    adapter, predict = large(folder(replace(SAME[0], heads=8)), tmp_path / "first.png", torch.bfloat16)
    peaks = []
    for rows in (1, 2):
        with no_collection(), PeakMemory() as memory:
            predict(rows, True)
        peaks.append(memory.peak)
    assert 0.85 < (peaks[1] - peaks[0]) / 2 / adapter.footprint().forward_numbers_per_row < 1.05


@torch.no_grad()
@pytest.mark.parametrize("kind", [SAME[1], SHARED, TEXT])
def test_operations_are_as_estimated(folder: Callable[[Kind], Path], conditions: list[Condition], kind: Kind) -> None:
    adapter = load(folder(kind), kind)
    latents, encoded = noise(adapter, rows=1), adapter.encode(conditions[:1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        adapter.predict(latents, torch.tensor([0.5]), encoded)
    estimate = adapter.footprint()
    expected = estimate.forward_flops_per_row * estimate.rows_per_prediction
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
