"""RAFT (arXiv 2003.12039) with its weights in either published layout.

torchvision's `raft_large` is the network. Princeton's checkpoints, of which VBench uses raft-things.pth, name the same
tensors otherwise: each is found once in torchvision's layout, but for the third norm of a block that shrinks, which is
stored twice.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree_rewards.shared.weights import State, load_strictly, read_state_dict, renamed, without

WRAPPED = "module."  # what torch's DataParallel puts before every name
RENAMED = (  # applied one after the other, each to the name that the one before made
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"\.(layer\d\.\d)\.conv(\d)\.", r".\1.convnormrelu\2.0."),
    (r"\.(layer\d\.\d)\.norm(\d)\.", r".\1.convnormrelu\2.1."),
    (r"^update_block\.encoder\.conv([cf])(\d)\.", r"update_block.motion_encoder.conv\1\2.0."),
    (r"\.motion_encoder\.convc(\d)\.", r".motion_encoder.convcorr\1."),
    (r"\.motion_encoder\.convf(\d)\.", r".motion_encoder.convflow\1."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)
TWICE = re.compile(r"\.layer(\d)\.(\d)\.norm3\.")  # also stored as downsample.1


def torchvision_layout(state: Mapping[str, Tensor]) -> State:
    """Return RAFT's weights under torchvision's names, from either layout.

    Raises RewardError if a tensor that Princeton's layout stores twice differs from its copy.
    """
    if state and all(name.startswith(WRAPPED) for name in state):
        state = renamed(state, lambda name: name.removeprefix(WRAPPED))
    if not any(name.startswith("fnet.") for name in state):
        return dict(state)
    copies = [name for name in state if TWICE.search(name)]
    for name in copies:
        original = TWICE.sub(r".layer\1.\2.downsample.1.", name)
        if original not in state or not torch.equal(state[name], state[original]):
            raise RewardError(f"RAFT's '{name}' must be stored once more, and alike, as '{original}'")
    names = dict(zip(state, state, strict=True))
    for pattern, replacement in RENAMED:
        names = {old: re.sub(pattern, replacement, new) for old, new in names.items()}
    return renamed(without(state, copies), names.__getitem__)


def empty_raft(narrow: int = 1) -> nn.Module:
    """Return RAFT without storage for its weights; making it draws nothing from the global random state.

    All widths are the published ones divided by ``narrow``: 1 is torchvision's raft_large.
    """
    from torchvision.models.optical_flow import raft

    hidden, encoded = 128 // narrow, 256 // narrow
    layers = tuple(width // narrow for width in (64, 64, 96, 128, 256))
    with torch.device("meta"):
        correlation = raft.CorrBlock(num_levels=4, radius=4)
        motion = raft.MotionEncoder(
            in_channels_corr=correlation.out_channels,
            corr_layers=(256 // narrow, 192 // narrow),
            flow_layers=(128 // narrow, 64 // narrow),
            out_channels=hidden,
        )
        recurrent = raft.RecurrentBlock(
            input_size=motion.out_channels + encoded - hidden,
            hidden_size=hidden,
            kernel_size=((1, 5), (5, 1)),
            padding=((0, 2), (2, 0)),
        )
        head = raft.FlowHead(in_channels=hidden, hidden_size=encoded)
        network: nn.Module = raft.RAFT(
            feature_encoder=raft.FeatureEncoder(layers=layers, norm_layer=nn.InstanceNorm2d),
            context_encoder=raft.FeatureEncoder(layers=layers, norm_layer=nn.BatchNorm2d),
            corr_block=correlation,
            update_block=raft.UpdateBlock(motion_encoder=motion, recurrent_block=recurrent, flow_head=head),
            mask_predictor=raft.MaskPredictor(in_channels=hidden, hidden_size=encoded, multiplier=0.25),
        )
    return network


def load_raft(file: Path) -> nn.Module:
    """Return RAFT with the weights of ``file``, in float32 on the CPU. Raises RewardError if they do not fit."""
    state = torchvision_layout(read_state_dict(file))
    last = state.get("feature_encoder.conv.bias")
    network = empty_raft(256 // len(last) if last is not None and len(last) in {32, 64, 128} else 1)
    load_strictly(network, state, str(file))
    return network


@torch.no_grad()
def largest_motions(network: Callable[..., Sequence[Tensor]], pairs: tuple[Tensor, Tensor], updates: int) -> Tensor:
    """Return how fast the fastest twentieth of the pixels moves between two frames, in pixels: (N,).

    Args:
        network: Maps two images (N, 3, H, W) in [-1, 1] to the flows (N, 2, H, W) in pixels after each update.
        pairs: Frames (N, 3, H, W) from 0 to 255 and those that follow them, H and W multiples of 8.
        updates: How often RAFT refines its flow.
    """
    first, second = (2 * (frames / 255) - 1 for frames in pairs)
    flow = network(first, second, num_flow_updates=updates)[-1]
    lengths = flow.square().sum(dim=1).sqrt().flatten(1)
    return lengths.topk(int(lengths.shape[1] * 0.05), dim=1).values.mean(dim=1)
