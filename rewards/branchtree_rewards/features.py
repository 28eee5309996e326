"""The feature spaces that samples are compared in: `inception`, `clip`, `digits`, `pixels` and `tensors`.

`inception` is the 2,048 pooled features that FID and KID are usually taken of. The network is the TensorFlow Inception
of 2015-12-05 as torch-fidelity holds it (Apache-2.0), with its own resizing; it is another one than torchvision's
`inception_v3`, and figures of the two cannot be compared. `clip` is the projected image features of OpenAI's CLIP
(arXiv 2103.00020), 512 of ViT-B/32. `digits`, `pixels` and `tensors` need no download, and `tensors` takes samples
of any kind. Axis letters: B samples, D features.
"""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.files.paths import LocalPath, PathOrName
from branchtree.files.reading import user_path
from branchtree.plugins import Media, Samples
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.clip.network import image_features, load_clip
from branchtree_rewards.digits import classifier_pair, load_classifier, read_classifier, to_network_input
from branchtree_rewards.shared.pixels import clip_pixels, shrunk, to_rgb, to_uint8
from branchtree_rewards.shared.source import cause, locate_weights
from branchtree_rewards.shared.weights import read_state_dict
from branchtree_rewards.small.clip import write_clip_folder

LAYER = "2048"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class DigitsFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `digits`.

    Attributes:
        classifier: Which bundled classifier; "heldout" is the one that no recipe trains against.
    """

    classifier: Literal["reward", "heldout"] = "heldout"


class PixelsFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `pixels`.

    Attributes:
        size: Pixels that the longer side is shrunk to.
    """

    size: int = pydantic.Field(default=16, ge=1, le=1024)


class TensorsFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """The feature space `tensors` has no settings."""


class ClipFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `clip`.

    Attributes:
        path: A hub id or folder of a transformers CLIPModel, or "random:small" for a tiny random one.
        revision: Branch, tag or commit of the hub id.
        normalize: Whether features are scaled to length 1. Figures of the two differ by orders of magnitude.
        batch: Images sent through the network at a time.
        frames: Frames that a video's features are averaged over.
    """

    path: PathOrName = "openai/clip-vit-base-patch32"
    revision: str | None = None
    normalize: bool = False
    batch: int = pydantic.Field(default=32, ge=1, le=10_000)
    frames: int = pydantic.Field(default=8, ge=1, le=10_000)


class InceptionFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `inception`.

    Attributes:
        path: torch-fidelity's weights file, weights-inception-2015-12-05-6726825d.pth of its release v0.2.0.
        batch: Images sent through the network at a time.
        frames: Frames that a video's features are averaged over.
    """

    path: LocalPath
    batch: int = pydantic.Field(default=32, ge=1, le=10_000)
    frames: int = pydantic.Field(default=8, ge=1, le=10_000)


Config = TypeVar("Config", bound=pydantic.BaseModel)
NetworkConfig = TypeVar("NetworkConfig", bound=ClipFeaturesConfig | InceptionFeaturesConfig)


class Features(ABC, Generic[Config]):
    """A feature space, as branchtree.studies.diversity.spaces.FeatureSpace describes it."""

    name: ClassVar[str]
    modalities: frozenset[str] = frozenset({"image", "video"})
    backend = ""  # what measures, in words; known once it is loaded

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device = torch.device("cpu")

    @abstractmethod
    def _open(self) -> tuple[str, ...]:
        """Load what measuring needs to the device, set ``backend``, and return the facts that features depend on."""

    @abstractmethod
    def _measure(self, media: Media) -> Tensor:
        """Return the features (B, D) of B images or videos."""

    def load(self, device: torch.device) -> None:
        """Load to ``device``. Raises RewardError if a library or files are missing, or do not fit."""
        self._device = device
        self._facts = self._open()

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """Return the features (B, D), float32, of B images or videos."""
        if not self.backend:
            raise RuntimeError(f"the {self.name} features were not loaded: call load(device) first")
        return self._measure(media)

    def fingerprint(self) -> str:
        """Return a digest: spaces with equal ones give equal features. Called after `load`."""
        return hashlib.sha256("\n".join((self.name, *self._facts)).encode()).hexdigest()


class DigitsFeatures(Features[DigitsFeaturesConfig]):
    """The 1,024 features that a bundled digit classifier's last layer reads, of images or of videos' last frames."""

    name = "digits"

    def _open(self) -> tuple[str, ...]:
        pair = classifier_pair(self._config.classifier)
        self._networks = {modality: load_classifier(name, self._device) for modality, name in pair.items()}
        self.backend = f"input of the last layer of the bundled digit classifier '{self._config.classifier}'"
        return tuple(hashlib.sha256(read_classifier(name)).hexdigest() for name in pair.values())

    def _measure(self, media: Media) -> Tensor:
        images = media.pixels if media.modality == "image" else media.pixels[:, -1]
        found: Tensor = self._networks[media.modality].features(to_network_input(images.to(self._device)))
        return found.flatten(1)


