"""What training and checkpoints ask of an adapter: gradients, LoRA, saving, restoring, exporting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.testing.case import AdapterCase
from branchtree.testing.probe import (
    HALF,
    SINGLE,
    disturbed,
    load,
    load_trained,
    make_question,
    predict_rows,
    randomise,
    require_close,
    require_equal,
    require_lora,
    same_samples,
    state,
    states_of,
    trainable_parameters,
)

both_variants = pytest.mark.parametrize("variant", ["full", "lora"])
both_precisions = pytest.mark.parametrize("dtype", [SINGLE, HALF])


class WeightPromises:
    """Exactly the trained weights learn; what is saved comes back to the bit."""

    # torch says so once, whenever float32 weights meet bfloat16 autocast in an RMS norm.
    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
    @pytest.mark.parametrize(("variant", "dtype"), [("full", SINGLE), ("lora", SINGLE), ("lora", HALF)])
    def test_gradients_reach_exactly_what_is_trained(self, case: AdapterCase, variant: str, dtype: torch.dtype) -> None:
        """Each trainable parameter gets a finite one, no other does, and gradient checkpointing changes none.

        With autocast and without.
        """
        adapter = load_trained(case, variant, dtype)
        plain = {autocast: _gradients(adapter, case, autocast) for autocast in (False, True)}
        adapter.enable_gradient_checkpointing()
        for autocast, expected in plain.items():
            checkpointed = _gradients(adapter, case, autocast)
            assert expected.keys() == checkpointed.keys() == trainable_parameters(adapter).keys()
            assert all(bool(gradient.isfinite().all()) for gradient in expected.values())
            assert any(bool(gradient.any()) for gradient in expected.values())
            tolerance = case.tolerance[HALF if autocast else dtype]
            for name, gradient in expected.items():
                require_close(checkpointed[name], gradient, tolerance)

    def test_lora_starts_as_the_base_model_from_its_seed_alone(self, case: AdapterCase) -> None:
        """The new weights are float32 and the only ones trained; torch's global random state is left as it was."""
        drawn = []
        for seed, disturbance in ((3, 0), (3, 1), (4, 0)):
            adapter = load(case)
            base = predict_rows(adapter, make_question(adapter, case))
            addresses = {parameter.data_ptr() for parameter in adapter.denoiser.parameters()}
            with disturbed(disturbance):
                adapter.add_lora(require_lora(case), seed)
            assert torch.equal(predict_rows(adapter, make_question(adapter, case)), base)
            fresh = list(trainable_parameters(adapter).values())
            assert fresh and not addresses & {parameter.data_ptr() for parameter in fresh}
            assert all(parameter.dtype == SINGLE for parameter in fresh)
            drawn.append(torch.cat([parameter.detach().flatten() for parameter in fresh]))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_without_lora_is_the_base_model(self, case: AdapterCase) -> None:
        """Also for a wrapped denoiser; afterwards, and after an exception, all is as before."""
        adapter = load(case)
        asked = make_question(adapter, case)
        base = predict_rows(adapter, asked)
        adapter.add_lora(require_lora(case), seed=0)
        randomise(adapter.denoiser)
        trained, names = predict_rows(adapter, asked), trainable_parameters(adapter).keys()
        assert not torch.allclose(trained, base, rtol=0, atol=1e-3)
        for denoiser in (adapter.denoiser, nn.ModuleList([adapter.denoiser])):
            with pytest.raises(KeyError), adapter.without_lora(denoiser):
                assert torch.equal(predict_rows(adapter, asked), base)
                raise KeyError
            assert torch.equal(predict_rows(adapter, asked), trained)
            assert trainable_parameters(adapter).keys() == names

    @both_precisions
    @both_variants
    def test_saved_weights_are_restored_to_the_bit(
        self, case: AdapterCase, tmp_path: Path, variant: str, dtype: torch.dtype
    ) -> None:
        """Into a newly loaded model with other weights; the folder is made by ``save``."""
        adapter = load_trained(case, variant, dtype)
        fresh = load_trained(case, variant, dtype, seed=9)
        asked, names = make_question(adapter, case), trainable_parameters(fresh).keys()
        assert not torch.equal(predict_rows(fresh, asked), predict_rows(adapter, asked))
        adapter.save(tmp_path / "run" / "model")
        fresh.restore(tmp_path / "run" / "model")
        require_equal(state(fresh), state(adapter))
        assert torch.equal(predict_rows(fresh, asked), predict_rows(adapter, asked))
        assert trainable_parameters(fresh).keys() == names

    @both_precisions
    @both_variants
    def test_other_weights_can_be_saved_in_their_place(
        self, case: AdapterCase, tmp_path: Path, variant: str, dtype: torch.dtype
    ) -> None:
        """As a moving average is: float32, by name. The model's own stay what and where they are."""
        adapter = load_trained(case, variant, dtype)
        live, other = state(adapter), _shifted(adapter)
        addresses = [parameter.data_ptr() for parameter in adapter.denoiser.parameters()]
        adapter.save(tmp_path / "saved", other)
        adapter.export(tmp_path / "exported", other)
        require_equal(state(adapter), live)
        assert [parameter.data_ptr() for parameter in adapter.denoiser.parameters()] == addresses
        adapter.restore(tmp_path / "saved")
        require_equal(state(adapter), live | {name: value.to(live[name].dtype) for name, value in other.items()})

    @both_variants
    def test_weights_of_another_model_are_not_saved(self, case: AdapterCase, tmp_path: Path, variant: str) -> None:
        """A wrong name, a missing one or a wrong shape is a CheckpointError, and no file is written."""
        adapter = load_trained(case, variant)
        whole = _shifted(adapter)
        first = next(iter(whole))
        lacking = {name: value for name, value in whole.items() if name != first}
        for wrong in (lacking, {**lacking, "no_such_weight": whole[first]}, {**whole, first: torch.zeros(1, 2, 3, 4)}):
            for write in (adapter.save, adapter.export):
                with pytest.raises(CheckpointError):
                    write(tmp_path / "model", wrong)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    @both_variants
    def test_what_cannot_be_restored_is_refused(self, case: AdapterCase, tmp_path: Path, variant: str) -> None:
        """An empty folder or damaged files are a CheckpointError, and the model stays as it is."""
        adapter = load_trained(case, variant)
        before = state(adapter)
        with pytest.raises(CheckpointError):
            adapter.restore(tmp_path / "nowhere")
        adapter.save(tmp_path / "model")
        for file in (path for path in (tmp_path / "model").rglob("*") if path.is_file()):
            file.write_bytes(b"damaged")
        with pytest.raises(CheckpointError):
            adapter.restore(tmp_path / "model")
        require_equal(state(adapter), before)

    @both_precisions
    def test_an_export_is_the_whole_model(self, case: AdapterCase, tmp_path: Path, dtype: torch.dtype) -> None:
        """An adapter built on its folder has the same weights and gives the same at every stage, to the bit."""
        adapter = load_trained(case, "full", dtype)
        adapter.export(tmp_path / "exported")
        again = load(case, dtype, path=tmp_path / "exported")
        require_equal(state(again), state(adapter))
        asked = make_question(adapter, case)
        require_equal(dict(again.encode(case.conditions)), dict(adapter.encode(case.conditions)))
        assert torch.equal(predict_rows(again, asked), predict_rows(adapter, asked))
        assert same_samples(again.decode(states_of(again, case, 2)), adapter.decode(states_of(adapter, case, 2)))
        assert torch.equal(again.sigmas(7), adapter.sigmas(7))

    def test_an_export_holds_the_weights_it_was_given(self, case: AdapterCase, tmp_path: Path) -> None:
        """A moving average, in place of the model's own."""
        adapter = load(case)
        other = _shifted(adapter)
        adapter.export(tmp_path / "exported", other)
        again = load(case, path=tmp_path / "exported")
        require_equal({name: value.detach() for name, value in trainable_parameters(again).items()}, other)


def _shifted(adapter: ModelAdapter) -> dict[str, Tensor]:
    """Other weights for all that is trained, float32 as an average has them."""
    return {name: (value.detach() + 0.5).float() for name, value in trainable_parameters(adapter).items()}


def _gradients(adapter: ModelAdapter, case: AdapterCase, autocast: bool) -> dict[str, Tensor]:
    """The gradients of the mean square of a prediction, of whatever parameters have one."""
    adapter.denoiser.zero_grad(set_to_none=True)
    asked = make_question(adapter, case)
    with torch.autocast("cpu", HALF, enabled=autocast):
        answer = adapter.predict(asked.latents, asked.sigma, asked.conditioning)
    assert answer.dtype == SINGLE and bool(answer.isfinite().all())
    answer.square().mean().backward()
    named = adapter.denoiser.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}
