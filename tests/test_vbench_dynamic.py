"""VBench's dynamic degree: RAFT in both published layouts, and when a video counts as moving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_rewards.shared.reward import Opened
from branchtree_rewards.vbench.base import padded, unpadded
from branchtree_rewards.vbench.dynamic import VBenchDynamic, VBenchDynamicConfig, judged
from branchtree_rewards.vbench.raft import empty_raft, load_raft, torchvision_layout
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_large
from vbench_recorded import recorded, recorder

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media

CPU = torch.device("cpu")
RECORDED = recorded("outputs")


@pytest.fixture(scope="module")
def princeton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random weights that VBench's own code was run with, as Princeton saves weights."""
    shapes = recorded("raft_keys")
    state = recorder().random_weights(shapes, RECORDED["seeds"]["raft"])
    for name in [name for name in state if ".norm3." in name]:
        state[name] = state[name.replace("norm3", "downsample.1")]
    for name in ("weight", "bias"):
        state[f"update_block.flow_head.conv2.{name}"] *= RECORDED["raft_pace"]
    file = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, file)
    return file


def loaded(network: nn.Module | None = None, path: Path | str = "random:small", **options: Any) -> VBenchDynamic:
    reward = VBenchDynamic(VBenchDynamicConfig(path=str(path), **options))
    reward.load(CPU)
    if network is not None:
        reward._opened = Opened(network, {})
    return reward


def score(reward: VBenchDynamic, videos: Tensor, fps: float | None = 8.0) -> Scores:
    return reward.score(Media(videos=videos, fps=fps), [Condition("")] * len(videos))


def test_princetons_layout_fills_torchvisions(princeton: Path) -> None:
    state = torch.load(princeton, weights_only=True)
    renamed = torchvision_layout(state)
    wanted = raft_large(weights=None, progress=False).state_dict()
    assert (len(state), len(renamed)) == (179, 169)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert sum(".norm3." in name for name in state) == 10