class PixelsFeatures(Features[PixelsFeaturesConfig]):
    """The numbers of the picture, or of all frames of the video, shrunk by averages."""

    name = "pixels"

    def _open(self) -> tuple[str, ...]:
        self.backend = f"pixels in [0, 1], the longer side shrunk to {self._config.size}"
        return (str(self._config.size),)

    def _measure(self, media: Media) -> Tensor:
        pixels = media.pixels.to(self._device, torch.float32)
        return shrunk(pixels.flatten(0, -4), self._config.size).reshape(len(media), -1)


class TensorsFeatures(Features[TensorsFeaturesConfig]):
    """All numbers of a sample of any kind, as they are, field after field."""

    name = "tensors"
    modalities = frozenset()

    def _open(self) -> tuple[str, ...]:
        self.backend = "the samples' own numbers"
        return ()

    def _measure(self, media: Samples) -> Tensor:
        return torch.cat([media.tensors[name].flatten(1).float() for name in sorted(media.tensors)], dim=1)


class NetworkFeatures(Features[NetworkConfig]):
    """A feature space of pictures under one network; of a video, the mean over evenly spaced frames."""

    _network: Any

    def _measure(self, media: Media) -> Tensor:
        pixels = media.pixels if media.modality == "video" else media.pixels.unsqueeze(1)
        count = min(self._config.frames, pixels.shape[1])
        kept = torch.linspace(0, pixels.shape[1] - 1, count).round().long()
        images = pixels[:, kept.to(pixels.device)].flatten(0, 1)
        found = torch.cat([self._measure_images(some).float() for some in images.split(self._config.batch)])
        return found.reshape(len(media), count, -1).mean(dim=1)

    @abstractmethod
    def _measure_images(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of at most ``batch`` images (N, C, H, W) in [0, 1]."""


class ClipFeatures(NetworkFeatures[ClipFeaturesConfig]):
    """Projected image features of a CLIP in float32, of pictures prepared as transformers does."""

    name = "clip"

    def _open(self) -> tuple[str, ...]:
        config = self._config
        network, file = load_clip(locate_weights(config.path, config.revision, partial(write_clip_folder, seed=0)))
        self._network = network.eval().requires_grad_(False).to(self._device)
        digest, length = file_sha256(file), "scaled to length 1" if config.normalize else "raw"
        self.backend = f"CLIP image features of {config.path} (sha256 {digest[:12]}), {length}, resized by PIL bicubic"
        return digest, config.model_dump_json(include={"normalize", "frames"})

    def _measure_images(self, images: Tensor) -> Tensor:
        pictures = clip_pixels(images, self._network.config.vision_config.image_size, floor=True)
        found = image_features(self._network, pictures.to(self._device))
        return F.normalize(found, dim=-1) if self._config.normalize else found


class InceptionFeatures(NetworkFeatures[InceptionFeaturesConfig]):
    """Pooled features of torch-fidelity's InceptionV3."""

    name = "inception"

    def _open(self) -> tuple[str, ...]:
        file = user_path(self._config.path)
        if not os.path.isfile(file):
            raise RewardError(f"no weights file '{file}'; give torch-fidelity's {WEIGHTS} as 'path'")
        self._network, digest = open_inception(file).to(self._device), file_sha256(file)
        name = Path(self._config.path).name
        self.backend = f"torch-fidelity InceptionV3, layer {LAYER}, 8-bit input, {name} (sha256 {digest[:12]})"
        return LAYER, digest, str(self._config.frames)

    def _measure_images(self, images: Tensor) -> Tensor:
        found: Tensor = self._network(to_uint8(to_rgb(images.to(self._device))))[0]
        return found


def open_inception(file: Path) -> Any:
    """Return torch-fidelity's extractor with the weights of ``file``, in evaluation mode. Raises RewardError."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise RewardError(
            f"features 'inception' need torch-fidelity, which cannot be imported ({error}); "
            "pip install 'torch-fidelity>=0.4'"
        ) from error
    weights = read_state_dict(file)
    # The extractor unpickles whatever its file holds, so it is given a copy that holds tensors alone. Its layers draw
    # first weights from torch's global random state, which is not ours to move.
    with tempfile.TemporaryDirectory(prefix="branchtree-inception-") as folder, torch.random.fork_rng(devices=[]):
        copy = Path(folder) / WEIGHTS
        torch.save(weights, copy)
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            raise RewardError(f"'{file}' does not fit torch-fidelity's InceptionV3: {cause(error)}") from error


@hookimpl
def register_features(register: Callable[..., None]) -> None:
    """Add the feature spaces to the registry."""
    summary = "Pooled features of the FID Inception, by torch-fidelity, from a weights file that you name."
    register("inception", build=InceptionFeatures, config=InceptionFeaturesConfig, summary=summary)
    summary = "Projected image features of OpenAI's CLIP, raw or scaled to length 1."
    register("clip", build=ClipFeatures, config=ClipFeaturesConfig, summary=summary)
    summary = "What a bundled digit classifier's last layer reads."
    register("digits", build=DigitsFeatures, config=DigitsFeaturesConfig, summary=summary)
    register("pixels", build=PixelsFeatures, config=PixelsFeaturesConfig, summary="The picture itself, shrunk.")
    summary = "All numbers of a sample of any kind, as they are."
    register("tensors", build=TensorsFeatures, config=TensorsFeaturesConfig, summary=summary)
