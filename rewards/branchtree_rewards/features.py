"""The feature spaces that samples are compared in: `inception`, `clip`, `digits` and `pixels`.

`inception` is the 2,048 pooled features that FID and KID are usually taken of. The network is the TensorFlow Inception
of 2015-12-05 as torch-fidelity holds it (Apache-2.0), with its own resizing; it is another one than torchvision's
`inception_v3`, and figures of the two cannot be compared. `clip` is the projected image features of OpenAI's CLIP
(arXiv 2103.00020), 512 of ViT-B/32. `digits` and `pixels` need no download. Axis letters: B samples, D features.
"""

from __future__ import annotations

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
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.protocols import Media
from branchtree_rewards.clip.network import image_features, load_clip
from branchtree_rewards.digits import (
    DigitClassifier,
    classifier_pair,
    load_classifier,
    read_classifier,
    to_network_input,
)
from branchtree_rewards.diversity import shrunk
from branchtree_rewards.shared.pixels import clip_pixels, to_rgb, to_uint8
from branchtree_rewards.shared.source import cause, locate_weights
from branchtree_rewards.shared.weights import read_state
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
    """A feature space; see branchtree.studies.diversity.spaces.FeatureSpace."""

    modalities: frozenset[str] = frozenset({"image", "video"})
    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device = torch.device("cpu")

    @property
    @abstractmethod
    def backend(self) -> str:
        """What measures, in words."""

    def load(self, device: torch.device) -> None:
        """Measure on ``device``."""
        self._device = device

    @abstractmethod
    def features(self, media: Media) -> Tensor:
        """Return the features (B, D), float32, of B images or videos."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest: spaces with equal ones give equal features. Called after `load`."""

    def _digest(self, *facts: str) -> str:
        return hashlib.sha256("\n".join((self.name, *facts)).encode()).hexdigest()


class DigitsFeatures(Features[DigitsFeaturesConfig]):
    """The 1,024 features that a bundled digit classifier's last layer reads, of images or of videos' last frames."""

    name = "digits"

    def __init__(self, config: DigitsFeaturesConfig) -> None:
        super().__init__(config)
        self._pair = classifier_pair(config.classifier)
        self._networks: dict[str, DigitClassifier] = {}

    @property
    def backend(self) -> str:
        """The classifier's name."""
        return f"input of the last layer of the bundled digit classifier '{self._config.classifier}'"

    def load(self, device: torch.device) -> None:
        """Put the classifiers of images and of video frames on ``device``."""
        super().load(device)
        self._networks = {modality: load_classifier(name, device) for modality, name in self._pair.items()}

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """Return the features (B, 1024)."""
        if not self._networks:
            raise RuntimeError("the digits features were not loaded: call load(device) first")
        images = media.pixels if media.modality == "image" else media.pixels[:, -1]
        found: Tensor = self._networks[media.modality].features(to_network_input(images.to(self._device)))
        return found.flatten(1)

    def fingerprint(self) -> str:
        """Return a digest of both classifiers' weights."""
        return self._digest(*(hashlib.sha256(read_classifier(name)).hexdigest() for name in self._pair.values()))


class PixelsFeatures(Features[PixelsFeaturesConfig]):
    """The numbers of the picture, or of all frames of the video, shrunk by averages."""

    name = "pixels"

    @property
    def backend(self) -> str:
        """The size that pictures are shrunk to."""
        return f"pixels in [0, 1], the longer side shrunk to {self._config.size}"

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """Return the shrunk numbers (B, D)."""
        pixels = media.pixels.to(self._device, torch.float32)
        return shrunk(pixels.flatten(0, -4), self._config.size).reshape(len(media), -1)

    def fingerprint(self) -> str:
        """Return a digest of the size."""
        return self._digest(str(self._config.size))


