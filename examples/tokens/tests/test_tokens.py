"""What is the tasks' own: rules, data, the order of revealing, pictures, rewards."""

from __future__ import annotations

import pytest
import torch
from branchtree_tokens.data import puzzles, solved_grids, sums
from branchtree_tokens.model import Addition, Sudoku, TokenConfig
from branchtree_tokens.network import CAP
from branchtree_tokens.rewards import AdditionConfig, AdditionReward, SudokuConfig, SudokuReward
from branchtree_tokens.samples import Grids, Texts
from branchtree_tokens.tasks import MASK, VOCABULARY, Puzzle, Sum, rules_kept, text_of, tokens_of, unknown
from branchtree_tokens.unmask import Unmask, UnmaskConfig, build_unmask
from scipy import stats

from branchtree.core.noise import CorrelatedSiblings, IndependentSiblings, NoiseSource, SimplexSiblings
from branchtree.errors import DataError, RecipeError
from branchtree.plugins import Condition
from branchtree.testing import RewardCase, RewardPromises

SOLVED = "1234341221434321"
CHANCE = 1e-4
"""Of failing by chance, for each test of a distribution; each seed is fixed."""


def test_rules_are_rows_columns_and_boxes() -> None:
    kept = rules_kept(tokens_of([SOLVED, "1" + SOLVED[1:15] + "2", "1234" * 4]))
    assert kept[0].all() and torch.nonzero(~kept[1])[:, 0].tolist() == [3, 7, 11]
    assert kept[2].tolist() == [True] * 4 + [False] * 8


def test_held_out_puzzles_have_solutions_of_their_own() -> None:
    trained, held_out = (set(map(text_of, solved_grids(half))) for half in (False, True))
    assert (len(trained), len(held_out), len(trained | held_out)) == (192, 96, 288)
    for half, solutions in ((False, trained), (True, held_out)):
        for clues in puzzles(5, half, seed=1):
            fits = [all(c in (".", s) for c, s in zip(clues, grid, strict=True)) for grid in trained | held_out]
            assert sum(fits) == 1
            assert any(all(c in (".", s) for c, s in zip(clues, grid, strict=True)) for grid in solutions)
    assert not set(sums(200, False, 1)) & set(sums(200, True, 1))


def logits(given: str, seed: int = 0) -> torch.Tensor:
    """Return what ``predict`` does for a text with dots: random logits, certain of what is given."""
    model = Addition(TokenConfig(path=None)) if len(given) == 12 else Sudoku(TokenConfig(path=None))
    drawn = 2 * torch.randn(1, len(given), len(VOCABULARY), generator=torch.Generator().manual_seed(seed))
    return model.predict(
        unknown(len(given))[None], torch.ones(1), {"given": tokens_of([given]).float()}, lambda *_: drawn
    )


def test_given_tokens_are_certain_and_no_others() -> None:
    found = logits("123+456=....").log_softmax(-1)
    assert torch.equal(found[0, :8].amax(-1), torch.zeros(8)) and bool((found[0, 8:].amax(-1) < 0).all())
    network = Sudoku(TokenConfig(path=None, width=8, depth=1)).build_denoiser()
    with torch.no_grad():
        network.head.bias.copy_(torch.linspace(-1e6, 1e6, len(VOCABULARY)))
        answer = network(torch.full((1, 16), MASK), torch.ones(1))
    assert float(answer.max() - answer.min()) <= 2 * CAP


@pytest.mark.parametrize("order", ["raster", "reverse", "shuffled"])
@pytest.mark.parametrize(("given", "steps"), [("..1.....4.....3.", 5), ("123+456=....", 4), ("123+456=....", 7)])
def test_each_unknown_position_is_revealed_once_in_order(order: str, given: str, steps: int) -> None:
    kernel = build_unmask(UnmaskConfig(order=order), None, "logits")
    state, seen = unknown(len(given))[None], []
    for step in range(steps):
        sigma, following = (torch.tensor([1 - each / steps]) for each in (step, step + 1))
        transition = kernel(state, logits(given, step), sigma, following, torch.tensor([True]))
        other = kernel(state, logits(given, step + 50), sigma, following, torch.tensor([True]))
        assert torch.equal(transition.words.drawn, other.words.drawn)  # whatever the model thinks
        state = transition.sample(torch.randn(1, len(given), len(VOCABULARY)))
        seen.append({i for i in torch.nonzero(transition.words.drawn[0])[:, 0].tolist() if given[i] == "."})
    dots = [i for i, sign in enumerate(given) if sign == "."]
    assert sorted(i for revealed in seen for i in revealed) == dots and MASK not in state[0, 0]
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    if order != "shuffled":
        flat = [i for revealed in seen for i in sorted(revealed, reverse=order == "reverse")]
        assert flat == dots[:: -1 if order == "reverse" else 1]
    assert all(sign in (".", shown) for sign, shown in zip(given, text_of(state[0, 0]), strict=True))


