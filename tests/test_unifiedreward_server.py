"""The `unifiedreward` reward behind a server that is absent, slow, dying or wrong: leaves are masked, none is invented.

The server gives brightness b the score 1 + 4 b. Pictures are flat, so that the expected scores follow from the bytes.
"""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from branchtree_rewards.unifiedreward.reward import UnifiedReward, UnifiedRewardConfig
from patience import PATIENCE
from PIL import Image
from torch import Tensor
from unified_server import Fault, FaultyServer, Question, faulty_server

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media

CPU = torch.device("cpu")
LEVELS = (0, 51, 102, 153, 204, 255)


def flat(levels: Sequence[int] = LEVELS, size: int = 16) -> Media:
    return Media(images=torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size) / 255)


def expected(levels: Sequence[int] = LEVELS) -> Tensor:
    return torch.tensor([1 + 4 * level / 255 for level in levels])


def loaded(server: FaultyServer, **settings: Any) -> UnifiedReward:
    reward = UnifiedReward(UnifiedRewardConfig(**{"server": server.url, "retries": 0, "timeout": PATIENCE, **settings}))
    reward.load(CPU)
    return reward


def scored(reward: UnifiedReward, levels: Sequence[int] = LEVELS) -> Scores:
    return reward.score(flat(levels), [Condition(f"a square of brightness {level}") for level in levels])