class NetworkFeatures(Features[NetworkConfig]):
    """A feature space of pictures under one network; of a video, the mean over some frames."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self._network: Any = None  # once it is loaded
        self._sha256 = ""  # of the weights' file

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """Return the features (B, D) of images, or of evenly spaced frames of each video their mean."""
        if self._network is None:
            raise RuntimeError(f"the {self.name} features were not loaded: call load(device) first")
        pixels = media.pixels if media.modality == "video" else media.pixels.unsqueeze(1)
        count = min(self._config.frames, pixels.shape[1])
        kept = torch.linspace(0, pixels.shape[1] - 1, count).round().long()
        images = pixels[:, kept.to(pixels.device)].flatten(0, 1)
        found = torch.cat([self._measure(some).float() for some in images.split(self._config.batch)])
        return found.reshape(len(media), count, -1).mean(dim=1)

    @abstractmethod
    def _measure(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of at most ``batch`` images (N, C, H, W) in [0, 1]."""


class ClipFeatures(NetworkFeatures[ClipFeaturesConfig]):
    """Projected image features of a CLIP, of pictures prepared as transformers does."""

    name = "clip"

    @property
    def backend(self) -> str:
        """The weights, and how features and pictures are scaled."""
        length = "scaled to length 1" if self._config.normalize else "raw"
        return (
            f"CLIP image features of {self._config.path} (sha256 {self._sha256[:12]}), {length}, resized by PIL bicubic"
        )

    def load(self, device: torch.device) -> None:
        """Load the network in float32. Raises RewardError if files are missing or do not fit."""
        super().load(device)
        source = locate_weights(self._config.path, self._config.revision, partial(write_clip_folder, seed=0))
        network, file = load_clip(source)
        self._network, self._sha256 = network.eval().requires_grad_(False).to(device), file_sha256(file)

    def fingerprint(self) -> str:
        """Return a digest of the weights and of the settings that change features."""
        return self._digest(self._sha256, self._config.model_dump_json(include={"normalize", "frames"}))

    def _measure(self, images: Tensor) -> Tensor:
        pictures = clip_pixels(images, self._network.config.vision_config.image_size, floor=True)
        found = image_features(self._network, pictures.to(self._device))
        return F.normalize(found, dim=-1) if self._config.normalize else found


class InceptionFeatures(NetworkFeatures[InceptionFeaturesConfig]):
    """Pooled features of torch-fidelity's InceptionV3."""

    name = "inception"

    @property
    def backend(self) -> str:
        """The network, its layer and its weights."""
        return (
            f"torch-fidelity InceptionV3, layer {LAYER}, 8-bit input, {Path(self._config.path).name} "
            f"(sha256 {self._sha256[:12]})"
        )

    def load(self, device: torch.device) -> None:
        """Load the network. Raises RewardError without torch-fidelity, or if the file is missing or does not fit."""
        super().load(device)
        file = user_path(self._config.path)
        if not os.path.isfile(file):
            raise RewardError(f"no weights file '{file}'; give torch-fidelity's {WEIGHTS} as 'path'")
        self._network, self._sha256 = open_inception(file).to(device), file_sha256(file)

    def fingerprint(self) -> str:
        """Return a digest of the weights, the layer and the frames that are averaged."""
        return self._digest(LAYER, self._sha256, str(self._config.frames))

    def _measure(self, images: Tensor) -> Tensor:
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
    weights = read_state(file)
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
    register(
        "inception",
        build=InceptionFeatures,
        config=InceptionFeaturesConfig,
        summary="Pooled features of the FID Inception, by torch-fidelity, from a weights file that you name.",
    )
    register(
        "clip",
        build=ClipFeatures,
        config=ClipFeaturesConfig,
        summary="Projected image features of OpenAI's CLIP, raw or scaled to length 1.",
    )
    register(
        "digits",
        build=DigitsFeatures,
        config=DigitsFeaturesConfig,
        summary="What a bundled digit classifier's last layer reads.",
    )
    register(
        "pixels",
        build=PixelsFeatures,
        config=PixelsFeaturesConfig,
        summary="The picture itself, shrunk.",
    )
