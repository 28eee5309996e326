"""Damaged model folders are refused by name, or compute to the bit what the whole folder does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sweep_model_folders import ASSETS, DAMAGE, MODELS, Case, Sweep, cases, files, trained

from branchtree.errors import ModelError


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("model", MODELS)
def test_whole_folders_are_right_with_and_without_digests(sweep: Sweep, model: str) -> None:
    for listed in (True, False):
        assert sweep.judge(Case(model, "", "whole", listed)).kind == "right"


def test_with_digests_every_damage_is_refused_by_the_files_name(sweep: Sweep) -> None:
    for case in [case for case in cases(listed=True) if case.kind == "flipped"]:
        outcome = sweep.judge(case)
        assert outcome.kind == "refused" and Path(case.file).name in outcome.message, (case, outcome)


def test_without_digests_no_damage_but_a_flipped_bit_gives_another_result(sweep: Sweep) -> None:
    unlisted = [case for case in cases(listed=False) if case.kind != "flipped" and case.model == "digits_flux"]
    counts: Counter[str] = Counter()
    for case in unlisted[::3]:
        outcome = sweep.judge(case)
        counts[outcome.kind] += 1
        assert outcome.kind in {"refused", "right"}, (case, outcome)
        assert outcome.kind == "right" or Path(case.file).parts[0] in outcome.message, (case, outcome)
    assert counts["refused"] > 4 * counts["right"]


def test_a_run_is_refused_with_the_same_message(tmp_path: Path) -> None:
    for model, kind in zip(MODELS, ("flipped", "truncated"), strict=True):
        case = Case(model, "vae/diffusion_pytorch_model.safetensors", kind, listed=kind == "flipped")
        with pytest.raises(ModelError, match="vae"):
            trained(case, tmp_path / model)


def test_the_bundled_lists_name_every_file() -> None:
    for model in MODELS:
        lines = (ASSETS / model / "SHA256SUMS").read_text().splitlines()
        assert [line.split("  ")[1] for line in lines] == files(model)
    assert set(DAMAGE) == {"deleted", "truncated", "emptied", "zeroed", "flipped"}
