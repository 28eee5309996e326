"""One step of a pipeline's own ``__call__`` as a prediction, its first lines as an encoder, its last as a decoder."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from branchtree.core.padding import pad_together
from branchtree.errors import ModelError, shortened
from branchtree.plugins.quantized import QuantizedLinear
from branchtree_adapters.any_pipeline.asking import Asked, Way, listed_prompts, ways
from branchtree_adapters.any_pipeline.clock import Clock, flow_clock, noise_clock, predicted
from branchtree_adapters.any_pipeline.draws import Draw, find_draws
from branchtree_adapters.any_pipeline.families import Family, family_of
from branchtree_adapters.any_pipeline.images import blank_images, image_sizes, inverted_images
from branchtree_adapters.any_pipeline.recording import (
    DRAW,
    PREPARE_LATENTS,
    Around,
    Leaf,
    LeafLayout,
    Recording,
    Replay,
    Rules,
    draws_in_call,
    find_states,
    groups,
    learn_layout,
    pack,
    recorded_methods,
    without_given,
)
from branchtree_adapters.any_pipeline.schedulers import GridReader, StepKeeper, StepRequest, StopCall, stand_in
from branchtree_adapters.any_pipeline.substitutes import (
    Silent,
    Wrapped,
    casting,
    rows_of_call,
    stopping,
    taking,
    without_weights,
)
from branchtree_adapters.any_pipeline.times import MixedRowsError, row_sigmas, row_times
from branchtree_adapters.pipeline.denoisers import DENOISERS

FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""Where torch writes of operations on shapes that fail, as some are expected to."""
TABLE_STEPS = 8
"""Steps of the grid by which a pipeline's times are compared with its noise levels."""
COMPARED = ((0.8, 0.3), (0.3, 0.2))
"""Pairs of noise levels of which one at least is on one side of any boundary between denoisers."""
ENDS = (0.999, 0.001)
"""Noise levels on both sides of any boundary."""


@functools.cache
def _quick_class(pipeline: type) -> type:
    """Return a subclass that is given its device and has no hooks to free: either would walk through every module."""
    members: dict[str, Any] = {
        "_execution_device": property(lambda self: self.__dict__["run_device"]),
        "maybe_free_model_hooks": lambda self: None,
        "__module__": pipeline.__module__,
    }
    if draws_in_call(pipeline):
        members[PREPARE_LATENTS] = staticmethod(inspect.unwrap(pipeline.__call__).__globals__[DRAW])
    return type(pipeline.__name__, (pipeline,), members)


