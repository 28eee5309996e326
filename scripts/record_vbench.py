"""Record what VBench's dynamic degree and imaging quality say of random weights, as test data.

    python scripts/record_vbench.py --code CHECKOUT --commit COMMIT [--out tests/data/rewards]

CHECKOUT is a working tree of https://github.com/Vchitect/VBench, of which vbench/dynamic_degree.py with its RAFT and
vbench/imaging_quality.py are run. The latter takes MUSIQ from pyiqa 0.1.16, which is no part of this project: its
licence is PolyForm Noncommercial. So this runs in an environment of its own, with opencv-python-headless, easydict,
tqdm, pyiqa and what they import, and imports nothing of this project. The recorded files came from commit
45e79ec14e69a2187202c675d2dbce1a71843d53 under Python 3.11.7 with torch 2.14.1, torchvision 0.29.1 and pyiqa 0.1.16, on
a CPU.

Weights and frames are not stored: they come from numpy's RandomState, whose streams never change, by `random_weights`
and `random_frames` below. RAFT is at its own size, MUSIQ at that of TINY. Written are

    vbench_outputs.json      scores by size of the frames, and what the weights were made with
    vbench_raft_keys.json    name and shape of every tensor of RAFT as Princeton publishes it
    vbench_musiq_keys.json   name and shape of every tensor of the full-size MUSIQ
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RAFT_SEED, MUSIQ_SEED, FRAMES_SEED = 1, 2, 3
PACE = 0.012  # of the random RAFT's flow, which otherwise leaves the frame
TINY = {"hidden_size": 12, "mlp_dim": 20, "num_heads": 2, "num_layers": 2}
MOVING = ((3, 128, 136), (2, 130, 149))  # frames, height, width
PICTURED = ((2, 40, 56), (1, 97, 130), (2, 530, 301))


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights by name: of matrices about as large as keeps what they act on, of norms near 1, of biases small."""
    source = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        noise = torch.from_numpy(source.randint(-100, 101, size=shape)).float() / 100
        if len(shape) == 1:
            weights[name] = 0.3 * noise + (1 if name.endswith(("weight", "running_var")) else 0)
        elif len(shape) == 0:
            weights[name] = torch.tensor(1)
        else:
            weights[name] = 1.7 * noise / math.sqrt(math.prod(shape[1:]))
    return weights


def random_frames(frames: int, height: int, width: int) -> Tensor:
    """Frames (frames, 3, height, width) of blocks of 4 x 4 pixels, floats with whole values from 0 to 255."""
    source = np.random.RandomState(FRAMES_SEED)
    blocks = source.randint(0, 256, size=(frames, 3, -(-height // 4), -(-width // 4)))
    pixels = blocks.repeat(4, axis=2).repeat(4, axis=3)[:, :, :height, :width]
    return torch.from_numpy(np.ascontiguousarray(pixels)).float()


def publisher(checkout: Path) -> tuple[Any, Any]:
    """VBench's modules of the two dimensions, without its package's own imports of everything."""
    package = types.ModuleType("vbench")
    package.__path__ = [str(checkout / "vbench")]
    sys.modules["vbench"] = package
    return importlib.import_module("vbench.dynamic_degree"), importlib.import_module("vbench.imaging_quality")


def shapes_of(network: nn.Module) -> dict[str, list[int]]:
    """Name and shape of every tensor."""
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def record_raft(module: Any) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """RAFT's tensors, and by size of the frames the speeds and the verdict of VBench's own loop."""
    network = module.RAFT(module.edict({"small": False, "mixed_precision": False, "alternate_corr": False})).eval()
    shapes = shapes_of(network)
    state = random_weights(shapes, RAFT_SEED)
    for name in [name for name in state if ".norm3." in name]:  # stored twice
        state[name] = state[name.replace("norm3", "downsample.1")]
    for name in ("weight", "bias"):
        state[f"update_block.flow_head.conv2.{name}"] *= PACE
    network.load_state_dict(state)
    degree = module.DynamicDegree.__new__(module.DynamicDegree)
    degree.model = network
    results = []
    for size in MOVING:
        frames = random_frames(*size)
        speeds: list[float] = []
        degree.get_frames = lambda path, frames=frames: list(frames[:, None])
        degree.get_score = lambda *pair, speeds=speeds: speeds.append(_score(module, degree, *pair)) or speeds[-1]
        results.append({"size": size, "dynamic": degree.infer("video.mp4"), "speeds": speeds})
    return shapes, results


def _score(module: Any, degree: Any, *pair: Tensor) -> float:
    return float(module.DynamicDegree.get_score(degree, *pair))


@torch.no_grad()
def record_musiq(module: Any) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """MUSIQ's tensors, and by size of the frames the score of each frame as VBench shows it."""
    network = module.MUSIQ(pretrained=False, **TINY).eval()
    network.load_state_dict(random_weights(shapes_of(network), MUSIQ_SEED))
    results = []
    for size in PICTURED:
        shown = module.transform(random_frames(*size), "longer")
        results.append({"size": size, "scores": [float(network(frame[None])) for frame in shown]})
    return shapes_of(module.MUSIQ(pretrained=False)), results


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/data/rewards"))
    given = parser.parse_args()
    dynamic, imaging = publisher(given.code)
    raft_keys, moving = record_raft(dynamic)
    musiq_keys, pictured = record_musiq(imaging)
    outputs = {
        "commit": given.commit,
        "seeds": {"raft": RAFT_SEED, "musiq": MUSIQ_SEED, "frames": FRAMES_SEED},
        "raft_pace": PACE,
        "musiq_sizes": TINY,
        "dynamic_degree": moving,
        "imaging_quality": pictured,
    }
    for name, content in (("outputs", outputs), ("raft_keys", raft_keys), ("musiq_keys", musiq_keys)):
        text = json.dumps(content).replace("], ", "],\n") + "\n"
        (given.out / f"vbench_{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
