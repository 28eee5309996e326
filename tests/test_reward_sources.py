"""What rewards with published weights share: finding and loading files, scales, pixels, and the base class."""

from __future__ import annotations

import hashlib
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from branchtree_rewards.shared.pixels import from_pil, shortest_side_crop, to_pil, to_rgb, to_uint8
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened
from branchtree_rewards.shared.scale import transform
from branchtree_rewards.shared.source import RANDOM_SMALL, locate_weights, verify
from branchtree_rewards.shared.weights import check_fit, load_strictly, read_weights, renamed, state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from branchtree.errors import RewardError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import Condition, Media

CPU = torch.device("cpu")


# --- scales ---


@pytest.mark.parametrize(
    ("scale", "raw", "value"),
    [
        ("raw", 22.7, 22.7),
        ("x100", 0.313, 31.3),
        ("x2.5", 2.0, 5.0),
        ("div26", 26.0, 1.0),
        ("mix(18,8)", 22.0, 0.5),
        ("mix( -1 , 2 )", 0.0, 0.5),
        ("clipscore", 0.3, 0.75),
        ("clipscore", -0.3, 0.0),
    ],
)
def test_scales(scale: str, raw: float, value: float) -> None:
    assert transform(scale)(torch.tensor([raw])).tolist() == pytest.approx([value])


@pytest.mark.parametrize("scale", ["", "x", "div0", "mix(1)", "mix(1,0)", "x-1", "sqrt", "raw100"])
def test_an_unknown_scale_is_refused_where_it_is_configured(scale: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="scale"):
        ModelRewardConfig(path="org/name", scale=scale)


# --- sources ---


def write_nothing(folder: Path) -> None:
    raise AssertionError("no small checkpoint was asked for")


def test_a_folder_gives_its_files_and_a_file_stands_for_the_weights(tmp_path: Path) -> None:
    (tmp_path / "b.bin").touch()
    (tmp_path / "config.json").touch()
    folder, file = (locate_weights(str(path), None, write_nothing) for path in (tmp_path, tmp_path / "b.bin"))
    assert folder.find("a.bin", "b.bin") == tmp_path / "b.bin"
    assert file.find("a.bin") == tmp_path / "b.bin"
    assert file.maybe("config.json") == tmp_path / "config.json"
    assert folder.maybe("a.bin") is None
    with pytest.raises(RewardError, match=r"holds no 'c\.bin'; did you mean 'b\.bin'"):
        folder.find("c.bin")


