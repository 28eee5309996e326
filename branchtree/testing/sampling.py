"""What a rollout asks of an adapter: noise, a time grid, encoded prompts, predictions, decoded samples."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from branchtree.core.grid import check_grid
from branchtree.core.padding import pad_together
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.registry import registry
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.saved import read_samples, write_samples
from branchtree.testing.case import AdapterCase
from branchtree.testing.probe import (
    CPU,
    SIGMAS,
    LoadedOnce,
    disturbed,
    load,
    make_question,
    predict_rows,
    randomise,
    require_close,
    require_equal,
    same_samples,
    states_of,
)
from branchtree.training.conditioning import ConditioningCache

NORMAL_NUMBERS = 20_000
"""How many are drawn to see whether noise is standard normal."""


class SamplingPromises(LoadedOnce):
    """A sample depends on its own noise, prompt and noise level, and on nothing else."""

    def test_initial_noise_is_standard_normal(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """By the Kolmogorov-Smirnov distance (a false alarm once in 8,000) and the correlation of neighbours."""
        if case.states is not None:
            pytest.skip("this model starts from states of its own")
        rows = math.ceil(NORMAL_NUMBERS / states_of(loaded, case, 1).numel())
        drawn = states_of(loaded, case, rows)
        assert drawn.dtype == torch.float32 and drawn.device == CPU
        numbers = drawn.flatten().double()
        count = len(numbers)
        uniform = torch.special.ndtr(numbers.sort().values)
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        distance = torch.maximum(steps[1:] - uniform, uniform - steps[:-1]).max()
        assert float(distance) < 2.2 / math.sqrt(count)
        assert abs(float((numbers[1:] * numbers[:-1]).mean())) < 4 / math.sqrt(count)
        assert len(numbers.unique()) > 0.99 * count

    def test_initial_noise_comes_from_its_generator_alone(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """The same generator gives the same noise whatever torch's global state, which is left as it was.

        Another one gives another, but for a model that starts from states of its own, which may be always the same.
        """
        drawn = []
        for seed, disturbance in ((3, 0), (3, 1), (4, 0)):
            with disturbed(disturbance):
                drawn.append(loaded.initial_noise(torch.Generator().manual_seed(seed)))
        assert torch.equal(drawn[0], drawn[1])
        assert case.states is not None or not torch.equal(drawn[0], drawn[2])

    @pytest.mark.parametrize("steps", [1, 2, 7, 20])
    def test_its_time_grid_falls_from_one_to_zero(self, loaded: ModelAdapter, steps: int) -> None:
        """At most 1 at the start, strictly down, exactly 0 at the end; one more noise level than steps."""
        sigmas = loaded.sigmas(steps)
        assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32 and sigmas.device == CPU
        check_grid(sigmas)

    def test_encoding_knows_no_neighbours(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """To the bit but for zeros at their ends, since encodings are cached: alone, together, and in another order."""
        conditions = case.conditions
        together, alone = loaded.encode(conditions), loaded.encode(conditions[1:2])
        backwards = loaded.encode(conditions[::-1])
        for name, rows in together.items():
            assert rows.device == CPU and not rows.requires_grad
            assert len(rows) == len(conditions)
            padded = pad_together([rows[1], alone[name][0]])
            assert torch.equal(padded[0], padded[1]), name
            assert torch.equal(rows, backwards[name].flip(0)), name
        assert any(not torch.equal(rows[0], rows[1]) for rows in together.values())

    def test_encodings_are_those_of_the_whole_condition(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """A run that keeps encodings also encodes a prompt again where the metadata beside it are others."""
        first, *others = case.conditions
        conditions = [first, *(replace(first, metadata=other.metadata) for other in others)]
        kept = ConditioningCache(loaded).get(conditions, CPU)
        for row, condition in enumerate(conditions):
            for name, value in loaded.encode([condition]).items():
                padded = pad_together([kept[name][row], value[0]])
                assert torch.equal(padded[0], padded[1]), name

    def test_predictions_are_float32_and_repeatable(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """They are finite, and of the shape of latents that are numbers; the arguments are left as they are."""
        asked, kept = make_question(loaded, case), make_question(loaded, case)
        answer = predict_rows(loaded, asked)
        assert len(answer) == len(asked.latents) and answer.dtype == torch.float32
        assert not asked.latents.is_floating_point() or answer.shape == asked.latents.shape
        assert bool(answer.isfinite().all())
        assert torch.equal(answer, predict_rows(loaded, asked))
        assert torch.equal(asked.latents, kept.latents) and torch.equal(asked.sigma, kept.sigma)
        require_equal(dict(asked.conditioning), dict(kept.conditioning))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_do_not_know_their_batch(self, case: AdapterCase, dtype: torch.dtype) -> None:
        """A row gives the same alone, in company, and at another index of the batch, up to rounding."""
        adapter = load(case, dtype)
        asked = make_question(adapter, case)
        together = predict_rows(adapter, asked)
        backwards = predict_rows(adapter, asked[[3, 2, 1, 0]]).flip(0)
        alone = torch.cat([predict_rows(adapter, asked[[row]]) for row in range(len(together))])
        for found in (alone, backwards):
            require_close(found, together, case.tolerance[dtype])

    def test_a_prediction_depends_on_all_that_is_given(self, case: AdapterCase) -> None:
        """Latents, noise level and condition; the weights are moved first, in case some start at zero."""
        adapter = load(case)
        randomise(adapter.denoiser)
        asked = make_question(adapter, case)[[0]]
        other = make_question(adapter, case)[[1]]
        answer = predict_rows(adapter, asked)
        for changed in (
            (other.latents, asked.sigma, asked.conditioning),
            (asked.latents, other.sigma, asked.conditioning),
            (asked.latents, asked.sigma, other.conditioning),
        ):
            with torch.no_grad():
                assert not torch.allclose(adapter.predict(*changed), answer, rtol=0, atol=1e-6)

    def test_a_frozen_copy_can_be_predicted_with(self, case: AdapterCase) -> None:
        """The module that is handed in answers, whatever has become of the adapter's own."""
        adapter = load(case)
        asked = make_question(adapter, case)
        frozen = copy.deepcopy(adapter.denoiser).requires_grad_(False)
        before = predict_rows(adapter, asked)
        randomise(adapter.denoiser)
        assert torch.equal(predict_rows(adapter, asked, frozen), before)
        assert not torch.equal(predict_rows(adapter, asked), before)

    def test_decoded_samples_are_media(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """They have the adapter's modality, are finite and differ where latents do; pixels are float32 in [0, 1]."""
        latents = states_of(loaded, case, len(SIGMAS))
        media = loaded.decode(latents)
        assert media.modality == loaded.modality and len(media) == len(latents)
        assert isinstance(media, Samples) and bool(media.is_finite().all())
        assert not any(value.requires_grad for value in media.tensors.values())
        assert not same_samples(media[:1], media[1:2])
        if isinstance(media, Media):
            assert media.pixels.ndim == (4 if media.modality == "image" else 5)
            assert media.pixels.dtype == torch.float32
            assert 0 <= float(media.pixels.min()) < float(media.pixels.max()) <= 1
            assert media.modality == "image" or (media.fps or 0) > 0

    def test_a_sample_is_decoded_the_same_in_any_batch(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """However the adapter or a recipe's ``batch.decode_rows`` cuts a batch up."""
        latents = states_of(loaded, case, len(SIGMAS))
        together, pieces = loaded.decode(latents), [loaded.decode(row) for row in latents.split(1)]
        for name, found in pieces[0].concatenate(pieces).tensors.items():
            require_close(found, together.tensors[name], case.tolerance[torch.float32])

    def test_its_samples_are_cut_and_drawn_one_by_one(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """A batch is its rows, one after the other; what draws them makes a picture of each, with pixels in [0, 1]."""
        samples = loaded.decode(states_of(loaded, case, len(SIGMAS)))
        assert same_samples(samples.concatenate([samples[row : row + 1] for row in range(len(samples))]), samples)
        assert same_samples(samples.cpu(), samples)
        shown = samples.show([case.conditions[row % 2] for row in range(len(samples))])
        if shown is not None:
            assert len(shown) == len(samples) and shown.pixels.dtype == torch.float32
            assert 0 <= float(shown.pixels.min()) <= float(shown.pixels.max()) <= 1

    def test_its_samples_come_back_from_a_file(self, case: AdapterCase, loaded: ModelAdapter, tmp_path: Path) -> None:
        """To the bit, with the conditions' prompts and metadata; and so over the wire to a reward elsewhere."""
        samples = loaded.decode(states_of(loaded, case, 2))
        if samples.modality not in registry().samples:
            pytest.skip("no hook register_samples names this kind, so `remote` and `branchtree score` cannot take it")
        conditions = case.conditions[:2]
        write_samples(tmp_path / "two.safetensors", samples, conditions)
        found, kept = read_samples(tmp_path / "two.safetensors")
        assert same_samples(found, samples)
        assert [each.metadata_text for each in kept] == [each.metadata_text for each in conditions]
        assert [each.prompt for each in kept] == [each.prompt for each in conditions]

    def test_samples_are_decoded_while_others_are_predicted(self, loaded: ModelAdapter, case: AdapterCase) -> None:
        """By another thread, as a run decodes the prompts that are done first."""
        latents, asked = states_of(loaded, case, 2), make_question(loaded, case)
        decoded, answer = loaded.decode(latents), predict_rows(loaded, asked)
        with ThreadPoolExecutor(max_workers=1) as executor:
            beside = [executor.submit(loaded.decode, latents) for _ in range(4)]
            answers = [predict_rows(loaded, asked) for _ in range(8)]
            assert all(same_samples(each.result(), decoded) for each in beside)
        assert all(torch.equal(each, answer) for each in answers)

    def test_frozen_parts_can_be_released_and_used_again(self, case: AdapterCase) -> None:
        """With the same results, to the bit."""
        adapter = load(case)
        latents = states_of(adapter, case, 2)
        encoded, decoded = adapter.encode(case.conditions), adapter.decode(latents)
        adapter.release_frozen()
        require_equal(dict(encoded), dict(adapter.encode(case.conditions)))
        adapter.release_frozen()
        assert same_samples(decoded, adapter.decode(latents))
