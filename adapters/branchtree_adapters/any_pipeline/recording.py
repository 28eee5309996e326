"""What a pipeline's own methods gave for a prompt, taken down leaf by leaf, and given back for a batch of rows.

A pipeline encodes prompts and prepares latents in methods whose names begin with ``encode_``, ``prepare_`` or
``generate_``. Everything that differs between prompts comes out of them. So the outermost call of each is recorded once
for each prompt, and replayed for a batch: tensors are concatenated along the axis that grew when the prompt was
recorded twice, and the state takes the place of the latents that the pipeline prepared.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from branchtree.errors import ModelError
from branchtree_adapters.any_pipeline.phantom import without_fakes, without_memory

PREFIXES = ("encode_", "prepare_", "generate_")
PREPARE_LATENTS, DRAW = "prepare_latents", "randn_tensor"
NOT_RECORDED = frozenset({"prepare_extra_step_kwargs"})

Output = tuple[str, int]
"""A method's name, and which of its calls."""
Leaf = tuple[str, int, int]
"""An output, and which of its leaves."""
Masked = Mapping[str, tuple[int, int]]
"""By a method's name, which of its leaves are tokens (rows, tokens, width), and which is the mask that is None if all
count."""
Around = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(method, the method itself, its arguments) -> what the pipeline gets."""


def recorded_methods(pipeline: type) -> list[str]:
    """Return the names of a pipeline's methods that are recorded, with the one that it gets if it lacks it."""
    names = [name for name in dir(pipeline) if name.startswith(PREFIXES) and name not in NOT_RECORDED]
    own = [name for name in names if callable(getattr(pipeline, name))]
    return [*own, PREPARE_LATENTS] if draws_in_call(pipeline) else own


def draws_in_call(pipeline: type) -> bool:
    """Whether a pipeline has no method that prepares latents, but draws them in its call by diffusers' function."""
    call: Any = pipeline.__call__
    return not hasattr(pipeline, PREPARE_LATENTS) and DRAW in inspect.unwrap(call).__code__.co_names


