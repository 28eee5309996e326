"""The base class of models that are a diffusers pipeline."""

from __future__ import annotations

import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from branchtree.core.padding import pad_together
from branchtree.errors import ModelError
from branchtree.files.paths import PathOrName
from branchtree.plugins import (
    Condition,
    Conditioning,
    Footprint,
    LoraSettings,
    LoraSummary,
    Media,
    ModelBase,
    ModelCard,
    quantized,
    weights,
)
from branchtree.plugins.weights import has_lora
from branchtree_adapters.any_pipeline.published import published_model
from branchtree_adapters.pipeline import sources, speed, trained
from branchtree_adapters.pipeline.blueprint import (
    TRANSFORMER,
    VAE,
    Blueprint,
    Published,
    count_parameters,
    described,
    largest_block,
    read_blueprint,
    require_multiple,
)
from branchtree_adapters.pipeline.components import own_component, quiet
from branchtree_adapters.pipeline.decoders import decoder_footprint, decoder_weights
from branchtree_adapters.pipeline.denoisers import apart, block_layers, quantizable_footprint, split_state, together
from branchtree_adapters.pipeline.encoders import fingerprint, probe_encoders
from branchtree_adapters.pipeline.grids import scheduler_grid
from branchtree_adapters.pipeline.lora_names import convert_names
from branchtree_adapters.pipeline.outline import ComponentSizes, Outline, read_outline
from branchtree_adapters.pipeline.sources import Configs

ENCODER = re.compile(r"(text|image)_encoder(_\d+)?")
"""Names that pipelines have for encoders."""


