"""The model family ``diffusers``: any pipeline of diffusers, driven through its own call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pydantic
import torch
from torch import Tensor, nn
from torch import distributed as dist

from branchtree.core.grid import check_grid
from branchtree.data.frames import condition_images
from branchtree.errors import DataError, ModelError, nearest, reason_of, shortened
from branchtree.plugins import Condition, Conditioning, Footprint, Media, Register, hookimpl
from branchtree.plugins.weights import lora_parameters_per_rank
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.any_pipeline.checkpointing import checkpoint_blocks
from branchtree_adapters.any_pipeline.clock import predicted
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.any_pipeline.families import family_of
from branchtree_adapters.any_pipeline.linear_inputs import make_contiguous
from branchtree_adapters.any_pipeline.published import published_model
from branchtree_adapters.any_pipeline.substitutes import Wrapped
from branchtree_adapters.any_pipeline.unloaded import SCHEDULER, unloaded_pipeline
from branchtree_adapters.pipeline.adapter import PipelineAdapter, PipelineConfig, on_device
from branchtree_adapters.pipeline.blueprint import Published, described
from branchtree_adapters.pipeline.components import INDEX, is_present, quiet
from branchtree_adapters.pipeline.denoisers import DENOISERS
from branchtree_adapters.pipeline.sources import CHECK_HUB, fetch_configs, read_configs

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("branchtree")

FRAMES = frozenset({"num_frames", "frames"})
"""Names that pipelines have for the number of frames."""
KEYS: Mapping[str, str] = {
    "height": "model.height",
    "width": "model.width",
    **dict.fromkeys(FRAMES, "model.frames"),
    "negative_prompt": "model.negative_prompt",
    "num_inference_steps": "tree.steps",
}
"""The recipe's keys that set keywords of the call."""
OURS = frozenset(
    {
        *KEYS,
        "self",
        "prompt",
        "image",
        "sigmas",
        "timesteps",
        "latents",
        "generator",
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
)
"""Arguments of a pipeline's call that are not the user's to set under ``call``."""
SMALLEST = 64
"""Pixels of a side of an image by which a layout is learnt, at least: some pipelines refuse smaller ones."""
SHORT, LONG = "a cat", "two small birds that sit on the branch of an old tree in the rain"
"""Two prompts of different lengths, by which a pipeline's layout is learnt."""
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("attn.to_qkv_mlp_proj", "attn.to_out"),  # FLUX.2's single blocks
    *(f"attention.{name}" for name in ("to_query", "to_key", "to_value", "out_layer")),  # Kandinsky 5
)
"""Endings of the names of attention's projections in diffusers' transformers."""

UNLOADED: dict[str, PipelineDriver] = {}
"""Drivers of the pipelines without weights that were used last, by what they were made of."""
KEPT = 2
"""How many of them; learning one takes seconds for a large model."""
MEASURED: WeakKeyDictionary[PipelineDriver, Footprint] = WeakKeyDictionary()
"""Sizes measured on them, which takes seconds too."""


class DiffusersConfig(PipelineConfig):
    """Which pipeline, and what it is to make: images, or videos of ``frames`` at ``fps`` where it makes videos.

    ``images`` is how many images a condition holds at most: 1 by default where one is needed, and 0 elsewhere. With
    more than one the pipeline is given a list. ``call`` holds keywords of the pipeline's own ``__call__``, such as
    ``guidance_scale``. ``negative_prompt`` stands in for that of conditions that have none.
    """

    frames: int | None = pydantic.Field(default=None, gt=0, le=10_000)
    fps: float = pydantic.Field(default=16.0, ge=0.1, le=1000)
    negative_prompt: str | None = None
    images: int | None = pydantic.Field(default=None, ge=0, le=16)
    call: Mapping[str, Any] = pydantic.Field(default_factory=dict)