@pytest.mark.parametrize("siblings", [IndependentSiblings(), CorrelatedSiblings(1.0), SimplexSiblings()])
def test_children_of_a_split_keep_the_law(siblings: IndependentSiblings) -> None:
    """By a chi-square test of the first and the last child's digits; the densities are those of what was drawn."""
    given, families = "123+456=....", 3000
    always = torch.tensor([True])
    one = Unmask()(unknown(12)[None], logits(given), torch.ones(1), torch.tensor([0.5]), always)
    noise = siblings.draw(NoiseSource(1, 0), 0, 1, range(families), 3, (12, len(VOCABULARY)))
    for child in (0, 2):
        family = one.rows(torch.zeros(families, dtype=torch.int64))
        following = family.sample(noise[child::3])
        found = following[:, 0]
        assert torch.equal(found[:, :8], tokens_of(["123+456="]).expand(families, -1)) and bool(
            (found[:, 10:] == MASK).all()
        )
        scored = sum(one.words.log_probs[0, i][found[:, i]] for i in (8, 9))
        assert torch.allclose(family.log_prob(following, "sum"), scored)
        for position in (8, 9):
            counts = torch.bincount(found[:, position], minlength=len(VOCABULARY))
            expected = one.words.log_probs[0, position].double().softmax(0) * families
            assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > CHANCE


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(RecipeError, match="velocity"):
        build_unmask(UnmaskConfig(), None, "velocity")


def condition(**metadata: object) -> Condition:
    return Condition("a question", metadata=metadata)


def finished(kind: type[Grids] | type[Texts], *texts: str) -> Grids | Texts:
    """Return samples all of whose tokens were revealed in one step."""
    tokens = tokens_of(texts)
    return kind(tokens, torch.ones_like(tokens))


def test_pictures_show_what_is_right_and_what_is_wrong() -> None:
    """Red where a digit breaks a rule or a sum, and nowhere else."""
    wrong = "1" + SOLVED[1:15] + "2"
    clues = condition(clues=SOLVED[:8] + "." * 8)
    grids = finished(Grids, SOLVED, wrong).show([clues, clues]).pixels
    texts = finished(Texts, "123+456=0579", "123+456=0589").show([condition(a=123, b=456)] * 2).pixels
    for pixels in (grids, texts):
        assert pixels.dtype == torch.float32 and pixels.shape[:3] == (2, 1, 3)
        red = ((pixels[:, 0, 0] > 0.7) & (pixels[:, 0, 1] < 0.4)).flatten(1).any(1)
        assert red.tolist() == [False, True]


@pytest.mark.parametrize("order", ["raster", "reverse"])
def test_pictures_mark_what_each_step_reveals(order: str) -> None:
    """A frame for each step, yellow where the sum's digit of that step is, and nowhere else."""
    given, state = "123+456=....", unknown(12)[None]
    for step in range(4):
        sigma, following = (torch.tensor([1 - each / 4]) for each in (step, step + 1))
        state = Unmask(order)(state, logits(given, step), sigma, following, torch.tensor([True])).sample(
            torch.randn(1, 12, len(VOCABULARY))
        )
    assert state[0, 1].tolist() == [4] * 8 + ([4, 3, 2, 1] if order == "raster" else [1, 2, 3, 4])
    (film,) = Addition(TokenConfig()).decode(state).show([condition(a=123, b=456)]).pixels
    yellow = (film[:, 0] > 0.9) & (film[:, 2] < 0.5)
    columns = [torch.nonzero(frame.any(0)).flatten() for frame in yellow]
    shown = [int(column.float().mean() * 7 / film.shape[-1]) for column in columns]
    assert shown == ([3, 4, 5, 6] if order == "raster" else [6, 5, 4, 3])
    assert all(int(column.max() - column.min()) < film.shape[-1] / 7 for column in columns)


def test_rewards_verify() -> None:
    grids, clues = finished(Grids, SOLVED, SOLVED, "1234" * 4), condition(clues="." * 15 + "1")
    asked = [clues, condition(clues="2" + "." * 15), condition(clues="." * 16)]
    rules, solved = (
        SudokuReward(SudokuConfig(measure=each)).score(grids, asked).values for each in ("rules", "solved")
    )
    assert rules.tolist() == pytest.approx([1, 0, 1 / 3]) and solved.tolist() == [1, 0, 0]
    texts, asked = finished(Texts, "123+456=0579", "123+456=1578"), [condition(a=123, b=456)] * 2
    digits, exact = (AdditionReward(AdditionConfig(measure=m)).score(texts, asked).values for m in ("digits", "exact"))
    assert digits.tolist() == [1, 0.5] and exact.tolist() == [1, 0]


def spoilt(count: int) -> Grids:
    """Return solved grids with as many cells changed as their index says."""
    tokens = solved_grids(False)[:count].clone()
    for i in range(count):
        tokens[i, :i] = tokens[i, :i] % 4 + 1
    return finished(Grids, *map(text_of, tokens))


def answered(count: int) -> Texts:
    """Return one sum with different answers."""
    return finished(Texts, *[f"123+456={answer}" for answer in ("0000", "0500", "0570", "0579", "0009")[:count]])


class TestSudokuReward(RewardPromises):
    """Held to the promises of rewards."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls) -> RewardCase:
        return RewardCase({"reward": "sudoku"}, [condition(clues="." * 16)] * 5, lambda _, count: spoilt(count))


class TestAdditionReward(RewardPromises):
    """Held to the promises of rewards."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls) -> RewardCase:
        return RewardCase({"reward": "addition"}, [condition(a=123, b=456)] * 5, lambda _, count: answered(count))


@pytest.mark.parametrize(
    ("task", "metadata", "message"),
    [
        (Puzzle, {}, "clues"),
        (Puzzle, {"clues": "12"}, "clues"),
        (Puzzle, {"clues": "11" + "." * 14}, "digit twice"),
        (Sum, {"a": 1}, "b: "),
        (Sum, {"a": 1, "b": 1000}, "999"),
    ],
)
def test_wrong_questions_are_named(task: type[Puzzle] | type[Sum], metadata: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"a question.*{message}"):
        condition(**metadata).read(task)