def test_the_network_is_torchvisions(princeton: Path) -> None:
    theirs = raft_large(weights=None, progress=False)
    theirs.load_state_dict(torchvision_layout(torch.load(princeton, weights_only=True)))
    images = torch.rand(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = theirs.eval()(*images, num_flow_updates=2)[-1]
        assert torch.equal(load_raft(princeton).eval()(*images, num_flow_updates=2)[-1], expected)


@pytest.mark.parametrize("layout", ["princeton", "torchvision"])
def test_speeds_and_verdict_are_vbenchs_own(layout: str, princeton: Path, tmp_path: Path) -> None:
    file = princeton
    if layout == "torchvision":
        file = tmp_path / "raft_large_C_T_V1-22a6c225.pth"
        torch.save(torchvision_layout(torch.load(princeton, weights_only=True)), file)
    told = RECORDED["dynamic_degree"][1 if layout == "torchvision" else 0]
    videos = recorder().random_frames(*told["size"])[None] / 255
    scores = score(loaded(path=file), videos)
    assert scores.values.tolist() == [float(told["dynamic"])]
    mean = sum(told["speeds"]) / len(told["speeds"])
    assert float(scores.details["speed"][0]) == pytest.approx(mean, rel=1e-4)
    assert int(scores.details["pairs"][0]) == len(told["speeds"])


def test_weights_that_do_not_fit_are_refused(princeton: Path, tmp_path: Path) -> None:
    state = torch.load(princeton, weights_only=True)
    name = "module.cnet.layer2.0.norm3.weight"
    for change, message in (
        ({name: state[name] + 1}, "must be stored once more, and alike, as 'cnet.layer2.0.downsample.1.weight'"),
        ({"module.more": torch.ones(1)}, "unknown: more"),
        ({"module.update_block.mask.2.bias": torch.ones(3)}, r"mask_predictor.conv.bias is \(3,\), not \(576,\)"),
    ):
        torch.save({**state, **change}, tmp_path / "raft-things.pth")
        with pytest.raises(RewardError, match=message):
            loaded(path=tmp_path)


def test_raft_that_is_not_there_says_where_it_comes_from() -> None:
    with pytest.raises(RewardError, match=r"not on the hub: download https://download\.pytorch\.org/models/raft_large"):
        loaded(path="raft-things.pth")


class Shifted(nn.Module):
    """A flow network that finds, of all pixels, the whole shift to the right that fits best; (N, 2, H, W)."""

    def forward(self, image1: Tensor, image2: Tensor, num_flow_updates: int) -> Sequence[Tensor]:
        """The shift that fits best, the same everywhere."""
        flows = []
        for first, second in zip(image1, image2, strict=True):
            fits = [float((first.roll(step, dims=2) - second).abs().mean()) for step in range(32)]
            flow = torch.zeros(2, *first.shape[1:])
            flow[0] = float(fits.index(min(fits)))
            flows.append(flow)
        return [torch.full_like(torch.stack(flows), 99.0), torch.stack(flows)]


def moving(frames: int, step: int, side: int = 128) -> Tensor:
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    return torch.stack([picture.roll(step * place, dims=2) for place in range(frames)])


def test_still_videos_are_not_dynamic_and_moving_ones_are() -> None:
    videos = torch.stack([moving(5, 0), moving(5, 20), moving(5, 3), moving(5, 4)])
    scores = score(loaded(Shifted()), videos)
    assert scores.values.tolist() == [0, 1, 0, 1]  # 3 pixels of 128 are the threshold, and not above it
    assert scores.details["speed"].tolist() == [0, 20, 3, 4]
    assert scores.details["share"].tolist() == [0, 1, 0, 1]
    assert scores.details["pairs"].tolist() == [4, 4, 4, 4]
    for frames in (3, 99):  # pairs at a time
        assert score(loaded(Shifted(), frames=frames), videos).details["speed"].tolist() == [0, 20, 3, 4]


def test_the_share_tells_more_videos_apart() -> None:
    stops = torch.cat([moving(3, 20), moving(3, 20)[-1:].expand(3, -1, -1, -1)])[None]  # two pairs of five move
    assert score(loaded(Shifted()), stops).values.tolist() == [1]
    shared = score(loaded(Shifted(), measure="share"), stops)
    torch.testing.assert_close(shared.values, torch.tensor([0.4]))


@pytest.mark.parametrize(
    ("fps", "pairs", "apart"),
    [(8.0, 8, 1), (16.0, 4, 2), (24.0, 2, 3), (20.0, 4, 2), (28.0, 2, 4), (3.0, 8, 1), (11.9, 8, 1)],
)
def test_about_8_frames_a_second_are_looked_at(fps: float, pairs: int, apart: int) -> None:
    scores = score(loaded(Shifted()), moving(9, 2)[None], fps)
    assert scores.details["pairs"].tolist() == [pairs]
    assert scores.details["speed"].tolist() == [2 * apart]


def by_vbenchs_loop(speeds: Sequence[float], height: int, width: int) -> bool:
    """The verdict as a loop that stops at the first pair by which enough have moved."""
    least, wanted, seen = 6 * min(height, width) / 256, round((len(speeds) + 1) / 4), 0
    for speed in speeds:
        seen += speed > least
        if seen >= wanted:
            return True
    return False


def test_verdicts_are_those_of_the_loop() -> None:
    source = torch.Generator().manual_seed(3)
    verdicts = []
    for count in range(40):
        for quick in (0.0, 0.1, 0.25, 0.3, 1.0):
            height = int(torch.randint(121, 600, (), generator=source))
            speeds = (torch.rand(count, generator=source) < quick) * 50.0
            found = judged(speeds, height, 300)
            assert found.dynamic == by_vbenchs_loop(speeds.tolist(), height, 300)
            verdicts.append(found.dynamic)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8
    assert judged(torch.zeros(1), 128, 128).dynamic  # of two frames no pair need move
    assert not judged(torch.zeros(2), 128, 128).dynamic
    assert not judged(torch.zeros(0), 128, 128).dynamic


def test_only_the_fastest_twentieth_counts() -> None:
    class Corner(nn.Module):
        def forward(self, image1: Tensor, image2: Tensor, num_flow_updates: int) -> Sequence[Tensor]:
            flow = torch.zeros(len(image1), 2, *image1.shape[2:])
            flow[:, :, :8, :64] = torch.tensor([3.0, -4.0])[None, :, None, None]  # 512 pixels of 128 x 128
            return [flow]

    scores = score(loaded(Corner()), moving(2, 0)[None])
    assert float(scores.details["speed"][0]) == pytest.approx(5 * 512 / 819, rel=1e-6)


def test_edges_are_repeated_half_before_and_half_behind() -> None:
    frames = torch.arange(2 * 3 * 5 * 13).float().view(2, 3, 5, 13)
    around = padded(frames, 8)
    assert around.shape == (2, 3, 8, 16)
    assert torch.equal(around[..., 1:6, 1:14], frames)
    assert torch.equal(around[..., 0, 1:14], frames[..., 0, :])
    assert torch.equal(around[..., 7, 1:14], frames[..., 4, :])
    assert torch.equal(around[..., 1:6, 15], frames[..., 12])
    assert torch.equal(unpadded(around, 5, 13, 8), frames)
    assert torch.equal(padded(around, 8), around)


def test_what_raft_cannot_see_is_not_scored() -> None:
    reward = loaded(Shifted())
    small = score(reward, torch.rand(2, 3, 3, 120, 200))
    assert not small.valid.any()
    assert small.reasons[0] == "frames of 200x120 are too small for RAFT; it needs 121 a side"
    assert score(reward, torch.rand(1, 2, 3, 121, 128)).valid.all()
    unknown = score(reward, moving(3, 20)[None], fps=None)
    assert unknown.reasons == {0: "the frame rate is not known, and the score depends on it; set clip_fps"}
    assert score(loaded(Shifted(), clip_fps=8), moving(3, 20)[None], fps=None).valid.all()


def test_a_small_one_sees_some_videos_move() -> None:
    videos = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    scores = score(loaded(), videos)
    assert scores.valid.all()
    assert ((scores.details["speed"] > 1) & (scores.details["speed"] < 9)).all()
    assert len(empty_raft(8).state_dict()) == 169