class PipelineDriver:
    """Drives a loaded flow-matching or noise-predicting pipeline.

    Args:
        pipeline: of diffusers.
        call: keywords of its ``__call__``, such as sizes and guidance.
        device: where the denoiser is.
        family: what is particular to the pipeline; None: what is known of its class.

    Raises ModelError if the pipeline's settings make a prediction depend on the step's number.
    """

    def __init__(
        self, pipeline: Any, call: Mapping[str, Any], device: torch.device, family: Family | None = None
    ) -> None:
        self._pipeline, self._call, self._device = pipeline, dict(call), device
        self._family = family or family_of(type(pipeline))
        self._family.check(pipeline, self._call)
        pipeline.set_progress_bar_config(disable=True)
        self._function: Callable[..., Any] = inspect.unwrap(type(pipeline).__call__)  # without its no_grad
        self._takes = inspect.signature(self._function).parameters
        self._methods = recorded_methods(type(pipeline))
        self._encoders = without_weights(pipeline)
        config = pipeline.scheduler.config
        self._train_steps: int = config.get("num_train_timesteps", 1000)
        self._inverted = bool(config.get("invert_sigmas", False))
        self.prediction = predicted(config)
        """What the denoiser predicts, in the library's words."""
        self._way: Way = listed_prompts
        self._alone = False  # whether each row has a call of its own
        self._silent: Mapping[str, Any] = {}  # denoisers that give zeros, where decoding takes a step
        self._rows_share_a_call: bool | None = None  # though their times differ; learnt at the first such rows
        self._learnt: LeafLayout | None = None
        self._draws: list[Draw] = []
        self._clock: Clock
        self.rows_per_prediction = 1
        """Rows through the denoiser for each row predicted."""
        self.example: Mapping[str, Tensor] = {}
        """The encodings of the prompt by which the layout was learnt, one row."""
        self.unused: Mapping[str, Set[str]] = {}
        """Names of parameters without effect, by denoiser; see ``find_unused``."""
        self._asked: Asked | None = None

    # Running the pipeline

    @contextmanager
    def _playing(self, kind: type[StepKeeper | GridReader], question: StepRequest, around: Around) -> Iterator[Any]:
        """A shallow copy of the pipeline, with a stand-in scheduler and its methods replaced on the copy alone."""
        pipeline = copy.copy(self._pipeline)
        own_class: Any = type(pipeline)  # mypy takes no class for hashable
        pipeline.__class__ = _quick_class(own_class)
        pipeline.__dict__["run_device"] = self._device
        pipeline.__dict__["vae"] = casting(self._pipeline.vae)
        dropped = {name: each for name, each in self._encoders.items() if getattr(pipeline, name) is None}
        pipeline.__dict__.update(dropped)
        pipeline.__dict__["scheduler"] = stand_in(self._pipeline.scheduler, kind, question)
        inside = False

        def replaced(name: str) -> Callable[..., Any]:
            own = getattr(pipeline, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside:
                    return own(*args, **kwargs)
                inside = True
                try:
                    return around(name, own, args, kwargs)
                finally:
                    inside = False

            return call

        pipeline.__dict__.update({name: replaced(name) for name in self._methods})
        try:
            yield pipeline
        finally:
            pipeline.__dict__.clear()  # it refers to itself, and would keep predictions and their graphs in memory

    def _run(
        self,
        kind: type[StepKeeper | GridReader],
        question: StepRequest,
        around: Around,
        asked: Asked,
        rows: int = 1,
        components: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Any:
        if "negative_prompt" not in self._takes:
            asked = replace(asked, negative_prompt=None)
        call = {
            "generator": torch.Generator().manual_seed(0),  # never torch's own random state
            "num_inference_steps": TABLE_STEPS,
            "return_dict": False,
            **self._call,
            **self._way(asked, rows),
            **keywords,
        }
        with self._playing(kind, question, around) as pipeline:
            pipeline.__dict__.update(components or {})
            try:
                return self._function_of(pipeline)(pipeline, **call)
            except StopCall:
                return None

    def _function_of(self, pipeline: Any) -> Callable[..., Any]:
        """Return the call; where it draws its latents itself, one that gets them of the copy's replaced method."""
        if not draws_in_call(type(self._pipeline)):
            return self._function
        names = {**self._function.__globals__, DRAW: getattr(pipeline, PREPARE_LATENTS)}
        own: Any = self._function
        call = FunctionType(own.__code__, names, None, own.__defaults__, own.__closure__)
        call.__kwdefaults__ = own.__kwdefaults__
        return call

    # Encoding

    @torch.no_grad()
    def _record(
        self,
        asked: Asked,
        copies: int = 1,
        denoisers: Mapping[str, Any] | None = None,
        given: Mapping[Leaf, Tensor] | None = None,
    ) -> tuple[Recording, StepRequest]:
        """Take down what methods give before a denoiser is first called, or in the whole call of some denoisers."""
        question = self._noisiest()
        recording = Recording(self._pipeline_dtype, given or {})
        stops = {name: stopping(module) for name, module in self.denoisers.items()}
        self._run(StepKeeper, question, recording.around, asked, copies, denoisers or stops, output_type="latent")
        return recording, question

    def _noisiest(self) -> StepRequest:
        """Return a request for a step at the noisiest level."""
        ones = torch.ones(2, device=self._device)
        return StepRequest(ones[:1] * self._train_steps, ones)

    @property
    def _pipeline_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def _is_weightless(self) -> bool:
        """Whether the denoiser computes shapes alone."""
        return isinstance(next(self.denoiser.parameters(), None), FakeTensor)

    @property
    def pipeline(self) -> Any:
        """The pipeline that is driven."""
        return self._pipeline

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The pipeline's modules that denoise, by name."""
        found = {name: getattr(self._pipeline, name, None) for name in DENOISERS}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def denoiser(self) -> Any:
        """The first of the modules that denoise."""
        return next(iter(self.denoisers.values()))

    def learn(self, asked: Asked, other: Asked) -> None:
        """Learn the pipeline's layout from two prompts of different lengths. Raises ModelError if it has none."""
        try:
            self._learn(asked, other)
        except (ModelError, NotImplementedError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # pipelines have exceptions of their own for what they are not given
            what = "" if asked.extra else ", images among them"
            raise ModelError(
                f"{type(self._pipeline).__name__} cannot be run for one step ({type(error).__name__}: "
                f"{shortened(' '.join(str(error).split()))}); look whether it lacks a keyword under model.call{what}, "
                f"or has one that does not suit it"
            ) from error

    def _learn(self, asked: Asked, other: Asked) -> None:
        if asked.extra == other.extra:  # what follows from an image would pass for the same for all prompts
            other = replace(other, extra=inverted_images(other.extra))
        two = self._record_twice(asked)
        one, _ = self._record(asked)
        silent = {name: Silent(module) for name, module in self.denoisers.items()}
        denoisers = {name: Wrapped(silent[name], module) for name, module in self.denoisers.items()}
        with rows_of_calls(self.denoisers.values()) as calls:
            _, question = self._record(asked, denoisers=denoisers)
        for each in silent.values():
            each.silenced = True
        self.rows_per_prediction = sum(calls)
        third, _ = self._record(other)

        def ask(leaf: Leaf, value: Tensor) -> Sequence[Tensor]:
            return self._record(asked, denoisers=denoisers, given={leaf: value})[1].samples

        states = find_states(one.leaves, question.samples, ask)
        if self._family.denoised in one.leaves:
            states = (without_given(states[0], one.leaves[self._family.denoised].cpu()), *states[1:])
        rules = self._family.rules
        rules = replace(rules, ragged=rules.ragged or bool(image_sizes(asked.extra)))
        self._learnt = learn_layout(one, two, third, states, rules)
        self._asked = asked
        self._draws = find_draws(states, lambda: self._record(asked)[0].leaves, type(self._pipeline))
        if self.prediction == "velocity":
            fine = partial(self._own_grid, self._train_steps)
            self._clock = flow_clock(self._train_steps, self._own_grid(TABLE_STEPS), fine)
        else:
            self._clock = noise_clock(self._pipeline.scheduler)
        if self._way is not listed_prompts and self._family.copies is None:
            self._find_rows(one, partial(learn_layout, one, two, third, states), rules, [asked, asked, other])
        self.example = pack(one, self.layout, image_sizes(asked.extra))
        self._silent = denoisers if self._needs_step(denoisers) else {}

    def _record_twice(self, asked: Asked) -> Recording:
        """Record two samples of a prompt in the first way that the pipeline takes; one, where it takes none."""
        candidates = ways(self._takes, self._family.copies, asked)
        for way in candidates[:-1]:
            self._way = way
            try:
                return self._record(asked, copies=2)[0]
            except torch.OutOfMemoryError:
                raise
            except Exception:  # pipelines have many exceptions for arguments that they do not take
                continue
        self._way = candidates[-1]
        return self._record(asked, copies=2)[0]

    def _find_rows(
        self, one: Recording, layout: Callable[[Rules], LeafLayout], rules: Rules, asked: Sequence[Asked]
    ) -> None:
        """Find, by predictions, which leaves have rows of prompts though they did not double with the prompt.

        Where rows in one call are not what they are alone, each has a call of its own from then on.
        """
        axes = self.layout.axes
        single = {leaf for leaf in self.layout.stored if axes[leaf] is None and one.leaves[leaf].shape[:1] == (1,)}
        for by_rows in ([rules.by_rows | single] if single else []) + [rules.by_rows]:
            self._learnt = layout(replace(rules, by_rows=by_rows))
            if self._rows_agree([self.encode(each) for each in asked]):
                return
        self._alone = True

    @torch.no_grad()
    def _rows_agree(self, encoded: Sequence[Mapping[str, Tensor]]) -> bool:
        """Return whether prompts' predictions in one batch are what they are alone."""
        state, sigma = self._noises(len(encoded)), torch.full((len(encoded),), 0.5, device=self._device)
        packed = {name: pad_together([row[name][0] for row in encoded]).to(self._device) for name in encoded[0]}
        was, FAKE_LOG.disabled = FAKE_LOG.disabled, True
        try:
            together = self.predict(state, sigma, packed)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the pipeline's or the model's code, for rows that it does not take
            return False
        finally:
            FAKE_LOG.disabled = was
        if self._is_weightless:
            return True
        rows = torch.arange(len(encoded)).split(1)
        alone = torch.cat([self.predict(state[row], sigma[row], _rows(packed, row)) for row in rows])
        return torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))

    @property
    def layout(self) -> LeafLayout:
        """What was learnt. Raises ModelError before ``learn``."""
        if self._learnt is None:
            raise ModelError("the pipeline's layout is not known yet")
        return self._learnt

    @property
    def _first(self) -> Asked:
        assert self._asked is not None
        return self._asked

    def _blank(self, packed: Mapping[str, Tensor]) -> Asked:
        """Return a prompt for the pipeline to run through while its methods are replayed."""
        return replace(self._first, extra=blank_images(self._first.extra, packed))

    def compare_levels(self) -> None:
        """Find out, by a few predictions, whether rows of different noise levels can share a call."""
        if self._alone:
            return
        state, twice = self._example_rows(2)
        for levels in COMPARED:
            self._rows_share_a_call = self._try_mixed(state, torch.tensor(levels, device=self._device), twice)
            if self._rows_share_a_call is not None:
                return

    def _noises(self, count: int) -> Tensor:
        """Return some rows of noise (B, *state) on the device."""
        rows = [self.noise(torch.Generator().manual_seed(row)) for row in range(count)]
        return torch.stack(rows).to(self._device)

    def _example_rows(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return some rows of noise, and as many of the example's encodings."""
        rows = {name: value.expand(count, *value.shape[1:]) for name, value in self.example.items()}
        return self._noises(count), {name: value.to(self._device) for name, value in rows.items()}

    @torch.enable_grad()
    def trace(self) -> list[Tensor]:
        """Return predictions of the example in which all denoisers work, with graphs whose tensors are not kept."""
        state, packed = self._example_rows(1)
        levels = torch.tensor(ENDS[: len(self.denoisers)], device=self._device)
        with saved_tensors_hooks(lambda _: torch.empty(0), lambda nothing: nothing):
            return [self.predict(state, level, packed) for level in levels.split(1)]

    def find_unused(self) -> None:
        """Find the parameters on which no prediction of the example depends."""
        parameters = {id(each): each for module in self.denoisers.values() for each in module.parameters()}
        trained = {key: each.requires_grad for key, each in parameters.items()}
        try:
            for each in parameters.values():
                each.requires_grad_(each.is_floating_point())
            used = {id(leaf) for predicted in self.trace() for leaf in leaves_of(predicted)}
        finally:
            for key, each in parameters.items():
                each.requires_grad_(trained[key])
        layers = [layer for module in self.denoisers.values() for layer in module.modules()]
        for layer in (layer for layer in layers if isinstance(layer, QuantizedLinear)):
            own = {id(each) for each in layer.parameters()}  # of which codes are in no graph
            used |= own if own & used else set()
        self.unused = {
            name: {key for key, value in module.named_parameters() if id(value) not in used}
            for name, module in self.denoisers.items()
        }

    def absent_levels(self, sigma: Tensor) -> Tensor:
        """Return noise levels at which denoisers are called that none of the rows at ``sigma`` (B,) calls."""
        boundary = self._pipeline.config.get("boundary_ratio")
        if boundary is None or len(self.denoisers) == 1:
            return sigma[:0]
        high = self._clock.time(sigma) >= boundary * self._train_steps
        return sigma.new_tensor(ENDS)[torch.stack([~high.any(), high.all()])]

    def encode(self, asked: Asked) -> dict[str, Tensor]:
        """Return a prompt's encodings by name, each with a first axis of 1, on the CPU."""
        recording, _ = self._record(asked)
        return pack(recording, self.layout, image_sizes(asked.extra))

    # The state: one tensor, also of a model with two samples

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        shapes = [state.shape for state in self.layout.states]
        return shapes[0] if len(shapes) == 1 else (sum(torch.Size(shape).numel() for shape in shapes),)

    def _joined(self, samples: Sequence[Tensor]) -> Tensor:
        return samples[0] if len(samples) == 1 else torch.cat([sample.flatten(1) for sample in samples], 1)

    def _samples(self, state: Tensor) -> list[Tensor]:
        shapes = [state_.shape for state_ in self.layout.states]
        if len(shapes) == 1:
            return [state]
        pieces = state.split([torch.Size(shape).numel() for shape in shapes], 1)
        return [piece.reshape(len(state), *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def noise(self, generator: torch.Generator) -> Tensor:
        """Draw one sample's starting noise (*state), float32 on the CPU, as the pipeline lays it out."""
        return self._joined([draw.sample(generator)[None] for draw in self._draws])[0]

    # The grid

    def grid(self, steps: int) -> Tensor:
        """Return the noise levels (steps + 1,) of the pipeline's own schedule, from at most 1 to 0."""
        levels = self._clock.levels(*self._own_grid(steps))
        return 1 - levels if self._inverted else levels

    @torch.no_grad()
    def _own_grid(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the times and sigmas that the pipeline's scheduler takes in a run."""
        question, asked, around = StepRequest(), self._first, Recording(self._pipeline_dtype).around
        if self.example:  # encoders may have left the device since
            state, packed = self._example_rows(1)
            asked, around = self._blank(packed), Replay(self.layout, packed, self._samples(state)).around
        self._run(GridReader, question, around, asked, num_inference_steps=steps)
        assert question.grid is not None
        return question.grid

    # Predicting and decoding

    def predict(
        self, state: Tensor, sigma: Tensor, packed: Mapping[str, Tensor], components: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return what the pipeline gives its scheduler, (B, *state), float32, after guidance.

        Args:
            state: (B, *state).
            sigma: (B,) noise levels.
            packed: B rows of encodings.
            components: of the pipeline, by name, to use in place of its own.
        """
        kinds = self._groups(packed)
        if kinds is None:
            return self._predict_levels(state, sigma, packed, components)
        self._require_whole_weights(components, "prompts or images of different sizes")
        return _in_order(
            [(rows, self._predict_levels(state[rows], sigma[rows], _rows(packed, rows), components)) for rows in kinds]
        )

    def _groups(self, packed: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Return the rows that can share a call, group by group; None where all can."""
        count = len(next(iter(packed.values())))
        return list(torch.arange(count).split(1)) if self._alone and count > 1 else groups(packed)

    def _predict_levels(
        self, state: Tensor, sigma: Tensor, packed: Mapping[str, Tensor], components: Mapping[str, Any] | None
    ) -> Tensor:
        """Predict for rows of one shape, in one call where the pipeline's model can take a time for each row.

        Where it can, the host asks nothing of the device.
        """
        if len(sigma) == 1:
            return self._once(state, sigma, packed, components, mixed=False)
        if self._rows_share_a_call:
            try:
                return self._once(state, sigma, packed, components, mixed=True)
            except MixedRowsError as question:
                masks = [question.answer, ~question.answer]
        else:
            levels = sigma.unique()
            if len(levels) == 1:
                return self._once(state, sigma, packed, components, mixed=False)
            if self._rows_share_a_call is None:
                self._rows_share_a_call = self._try_mixed(state, sigma, packed)
                if self._rows_share_a_call:
                    return self._predict_levels(state, sigma, packed, components)
            self._require_whole_weights(components, "different noise levels")
            masks = [sigma == level for level in levels]
        found = []
        for mask in masks:
            rows = torch.nonzero(mask)[:, 0]
            found.append((rows, self._predict_levels(state[rows], sigma[rows], _rows(packed, rows), components)))
        return _in_order(found)

    def _require_whole_weights(self, components: Mapping[str, Any] | None, rows: str) -> None:
        """Raise ModelError before calls whose number other processes, which must gather weights too, do not know."""
        if any(isinstance(each, Wrapped) and each.sharded for each in (components or {}).values()):
            raise ModelError(
                f"{type(self._pipeline).__name__} needs a call each for rows of {rows}, so that processes would wait "
                "for each other's weights for ever under FSDP2; train under DDP, with lora if memory is short"
            )

    def _once(
        self,
        state: Tensor,
        sigma: Tensor,
        packed: Mapping[str, Tensor],
        components: Mapping[str, Any] | None,
        *,
        mixed: bool,
    ) -> Tensor:
        """Run the pipeline for one step."""
        level = 1 - sigma if self._inverted else sigma
        if mixed:
            ndim = max(len(each.shape) for each in self.layout.states)
            question = StepRequest(row_times(self._clock.time(level)), row_sigmas(level, ndim))
        else:
            question = StepRequest(self._clock.time(level[:1]), level[:1].repeat(2))
        replay = Replay(self.layout, packed, self._samples(state))
        asked = self._blank(packed)
        self._run(StepKeeper, question, replay.around, asked, len(state), components, output_type="latent")
        outputs = zip(self.layout.states, question.outputs, strict=True)
        output = self._joined([state.of_prediction(each.float()) for state, each in outputs])
        return -output if self._inverted else output

    @torch.no_grad()
    def _try_mixed(self, state: Tensor, sigma: Tensor, packed: Mapping[str, Tensor]) -> bool | None:
        """Return whether one call with a time for each row gives what a call for each level gives; None: not known."""
        try:
            together = self._once(state, sigma, packed, None, mixed=True)
        except MixedRowsError as question:
            for mask in (question.answer, ~question.answer):
                rows = torch.nonzero(mask)[:, 0]
                if len(sigma[rows].unique()) > 1:
                    return self._try_mixed(state[rows], sigma[rows], _rows(packed, rows))
            return None
        except (TypeError, ValueError, RuntimeError):  # its code makes one number of the time
            return False
        for level in sigma.unique():
            mask = sigma == level
            alone = self._once(state, level.expand(len(state)), packed, None, mixed=False)
            scale = float(alone.abs().max())
            if not torch.allclose(alone[mask], together[mask], rtol=1e-3, atol=1e-4 * scale):
                return False
        return True

    @torch.no_grad()
    def decode(self, state: Tensor, packed: Mapping[str, Tensor]) -> Any:
        """Return what the pipeline makes of clean states (B, *state) after its loop, as a tensor with B first."""
        kinds = self._groups(packed)
        if kinds is not None:
            return _in_order([(rows, self.decode(state[rows], _rows(packed, rows))) for rows in kinds])
        if self._family.decodes_singly and len(state) > 1:
            rows = torch.arange(len(state)).split(1)
            return torch.cat([self.decode(state[row], _rows(packed, row)) for row in rows])
        return self._leave_loop(state, packed, self._silent)[0]

    def _leave_loop(self, state: Tensor, packed: Mapping[str, Tensor], components: Mapping[str, Any]) -> Any:
        """Run the pipeline from the end of its loop; where a denoiser is among the components, from its last step."""
        zero = torch.zeros(1, device=self._device)
        stepped = bool(components.keys() & self.denoisers.keys())
        question = self._noisiest() if stepped else StepRequest(zero[:0], zero)
        dtype = None if stepped else self._pipeline.vae.dtype
        replay = Replay(self.layout, packed, self._samples(state), dtype)
        asked = self._blank(packed)
        return self._run(StepKeeper, question, replay.around, asked, len(state), components, output_type="pt")

    @torch.no_grad()
    def _needs_step(self, silent: Mapping[str, Any]) -> bool:
        """Return whether the pipeline's last lines need what a step of its loop leaves, the state apart.

        It is so if its VAE is given something else without a step than with one that changes nothing.
        """
        found: list[Tensor] = []
        vae = {"vae": taking(self._pipeline.vae, found)}
        state, packed = self._example_rows(1)
        self._leave_loop(state, packed, {**silent, **vae})
        try:
            self._leave_loop(state, packed, vae)
        except UnboundLocalError:  # of what is set in the loop alone
            return True
        if len(found) < 2 or self._is_weightless:
            return False
        stepped, plain = (each.float() for each in found)
        close = 0.05 * float(stepped.abs().max())  # for rounding in the loop
        return not torch.allclose(stepped, plain, rtol=0.05, atol=close)


@contextmanager
def rows_of_calls(denoisers: Iterable[nn.Module]) -> Iterator[list[int]]:
    """A context that yields a list of how many rows each call of one of the denoisers has."""
    calls: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(rows_of_call(args, kwargs))

    hooks = [denoiser.register_forward_pre_hook(count, with_kwargs=True) for denoiser in denoisers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Return the tensors with gradients of their own on which a tensor depends."""
    found, waiting, seen = [], [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _rows(packed: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows.to(value.device)] for name, value in packed.items()}


def _in_order(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Put rows that were predicted in groups back in their order."""
    order = torch.cat([rows for rows, _ in found]).argsort()
    values = torch.cat([values for _, values in found])
    return values[order.to(values.device)]
