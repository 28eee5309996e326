"""The feature space `inception`: the 2,048 pooled features that FID and KID are usually taken of.

The network is the TensorFlow Inception of 2015-12-05 as torch-fidelity holds it (Apache-2.0), with its own resizing; it
is another network than torchvision's `inception_v3`, and figures of the two cannot be compared.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.files.paths import LocalPath
from branchtree.files.reading import user_path
from branchtree_rewards.features.frames import NetworkFeatures, digest_of
from branchtree_rewards.shared.pixels import to_rgb, to_uint8
from branchtree_rewards.shared.weights import read_weights, state_dict

LAYER = "2048"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


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


class InceptionFeatures(NetworkFeatures[InceptionFeaturesConfig]):
    """Pooled features of torch-fidelity's InceptionV3."""

    name = "inception"

    @property
    def backend(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return (
            f"torch-fidelity InceptionV3, layer {LAYER}, 8-bit input, {Path(self._config.path).name} "
            f"(sha256 {self._digest[:12]})"
        )

    def load(self, device: torch.device) -> None:
        """Load the network. Raises RewardError without torch-fidelity, or if the file is missing or does not fit."""
        file = user_path(self._config.path)
        if not os.path.isfile(file):
            raise RewardError(f"no weights file '{file}'; give torch-fidelity's {WEIGHTS} as 'path'")
        self._network = open_inception(file).to(device)
        self._device, self._digest = device, file_sha256(file)

    def fingerprint(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return digest_of("inception", LAYER, self._digest, str(self._config.frames))

    def _measure(self, images: Tensor) -> Tensor:
        found: Tensor = self._network(to_uint8(to_rgb(images.to(self._device))))[0]
        return found


def open_inception(file: Path) -> Any:
    """torch-fidelity's extractor with the weights of ``file``, in evaluation mode. Raises RewardError."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise RewardError(
            f"features 'inception' need torch-fidelity, which cannot be imported ({error}); "
            "pip install 'torch-fidelity>=0.4'"
        ) from error
    weights = state_dict(read_weights(file), file)
    # The extractor unpickles whatever its file holds, so it is given a copy that holds tensors alone. Its layers draw
    # first weights from torch's global random state, which is not ours to move.
    with tempfile.TemporaryDirectory(prefix="branchtree-inception-") as folder, torch.random.fork_rng(devices=[]):
        copy = Path(folder) / WEIGHTS
        torch.save(weights, copy)
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise RewardError(f"'{file}' does not fit torch-fidelity's InceptionV3: {reason}") from error