class Diffusers(PipelineAdapter):
    """A pipeline whose prediction is one step of its own call: the model is what the pipeline says it is.

    Latents are what the pipeline gives its scheduler.
    """

    config: DiffusersConfig
    config_files = (SCHEDULER,)

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__(config)
        self._loaded: PipelineDriver | None = None

    # Known before loading

    @cached_property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """The class that the model's model_index.json names. Raises ModelError if it names none of diffusers."""
        import diffusers

        name = str(self._index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ModelError(f"'{self._source.location}/{INDEX}' names {name}, which is no pipeline of diffusers.")
        family_of(kind).check_class(name)
        return name

    @cached_property
    def published(self) -> Published | None:  # type: ignore[override]
        """What is known of the model's hub id, whose files need not be in the local cache."""
        found = published_model(self._source.name) if self._source.folder is None else None
        return None if found is None else found.files

    @cached_property
    def _index(self) -> Mapping[str, Any]:
        found = read_configs(self._source, [INDEX])
        if found is None and self.published is not None:
            found = self.published.configs
        if found is None:
            fetch_configs(self._source, [INDEX])
            found = read_configs(self._source, [INDEX])
        if found is None:
            raise ModelError(f"'{self._source.name}/{INDEX}' cannot be read; {CHECK_HUB}.")
        return found[INDEX]

    @cached_property
    def denoiser_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The denoisers that the model has. Raises ModelError for a pipeline that takes none."""
        parameters = inspect.signature(self._class.__init__).parameters
        taken = [name for name in DENOISERS if name in parameters]
        if not taken:
            raise ModelError(f"{self.pipeline_class} has no {' or '.join(DENOISERS[:2])}, and cannot be trained.")
        return tuple(name for name in taken if is_present(self._index.get(name))) or (taken[0],)

    @cached_property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(inspect.unwrap(self._class.__call__)).parameters

    @property
    def modality(self) -> str:
        """``"video"`` for a pipeline that takes a number of frames."""
        return "image" if FRAMES.isdisjoint(self._takes) else "video"

    @property
    def prediction(self) -> str:  # type: ignore[override]
        """What the model predicts, by its scheduler's configuration."""
        return predicted(self.blueprint.configs[SCHEDULER])

    @property
    def media(self) -> frozenset[str]:  # type: ignore[override]
        """The image that a pipeline takes, if it takes one, or several."""
        several = {"images"} if self._images > 1 else set()
        return frozenset({"image", "video"} | several if self._images else ())

    @property
    def encodes_with_vae(self) -> bool:  # type: ignore[override]
        """Whether an encoding depends on the VAE: images go through it."""
        return self._images > 0

    @property
    def _images(self) -> int:
        """Images that a condition holds at most. Raises ModelError for a pipeline that takes none."""
        image = self._takes.get("image")
        if self.config.images is None:
            return int(image is not None and image.default is inspect.Parameter.empty)
        if self.config.images and image is None:
            raise ModelError(f"model.images: {self.pipeline_class} takes no image; leave it out.")
        return self.config.images

    @property
    def call(self) -> dict[str, Any]:
        """The keywords of every call. Raises ModelError for one that the pipeline does not take."""
        known = self._takes.keys() - OURS
        for name in self.config.call:
            if name not in known:
                raise ModelError(f"model.call.{name} {self._why_not(name, known)}")
        sizes = {"height": self.config.height, "width": self.config.width, **dict.fromkeys(FRAMES, self.config.frames)}
        given = {name: size for name, size in sizes.items() if name in self._takes and size is not None}
        return {**given, **self.config.call}

    def _why_not(self, name: str, known: Iterable[str]) -> str:
        """Return why a keyword cannot be one of the call's, and what to write instead."""
        if name in KEYS:
            return f"has a key of its own: set {KEYS[name]} instead."
        if name in OURS:
            return "is set by the library; leave it out."
        return f"is not taken by {self.pipeline_class}{nearest(name, sorted(known))}"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of what the pipeline gives its scheduler."""
        return self.driver.state_shape

    @property
    def rows_per_prediction(self) -> int:  # type: ignore[override]
        """Rows through the denoiser for each row predicted, guidance included."""
        return self.driver.rows_per_prediction

    def _lora_targets(self, denoiser: nn.Module) -> Sequence[str]:
        linear = super()._lora_targets(denoiser)
        return [name for name in linear if name.endswith(ATTENTION)] or linear

    def footprint(self) -> Footprint:
        """Return the model's sizes, measured on a pipeline without weights. Raises ModelError if there can be none."""
        from branchtree_adapters.any_pipeline.measure import measure

        if self._unloaded not in MEASURED:
            made = measure(self._unloaded, self._examples[0], torch.bfloat16, self.blueprint.origin)
            MEASURED[self._unloaded] = made
            self._unloaded.find_unused()
        found = MEASURED[self._unloaded]
        each_rank = sum(
            lora_parameters_per_rank(module, self._with_effect(name, module, self._lora_targets(module)))
            for name, module in self._unloaded.denoisers.items()
        )
        return replace(found, lora_parameters_per_rank=each_rank, assumed=self.blueprint.assumed)

    # The pipeline at work

    @property
    def driver(self) -> PipelineDriver:
        """The driver of the loaded pipeline; before it is loaded, that of a pipeline without weights."""
        return self._unloaded if self._loaded is None else self._loaded

    @cached_property
    def _unloaded(self) -> PipelineDriver:
        """The driver of a pipeline made of configuration files: one for all models of a process that are the same."""
        files = sorted(self._source.folder.glob("*/*")) if self._source.folder else []
        states = [(str(file), file.stat().st_mtime_ns) for file in files]
        key = repr((self._source, self.config, self.blueprint.configs, states))
        if (found := UNLOADED.pop(key, None)) is None:
            with described():
                pipeline = unloaded_pipeline(self._class, self.blueprint, self._source.folder)
                found = self._driven(pipeline, torch.device("cpu"))
        UNLOADED[key] = found  # as the last one used
        for old in list(UNLOADED)[:-KEPT]:
            del UNLOADED[old]
        return found

    def load(
        self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        """Load the pipeline, and learn its layout, for which encoders work once; see PipelineAdapter."""
        super().load(device, dtype, denoiser_dtype, quantize)
        pipeline = self.with_encoders()
        on_device(pipeline.vae, device)
        self._loaded = self._driven(pipeline, device)
        self._require_all_images(self._loaded)
        make_contiguous(self.denoisers.values(), self._loaded.find_unused)
        self._loaded.compare_levels()
        self.release_frozen()

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks again in the backward pass that the denoisers would; finds them by a prediction."""
        checkpoint_blocks(self.denoisers.values(), self.driver.trace)

    def unused_layers(self, name: str) -> frozenset[str]:
        """Return layers of a denoiser, by name, whose weights have no effect."""
        return frozenset(key.removesuffix(".weight") for key in self.driver.unused.get(name, ()))

    def freeze_unused(self) -> None:
        """Freeze the weights that have no effect, and log which."""
        for name, module in self.denoisers.items():
            unused = sorted(self.driver.unused.get(name, ()))
            self._fixed[name] = {key: module.get_parameter(key).requires_grad_(False).detach() for key in unused}
            if unused:
                log.info("%d tensors of %s have no effect and are not trained: %s, ...", len(unused), name, unused[0])

    def _driven(self, pipeline: Any, device: torch.device) -> PipelineDriver:
        driver = PipelineDriver(pipeline, self.call, device)
        try:
            with quiet():  # the examples may be too long for a tokenizer
                driver.learn(*self._examples)
        except Exception as error:  # whatever a pipeline's own code stumbles over
            if "image" not in self._takes or self._images == 1:
                raise
            given = f"with {self._images} images" if self._images else "without an image"
            raise ModelError(
                f"model.images: {self.pipeline_class} does not work {given} ({reason_of(error)}); if it takes one, set "
                "images to 1"
            ) from error
        return driver

    def _require_all_images(self, driver: PipelineDriver) -> None:
        """Raise ModelError if the pipeline looks at fewer images than it is given."""
        if self._images < 2:
            return
        first = self._examples[0]
        *others, last = first.extra["image"]
        changed = replace(first, extra={"image": [*others, _blank("white", *last.size)]})
        before, after = driver.encode(first), driver.encode(changed)
        if all(torch.equal(value, after[name]) for name, value in before.items()):
            raise ModelError(f"model.images: {self.pipeline_class} does not look at image {self._images}; give fewer")

    @property
    def _examples(self) -> list[Asked]:
        """Two prompts of different lengths, with images of different colours and shapes."""
        width, height = max(self.config.width, SMALLEST), max(self.config.height, SMALLEST)
        blank = [_blank("grey", width, height), _blank("white", 2 * width, height)]
        return [
            self._asked(Condition(prompt), [image] * self._images)
            for prompt, image in zip((SHORT, LONG), blank, strict=True)
        ]

    def _asked(self, condition: Condition, images: Sequence[Image.Image]) -> Asked:
        """Return a condition as the pipeline takes it: a list of images only where there may be several."""
        negative = condition.negative_prompt if condition.negative_prompt is not None else self.config.negative_prompt
        given = {"image": list(images) if self._images > 1 else images[0]} if images else {}
        return Asked(condition.prompt, negative, given)

    def check(self, condition: Condition) -> None:
        """Refuse a condition that the pipeline cannot take. Raises DataError."""
        if condition.negative_prompt and "negative_prompt" not in self._takes:
            raise DataError(f"{condition} has a negative prompt, which {self.pipeline_class} does not take; remove it.")
        images = self._read_images(condition)
        if not images:
            return
        processor: Any = getattr(self._unloaded.pipeline, "image_processor", None)
        if hasattr(processor, "check_image_input"):
            with _refused(condition, self.pipeline_class):
                for image in images:
                    processor.check_image_input(image)

    def _read_images(self, condition: Condition) -> list[Image.Image]:
        """Return a condition's images. Raises DataError where there are none or too many, or one cannot be read."""
        if not self._images:
            return []
        if len(condition.images) > self._images:
            raise DataError(
                f"{condition} has {len(condition.images)} images, and model.images is {self._images}; give at most as "
                "many, or raise model.images if the model takes more."
            )
        images = condition_images(condition)
        if not images:
            raise DataError(f"{condition} has no image, which {self.pipeline_class} needs; give it an 'image'.")
        return images

    def encode_condition(self, condition: Condition) -> Conditioning:
        """Return what the pipeline's own methods gave for a condition, by method, call and leaf."""
        asked = self._asked(condition, self._read_images(condition))
        if asked.extra:
            on_device(self.pipeline.vae, self.device)
        with _refused(condition, self.pipeline_class):
            return self.driver.encode(asked)

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Draw starting latents as the pipeline does and lays them out."""
        return self.driver.noise(generator)

    def sigmas(self, steps: int) -> Tensor:
        """Return the noise levels (steps + 1,) of the pipeline's own schedule. Raises ModelError if it has none.

        Where its formula has none of one step, as it divides by the number of the others, that one leads from its
        noisiest level to 0.
        """
        try:
            with np.errstate(divide="raise", invalid="raise"):
                grid = self.driver.grid(steps)
            check_grid(grid)
        except Exception as error:  # diffusers divides by zero, among other things
            if steps == 1:
                return self.sigmas(2)[[0, -1]]
            scheduler = type(self.driver.pipeline.scheduler).__name__
            raise ModelError(
                f"sampler.grid 'pipeline': {scheduler} of '{self.config.path}' makes no grid of {steps} steps: "
                f"{shortened(' '.join(str(error).split()))}. Set other tree.steps, or sampler.grid to 'linear'."
            ) from error
        return grid

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Return what the pipeline gives its scheduler (B, *latent), guidance included, at sigma (B,)."""
        outer, sigma = self.denoiser if denoiser is None else denoiser, sigma.to(latents.device)
        sharded = _is_sharded(outer)
        if len(self.denoiser_names) == 1:
            name, own = self.denoiser_names[0], self.denoiser
            components = None if outer is own and not sharded else {name: Wrapped(outer, own, sharded)}
            return self.driver.predict(latents, sigma, conditioning, components)
        components = {name: Wrapped(partial(outer, name), own, sharded) for name, own in self.denoisers.items()}
        added = self.driver.absent_levels(sigma) if in_step(outer) else sigma[:0]
        rows = [*range(len(sigma)), *[0] * len(added)]  # those at the end call denoisers that no other row calls
        asked = {name: value[rows] for name, value in conditioning.items()} if len(added) else conditioning
        latents = latents[rows] if len(added) else latents
        return self.driver.predict(latents, torch.cat([sigma, added]), asked, components)[: len(sigma)]

    @torch.no_grad()
    def decode(self, latents: Tensor, conditioning: Conditioning | None = None) -> Media:
        """Decode latents (B, *latent) as the pipeline does after its loop, where a given frame may come back in."""
        on_device(self.pipeline.vae, self.device)
        rows = conditioning if conditioning and self._images else self._example_rows(len(latents))
        decoded = self.driver.decode(latents.to(self.device), rows)
        samples = opaque(decoded.float().clamp(0, 1))
        return Media(videos=samples, fps=self.config.fps) if self.modality == "video" else Media(images=samples)

    def _example_rows(self, count: int) -> dict[str, Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.driver.example.items()}


def opaque(samples: Tensor) -> Tensor:
    """Lay samples (..., 4, H, W) with an opacity over white; return those without one as they are."""
    if samples.shape[-3] != 4:
        return samples
    colours, opacity = samples.split([3, 1], dim=-3)
    over: Tensor = colours * opacity + (1 - opacity)
    return over


def in_step(denoiser: nn.Module) -> bool:
    """Return whether several processes must call the same modules in the same order.

    So they must where weights are gathered from all of them, or gradients.
    """
    several = _is_distributed() and dist.get_world_size() > 1
    return several and (torch.is_grad_enabled() or _is_sharded(denoiser))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_sharded(denoiser: nn.Module) -> bool:
    if not _is_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule  # which takes longer to import than torch itself

    return isinstance(denoiser, FSDPModule)


def _blank(colour: str, width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (width, height), colour)


@contextmanager
def _refused(condition: Condition, pipeline: str) -> Iterator[None]:
    """Turn what a pipeline says of its arguments into a DataError that names the condition."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{condition}: {pipeline} does not take it: {error}") from error


@hookimpl
def register_models(register: Register) -> None:
    """Register the model family ``diffusers``."""
    register(
        "diffusers", build=Diffusers, config=DiffusersConfig, summary="any diffusers pipeline, driven by its own call"
    )
