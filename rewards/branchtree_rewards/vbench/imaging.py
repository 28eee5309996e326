"""VBench's imaging quality, `vbench_imaging`: MUSIQ's verdict on each frame.

The frames are those of imaging_quality.py in Vchitect/VBench (arXiv 2311.17982), in its default mode, "longer".
"""

from collections.abc import Mapping

import pydantic
import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree_rewards.shared.reward import Opened
from branchtree_rewards.shared.samples import spans
from branchtree_rewards.shared.source import locate_local, refuse_file
from branchtree_rewards.shared.weights import load_strictly, read_weights, state_dict
from branchtree_rewards.small.vbench import MUSIQ_FILE, SIZES_FILE, write_small_musiq
from branchtree_rewards.vbench.base import Figures, VBenchConfig, VBenchReward, longer_side
from branchtree_rewards.vbench.musiq import Musiq, MusiqSizes

PUBLISHED = f"https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/{MUSIQ_FILE}"
OTHERS = r"(?<![a-z])(?:koniq|paq2piq|ava)(?![a-z])"  # in names of MUSIQ's weights for other data
LONGEST = 512  # pixels


class VBenchImagingConfig(VBenchConfig, frozen=True):
    """Settings of the `vbench_imaging` reward.

    Attributes:
        path: MUSIQ's weights for SPAQ, musiq_spaq_ckpt-358bb6af.pth: the file, its folder, or "random:small". They are
            not on the hub. A folder may hold a musiq.json with the sizes of another MUSIQ.
        frames: Frames sent through MUSIQ at a time.
    """

    path: PathOrName = MUSIQ_FILE
    frames: int = pydantic.Field(default=4, ge=1, le=10_000)


class VBenchImaging(VBenchReward[VBenchImagingConfig]):
    """VBench's imaging quality: the mean over all frames of MUSIQ's score, about 0 to 100.

    VBench's own table divides the mean over videos by 100; the scale "div100" does.
    """

    name = "vbench_imaging"

    def _open(self) -> Opened:
        advice = f"these weights are not on the hub: download {PUBLISHED} and give its path"
        source = locate_local(self._config.path, self._config.revision, write_small_musiq, advice)
        refuse_file(source, OTHERS, f"VBench rates frames by MUSIQ for SPAQ; give '{MUSIQ_FILE}'")
        file = source.find(MUSIQ_FILE)
        described = source.maybe(SIZES_FILE) if source.only is None else None
        try:
            sizes = MusiqSizes.model_validate_json(described.read_bytes()) if described else MusiqSizes()
        except ValueError as error:
            raise RewardError(f"'{described}' holds no sizes of MUSIQ: {error}") from error
        content = read_weights(file)
        if isinstance(content, Mapping) and content.keys() == {"params"}:  # as some training tools save it
            content = content["params"]
        with torch.device("meta"):
            network = Musiq(sizes)
        load_strictly(network, state_dict(content, file), str(file))
        return Opened(network, {file.name: file}, (described,) if described else ())

    def _figure(self, network: nn.Module, frames: Tensor, fps: float | None) -> Figures:
        shown = longer_side(frames, LONGEST) / 255
        scores = torch.cat([network(shown[span]) for span in spans(len(shown), self._config.frames)])
        return {"value": scores.mean()}