def test_a_small_checkpoint_is_written_when_asked_for_and_removed_at_the_end() -> None:
    program = """
from branchtree_rewards.shared.source import locate_weights
source = locate_weights("random:small", None, lambda folder: (folder / "w").touch())
assert source.find("w").is_file()
print(source.folder)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("branchtree-small-") and not folder.exists()


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~nobody-here/x", "justaword", "a/b/c", ""])
def test_a_path_that_is_nothing_says_what_would_be(path: str) -> None:
    with pytest.raises(RewardError, match="give a folder, a weights file, a hub id"):
        locate_weights(path, None, write_nothing)


def test_a_revision_belongs_to_a_hub_id(tmp_path: Path) -> None:
    assert locate_weights("org/name", "v1", write_nothing).revision == "v1"
    for path in (str(tmp_path), RANDOM_SMALL):
        with pytest.raises(RewardError, match="revision 'v1' belongs to a hub id"):
            locate_weights(path, "v1", write_nothing)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"cannot get files of 'org/nothing' from the hub .* give their folder"):
        locate_weights("org/nothing", None, write_nothing).find("weights.bin")


def test_digests(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("a", "b")}
    for name, file in files.items():
        file.write_bytes(name.encode() * 5_000_000)
    right = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert {name: file_sha256(file) for name, file in files.items()} == right
    verify(files, None)
    verify(files, {"b": right["b"].upper()})
    verify({"a": files["a"]}, right["a"])
    with pytest.raises(RewardError, match=r"'.*/a' has sha256 .* not the pinned 00"):
        verify(files, {"a": "00"})
    with pytest.raises(RewardError, match="names 'c', which is no weights file"):
        verify(files, {"c": right["a"]})
    with pytest.raises(RewardError, match="the weights are in a, b"):
        verify(files, right["a"])


# --- weights ---


class Trap:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_only_tensors_are_read(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0)}
    torch.save({"state_dict": weights}, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "w.safetensors")
    assert torch.equal(read_weights(tmp_path / "zip.pt")["state_dict"]["a"], weights["a"])
    for name in ("old.pt", "w.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], weights["a"])
    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "zip.pt").read_bytes()[:-200])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("trap.pt", "pickle.pt", "cut.pt", "empty.pt", "cut.safetensors", "missing.pt"):
        with pytest.raises(RewardError, match=f"cannot read weights from '.*{name}'"):
            read_weights(tmp_path / name)
    for content in ([weights["a"]], {"a": 1}):
        with pytest.raises(RewardError, match="holds no state dict"):
            state_dict(content, tmp_path / "zip.pt")


def test_weights_must_fit_exactly() -> None:
    module = nn.Linear(2, 3)
    right = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(module, right, "here")
    assert torch.equal(module.weight, right["weight"])
    wrong = {"weight": torch.ones(2, 2), "bios": torch.zeros(3), "b": torch.zeros(1)}
    with pytest.raises(RewardError) as told:
        check_fit(wrong, module.state_dict(), "here")
    assert str(told.value) == (
        "the weights of 'here' do not fit the model: 1 missing: bias; 2 unknown: b, bios; "
        "1 of another shape: weight is (2, 2), not (3, 2)"
    )
    with pytest.raises(RewardError, match="two tensors of the checkpoint come to the name 'x'"):
        renamed(right, lambda name: "x")


# --- pixels ---


@pytest.mark.parametrize("size", [(224, 224), (31, 97), (97, 31), (500, 301), (225, 224), (28, 28), (1024, 720)])
def test_the_crop_is_torchvisions_on_pictures(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    wanted = CenterCrop(28)(Resize(28, InterpolationMode.BICUBIC)(image))
    assert np.array_equal(np.asarray(shortest_side_crop(image, 28)), np.asarray(wanted))


def test_pixels_are_rounded_to_bytes() -> None:
    levels = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.0, 1.2])
    assert to_uint8(levels).tolist() == [0, 0, 0, 1, 254, 255, 255]
    pixels = torch.rand(2, 3, 4, 5)
    assert torch.equal(from_pil(to_pil(pixels)), to_uint8(pixels).float() / 255)


def test_pictures_have_three_channels() -> None:
    grey, alpha = torch.rand(1, 1, 2, 2), torch.rand(1, 4, 2, 2)
    assert torch.equal(to_rgb(grey), grey.repeat(1, 3, 1, 1))
    assert torch.equal(to_rgb(alpha), alpha[:, :3])
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        to_rgb(torch.rand(1, 2, 2, 2))


# --- the base class ---


class Brightness(ModelReward[ModelRewardConfig]):
    """The mean of a sample times one published weight."""

    def __init__(self, config: ModelRewardConfig) -> None:
        super().__init__(config)
        self.sizes: list[int] = []

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, write_nothing)
        network = nn.Linear(1, 1, bias=False)
        file = source.find("w.safetensors")
        load_strictly(network, read_weights(file), source.name)
        return Opened(network, {"w.safetensors": file})

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        self.sizes.append(len(media))
        values: Tensor = network(media.pixels.flatten(1).mean(dim=1, keepdim=True))[:, 0]
        values = values / torch.tensor([float(condition.prompt != "divide by zero") for condition in conditions])
        return Measured(values, {"double": values * 2})

    def _prompt_flaw(self, prompt: str) -> str | None:
        return "unscorable" if prompt == "refuse" else None


def brightness(folder: Path, weight: float = 2.0, **options: Any) -> Brightness:
    save_file({"weight": torch.tensor([[weight]])}, folder / "w.safetensors")
    reward = Brightness(ModelRewardConfig(path=str(folder), **options))
    reward.load(CPU)
    return reward


def media(*levels: float) -> Media:
    return Media(images=torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))


def test_scores_are_raw_scaled_masked_and_capped(tmp_path: Path) -> None:
    reward = brightness(tmp_path, scale="x10", batch=2)
    prompts = ["fine", "divide by zero", "fine", "refuse", "fine"]
    scores = reward.score(media(0.25, 0.5, math.nan, 0.5, 1.0), [Condition(prompt) for prompt in prompts])
    assert reward.sizes == [2, 1]
    assert scores.valid.tolist() == [True, False, False, False, True]
    assert scores.raw is not None and scores.raw[[0, 4]].tolist() == [0.5, 2.0]
    assert scores.values[[0, 4]].tolist() == [5.0, 20.0]
    assert scores.details["double"][[0, 4]].tolist() == [1.0, 4.0]
    assert scores.reasons == {
        1: "the model's score is not finite",
        2: "pixels are not finite",
        3: "unscorable",
    }


def test_the_fingerprint_is_of_weights_and_settings(tmp_path: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return brightness(tmp_path, **options).fingerprint()

    same = fingerprint()
    (tmp_path / "elsewhere").mkdir()
    assert brightness(tmp_path / "elsewhere").fingerprint() == same
    assert fingerprint(batch=3, offload=True) == same
    assert fingerprint(scale="x100") != same
    assert fingerprint(weight=3.0) != same


def test_a_pin_is_checked_when_loading(tmp_path: Path) -> None:
    right = brightness(tmp_path)
    pins: Mapping[str, Any] = {"right": file_sha256(tmp_path / "w.safetensors"), "wrong": "0" * 64}
    assert brightness(tmp_path, sha256=pins["right"]).fingerprint() == right.fingerprint()
    with pytest.raises(RewardError, match="it is another checkpoint"):
        brightness(tmp_path, sha256=pins["wrong"])


def test_a_reward_asked_to_leaves_the_device_when_idle(tmp_path: Path) -> None:
    """The device without memory stands in for a GPU: weights on it have no values, and neither have scores."""
    meta = torch.device("meta")
    save_file({"weight": torch.ones(1, 1)}, tmp_path / "w.safetensors")
    staying, leaving = (Brightness(ModelRewardConfig(path=str(tmp_path), offload=off)) for off in (False, True))
    staying.load(meta)
    leaving.load(meta)
    assert staying._require_opened().network.weight.device == meta
    assert leaving._require_opened().network.weight.device == CPU
    leaving.release()
    assert leaving._require_opened().network.weight.device == CPU


def test_misuse_is_told(tmp_path: Path) -> None:
    reward = brightness(tmp_path)
    with pytest.raises(ValueError, match="2 samples came with 1 conditions"):
        reward.score(media(0.1, 0.2), [Condition("a")])
    with pytest.raises(ValueError, match="scores image, not video"):
        reward.score(Media(videos=torch.zeros(1, 2, 3, 4, 4)), [Condition("a")])
    with pytest.raises(RuntimeError, match="was not loaded"):
        Brightness(ModelRewardConfig(path=str(tmp_path))).score(media(0.1), [Condition("a")])
