"""The feature spaces, each against the library or the layer that its features come from."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.digits import load_classifier
from branchtree_rewards.features import (
    ClipFeatures,
    ClipFeaturesConfig,
    DigitsFeatures,
    DigitsFeaturesConfig,
    InceptionFeatures,
    InceptionFeaturesConfig,
    PixelsFeatures,
    PixelsFeaturesConfig,
)
from branchtree_rewards.small.clip import write_clip_folder
from torch import Tensor

from branchtree.errors import PluginError, RecipeError, RewardError
from branchtree.plugins import Media
from branchtree.plugins.registry import registry
from branchtree.studies.diversity.spaces import load_spaces, make_spaces

CPU = torch.device("cpu")


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_all_are_registered() -> None:
    assert sorted(registry().features) == ["clip", "digits", "inception", "pixels", "tensors"]
    assert all(entry.summary for entry in registry().features.values())


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A weights file of the right names and shapes, and torch-fidelity's network with these weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(module.FeatureExtractorInceptionV3):  # type: ignore[misc,name-defined]
        def load_state_dict(self, state: Any) -> None:
            """Leave the weights as they were drawn."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Unloaded("name", ["2048"], feature_extractor_weights_path=str(folder / "empty.pt"))
    torch.save(network.state_dict(), folder / "weights.pth")
    yield folder / "weights.pth", network


def test_inception_is_torch_fidelitys_pool_of_8_bit_pictures(inception: tuple[Path, Any]) -> None:
    file, network = inception
    images = pictures(2, 3, 40, 30)
    space = InceptionFeatures(InceptionFeaturesConfig(path=str(file), batch=2))
    before = torch.random.get_rng_state()
    space.load(CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = space.features(Media(images=images))
    expected = network((images * 255).round().to(torch.uint8))[0]
    assert torch.equal(found, expected)
    assert found.shape == (2, 2048)
    assert "torch-fidelity InceptionV3" in space.backend and "weights.pth" in space.backend


def test_inception_says_what_it_needs(
    inception: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> None:
        InceptionFeatures(InceptionFeaturesConfig(path=str(path))).load(CPU)

    with pytest.raises(RewardError, match="no weights file"):
        load(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match="does not fit"):
        load(tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(RewardError, match="holds more than tensors"):
        load(tmp_path / "code.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(RewardError, match="pip install 'torch-fidelity"):
        load(inception[0])


def test_clip_is_transformers_with_its_own_preprocessing(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel

    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    write_clip_folder(tmp_path, seed=0)
    images = pictures(3, 3, 62, 56)  # of 31 rows, 28 are kept: where the cut begins is seen
    space = ClipFeatures(ClipFeaturesConfig(path=str(tmp_path), batch=2))
    space.load(CPU)
    found = space.features(Media(images=images))
    raw = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in images]
    inputs = Processor.from_pretrained(tmp_path)(raw, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = CLIPModel.from_pretrained(tmp_path).eval().get_image_features(inputs)
    expected = output if isinstance(output, Tensor) else output.pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    scaled = ClipFeatures(ClipFeaturesConfig(path="random:small", normalize=True))
    scaled.load(CPU)
    unit = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaled.features(Media(images=images)), unit, rtol=1e-4, atol=1e-5)
    assert "raw" in space.backend and "scaled to length 1" in scaled.backend
    assert space.fingerprint() != scaled.fingerprint()


def test_a_videos_features_are_the_mean_over_spaced_frames() -> None:
    space = ClipFeatures(ClipFeaturesConfig(path="random:small", frames=3))
    space.load(CPU)
    videos = pictures(2, 9, 3, 28, 28)
    frames = [space.features(Media(images=videos[:, place])) for place in (0, 4, 8)]
    torch.testing.assert_close(space.features(Media(videos=videos)), sum(frames) / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classifier", ["reward", "heldout"])
def test_digits_are_what_the_last_layer_reads(classifier: Any) -> None:
    space = DigitsFeatures(DigitsFeaturesConfig(classifier=classifier))
    space.load(CPU)
    images, network = pictures(2, 1, 32, 32), load_classifier(classifier, CPU)
    torch.testing.assert_close(network.head(space.features(Media(images=images))), network(images))
    videos, moving = pictures(2, 3, 1, 32, 32), load_classifier(f"moving_{classifier}", CPU)  # type: ignore[arg-type]
    torch.testing.assert_close(moving.head(space.features(Media(videos=videos))), moving(videos[:, -1]))


def test_pixels_are_means_of_squares_of_the_picture() -> None:
    space = PixelsFeatures(PixelsFeaturesConfig(size=2))
    space.load(CPU)
    image = torch.arange(16.0).view(1, 1, 4, 4) / 16
    expected = torch.tensor([[2.5, 4.5, 10.5, 12.5]]) / 16
    torch.testing.assert_close(space.features(Media(images=image)), expected)
    video = torch.stack([image, image + 1], dim=1)
    torch.testing.assert_close(space.features(Media(videos=video)), torch.cat([expected, expected + 1], dim=1))


def test_features_before_loading_are_refused() -> None:
    for space in (DigitsFeatures(DigitsFeaturesConfig()), ClipFeatures(ClipFeaturesConfig(path="random:small"))):
        with pytest.raises(RuntimeError, match="call load"):
            space.features(Media(images=pictures(1, 3, 8, 8)))


def test_spaces_are_named_with_settings() -> None:
    first, second = make_spaces(["pixels size=4", "pixels"], "image")
    load_spaces([first, second], CPU)
    assert (first.label, second.label) == ("pixels size=4", "pixels")
    assert first.space.features(Media(images=pictures(1, 1, 16, 16))).shape == (1, 16)
    assert first.space.fingerprint() != second.space.fingerprint()


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (["pixel"], PluginError, "did you mean 'pixels'"),
        (["pixels sise=4"], RecipeError, "did you mean 'size'"),
        (["pixels 4"], RecipeError, "'4' is no setting"),
        (["pixels size='4"], RecipeError, "cannot be read"),
        ([""], RecipeError, "cannot be read"),
        (["pixels", "pixels"], RecipeError, "asked for twice"),
        (["inception"], RecipeError, "path: is missing"),
    ],
)
def test_what_cannot_be_a_space_is_told(specs: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_spaces(specs, "image")


def test_a_space_that_fails_to_load_is_named() -> None:
    with pytest.raises(RewardError, match="features 'clip path=/none' cannot be loaded: path '/none' is no existing"):
        load_spaces(make_spaces(["clip path=/none"], "image"), CPU)
