"""Promises that every reward adapter keeps. Axis letters: B samples, F frames, C channels, H height, W width."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from branchtree.core.scores import Scores
from branchtree.errors import BranchTreeError, DataError, RewardError
from branchtree.plugins.protocols import ChecksConditions, Fingerprinted, GroupReward, ReleasesMemory, RewardAdapter
from branchtree.plugins.registry import registry
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.scores import check_scores
from branchtree.plugins.values import Condition
from branchtree.recipe.build import make_reward
from branchtree.testing.probe import CPU, require_close, same_samples

REFUSED = (ValueError, BranchTreeError)


def noise_media(modality: str, samples: int) -> Media:
    """Samples that differ, of smooth noise: images of 40x48 pixels, or videos of 9 such frames at 8 fps.

    Raises ValueError for another modality.
    """
    if modality not in {"image", "video"}:
        raise ValueError(f"noise is images or videos; give the case a function 'media' that makes samples '{modality}'")
    frames = 9 if modality == "video" else 1
    source = torch.Generator().manual_seed(7)
    coarse = torch.rand(samples * frames, 3, 5, 6, generator=source)
    fine = F.interpolate(coarse, (40, 48), mode="bilinear").unflatten(0, (samples, frames))
    rounded = (fine * 255).round() / 255
    return Media(videos=rounded, fps=8.0) if modality == "video" else Media(images=rounded[:, 0])


@dataclass(frozen=True)
class RewardCase:
    """One registered reward with small weights, and samples that it can score.

    ``reward`` is written as an entry of a recipe's ``rewards``; its plug-in must be installed. ``conditions`` are what
    the samples were asked to show: at least four, each of them one that the reward can score. ``media`` makes samples
    of a modality, by default images or videos of noise. Where a setting limits how many samples go through a model at
    once, let it be smaller than their number. ``refused`` are conditions that the ``check`` of a reward that has one
    must refuse.
    """

    reward: Mapping[str, Any]
    conditions: Sequence[Condition]
    media: Callable[[str, int], Samples] = noise_media  # (modality, B) -> B samples, not all of one score
    tolerance: float = 1e-5  # between a sample scored in two batches, relative to the largest score or to 1
    refused: Sequence[Condition] = ()

    def build(self, **options: Any) -> RewardAdapter:
        """The reward, not loaded, from the plug-in that registered it; ``options`` replace its settings."""
        keys = {key: value for key, value in self.reward.items() if key not in {"reward", "weight", "label"}}
        return make_reward(self.reward["reward"], {**keys, **options}, ("reward",))[0]

    def load(self, **options: Any) -> RewardAdapter:
        """The reward, loaded on the CPU."""
        adapter = self.build(**options)
        adapter.load(CPU)
        return adapter

    def samples(self) -> list[Samples]:
        """Samples of each modality that the reward takes, one for each condition. Raises ValueError for too few."""
        count = len(self.conditions)
        if count < 4:
            raise ValueError(f"a case needs at least four conditions, not {count}")
        return [self.media(modality, count) for modality in sorted(self.build().modalities)]


def _groupwise(adapter: RewardAdapter) -> bool:
    return isinstance(adapter, GroupReward) and adapter.groupwise


def _chosen(media: Samples, rows: Sequence[int]) -> Samples:
    """Return a copy of some samples, in any order."""
    return media.concatenate([media[row : row + 1] for row in rows]).cpu()


def _score(adapter: RewardAdapter, case: RewardCase, media: Samples, rows: Sequence[int] | None = None) -> Scores:
    """The scores of some samples, each against its own condition; of all by default."""
    chosen = range(len(media)) if rows is None else rows
    return adapter.score(_chosen(media, chosen), [case.conditions[row] for row in chosen])


def _require_equal(found: Scores, expected: Scores) -> None:
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.valid, expected.valid)


def _random_states() -> tuple[Any, ...]:
    names, numbers, *rest = np.random.get_state()
    return random.getstate(), (names, np.asarray(numbers).tolist(), *rest), torch.get_rng_state().tolist()


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """The global random states as one seed makes them, which nobody else is likely to set; afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class RewardPromises:
    """What ``branchtree.plugins.RewardAdapter`` asks of a reward, taken promise by promise."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, case: RewardCase) -> RewardAdapter:
        """The case's reward on the CPU; the tests leave it as it is."""
        return case.load()

    @pytest.fixture(scope="class")
    @classmethod
    def twin(cls, case: RewardCase) -> RewardAdapter:
        """The same reward, built and loaded again."""
        return case.load()

    def test_it_says_what_it_scores(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """Before it is loaded; loading may narrow it, never widen it. Its card, if it gives one, promises no less."""
        card = registry().reward(case.reward["reward"]).card
        modalities = case.build().modalities
        assert modalities and all(modality.isidentifier() for modality in modalities)
        assert loaded.modalities and loaded.modalities <= modalities
        assert card is None or not card.modalities or modalities <= card.modalities

    def test_it_scores_only_what_is_loaded(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """Before ``load`` an error says to load it; a reward that has nothing to load may score instead."""
        for media in case.samples():
            try:
                early = _score(case.build(), case, media)
            except (RuntimeError, BranchTreeError) as error:
                assert "load" in str(error)
            else:
                _require_equal(early, _score(loaded, case, media))

    def test_each_sample_gets_a_number_and_a_flag(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """float32 and bool (B,), on one device, without gradients; the case's samples are valid and differ in score."""
        for media in case.samples():
            scores = _score(loaded, case, media)
            try:
                check_scores(case.reward["reward"], scores, len(media))
            except RewardError as error:
                pytest.fail(str(error))
            numbers = [scores.values, *([] if scores.raw is None else [scores.raw])]
            assert all(number.dtype == torch.float32 for number in numbers)
            assert {tensor.device for tensor in (*numbers, *scores.details.values(), scores.valid)} == {CPU}
            assert not any(tensor.requires_grad for tensor in (*numbers, *scores.details.values()))
            assert bool(scores.valid.all()), scores.reasons
            assert bool(scores.values.isfinite().all())
            assert not scores.reasons
            assert len(set(scores.values.tolist())) > 1

    def test_what_it_cannot_score_is_refused(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """Samples of another kind, and another number of conditions than of samples: ValueError, or one of ours."""
        for modality in {"image", "video"} - loaded.modalities:
            with pytest.raises(REFUSED):
                loaded.score(noise_media(modality, len(case.conditions)), case.conditions)
        for media in case.samples():
            for conditions in (case.conditions[:-1], [*case.conditions, case.conditions[0]], case.conditions[:1], []):
                with pytest.raises(REFUSED):
                    loaded.score(media, conditions)

    def test_what_its_check_refuses_is_not_scored(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """Before loading, the case's conditions pass; the refused ones are named in an error, and are never valid."""
        adapter = case.build()
        if not isinstance(adapter, ChecksConditions):
            pytest.skip("this reward takes any condition")
        for condition in case.conditions:
            try:
                adapter.check(condition)
            except DataError as error:
                pytest.fail(f"a condition of the case is refused: {error}")
        for condition in case.refused:
            with pytest.raises(DataError, match=re.escape(condition.prompt)):
                adapter.check(condition)
            for media in case.samples():
                assert not loaded.score(_chosen(media, [0]), [condition]).valid.any()

    def test_samples_that_are_not_finite_are_not_valid(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """With a reason if the reward gives any; the other samples' scores are those without them."""
        for media in case.samples():
            numbers = [name for name, value in media.tensors.items() if value.is_floating_point()]
            if not numbers:  # such as tokens
                continue
            rest = list(range(2, len(media)))
            expected = _score(loaded, case, media, rest)
            spoilt = media.cpu()
            for row, number in enumerate((float("nan"), float("inf"))):
                for value in (spoilt.tensors[name][row] for name in numbers):
                    middle: Any = (..., *(size // 2 for size in value.shape[-2:]))  # of a picture, or of a sequence
                    value[middle] = number
            scores = _score(loaded, case, spoilt)
            assert scores.valid.tolist() == [row in rest for row in range(len(media))]
            assert set(scores.reasons) <= {0, 1}
            require_close(scores.values[rest], expected.values, case.tolerance, least=1.0)

    def test_a_score_does_not_know_its_batch(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """All at once, one at a time, and some of them in another order: each sample keeps its score."""
        if _groupwise(loaded):
            pytest.skip("this reward compares the samples of a prompt")
        for media in case.samples():
            whole = _score(loaded, case, media).values
            alone = [_score(loaded, case, media, [row]).values for row in range(len(media))]
            require_close(torch.cat(alone), whole, case.tolerance, least=1.0)
            order = [*range(2, len(media)), 0]
            require_close(_score(loaded, case, media, order).values, whole[order], case.tolerance, least=1.0)

    def test_a_group_has_no_order(self, case: RewardCase, loaded: RewardAdapter) -> None:
        """A reward that compares samples gives them the same scores in another order."""
        if not _groupwise(loaded):
            pytest.skip("this reward judges each sample alone")
        for media in case.samples():
            whole = _score(loaded, case, media).values
            for order in ([*range(1, len(media)), 0], list(reversed(range(len(media))))):
                require_close(_score(loaded, case, media, order).values, whole[order], case.tolerance, least=1.0)

    def test_the_same_samples_get_the_same_scores(
        self, case: RewardCase, loaded: RewardAdapter, twin: RewardAdapter
    ) -> None:
        """To the bit: again, and by a reward that was built and loaded again. Samples are left as they were."""
        for media in case.samples():
            before = media.cpu()
            scores = loaded.score(media, case.conditions)
            assert same_samples(media, before)
            _require_equal(_score(loaded, case, media), scores)
            _require_equal(_score(twin, case, media), scores)

    def test_it_scores_as_before_after_leaving_the_device(self, case: RewardCase, twin: RewardAdapter) -> None:
        """``release``, once or twice, costs time and nothing else."""
        if not isinstance(twin, ReleasesMemory):
            pytest.skip("this reward does not leave the device")
        for media in case.samples():
            scores = _score(twin, case, media)
            twin.release()
            twin.release()
            _require_equal(_score(twin, case, media), scores)

    def test_it_leaves_the_global_random_state_alone(self, case: RewardCase) -> None:
        """Building, loading and scoring draw nothing from the generators of torch, numpy and Python."""
        with _global_seed(271_828):
            before = _random_states()
            adapter = case.load()
            for media in case.samples():
                _score(adapter, case, media)
            assert _random_states() == before

    def test_its_fingerprint_is_that_of_its_scores(
        self, case: RewardCase, loaded: RewardAdapter, twin: RewardAdapter
    ) -> None:
        """The same for the same weights and settings, whenever it is asked for."""
        if not isinstance(loaded, Fingerprinted) or not isinstance(twin, Fingerprinted):
            pytest.skip("this reward has no fingerprint")
        mark = loaded.fingerprint()
        assert isinstance(mark, str) and mark
        for media in case.samples():
            loaded.score(media, case.conditions)
        assert loaded.fingerprint() == twin.fingerprint() == mark