def assert_all_masked(scores: Scores, reason: str) -> None:
    assert not scores.valid.any()
    assert scores.values.isnan().all()
    assert all(reason in scores.reasons[row] for row in range(len(scores))), scores.reasons


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_healthy_server_scores_and_the_model_is_the_one_it_lists() -> None:
    with faulty_server() as server:
        scores = scored(loaded(server, scale="div5"))
    torch.testing.assert_close(scores.raw, expected(), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.values, expected() / 5, atol=1e-4, rtol=0)
    assert scores.valid.all()
    assert scores.reasons == {}
    torch.testing.assert_close(scores.details["style"], expected(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("image_format", "kind"), [("jpeg", "JPEG"), ("png", "PNG")])
def test_the_request_is_the_one_that_public_servers_take(image_format: str, kind: str) -> None:
    with faulty_server() as server:
        scored(loaded(server, image_format=image_format, max_tokens=77, template="score", resize=32), [128])
        asked = server.questions[0]
    assert asked.picture.format == kind
    assert asked.picture.size == (32, 32)
    assert asked.picture.getpixel((3, 3)) == (128, 128, 128)
    assert asked.text.endswith("Text Caption: [a square of brightness 128]")
    assert asked.body | {"messages": None} == {
        "model": "UnifiedReward",
        "messages": None,
        "temperature": 0,
        "max_tokens": 77,
    }
    (message,) = asked.body["messages"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][0]["image_url"]["url"].startswith(f"data:image/{image_format};base64,")


def test_jpeg_pictures_have_quality_95() -> None:
    noise = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    stream = io.BytesIO()
    array = (noise[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(stream, format="JPEG", quality=95)
    with faulty_server() as server:
        loaded(server).score(Media(images=noise), [Condition("noise")])
        url = server.questions[0].body["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.split(",")[1]) == stream.getvalue()


def test_order_is_kept_when_late_questions_are_answered_first() -> None:
    levels = list(range(0, 240, 20))
    arrived = threading.Barrier(len(levels))

    def brighter_is_quicker(question: Question) -> str:
        arrived.wait(PATIENCE)
        time.sleep(0.3 * (1 - question.brightness))
        return "fine"

    with faulty_server(brighter_is_quicker) as server:
        scores = scored(loaded(server, concurrency=len(levels)), levels)
        assert server.most_under_way == len(levels)
    torch.testing.assert_close(scores.raw, expected(levels), atol=1e-4, rtol=0)


def test_no_more_questions_are_under_way_than_allowed() -> None:
    three = threading.Barrier(3)

    def in_threes(question: Question) -> Fault:
        three.wait(PATIENCE)
        return "slow"  # so that one more would be seen

    with faulty_server(in_threes, delay=0.05) as server:
        assert scored(loaded(server, concurrency=3), range(0, 180, 20)).valid.all()
        assert server.most_under_way == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "500 Internal Server Error: no room on the device"),
        ("400", "400 Bad Request: no room on the device"),
        ("dies", "no answer from"),
        ("malformed", "not JSON"),
        ("no_choices", "no chat completion"),
        ("no_text", "has no text"),
        ("truncated", "cut off"),
        ("nan", "no number follows 'Alignment Score (1-5):'"),
        ("ten", "is not between 1 and 5"),
        ("silent", "it is empty"),
    ],
)
def test_a_fault_masks_the_leaves_that_met_it_and_no_other(fault: str, reason: str) -> None:
    def dark_ones_fail(question: Question) -> str:
        return fault if question.brightness < 0.5 else "fine"

    with faulty_server(dark_ones_fail) as server:
        scores = scored(loaded(server))
    assert scores.valid.tolist() == [False] * 3 + [True] * 3
    torch.testing.assert_close(scores.values[3:], expected()[3:], atol=1e-4, rtol=0)
    assert scores.values[:3].isnan().all()
    assert list(scores.reasons) == [0, 1, 2]
    assert all(reason in text for text in scores.reasons.values()), scores.reasons


def test_a_score_that_was_cut_off_is_no_score() -> None:
    with faulty_server("truncated_number") as server:
        assert_all_masked(scored(loaded(server, template="score")), "cut off within the number")


def test_slow_answers_are_given_up_within_the_timeout() -> None:
    with faulty_server("slow", delay=PATIENCE) as server:
        assert_all_masked(scored(loaded(server, timeout=0.3, wait=PATIENCE)), "within 0.3 s")


def test_an_answer_that_comes_drop_by_drop_is_given_up_within_the_timeout() -> None:
    with faulty_server("drips") as server:
        assert_all_masked(scored(loaded(server, timeout=0.4, wait=PATIENCE), [10, 20]), "within 0.4 s")


@pytest.mark.parametrize("fault", ["500", "dies"])
def test_what_passes_is_asked_again(fault: str) -> None:
    asked: set[str] = set()

    def first_time_fails(question: Question) -> str:
        first = question.text not in asked
        asked.add(question.text)
        return fault if first else "fine"

    with faulty_server(first_time_fails) as server:
        scores = scored(loaded(server, retries=1))
        assert len(server.questions) == 2 * len(LEVELS)
    assert scores.valid.all()
    torch.testing.assert_close(scores.raw, expected(), atol=1e-4, rtol=0)


def test_what_does_not_pass_is_not_asked_again() -> None:
    with faulty_server("400") as server:
        assert_all_masked(scored(loaded(server, retries=5)), "400 Bad Request")
        assert len(server.questions) == len(LEVELS)


def test_retries_are_bounded() -> None:
    with faulty_server("500") as server:
        assert_all_masked(scored(loaded(server, retries=2), [1, 2]), "500")
        assert len(server.questions) == 2 * 3


def test_a_server_that_goes_away_and_comes_back() -> None:
    with faulty_server() as server:
        reward = loaded(server)
        assert scored(reward).valid.all()
    assert_all_masked(scored(reward), "no answer from")
    with faulty_server(port=server.port):
        assert scored(reward).valid.all()


def test_an_absent_server_is_an_error_that_says_what_to_start() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    reward = UnifiedReward(UnifiedRewardConfig(server=url))
    with pytest.raises(RewardError, match=r"not ready: no answer from .*start it, for example with 'vllm serve"):
        reward.load(CPU)
    with pytest.raises(RuntimeError, match="not loaded"):
        scored(reward)


def test_a_server_that_is_still_starting_is_waited_for() -> None:
    port = free_port()
    started: list[FaultyServer] = []
    timer = threading.Timer(
        0.4, lambda: started.append(FaultyServer("fine", ["UnifiedReward"], None, delay=1, port=port))
    )
    timer.start()
    try:
        reward = UnifiedReward(UnifiedRewardConfig(server=f"http://127.0.0.1:{port}/v1", wait=PATIENCE))
        reward.load(CPU)
        assert scored(reward).valid.all()
    finally:
        timer.join()
        started[0].stop()


def test_a_key_is_taken_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with faulty_server(key="open sesame") as server:
        with pytest.raises(RewardError, match=r"wants a key: .*401.*'api_key_env'"):
            loaded(server)
        with pytest.raises(RewardError, match="no variable of that name"):
            loaded(server, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "open sesame")
        reward = loaded(server, api_key_env="JUDGE_KEY")
        assert scored(reward).valid.all()
        server.key = "another"
        assert_all_masked(scored(reward), "401 Unauthorized")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with faulty_server() as server:
        assert scored(loaded(server)).valid.all()


def test_which_model_is_asked() -> None:
    with faulty_server(models=("one", "two")) as server:
        with pytest.raises(RewardError, match=r"lists 2 models \('one', 'two'\); name the one to use as 'model'"):
            loaded(server)
        with pytest.raises(RewardError, match=r"does not serve 'three': .*404.*lists 'one', 'two'"):
            loaded(server, model="three")
        scored(loaded(server, model="two"), [7])
        assert server.questions[-1].body["model"] == "two"


def test_a_url_without_v1_is_told() -> None:
    with faulty_server() as server, pytest.raises(RewardError, match="ends in /v1"):
        UnifiedReward(UnifiedRewardConfig(server=server.url.removesuffix("/v1"))).load(CPU)


def test_a_sample_that_is_not_finite_is_not_sent() -> None:
    media = flat([51, 102, 153])
    assert media.images is not None
    images = media.images.clone()
    images[1, 0, 3, 3] = torch.nan
    with faulty_server() as server:
        scores = loaded(server).score(Media(images=images), [Condition("a"), Condition("b"), Condition("c")])
        assert len(server.questions) == 2
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons == {1: "pixels are not finite"}
    torch.testing.assert_close(scores.raw[::2], expected([51, 153]), atol=1e-4, rtol=0)


def test_fingerprints_tell_served_models_and_settings_apart() -> None:
    with faulty_server(models=("one", "two")) as server, faulty_server(models=("one",)) as other:
        print_of = lambda where, **settings: loaded(where, **settings).fingerprint()  # noqa: E731
        one = print_of(server, model="one")
        assert one == print_of(other, concurrency=2, timeout=7)
        different = [{"model": "two"}, {"model": "one", "template": "acs_v2"}, {"model": "one", "image_format": "png"}]
        assert len({one, *(print_of(server, **settings) for settings in different)}) == 4
