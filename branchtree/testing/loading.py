"""What an adapter says of itself, and what loading it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from branchtree.errors import DataError, ModelError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import LoraSettings
from branchtree.testing.case import AdapterCase
from branchtree.testing.probe import (
    CPU,
    HALF,
    SINGLE,
    LoadedOnce,
    counted_rows,
    load,
    make_question,
    predict_rows,
    require_equal,
    state,
    trainable_parameters,
)


class LoadingPromises(LoadedOnce):
    """An adapter knows its sizes unloaded, loads what was asked for, and refuses what it cannot use."""

    def test_it_has_all_that_the_protocol_names(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """Attributes and methods; modality, prediction and guidance are known before loading."""
        names = [name for name in vars(ModelAdapter) if not name.startswith("_")]
        assert [name for name in names if not hasattr(loaded, name)] == []
        assert isinstance(loaded.denoiser, nn.Module)
        for adapter in (case.build(), loaded):
            assert adapter.modality.isidentifier()
            assert adapter.prediction.isidentifier()
            assert adapter.rows_per_prediction >= 1
        assert loaded.rows_per_prediction == case.build().rows_per_prediction

    def test_it_is_loaded_by_load_alone(self, case: AdapterCase, tmp_path: Path) -> None:
        """Before that, what needs weights raises ModelError; so may the rest, but nothing else."""
        adapter = case.build()
        for needs_weights in (
            lambda: adapter.denoiser,
            lambda: adapter.save(tmp_path / "saved"),
            lambda: adapter.export(tmp_path / "exported"),
            lambda: adapter.restore(tmp_path / "saved"),
        ):
            with pytest.raises(ModelError):
                needs_weights()
        assert list(tmp_path.iterdir()) == []
        rest: list[Callable[[], object]] = [
            lambda: adapter.sigmas(4),
            lambda: adapter.initial_noise(torch.Generator()),
            lambda: adapter.encode(case.conditions[:1]),
            lambda: adapter.decode(torch.zeros(1, *adapter.footprint().latent_shape)),
            lambda: adapter.add_lora(LoraSettings(rank=1, alpha=1.0), 0),
            adapter.enable_gradient_checkpointing,
            adapter.release_frozen,
        ]
        for call in rest:
            try:
                call()
            except ModelError:
                continue

    def test_it_always_loads_the_same_weights(self, case: AdapterCase) -> None:
        """Whatever torch's global random state, so that all processes and a resumed run begin alike."""
        states = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                states.append(state(load(case)))
        require_equal(*states)

    def test_conditions_are_checked_before_loading(self, case: AdapterCase) -> None:
        """The case's conditions pass; the ones that must be refused are, by a DataError that names them."""
        adapter = case.build()
        for condition in case.conditions:
            adapter.check(condition)
        for condition in case.refused:
            with pytest.raises(DataError, match=re.escape(condition.prompt)):
                adapter.check(condition)

    def test_a_missing_folder_is_named(self, case: AdapterCase, tmp_path: Path) -> None:
        """By ``footprint``, with which a plan begins, and by ``load``."""
        missing = tmp_path / "no_such_model"
        for method in ("footprint", "load"):
            adapter = case.build(**{case.path_key: str(missing)})
            arguments = (CPU, SINGLE, SINGLE) if method == "load" else ()
            with pytest.raises(ModelError, match="no_such_model"):
                getattr(adapter, method)(*arguments)

    def test_footprint_is_that_of_the_loaded_model(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """Parameters, the shape of latents, and positive estimates of the rest."""
        footprint = case.build().footprint()
        assert footprint.denoiser_parameters == sum(p.numel() for p in loaded.denoiser.parameters())
        assert footprint.latent_shape == tuple(loaded.initial_noise(torch.Generator()).shape)
        assert footprint.frozen_parameters >= 0
        assert 0 < footprint.checkpointed_numbers_per_row <= footprint.activation_numbers_per_row
        assert footprint.forward_flops_per_row > 0
        assert footprint.source

    def test_footprint_counts_the_lora(self, case: AdapterCase) -> None:
        """What each unit of rank adds on the adapter's own targets; a family without LoRA refuses it."""
        adapter, per_rank = load(case), case.build().footprint().lora_parameters_per_rank
        if case.lora is None:
            with pytest.raises(ModelError):
                adapter.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
            assert per_rank == 0
        else:
            adapter.add_lora(replace(case.lora, targets=None), seed=0)
            assert per_rank * case.lora.rank == sum(p.numel() for p in trainable_parameters(adapter).values())

    def test_rows_per_prediction_are_those_through_the_denoiser(self, case: AdapterCase, loaded: ModelAdapter) -> None:
        """Counted on the module; the adapter and its footprint say the same."""
        asked = make_question(loaded, case)
        with counted_rows(loaded.denoiser) as rows:
            predict_rows(loaded, asked)
            predict_rows(loaded, asked[[0]])
        assert rows.rollout == (len(asked.sigma) + 1) * loaded.rows_per_prediction
        assert case.build().footprint().rows_per_prediction == loaded.rows_per_prediction

    @pytest.mark.parametrize(("dtype", "denoiser_dtype"), [(SINGLE, SINGLE), (HALF, SINGLE), (HALF, HALF)])
    def test_it_loads_in_the_precision_asked_for(
        self, case: AdapterCase, dtype: torch.dtype, denoiser_dtype: torch.dtype
    ) -> None:
        """A few of the denoiser's weights may stay in float32; results are float32 and finite in any case."""
        adapter = case.build()
        adapter.load(CPU, dtype, denoiser_dtype)
        found = {parameter.dtype for parameter in adapter.denoiser.parameters()}
        assert {denoiser_dtype} <= found <= {denoiser_dtype, SINGLE}
        asked = make_question(adapter, case)
        answer, decoded = predict_rows(adapter, asked), adapter.decode(asked.latents)
        assert answer.dtype == SINGLE and bool(answer.isfinite().all()) and bool(decoded.is_finite().all())
        assert all(value.dtype == SINGLE for value in decoded.tensors.values() if value.is_floating_point())
