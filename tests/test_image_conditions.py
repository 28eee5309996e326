"""Images of conditions in the model family ``diffusers``: how many, of which sizes, and that decoding sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.flux import Flux
from branchtree_adapters.small.pipelines import PIPELINES
from branchtree_rewards.digits import Digits
from PIL import Image
from torch import Tensor
from training_runs import shortened

from branchtree import load_recipe, train
from branchtree.core.scores import Scores
from branchtree.data.prompts import check_conditions, media_of
from branchtree.errors import DataError, ModelError
from branchtree.plugins import Condition, Conditioning, Media
from branchtree.plugins.decoding import Encoded
from branchtree.run.directory import EVALUATION, METRICS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def constants() -> Iterator[None]:
    """Small images inside of the Qwen pipeline, as in its other tests."""
    family = PIPELINES["qwen_edit_plus"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in family.constants.items():
            patch.setattr(sys.modules[getattr(diffusers, family.pipeline).__module__], name, value)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of random colours: square, wide, and square again."""
    folder, source = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for name, size in {"a": (64, 64), "b": (96, 64), "c": (64, 64)}.items():
        pixels = torch.randint(0, 256, (4, 4, 3), generator=source, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.NEAREST).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in "abc"]


def made(name: str, **options: Any) -> Diffusers:
    family = PIPELINES[name]
    call = {key: value for key, value in family.call.items() if key not in {"height", "width", "num_frames"}}
    sizes = {"height": family.call["height"], "width": family.call["width"], "frames": family.call.get("num_frames")}
    given = {"path": f"small:{name}", "negative_prompt": family.negative, "images": 1, **sizes, "call": call}
    return Diffusers(DiffusersConfig(**{**given, **options}))


def loaded(name: str, **options: Any) -> Diffusers:
    adapter = made(name, **options)
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter


def noise(adapter: Diffusers, rows: int) -> Tensor:
    return torch.stack([adapter.initial_noise(torch.Generator().manual_seed(row)) for row in range(rows)])


def test_conditions_with_one_and_with_two_images_share_a_batch(files: list[Path]) -> None:
    a, b, c = files
    adapter = loaded("qwen_edit_plus", images=2)
    conditions = [
        Condition("one", image=a),
        Condition("two", image=a, further_images=(b,)),
        Condition("three", image=b, further_images=(a,)),
        Condition("four", image=b),
    ]
    check_conditions(adapter, conditions)
    encoded = adapter.encode(conditions)
    latents, sigma = noise(adapter, 4), torch.linspace(0.9, 0.3, 4)
    with torch.no_grad():
        together = adapter.predict(latents, sigma, encoded)
        for row, condition in enumerate(conditions):
            alone = adapter.predict(latents[row : row + 1], sigma[row : row + 1], adapter.encode([condition]))
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
        other = adapter.encode([Condition("two", image=a, further_images=(c,))])  # which has the size of neither
        assert not torch.allclose(adapter.predict(latents[1:2], sigma[1:2], other)[0], together[1], atol=1e-4)
    assert adapter.decode(latents, encoded).pixels.shape[0] == 4


