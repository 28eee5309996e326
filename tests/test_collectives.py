"""Two processes make the same collective calls, whatever each has to do: in order, in kind and in number."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import lockstep_worker
import pytest
from forked import context
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from patience import PATIENCE


class Pair:
    """Two gloo processes that run schedules together."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._failure: str | None = None
        ends = [context().Pipe() for _ in range(2)]
        self._pipes = [ours for ours, _ in ends]
        self._processes = [
            context().Process(target=lockstep_worker.serve, args=(rank, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process, (_, theirs) in zip(self._processes, ends, strict=True):
            process.start()
            theirs.close()  # so that its end is seen

    def run(self, schedule: dict[str, Any]) -> list[dict[str, Any]]:
        """What both processes answer; fails, naming the schedule, if one raises or does not answer."""
        answers: list[dict[str, Any]] = []
        if self._failure is None:
            for pipe in self._pipes:
                pipe.send(schedule)
            answers = [self._answer(rank, schedule) for rank in range(2)]
        if self._failure is not None:  # hypothesis runs a failing example again, when both have ended
            self.close()
            pytest.fail(self._failure)
        return answers

    def _answer(self, rank: int, schedule: dict[str, Any]) -> dict[str, Any]:
        pipe = self._pipes[rank]
        try:
            ready = pipe.poll(PATIENCE if self._failure is None else 5)
            answer = pipe.recv() if ready else "no answer: it hangs"
        except EOFError:
            answer = "it ended"
        if isinstance(answer, str):
            self._failure = f"{self._failure or schedule}\nprocess {rank}: {answer}"
            return {}
        found: dict[str, Any] = answer
        return found

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    both = Pair()
    yield both
    both.close()


@st.composite
def plan(draw: st.DrawFn, steps: int) -> dict[str, Any]:
    stochastic = [draw(st.booleans()) for _ in range(steps - 1)] + [False]
    factors = [draw(st.integers(1, 3)) if flag else 1 for flag in stochastic]
    return {"factors": factors, "stochastic": stochastic}


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(2, 4))
    ranks = [
        {
            "plans": draw(st.lists(plan(steps), min_size=1, max_size=3)),
            "seed": draw(st.integers(0, 9)),
            "kept": draw(st.sampled_from([0.0, 0.3, 1.0])),
        }
        for _ in range(2)
    ]
    return {
        "ranks": ranks,
        "sharded": draw(st.booleans()),
        "reduce_once": draw(st.booleans()),
        "kl": draw(st.booleans()),
        "rollout_rows": draw(st.sampled_from([None, 1, 2])),
        "update_rows": draw(st.sampled_from([None, 1, 2])),
        "steps": draw(st.integers(1, 3)),
        "old_log_prob": draw(st.sampled_from(["rollout", "recomputed"])),
    }


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Stage.generate],
    suppress_health_check=list(HealthCheck),
)
@given(schedule=schedules())
def test_no_schedule_hangs(pair: Pair, schedule: dict[str, Any]) -> None:
    first, second = pair.run(schedule)
    assert first["sharded"] == second["sharded"] == schedule["sharded"]
    assert first["steps"] == second["steps"]
    assert first["collectives"] == second["collectives"]
    gathered = [name for name, _ in first["collectives"] if name.startswith(("all_gather_single", "all_gather_into"))]
    assert bool(gathered) == schedule["sharded"]  # weights
    assert (first["steps"][0] > 0) == (first["edges"] + second["edges"] > 0)
    if schedule["sharded"]:
        assert first["calls"] == second["calls"]
        assert second["weights"] == {}  # whole tensors are kept by the main process alone
    else:
        assert first["weights"] == second["weights"]


BUSY = {"plans": [{"factors": [2, 2, 1], "stochastic": [True, True, False]}] * 3, "seed": 1, "kept": 1.0}
IDLE = {"plans": [{"factors": [1, 1, 1], "stochastic": [False, False, False]}], "seed": 1, "kept": 0.0}


@pytest.mark.parametrize("ranks", [(BUSY, IDLE), (IDLE, BUSY)], ids=["the second", "the first"])
def test_a_process_with_nothing_to_train_learns_what_the_other_does(pair: Pair, ranks: tuple[Any, Any]) -> None:
    common = {"ranks": list(ranks), "kl": True, "rollout_rows": 1, "update_rows": 1, "steps": 2}
    common |= {"old_log_prob": "recomputed"}
    weights = []
    for sharded, reduce_once in [(False, False), (True, False), (True, True)]:
        first, second = pair.run({**common, "sharded": sharded, "reduce_once": reduce_once})
        assert first["steps"] == second["steps"] == (2, 0)
        weights.append(first["weights"])
    for name, values in weights[0].items():
        for other in weights[1:]:
            assert _flat(other[name]) == pytest.approx(_flat(values), rel=1e-5, abs=1e-6), name


def _flat(values: list[Any]) -> list[float]:
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("sharded", [False, True])
def test_what_fails_on_one_process_fails_on_the_other(pair: Pair, sharded: bool) -> None:
    """So that it does not wait; in a forward that all make together, that holds of rewards alone."""
    cases = {
        (None, None): ("done", "done"),
        (None, "reward"): ("RewardError: no judge", "RewardError: no judge"),
        ("value", "reward"): ("ValueError: no judge", "RewardError: no judge"),
        ("value", None): ("ValueError: no judge", "BranchTreeError: another process failed: ValueError: no judge"),
    }
    for errors, expected in cases.items():
        if not (sharded and "value" in errors):
            answers = pair.run({"errors": errors, "sharded": sharded})
            assert tuple(answer["came"] for answer in answers) == expected