@dataclass
class Recording:
    """What the methods gave in one run, in order."""

    cast: torch.dtype | None = None  # of encodings, whose encoders may be of another precision than the denoiser
    given: Mapping[Leaf, Tensor] = field(default_factory=dict)  # instead of what methods give
    leaves: dict[Leaf, Any] = field(default_factory=dict)
    trees: dict[Output, TreeSpec] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def around(self, name: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method and take down what it gives, if there is a tensor in it."""
        output = without_fakes(own(*args, **kwargs))
        call = self._calls[name] = self._calls.get(name, -1) + 1
        leaves, tree = tree_flatten(output)
        if self.cast is not None and name.startswith("encode_"):
            leaves = [_floating(leaf, self.cast) for leaf in leaves]
        if name == PREPARE_LATENTS and isinstance(leaves[0], Tensor):
            # Images' come out of the VAE in its precision, and some pipelines draw noise in that of their encoder.
            dtype = torch.promote_types(leaves[0].dtype, self.cast or leaves[0].dtype)
            leaves = [_floating(leaf, dtype) for leaf in leaves]
        leaves = [self.given.get((name, call, i), without_memory(leaf)) for i, leaf in enumerate(leaves)]
        output = tree_unflatten(leaves, tree)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            self.trees[name, call] = tree
            self.leaves |= {(name, call, i): leaf for i, leaf in enumerate(leaves)}
        return output


def _floating(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class State:
    """Where one of the samples that are denoised comes from."""

    leaf: Leaf
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype
    index: Tensor | None = None  # of its numbers among those of the leaf's row; None: the leaf is the sample
    rest: Tensor | None = None  # of the leaf's other numbers, which are the prompt's own
    predicted: Tensor | None = None  # of its numbers among those of a prediction's row; None: they are the same

    def taken(self, value: Tensor) -> Tensor:
        """Return the sample's numbers in a leaf of one row."""
        return value.flatten() if self.index is None else value.flatten()[self.index.to(value.device)]

    def numbers(self, leaves: Mapping[Leaf, Any]) -> Tensor:
        """Return the sample's numbers among what methods gave for one row, in float64 on the CPU."""
        return self.taken(leaves[self.leaf].detach().cpu().double())

    def of_prediction(self, output: Tensor) -> Tensor:
        """Return what is predicted (B, *shape) of what the scheduler is given."""
        return output if self.predicted is None else output.flatten(1)[:, self.predicted.to(output.device)]

    def placed(self, sample: Tensor, own: Tensor | None, row: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Return the leaf of B rows of shape ``row`` with the samples in it, and ``own`` (B, rest) around them."""
        placed = sample.to(dtype or self.dtype, copy=True)  # some pipelines write into it
        if self.index is None or self.rest is None or own is None:
            return placed
        leaf = placed.new_empty(len(placed), row.numel())
        leaf[:, self.index.to(leaf.device)] = placed.flatten(1)
        leaf[:, self.rest.to(leaf.device)] = own.to(leaf)
        return leaf.reshape(len(placed), *row)


@dataclass(frozen=True)
class LeafLayout:
    """How a pipeline's leaves relate to rows: learnt from recordings of one prompt, of it twice, and of another."""

    trees: Mapping[Output, TreeSpec]
    axes: Mapping[Leaf, int | None]  # the batch axis of each tensor
    lists: frozenset[Output]  # outputs that hold a list with an entry for each prompt
    states: tuple[State, ...]
    rows: tuple[torch.Size, ...]  # the shapes of a row of the leaves that the states are put in
    common: Mapping[Leaf, Any]  # leaves that are the same for all prompts
    stored: tuple[Leaf, ...]  # leaves of a prompt's own
    masked: Masked  # outputs whose tokens may be padded
    ragged: bool  # whether prompts differ in the sizes of their leaves


@dataclass(frozen=True)
class Rules:
    """What recordings do not show of a pipeline's leaves."""

    ragged: bool = False  # prompts may differ in the sizes of their leaves though two of other lengths do not
    masked: Masked = field(default_factory=dict)  # outputs of tokens that the model takes padded
    by_rows: frozenset[Leaf] = frozenset()  # leaves whose first axis is rows though it does not grow with them


def learn_layout(
    one: Recording, two: Recording, other: Recording, states: tuple[State, ...], rules: Rules
) -> LeafLayout:
    """Learn a pipeline's layout from one prompt's recording, from the same prompt twice, and from another prompt's."""
    axes = {leaf: _grown_axis(value, two.leaves.get(leaf)) for leaf, value in one.leaves.items()}
    axes |= {leaf: 0 for leaf in rules.by_rows if leaf in one.leaves}
    lists = frozenset(output for output in one.trees if _count(one.leaves, output) != _count(two.leaves, output))
    taken = {state.leaf for state in states if state.index is None}
    partial = {state.leaf for state in states} - taken
    common = {
        leaf: value
        for leaf, value in one.leaves.items()
        if leaf not in taken | partial
        and leaf[:2] not in lists
        and axes[leaf] is None
        and _equal(value, other.leaves.get(leaf))
    }
    stored = tuple(leaf for leaf in one.leaves if leaf not in common and leaf not in taken)
    sizes = [[getattr(each.leaves.get(leaf), "shape", None) for leaf in stored] for each in (one, other)]
    unbatched = any(axes[leaf] is None and leaf[:2] not in lists for leaf in stored)
    rows = tuple(one.leaves[state.leaf].shape[1:] for state in states)
    ragged = rules.ragged or bool(rules.masked) or unbatched or sizes[0] != sizes[1]
    return LeafLayout(one.trees, axes, lists, states, rows, common, stored, rules.masked, ragged)


def _count(leaves: Mapping[Leaf, Any], output: Output) -> int:
    return sum(leaf[:2] == output for leaf in leaves)


def _grown_axis(one: Any, two: Any) -> int | None:
    """Return the axis along which a tensor doubled with the prompt; None if there is not exactly one."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.ndim != two.ndim:
        return None
    grown = [axis for axis in range(one.ndim) if one.shape[axis] and two.shape[axis] == 2 * one.shape[axis]]
    return grown[0] if len(grown) == 1 else None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.shape == other.shape
            and bool(torch.equal(one, other))
        )
    return bool(one == other)


def find_states(
    leaves: Mapping[Leaf, Any], samples: Sequence[Tensor], ask: Callable[[Leaf, Tensor], Sequence[Tensor]]
) -> tuple[State, ...]:
    """Return where the samples that the scheduler is given come from.

    Args:
        leaves: what the methods gave.
        samples: what the scheduler was given then.
        ask: what the scheduler is given if a leaf is replaced.

    Raises ModelError if no method gave them.
    """
    return tuple(_find_state(leaves, samples, k, ask) for k in range(len(samples)))


def _find_state(
    leaves: Mapping[Leaf, Any],
    samples: Sequence[Tensor],
    which: int,
    ask: Callable[[Leaf, Tensor], Sequence[Tensor]],
) -> State:
    """Return the leaf that is the sample, or begins with it along one axis, or has its numbers elsewhere."""
    sample = samples[which]
    tensors = {leaf: value for leaf, value in leaves.items() if isinstance(value, Tensor)}
    shape = tuple(sample.shape[1:])
    for leaf, value in tensors.items():
        if value.shape == sample.shape and torch.equal(value.float(), sample.float()):
            return State(leaf, shape, value.dtype)
    for leaf, value in tensors.items():
        index = _prefix(value, sample)
        if index is not None:
            return _state_within(leaf, value, shape, index)
    latents = [leaf for leaf in tensors if leaf[0].startswith("prepare_") and "latents" in leaf[0]]
    for leaf in latents:
        value = tensors[leaf]
        if not value.is_floating_point() or value.numel() <= sample.numel() or value.numel() > 2**24:
            continue
        numbers = torch.arange(value.numel(), device=value.device).reshape(value.shape)
        found = ask(leaf, numbers.to(value.dtype))[which].detach().cpu().double().flatten()
        index = found.long()
        if torch.equal(index.double(), found) and len(index.unique()) == len(index):
            return _state_within(leaf, value, shape, index)
    raise ModelError(
        "no method of the pipeline returned the latents that its scheduler is given, so that they cannot be set; "
        "no setting changes that: choose another pipeline class for the model, or report this one"
    )


def _prefix(value: Tensor, sample: Tensor) -> Tensor | None:
    """Return the index of a sample's numbers in a leaf that begins with it along one axis; None if it does not."""
    if value.ndim != sample.ndim:
        return None
    differing = [axis for axis in range(value.ndim) if value.shape[axis] != sample.shape[axis]]
    if len(differing) != 1 or value.shape[differing[0]] < sample.shape[differing[0]]:
        return None
    axis, size = differing[0], sample.shape[differing[0]]
    if not torch.equal(value.narrow(axis, 0, size).float(), sample.float()):
        return None
    return torch.arange(value.numel()).reshape(value.shape).narrow(axis, 0, size).flatten()


def _state_within(leaf: Leaf, value: Tensor, shape: tuple[int, ...], index: Tensor) -> State:
    others = torch.ones(value.numel(), dtype=torch.bool)
    others[index] = False
    return State(leaf, shape, value.dtype, index, torch.nonzero(others)[:, 0])


def without_given(state: State, denoised: Tensor) -> State:
    """Return a state without the numbers that are given: those where ``denoised``, as one row of the leaf, is zero."""
    leaf = torch.empty(1, *state.shape, dtype=state.dtype)
    index = torch.nonzero(denoised.expand(leaf.shape).flatten())[:, 0]
    return replace(_state_within(state.leaf, leaf, (len(index),), index), predicted=index)


# A prompt's own leaves as tensors that the library stores


SHAPES, GROUP = "shapes", "group"


def pack(recording: Recording, layout: LeafLayout, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a prompt's own leaves by name, each with a first axis of 1, and the sizes of its images.

    Where prompts differ in sizes, also the leaves' shapes, and a number that prompts share that can share a call.
    Raises ModelError if the recording has other leaves than the layout, or an own leaf that is not a tensor.
    """
    if recording.trees.keys() != layout.trees.keys():
        raise ModelError("the pipeline calls other methods for this prompt than for others")
    rests = {state.leaf: state.rest for state in layout.states if state.rest is not None}
    values = [recording.leaves.get(leaf) for leaf in layout.stored]
    values = [
        value.flatten()[rests[leaf].to(value.device)][None] if leaf in rests and isinstance(value, Tensor) else value
        for leaf, value in zip(layout.stored, values, strict=True)
    ]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values):
        odd = next(leaf for leaf, value in zip(layout.stored, values, strict=True) if not isinstance(value, Tensor))
        raise ModelError(
            f"{odd[0]} of the pipeline gave something for this prompt that is no tensor, and not for others"
        )
    packed = {_name(leaf): value[None].cpu() for leaf, value in zip(layout.stored, tensors, strict=True)}
    packed |= images
    if layout.ragged:
        packed[SHAPES] = torch.tensor([[size for value in tensors for size in value.shape]])
        packed[GROUP] = torch.tensor([[_group(layout, tensors, images)]])
    return packed


def _name(leaf: Leaf) -> str:
    return ".".join(map(str, leaf))


def _group(layout: LeafLayout, values: Sequence[Tensor], images: Mapping[str, Tensor]) -> int:
    """Return a number that is the same for prompts whose leaves can be concatenated."""
    content = hashlib.blake2b(repr([(name, sizes.tolist()) for name, sizes in images.items()]).encode(), digest_size=7)
    for leaf, value in zip(layout.stored, values, strict=True):
        if leaf[:2] in layout.lists or leaf[0] in layout.masked:
            continue
        content.update(f"{leaf} {tuple(value.shape)}".encode())
        if layout.axes[leaf] is None:
            content.update(value.detach().cpu().float().numpy().tobytes())
    return int.from_bytes(content.digest(), "little")


def groups(packed: Mapping[str, Tensor]) -> list[Tensor] | None:
    """Return the rows (B,) that can share a call, group by group; None where all can."""
    if GROUP not in packed or len(packed[GROUP]) == 1:
        return None
    numbers = packed[GROUP].flatten().cpu()
    kinds = numbers.unique()
    return None if len(kinds) == 1 else [torch.nonzero(numbers == kind)[:, 0] for kind in kinds]


def unpack(packed: Mapping[str, Tensor], layout: LeafLayout, count: int) -> list[dict[Leaf, Tensor]]:
    """Return the own leaves of ``count`` rows, in their own sizes."""
    rows = [{leaf: packed[_name(leaf)][row] for leaf in layout.stored} for row in range(count)]
    if SHAPES in packed:
        for leaves, shapes in zip(rows, packed[SHAPES].tolist(), strict=True):
            sizes = iter(shapes)
            for leaf, value in leaves.items():
                leaves[leaf] = value[tuple(slice(size) for size in itertools.islice(sizes, value.ndim))]
    return rows


class Replay:
    """Gives a pipeline what its methods gave for B prompts, and the state in place of its latents."""

    def __init__(
        self,
        layout: LeafLayout,
        packed: Mapping[str, Tensor],
        states: Sequence[Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            layout: of the pipeline.
            packed: B rows of encodings that can share a call.
            states: one sample (B, ...) each.
            dtype: of states; None: as the latents that were recorded.
        """
        self._layout = layout
        count = len(states[0])
        self._rows = unpack(packed, layout, count) if SHAPES in packed else None
        self._packed, self._calls = packed, dict[str, int]()
        self._states = {
            state.leaf: state.placed(value, None if state.rest is None else self._own(state.leaf), row, dtype)
            for state, row, value in zip(layout.states, layout.rows, states, strict=True)
        }

    def around(self, name: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a method gave for these rows; methods without tensors are called."""
        call = self._calls[name] = self._calls.get(name, -1) + 1
        tree = self._layout.trees.get((name, call))
        if tree is None:
            return own(*args, **kwargs)
        if (name, call) in self._layout.lists:
            return self._listed((name, call), tree)
        leaves = [self._leaf((name, call, i)) for i in range(tree.num_leaves)]
        if name in self._layout.masked:
            tokens, mask = self._layout.masked[name]
            leaves[mask] = self._mask((name, call, tokens))
        return tree_unflatten(leaves, tree)

    def _mask(self, leaf: Leaf) -> Tensor | None:
        """Return which tokens (B, tokens) are not padding; None: all."""
        lengths = [row[leaf].shape[1] for row in self._rows or ()]
        if len(set(lengths)) <= 1:
            return None
        tokens = self._packed[_name(leaf)]
        return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).to(tokens.device, torch.long)

    def _leaf(self, leaf: Leaf) -> Any:
        if leaf in self._states:
            return self._states[leaf]
        if leaf in self._layout.common:
            return self._layout.common[leaf]
        return self._own(leaf)

    def _own(self, leaf: Leaf) -> Tensor:
        axis = self._layout.axes[leaf]
        values = list(self._packed[_name(leaf)]) if self._rows is None else [row[leaf] for row in self._rows]
        within = any(state.leaf == leaf for state in self._layout.states)
        axis = 0 if within else axis
        if leaf[0] in self._layout.masked and axis == 0 and len({value.shape for value in values}) > 1:
            return pad_sequence([value[0] for value in values], batch_first=True)
        return values[0] if axis is None else torch.cat(values, axis)

    def _listed(self, output: Output, tree: TreeSpec) -> Any:
        count = len(next(iter(self._states.values())))
        rows = self._rows or unpack(self._packed, self._layout, count)
        trees = [tree_unflatten([row[*output, i] for i in range(tree.num_leaves)], tree) for row in rows]
        return _concatenated(trees)


def _concatenated(trees: Sequence[Any]) -> Any:
    """Join outputs of one prompt each: lists end to end, tensors along their first axis."""
    first = trees[0]
    if isinstance(first, list):
        return [entry for tree in trees for entry in tree]
    if isinstance(first, tuple):
        return tuple(_concatenated(entries) for entries in zip(*trees, strict=True))
    return torch.cat(list(trees)) if isinstance(first, Tensor) else first