def test_a_pipeline_gets_images_upright_and_in_rgb(tmp_path: Path, files: list[Path]) -> None:
    """In a list only where there may be several."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    wide = Image.open(files[1]).convert("L")
    wide.save(tmp_path / "turned.png", exif=exif)
    condition = Condition("a", image=tmp_path / "turned.png")
    for images in (1, 2):
        adapter = made("flux2_klein_image", images=images)
        given = adapter._asked(condition, adapter._read_images(condition)).extra["image"]
        assert isinstance(given, list) == (images == 2)
        [image] = given if isinstance(given, list) else [given]
        expected = wide.transpose(Image.Transpose.ROTATE_270).convert("RGB")
        assert (image.mode, image.size) == ("RGB", (64, 96)) and image.tobytes() == expected.tobytes()


def test_what_a_model_cannot_take_is_refused_before_it_is_loaded(tmp_path: Path, files: list[Path]) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "tiny.png")
    Image.new("RGB", (1000, 64)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:50])
    several = Condition("x", image=files[0], further_images=(files[1], files[0]), location="p.jsonl:1")
    gone = Condition("x", image=files[0], further_images=(tmp_path / "gone.png",), location="p.jsonl:4")
    cut = Condition("x", image=files[0], further_images=(tmp_path / "cut.png",), location="p.jsonl:5")
    adapter = made("flux2_klein_image", images=2)
    for condition, message in (
        (several, "has 3 images, and model.images is 2; give at most as many"),
        (Condition("x", location="p.jsonl:2"), "has no image, which Flux2KleinPipeline needs"),
        (Condition("x", image=tmp_path / "tiny.png", location="p.jsonl:3"), "too small.*at least 64px"),
        (Condition("x", image=tmp_path / "thin.png", location="p.jsonl:3"), "Flux2KleinPipeline does not take it"),
        (gone, "gone.png"),
        (cut, "cut.png' cannot be read"),
    ):
        with pytest.raises(DataError, match=rf"(?is){condition.location}: 'x'.*{message}"):
            check_conditions(adapter, [condition])
    with pytest.raises(DataError, match=r"p\.jsonl:1: .x. has 3 images, and the model takes one"):
        check_conditions(made("flux_kontext"), [several])


def test_images_are_read_where_the_pipeline_takes_them() -> None:
    assert media_of(made("flux2_klein_image", images=3)) == {"image", "images", "video"}
    assert media_of(made("flux2_klein_image")) == {"image", "video"}
    assert media_of(made("flux2_klein", images=0)) == set()


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("flux_kontext", 2, "FluxKontextPipeline does not work with 2 images .*; if it takes one, set images to 1"),
        ("wan_image_plain", 2, "WanImageToVideoPipeline does not work with 2 images"),
        ("ltx_image", 0, "LTXImageToVideoPipeline does not work without an image .*; if it takes one, set images to 1"),
    ],
)
def test_a_number_of_images_that_a_pipeline_cannot_take_is_refused(name: str, images: int, message: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s)model\.images: {message}"):
        loaded(name, images=images)


def test_images_that_a_pipeline_does_not_look_at_are_refused() -> None:
    adapter = made("flux2_klein_image", images=2)

    def driver(*seen: int) -> Any:
        """One whose encodings depend on some of the images alone."""

        def encode(asked: Asked) -> dict[str, Tensor]:
            return {"colours": torch.tensor([[asked.extra["image"][i].getpixel((0, 0)) for i in seen]])}

        return SimpleNamespace(encode=encode)

    adapter._require_all_images(driver(0, 1))
    with pytest.raises(ModelError, match=r"model\.images: Flux2KleinPipeline does not look at image 2"):
        adapter._require_all_images(driver(0))


def test_an_image_of_another_size_than_those_of_the_layout_is_taken(files: list[Path]) -> None:
    """Kontext's positions follow from the image's size, which no two conditions need share."""
    adapter = loaded("flux_kontext")
    encoded = adapter.encode([Condition("one", image=files[0]), Condition("two", image=files[1])])
    with torch.no_grad():
        found = adapter.predict(noise(adapter, 2), torch.tensor([0.9, 0.4]), encoded)
    assert bool(found.isfinite().all())


def test_encodings_with_images_depend_on_the_vae() -> None:
    assert made("flux_kontext").encodes_with_vae and not made("flux", images=None).encodes_with_vae


# Decoding


def test_a_given_frame_comes_back_in_under_each_samples_own_condition(files: list[Path]) -> None:
    """Two conditions' samples, decoded together, are what the pipeline's own calls make."""
    adapter = loaded("wan_image_expanded")
    pipeline = adapter.pipeline
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    conditions = [Condition("one", image=files[0]), Condition("two words", image=files[1])]
    call = {**adapter.call, "num_inference_steps": 3, "output_type": "pt", "return_dict": False}
    expected = [
        pipeline(
            image=Image.open(condition.images[0]),
            prompt=condition.prompt,
            negative_prompt=adapter.config.negative_prompt,
            generator=torch.Generator().manual_seed(row),
            **call,
        )[0]
        for row, condition in enumerate(conditions)
    ]
    encoded, state = adapter.encode(conditions), noise(adapter, 2)
    with torch.no_grad():
        for sigma, following in pairwise(adapter.sigmas(3)):
            state = state + (following - sigma) * adapter.predict(state, sigma.expand(2), encoded)
    for order in ([0, 1], [1, 0, 1]):
        found = Encoded(encoded, torch.tensor(order)).decode(adapter, state[order]).pixels
        torch.testing.assert_close(found, torch.cat([expected[row] for row in order]), rtol=0, atol=1e-5)
    blank = adapter.decode(state).pixels
    assert not torch.allclose(blank[0], expected[0][0], atol=1e-2)


def test_a_run_decodes_under_what_it_sampled_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that asks for encodings gets those of the prompts that its samples are scored by."""
    recipe = load_recipe("quickstart", {**shortened("quickstart"), "evaluation.limit": 3, "batch.decode_rows": 3})
    train(recipe, output=tmp_path / "plain")
    own_encode, own_decode, own_score = Flux.encode, Flux.decode, Digits.score
    known: dict[bytes, str] = {}
    decoded, scored = list[list[str]](), list[list[str]]()

    def encode(self: Flux, conditions: Sequence[Condition]) -> Conditioning:
        encoded = own_encode(self, conditions)
        known.update(zip(map(as_bytes, encoded["prompt_embeds"]), (each.prompt for each in conditions), strict=True))
        return encoded

    def decode(self: Flux, latents: Tensor, conditioning: Conditioning | None = None) -> Media:
        assert conditioning is not None
        assert {len(value) for value in conditioning.values()} == {len(latents)}
        decoded.append([known[as_bytes(row)] for row in conditioning["prompt_embeds"]])
        return own_decode(self, latents)

    def score(self: Digits, media: Media, conditions: Sequence[Condition]) -> Scores:
        scored.append([condition.prompt for condition in conditions])
        return own_score(self, media, conditions)

    monkeypatch.setattr(Flux, "encode", encode)
    monkeypatch.setattr(Flux, "decode", decode)
    monkeypatch.setattr(Digits, "score", score)
    train(recipe, output=tmp_path / "asking")
    assert len(scored) > 3 and all(prompts in decoded for prompts in scored)
    assert max(len(set(prompts)) for prompts in decoded) > 1
    for name in (METRICS, EVALUATION):  # as with a decoder of latents alone
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "asking" / name).read_bytes()


def as_bytes(row: Tensor) -> bytes:
    return row.float().numpy().tobytes()
