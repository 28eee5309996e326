"""A distribution of model adapters that each break one promise: wrong guests, and FLUX with a wrong LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_guest.model import GuestGaussian, GuestGaussianConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from branchtree.plugins import Condition, Conditioning, Footprint, LoraSettings, Media
from branchtree.plugins.base import DENOISER_FILE as WEIGHTS
from branchtree.plugins.hookspecs import Register, hookimpl

LATENT = (3, 4, 4)


class MixesRows(GuestGaussian):
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        answer = super().predict(latents, sigma, conditioning, denoiser)
        return answer + 0.1 * answer.mean(dim=0, keepdim=True)


class Forgetful(GuestGaussian):
    calls = 0

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        self.calls += 1
        return super().predict(latents, sigma, conditioning, denoiser) + 1e-3 * (self.calls % 7)


class UsesItsOwnDenoiser(GuestGaussian):
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        return super().predict(latents, sigma, conditioning)


class IgnoresThePrompt(GuestGaussian):
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        conditioning = {name: torch.zeros_like(value) for name, value in conditioning.items()}
        return super().predict(latents, sigma, conditioning, denoiser)


class WritesIntoItsArguments(GuestGaussian):
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        answer = super().predict(latents, sigma, conditioning, denoiser)
        if not latents.requires_grad:
            latents.mul_(0.5)
        return answer


class AnswersInHalf(GuestGaussian):
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        return super().predict(latents, sigma, conditioning, denoiser).bfloat16()


class DrawsFromTheGlobalState(GuestGaussian):
    def initial_noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(LATENT)


class DrawsUniformNoise(GuestGaussian):
    def initial_noise(self, generator: torch.Generator) -> Tensor:
        return (torch.rand(LATENT, generator=generator) - 0.5) * 12**0.5


class RepeatsItsNoise(GuestGaussian):
    def initial_noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(LATENT[1:], generator=generator).expand(LATENT).clone()


class StopsShortOfZero(GuestGaussian):
    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0.01, steps + 1)


class ComparesPrompts(GuestGaussian):
    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        words = super().encode(conditions)["words"]
        return {"words": words / words.sum()}


class StretchesContrast(GuestGaussian):
    def decode(self, latents: Tensor) -> Media:
        return super().decode(latents / latents.std())


class DecodesBeyondWhite(GuestGaussian):
    def decode(self, latents: Tensor) -> Media:
        return replace(super().decode(latents), images=latents + 0.5)


class LosesWhatIsReleased(GuestGaussian):
    released = False

    def release_frozen(self) -> None:
        self.released = True

    def decode(self, latents: Tensor) -> Media:
        return super().decode(0.5 * latents if self.released else latents)


class SaysTwoRows(GuestGaussian):
    rows_per_prediction = 2


class GuessesItsSizes(GuestGaussian):
    def footprint(self) -> Footprint:
        return replace(super().footprint(), denoiser_parameters=1000)


class LoadsAtOnce(GuestGaussian):
    def __init__(self, config: GuestGaussianConfig) -> None:
        super().__init__(config)
        self.load(torch.device("cpu"), torch.float32, torch.float32)


class BeginsAnywhere(GuestGaussian):
    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        super().load(device, dtype, denoiser_dtype)
        for parameter in self.denoiser.parameters():
            nn.init.normal_(parameter, std=0.1)


class PassesErrorsOn(GuestGaussian):
    def _weights_file(self) -> Path | None:
        if self.config.path is not None and not self.config.path.exists():
            raise FileNotFoundError(self.config.path)
        return super()._weights_file()


class TakesAnyCondition(GuestGaussian):
    """Wrong in a case that names a condition to refuse."""


class AlwaysFull(GuestGaussian):
    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        super().load(device, dtype, torch.float32)


class HasADeadWeight(GuestGaussian):
    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        super().load(device, dtype, denoiser_dtype)
        self.denoiser.dead = torch.nn.Parameter(torch.zeros(1))


class CheckpointsWrongly(GuestGaussian):
    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.mean.weight.register_hook(lambda gradient: 0.9 * gradient)


class LosesATensor(GuestGaussian):
    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        super().save(directory, denoiser_state)
        save_file({"mean.weight": load_file(directory / WEIGHTS)["mean.weight"]}, directory / WEIGHTS)

    def restore(self, directory: Path) -> None:
        self.denoiser.load_state_dict(load_file(directory / WEIGHTS), strict=False)


class SavesInHalf(GuestGaussian):
    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        super().save(directory, denoiser_state)
        halves = {name: value.half() for name, value in load_file(directory / WEIGHTS).items()}
        save_file(halves, directory / WEIGHTS)


class KeepsWhatItShouldOnlySave(GuestGaussian):
    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        super().save(directory, denoiser_state)
        self.restore(directory)


class ChecksTooLate(GuestGaussian):
    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        super().save(directory)
        if denoiser_state is not None:
            super().save(directory, denoiser_state)


class RestoresInSilence(GuestGaussian):
    def restore(self, directory: Path) -> None:
        if (directory / WEIGHTS).is_file():
            super().restore(directory)


class ExportsItsStart(GuestGaussian):
    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        fresh = GuestGaussian(self.config)
        fresh.load(torch.device("cpu"), torch.float32, torch.float32)
        fresh.save(directory)


class LoraWithoutASeed(Flux):
    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        super().add_lora(settings, seed=0)


class LoraOfAnotherRank(Flux):
    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        super().add_lora(replace(settings, rank=settings.rank + 1), seed)


class LoraThatStaysOn(Flux):
    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class LoraBesideTheRest(Flux):
    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        super().add_lora(settings, seed)
        next(self.denoiser.parameters()).requires_grad_(True)


class LoraInHalf(Flux):
    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        super().add_lora(settings, seed)
        self.denoiser.to(torch.bfloat16)


@hookimpl
def register_models(register: Register) -> None:
    for build in GuestGaussian.__subclasses__():
        register(build.__name__, build=build, config=GuestGaussianConfig, summary="wrong")
    for build in Flux.__subclasses__():
        register(build.__name__, build=build, config=FluxConfig, summary="wrong")