class PipelineConfig(pydantic.BaseModel):
    """Which pipeline, and the size in pixels of what it is to make.

    ``path`` is a hub id, a local pipeline folder, or ``bundled:NAME``. ``attention`` is an attention back-end of
    diffusers, such as ``flash``.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    path: PathOrName
    height: int = pydantic.Field(gt=0, le=8192)
    width: int = pydantic.Field(gt=0, le=8192)
    revision: str | None = None
    attention: str | None = None


class PipelineAdapter(ModelBase):
    """A diffusers pipeline whose denoisers are trained: one transformer, unless a model says otherwise.

    A model writes ``modality``, ``pipeline_class``, ``encode_condition`` and ``predict``. The defaults are those of an
    image model with the VAE's latents as they are and the scheduler's own time grid. A video model's configuration
    also has ``frames`` and ``fps``. ``pipeline``, ``device`` and ``dtype`` (the denoisers') are set by ``load``.
    """

    pipeline_class: str
    """The name of the pipeline's class in diffusers."""
    denoiser_names: tuple[str, ...] = ("transformer",)
    """The components that are trained, in the order in which a prediction calls them."""
    config_files: tuple[str, ...] = ()
    """JSON files to find in ``blueprint.configs`` beside those of components with weights."""
    published: Published | None = None
    """A published model whose sizes are assumed of a hub id that is not in the local cache; by default, it is asked."""
    float32_components: tuple[str, ...] = ()
    """Encoders and VAE that are in float32, whatever precision the others are in."""
    decode_pixels: int = 8 * 1024**2
    """Pixels of images or frames that go through the VAE at once; one sample always does."""
    encoding_settings: tuple[str, ...] | None = None
    """Fields or properties of the configuration that an encoding depends on; None: all fields."""
    encodes_with_vae = False
    """Whether an encoding depends on the VAE too."""
    compile_blocks = staticmethod(speed.compile_blocks)
    quantizations = frozenset(quantized.FORMATS)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._pipeline: Any = None
        self._blueprint: Blueprint | None = None
        self._frozen_dtypes: Mapping[str, torch.dtype] = {}
        self._fixed: dict[str, Mapping[str, Tensor]] = {}  # by denoiser, weights that full training leaves as they are

    # What a model writes

    @abstractmethod
    def encode_condition(self, condition: Condition) -> Conditioning:
        """Encode one condition: tensors with a first axis of 1, on any device, from encoders that are on ``device``."""

    # What a model may write differently

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, rows and columns of an image. Raises ModelError for a size that the model cannot make."""
        vae, transformer = (self.configs[name] for name in (VAE, TRANSFORMER))
        scale = 2 ** (len(vae.get("encoder_block_out_channels") or vae["block_out_channels"]) - 1)
        multiple = scale * (transformer.get("patch_size") or 1)
        for name in ("height", "width"):
            require_multiple(name, getattr(self.config, name), multiple)
        return transformer["in_channels"], self.config.height // scale, self.config.width // scale

    @property
    def tokens(self) -> int:
        """Patches of one sample."""
        patch = self.configs[TRANSFORMER].get("patch_size") or 1
        return math.prod(self.latent_shape[1:]) // patch**2

    def row_costs(self) -> Mapping[str, Any]:
        """Return what a row costs, by fields of a Footprint, from ``configs`` alone; by default it is estimated."""
        return {}

    def sizes(self, denoiser: nn.Module) -> Footprint:
        """Return the sizes of a denoiser on torch's meta device, with ``row_costs`` where a model has its own."""
        return replace(super().sizes(denoiser), **self.row_costs())

    def scheduler_changes(self) -> Mapping[str, Any]:
        """Return settings to use in place of the scheduler's."""
        return {}

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Have a scheduler make its grid as the pipeline does."""
        scheduler.set_timesteps(steps, device="cpu")

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Return what the VAE decodes for latents (B, *latent)."""
        scale, shift = (getattr(self.pipeline.vae.config, name, None) for name in ("scaling_factor", "shift_factor"))
        return latents / (scale or 1) + (shift or 0)

    # What every pipeline has

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline; its encoders are there during ``encode``. Raises ModelError before ``load``."""
        if self._pipeline is None:
            raise ModelError("the model is not loaded; call load first.")
        return self._pipeline

    @property
    def blueprint(self) -> Blueprint:
        """What the model's configuration files say. Raises ModelError for files that are missing or wrong."""
        if self._blueprint is None:
            self._blueprint = self._read_blueprint()
        return self._blueprint

    @property
    def configs(self) -> Configs:
        """The model's JSON files by name, those of diffusers' classes with their defaults. Raises ModelError."""
        outline = self._outline
        return self.blueprint.configs if outline is None else outline.configs

    @property
    def _outline(self) -> Outline | None:
        """What is known of the model, not loaded, without model libraries; None if they must be asked."""
        return self._found_outline if self._blueprint is None else None

    @cached_property
    def _found_outline(self) -> Outline | None:
        kind = type(self)
        if kind.row_costs is PipelineAdapter.row_costs or kind.sizes is not PipelineAdapter.sizes:
            return None
        found = read_outline(self.pipeline_class, self._source, self.config_files, self.published)
        same = found is not None and all(
            found.sizes[name].lora_targets == self.lora_targets for name in self.denoiser_names
        )
        return found if same else None

    def _read_blueprint(self, *, fetch: bool = False) -> Blueprint:
        names = self.denoiser_names
        return read_blueprint(self._class, self._source, names, self.config_files, self.published, fetch=fetch)

    @property
    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline_class)

    @cached_property
    def _source(self) -> sources.ModelSource:
        return sources.locate_pipeline(self.config.path, self.config.revision)

    def build_denoiser(self) -> nn.Module:
        """Return denoisers with random weights, by their config.json. Raises ModelError if one describes none."""
        return together({name: self.blueprint.build(name) for name in self.denoiser_names})

    @property
    def denoisers(self) -> dict[str, Any]:
        """The modules that are trained, by name."""
        return apart(self.denoiser, self.denoiser_names)

    def footprint(self) -> Footprint:
        """Return the model's sizes, from config.json files. Raises ModelError for a folder or size that cannot be."""
        outline = self._outline
        whole, frozen = self._count() if outline is None else self._look_up(outline)
        counts = {name: sizes.parameters for name, sizes in frozen.items()}
        float32 = sum(count for name, count in counts.items() if name in self.float32_components)
        size, decoder = (self.config.height, self.config.width), frozen["vae"].decoder
        return replace(
            whole,
            frozen_parameters=sum(counts.values()),
            frozen_float32_parameters=float32,
            decoder=decoder_footprint(self.configs[VAE], decoder, size, self.latent_shape, self._decoded_at_once),
            source=(outline or self.blueprint).origin,
            assumed=(outline or self.blueprint).assumed,
        )

    def _count(self) -> tuple[Footprint, Mapping[str, ComponentSizes]]:
        """Return the sizes of the denoisers, and of each component around them, built without weights."""
        with torch.device("meta"):
            denoiser = self.build_denoiser()
            frozen = {name: self.blueprint.build(name) for name in (*self.blueprint.encoders, "vae")}
        sizes = {name: ComponentSizes(count_parameters(module)) for name, module in frozen.items()}
        sizes["vae"] = replace(sizes["vae"], decoder=decoder_weights(frozen["vae"]))
        whole = replace(
            self.sizes(denoiser),
            largest_block_parameters=largest_block(denoiser),
            quantizable=quantizable_footprint([denoiser]),
        )
        return whole, sizes

    def _look_up(self, outline: Outline) -> tuple[Footprint, Mapping[str, ComponentSizes]]:
        """Return the same by what is known."""
        (name,) = self.denoiser_names
        denoiser = outline.sizes[name]
        whole = Footprint(
            denoiser_parameters=denoiser.parameters,
            frozen_parameters=0,
            latent_shape=self.latent_shape,
            rows_per_prediction=self.rows_per_prediction,
            lora_parameters_per_rank=denoiser.lora_parameters_per_rank,
            largest_block_parameters=denoiser.largest_block,
            quantizable=denoiser.quantizable,
            source=outline.origin,
            **self.row_costs(),
        )
        return whole, {each: sizes for each, sizes in outline.sizes.items() if each != name}

    @property
    def _decoded_at_once(self) -> int:
        sample = int(self.config.height * self.config.width * getattr(self.config, "frames", 1))
        return max(1, self.decode_pixels // sample)

    def load(
        self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        """Load the pipeline: its denoisers to ``device``, the VAE to the CPU until it is needed.

        Encoders are read when ``encode`` first needs them. The weights that diffusers keeps in float32 stay so. Under
        ``quantize`` each linear layer of the denoisers' blocks is quantised as it comes to the device. Raises
        ModelError if the source cannot be read, or for a size or task that the model is not made for.
        """
        if quantize is not None:
            quantized.check_quantization(quantize)
        source = self._source
        try:
            self._blueprint = self._read_blueprint(fetch=True)
        except ModelError as error:
            raise ModelError(f"cannot load '{source.location}': {error}") from error
        with described():
            self.latent_shape  # noqa: B018 - refused before weights are read
        speed.check_attention(self.config.attention)
        self._frozen_dtypes = {"default": dtype, **dict.fromkeys(self.float32_components, torch.float32)}
        in_call = [*self.denoiser_names, *self._beside_names]
        dtypes = {**self._frozen_dtypes, **dict.fromkeys(in_call, denoiser_dtype)}
        loaded = sources.load_pipeline(self._class, source, dtypes, self._encoder_names)
        self._blueprint = self._blueprint.with_loaded(loaded)
        self.latent_shape  # noqa: B018 - of what was loaded
        for name in self.denoiser_names:
            denoiser = getattr(loaded, name)
            speed.set_attention(denoiser, self.config.attention)
            own_component(denoiser, device if quantize is None else torch.device("cpu"), self._location(name))
            if quantize is not None:
                quantized.quantize_layers(denoiser, block_layers(denoiser), quantize, device)
                denoiser.to(device)
        self._own({"vae": loaded.vae})
        for name in self._beside_names:
            own_component(getattr(loaded, name), device, self._location(name))
            getattr(loaded, name).requires_grad_(False)
        if device.type == "cpu" or self.modality == "image":
            _channels_last(loaded.vae)
        self.take(loaded, device, denoiser_dtype)

    def take(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Use a pipeline whose denoisers are on ``device`` in ``dtype``."""
        self._pipeline, self.device, self.dtype = pipeline, device, dtype
        self._denoiser = together({name: getattr(pipeline, name) for name in self.denoiser_names})

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Put LoRA on each denoiser; see ModelBase."""
        for offset, (name, module) in enumerate(self.denoisers.items()):
            targets = self._with_effect(name, module, settings.targets or self._lora_targets(module))
            weights.add_lora(module, settings, targets, seed + offset)

    def _with_effect(self, name: str, module: nn.Module, targets: Sequence[str]) -> Sequence[str]:
        """Return targets without the layers of ``unused_layers``. Raises ModelError where none are left."""
        unused = self.unused_layers(name)
        if not unused:
            return targets
        names = {id(layer): key for key, layer in module.named_modules()}
        found = [names[id(layer)] for layer in weights.linear_layers(module, targets)]
        left = [key for key in found if key not in unused]
        if not left:
            raise ModelError(f"LoRA targets {list(targets)} are layers of {name} that no prediction depends on")
        return left if len(left) < len(found) else targets

    def unused_layers(self, name: str) -> frozenset[str]:
        """Return layers of a denoiser, by name, whose weights have no effect. By default none are known."""
        return frozenset()

    def _states(self, replacement: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """Return the trained weights, or others in their place, of each denoiser. Raises CheckpointError."""
        return split_state(weights.trained_state(self.denoiser, replacement), self.denoiser_names)

    def _twins(self, replacement: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """Return the denoisers as modules of their own, with other weights. Raises CheckpointError."""
        states, fixed = self._states(replacement), self._fixed  # which are whole here, also where others are sharded
        return {
            name: trained.with_weights(module, {**fixed.get(name, {}), **states[name]})
            for name, module in self.denoisers.items()
        }

    @property
    def _encoder_names(self) -> list[str]:
        """Names that the pipeline has for encoders, whether this model has them or not."""
        names = inspect.signature(self._class.__init__).parameters
        return [name for name in names if ENCODER.fullmatch(name)]

    @property
    def _beside_names(self) -> list[str]:
        """Names of the components with weights that work beside the denoiser, in its precision."""
        known = {*self.denoiser_names, "vae", *self._encoder_names}
        return [name for name in self.blueprint.classes if name not in known]

    def _own(self, components: Mapping[str, Any]) -> None:
        for name, component in components.items():
            if component is not None:
                own_component(component, torch.device("cpu"), self._location(name))
                component.requires_grad_(False)

    def _location(self, component: str) -> str:
        return f"{self._source.location}/{component}"

    def weights_of(self, component: str) -> str:
        """Return where the weights of the ``denoiser``, the ``decoder`` or the ``encoders`` are."""
        encoding = [*self.blueprint.encoders, *(["vae"] if self.encodes_with_vae else [])]
        names = {"denoiser": list(self.denoiser_names), "decoder": ["vae"]}.get(component, encoding)
        return ", ".join(self._location(name) for name in names)

    @torch.no_grad()
    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions, one at a time so that no row depends on another. Returns tensors on the CPU.

        Smaller ones have zeros at their ends.
        """
        self.with_encoders()
        rows = [self.encode_condition(condition) for condition in conditions]
        return {name: pad_together([row[name][0].cpu() for row in rows]) for name in rows[0]}

    def with_encoders(self) -> Any:
        """Return the pipeline with its encoders on the device, read if they are not there. Raises ModelError."""
        pipeline, absent = self.pipeline, self._absent_encoders()
        if absent:
            self._own(absent)
            pipeline.register_modules(**absent)
        for name in self._encoder_names:
            if (encoder := getattr(pipeline, name)) is not None:
                on_device(encoder, self.device)
        if absent:
            probe_encoders(pipeline, self._source.location)
        return pipeline

    def _absent_encoders(self) -> dict[str, Any]:
        """Read the encoders by name, unless the pipeline has them. Raises ModelError."""
        names = self._encoder_names
        if any(getattr(self.pipeline, name) is not None for name in names):
            return {}
        others = [name for name in self.pipeline.components if name not in names]
        found = sources.load_some(self._class, sources.pinned(self._source), self._frozen_dtypes, others)
        return {name: found.get(name) for name in names}

    def drop_encoders(self) -> None:
        """Free the encoders; they are read again if ``encode`` is called again."""
        self.pipeline.register_modules(**dict.fromkeys(self._encoder_names))

    def encoding_fingerprint(self) -> str | None:
        """Digest the files, settings and libraries that encodings depend on; None if no file is known."""
        skipped = {*self.denoiser_names, "scheduler"} | (set() if self.encodes_with_vae else {"vae"})
        names = self.encoding_settings or type(self.config).model_fields.keys() - {"path", "revision", "attention"}
        settings = {"family": type(self).__name__, **{name: str(getattr(self.config, name)) for name in names}}
        settings |= {f"dtype of {name}": str(dtype) for name, dtype in self._frozen_dtypes.items()}
        components = [name for name in self.pipeline.components if name not in skipped]
        return fingerprint(self._source, components, settings)

    def release_frozen(self) -> None:
        """Move encoders and VAE to the CPU, and give their memory on the device back."""
        if self.device.type == "cpu":
            return
        for name in (*self._encoder_names, "vae"):
            if (component := getattr(self.pipeline, name)) is not None:
                component.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sigmas(self, steps: int) -> Tensor:
        """Return the grid of the pipeline's scheduler, shift included: (steps + 1,) float32, to 0.

        Raises ModelError for a scheduler whose grid is not one of flow matching, or that the pipeline cannot use.
        """
        return scheduler_grid(
            self.pipeline.scheduler,
            str(self.config.path),
            steps,
            lambda scheduler: self.set_timesteps(scheduler, steps),
            self.scheduler_changes(),
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Media:
        """Decode latents (B, *latent) to images (B, 3, H, W) or videos (B, F, 3, H, W), on the device."""
        vae = on_device(self.pipeline.vae, self.device)
        decoded = []
        for rows in latents.split(self._decoded_at_once):
            pixels = vae.decode(self.vae_latents(rows.to(self.device)).to(vae.dtype), return_dict=False)[0]
            decoded.append((pixels.float() / 2 + 0.5).clamp(0, 1))
        samples = torch.cat(decoded)
        if self.modality == "image":
            return Media(images=samples)
        return Media(videos=samples.transpose(1, 2), fps=self.config.fps)

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors``, or without LoRA the whole ``transformer/``; see ModelBase.

        So for each denoiser, with its name for the folder; the LoRA of the first is in ``directory`` itself.
        """
        if has_lora(self.denoiser):
            trained.save_lora(self.pipeline, self.denoisers, self._states(denoiser_state), directory, exact=True)
        else:
            for name, twin in self._twins(denoiser_state).items():
                twin.save_pretrained(directory / name)

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what a user loads: the LoRA file, or without LoRA a complete pipeline folder. See ``save``.

        The LoRA file gives every reader the trained strength, whether it knows of alpha or not.
        """
        if has_lora(self.denoiser):
            trained.save_lora(self.pipeline, self.denoisers, self._states(denoiser_state), directory, exact=False)
        else:
            twins = self._twins(denoiser_state)
            components = {**self.pipeline.components, **self._absent_encoders(), **twins}
            takes = inspect.signature(self._class.__init__).parameters.keys() - components.keys()
            settings = {name: value for name, value in self.pipeline.config.items() if name in takes}
            with quiet():
                self._class(**components, **settings).save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        """Read back, to the bit, what ``save`` wrote, before sharding. Raises CheckpointError if it does not fit."""
        if has_lora(self.denoiser):
            trained.restore_lora(self.denoisers, directory)
        else:
            trained.restore_all(self.denoisers, directory)

    def start_from(self, source: Path) -> None:
        """Take a LoRA's file or folder, or without LoRA a folder of all weights, before sharding.

        A folder has the layout of ``save``. Raises CheckpointError if they do not fit.
        """
        if has_lora(self.denoiser):
            unused = {name: self.unused_layers(name) for name in self.denoiser_names}
            trained.start_lora(self.denoisers, source, self._class, unused)
        else:
            trained.start_all(self.denoisers, source)

    def load_lora(self, source: Path) -> LoraSummary:
        """Put a LoRA file of any common kind, or the folder of one, on the denoiser in place of any other LoRA.

        Several denoisers take a folder as ``save`` writes it. Raises CheckpointError for one that is damaged, or has
        keys that fit nothing in the denoiser.
        """
        return trained.load_lora(self.denoisers, source, self._class)

    def card(self) -> ModelCard:
        """Return the hub id, and the licence that is known of it or of a model that comes with the package."""
        known, licence = published_model(self._source.name), "as given where the model comes from"
        if self._source.name.startswith((sources.BUNDLED, sources.SMALL)):
            licence = "Apache-2.0"
        elif self._source.folder is None:
            licence = known.licence if known else f"see https://huggingface.co/{self._source.name}"
        return ModelCard(None if self._source.folder else self._source.name, licence, "diffusers")

    def convert_lora(self, source: Path, form: str) -> Mapping[str, Mapping[str, Tensor]]:
        """Return a LoRA that ``export`` wrote, by denoiser, as ``kohya``'s scripts or ``comfyui`` name it.

        Nothing is loaded. Raises CheckpointError for a model or a layer that has no such names.
        """
        with torch.device("meta"):
            denoisers = {name: self.blueprint.build(name) for name in self.denoiser_names}
        files = trained.read_each(denoisers, source, self._class)
        return {name: convert_names(file, denoisers[name], form) for name, file in files.items()}


@torch.no_grad()
def _channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions over images and videos out with channels last, which a CPU is fastest in."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.detach().contiguous(memory_format=layout)


def on_device(module: Any, device: torch.device) -> Any:
    """Move ``module`` (a diffusers or transformers model) to ``device`` unless it is there: asking costs much less."""
    return module if module.device == device else module.to(device)
