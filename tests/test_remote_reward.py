"""The ``remote`` reward against real servers: the scores of the reward it stands for, and what a failure costs."""

from __future__ import annotations

import json
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
import torch
from branchtree_rewards.clip.hps import Hps, HpsConfig
from branchtree_rewards.digits import Digits, DigitsConfig
from branchtree_rewards.motion.reward import MotionConfig, MotionSmoothness
from branchtree_rewards.remote import Remote, RemoteConfig
from forked import Python
from patience import PATIENCE
from PIL import Image
from reward_servers import CPU, ENVIRONMENT, SERVED, TOKEN, VARIABLE, Mean, Process, parts, samples, serving
from torch import Tensor

import branchtree
from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media, RewardAdapter
from branchtree.plugins.registry import registry
from branchtree.plugins.scores import ask
from branchtree.recipe.schema import RewardSection

HERE: dict[str, Callable[[], RewardAdapter]] = {
    "digits": lambda: Digits(DigitsConfig()),
    "motion": lambda: MotionSmoothness(MotionConfig(measure="subject")),
    "hps": lambda: Hps(HpsConfig(path="random:small", scale="x100")),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Process]]:
    """A server process for each reward; each ends in order by the signal that it is sent."""
    with ExitStack() as ends:
        started = {kind: ends.enter_context(Process(*words)) for kind, words in SERVED.items()}
        for process in started.values():
            process.await_ready()
        yield started
        told = {"motion": signal.SIGINT, "hps": signal.SIGTERM, "digits": signal.SIGTERM}
        for kind, number in told.items():
            started[kind].send(number)
        codes = {kind: started[kind].ended() for kind in told}
    assert set(codes.values()) == {0}, codes


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TOKEN)


def loaded(url: str, **settings: Any) -> Remote:
    reward = Remote(RemoteConfig(url=url, **{"retries": 0, **settings}))
    reward.load(CPU)
    return reward


def images(*values: float, size: int = 2) -> tuple[Media, list[Condition]]:
    return Media(images=torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, size, size)), [Condition("a")] * len(
        values
    )


# Against processes


def test_two_client_processes_get_the_scores_of_the_reward_itself(
    processes: dict[str, Process], tmp_path: Path
) -> None:
    pixels = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "first.png")
    urls = json.dumps({kind: processes[kind].url for kind in SERVED})
    script = str(Path(__file__).with_name("reward_servers.py"))
    clients = [Python(script, str(seed), str(tmp_path), urls, environment=ENVIRONMENT) for seed in (0, 3)]
    expected = {}
    for kind in SERVED:
        reward = HERE[kind]()
        reward.load(CPU)
        for seed in range(6):
            media, conditions = samples(kind, seed, tmp_path)
            scores = ask(kind, reward, media, conditions)
            assert scores.valid.any()
            assert not scores.valid.all()
            expected[kind, seed] = (parts(scores), dict(scores.reasons))
    for client in clients:
        assert client.ended() == 0, client.err
    for (kind, seed), (tensors, reasons) in expected.items():
        found, found_reasons = torch.load(tmp_path / f"{kind}-{seed}.pt", weights_only=True)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors), (kind, seed)
        assert found_reasons == reasons
    assert "raw" in expected["hps", 0][0]
    assert not torch.equal(expected["motion", 0][0]["values"][0], expected["motion", 0][0]["values"][1:2])


def test_bytes_give_a_published_model_the_same_scores(processes: dict[str, Process], tmp_path: Path) -> None:
    floats, bytes_ = (loaded(processes["hps"].url, token_env=VARIABLE, pixels=how) for how in ("float32", "uint8"))
    asked = samples("hps", 7, tmp_path)
    whole, rounded = floats.score(*asked), bytes_.score(*asked)
    assert torch.equal(whole.valid, rounded.valid)
    assert torch.equal(whole.values[whole.valid], rounded.values[whole.valid])
    assert whole.reasons == rounded.reasons == {3: "pixels are not finite"}
    here = Hps(HpsConfig(path="random:small", scale="x100"))
    here.load(CPU)
    assert floats.fingerprint() == here.fingerprint()
    assert bytes_.fingerprint() != floats.fingerprint()


def test_a_process_serves_only_this_machine_and_tells_what(processes: dict[str, Process]) -> None:
    here = Hps(HpsConfig(path="random:small", scale="x100"))
    here.load(CPU)
    url = processes["hps"].url
    host, port = url.removeprefix("http://").split(":")
    assert processes["hps"].line == f"Serving hps at {url} (fingerprint {here.fingerprint()[:12]})"
    assert processes["digits"].line == f"Serving digits at {processes['digits'].url} (no fingerprint)"
    assert host == "127.0.0.1"
    # Another address of the same machine's own network: a server at 0.0.0.0 would answer there.
    with pytest.raises(OSError, match=r"refused|assign"):
        socket.create_connection(("127.0.0.2", int(port)), timeout=5)


def test_a_process_refuses_a_wrong_hash_a_missing_token_a_large_body_and_what_is_no_image(
    processes: dict[str, Process],
) -> None:
    url = processes["hps"].url
    good = loaded(url, token_env=VARIABLE).fingerprint()
    assert loaded(url, token_env=VARIABLE, fingerprint=good[:12].upper()).fingerprint() == good
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    with pytest.raises(RewardError, match=f"serves 'hps' with fingerprint {good}, not {wrong}"):
        loaded(url, token_env=VARIABLE, fingerprint=wrong)
    with pytest.raises(RewardError, match=r"401.*token is missing or wrong.*name its variable as 'token_env'"):
        loaded(url)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-safetensors"}
    with httpx.Client(trust_env=False, base_url=url) as client:
        assert client.post("/score", content=b"GIF89a", headers=headers).status_code == 400
        assert client.post("/score", content=b"GIF89a").status_code == 401
    # A head that announces more than 256 MiB is enough to be refused.
    lines = [f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": 2**28 + 1}.items()]
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=PATIENCE) as raw:
        raw.sendall(f"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\n{''.join(lines)}\r\n".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_killed_server_costs_samples_until_it_is_back(tmp_path: Path) -> None:
    with Process(*SERVED["digits"]) as process:
        process.await_ready()
        url = process.url
        reward, asked = loaded(url, token_env=VARIABLE), samples("digits", 0, tmp_path)
        before = reward.score(*asked)
        assert before.valid.tolist() == [True, True, False, False]
        process.send(signal.SIGKILL)
        process.ended()
    during = reward.score(*asked)
    assert not during.valid.any()
    assert during.values.isnan().all()
    assert list(during.reasons) == [0, 1, 2, 3]
    assert f"no answer from {url}/score" in during.reasons[0]
    options, port = {"classifier": "reward", "measure": "log_prob"}, int(url.rpartition(":")[2])
    again = Digits(DigitsConfig())
    with serving(again, name="digits", options=options, token=TOKEN, port=port):
        after = reward.score(*asked)
    assert after.reasons == before.reasons
    assert torch.equal(parts(after)["values"], parts(before)["values"])
    assert torch.equal(after.valid, before.valid)


# What is compared at the start, and on the way


class Named(Mean):
    """A reward with a fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        return self._fingerprint


def test_a_server_that_came_back_with_another_checkpoint_ends_the_run() -> None:
    with serving(Named("a" * 64), options={"batch": 1}) as url:
        reward = loaded(url)
        assert reward.score(*images(1.0)).values.tolist() == [1.0]
    port = int(url.rpartition(":")[2])
    with serving(Named("a" * 64), options={"batch": 2}, port=port):
        assert reward.score(*images(2.0)).values.tolist() == [2.0]
    with serving(Named("b" * 64), port=port), pytest.raises(RewardError, match=r"409.*another.*fingerprint bbbb"):
        reward.score(*images(1.0))


def test_a_reward_without_fingerprint_is_known_by_its_options() -> None:
    with serving(Mean(), options={"of": "all"}) as url:
        reward = loaded(url)
        first = reward.fingerprint()
    with serving(Mean(), options={"of": "some"}, port=int(url.rpartition(":")[2])):
        assert loaded(url).fingerprint() != first
        with pytest.raises(RewardError, match="409"):
            reward.score(*images(1.0))


def test_the_server_must_be_the_one_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Mean()) as url:
        with pytest.raises(RewardError, match="serves 'mean', not 'hps'"):
            loaded(url, serves="hps")
        with pytest.raises(RewardError, match="serves 'mean' with fingerprint None, not 0123456789ab"):
            loaded(url, fingerprint="0123456789ab")
        with pytest.raises(RewardError, match="serves 'mean', which scores image, not video"):
            loaded(url, modality="video")
        assert loaded(url, serves="mean", modality="image").modalities == {"image"}
        monkeypatch.setattr(branchtree, "__version__", "9.9")
        with pytest.raises(RewardError, match=r"runs branchtree \d.*, and this is 9\.9.*check_version: false"):
            loaded(url)
        assert loaded(url, check_version=False).score(*images(1.0)).valid.all()


def test_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Mean(), token=TOKEN) as url:
        assert loaded(url, token_env=VARIABLE).score(*images(1.0)).valid.all()
        monkeypatch.setenv(VARIABLE, "another")
        with pytest.raises(RewardError, match=f"401.*check the token in {VARIABLE}") as told:
            loaded(url, token_env=VARIABLE)
        assert "another" not in str(told.value)
        monkeypatch.delenv(VARIABLE)
        with pytest.raises(RewardError, match=f"{VARIABLE} is not set"):
            loaded(url, token_env=VARIABLE)


def test_a_server_can_be_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(RewardError, match=r"no answer from .*start 'branchtree serve-reward' there"):
        loaded(url)
    found: list[Remote] = []
    waiting = threading.Thread(target=lambda: found.append(loaded(url, wait=PATIENCE)))
    waiting.start()
    time.sleep(0.1)
    with serving(Mean(), port=port):
        waiting.join(PATIENCE)
        assert found
        assert found[0].score(*images(1.0)).valid.all()


def test_what_is_no_server_of_rewards_is_told() -> None:
    with serving(Mean()) as url, pytest.raises(RewardError, match="404"):
        loaded(f"{url}/elsewhere")


# Samples


class Odd(Mean):
    """Notes the sizes of its calls; fails where a sample is 13."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.calls.append(len(media))
        if (media.pixels == 13).any():
            raise ValueError("unlucky")
        return super().score(media, conditions)


class Group(Odd):
    """Must see whole groups."""

    groupwise = True


def test_samples_on_which_the_reward_fails_are_not_valid() -> None:
    with serving(Odd()) as url:
        reward = loaded(url)
        scores = reward.score(*images(1.0, 13.0))
        assert scores.valid.tolist() == [False, False]
        assert "reward 'mean' failed: ValueError: unlucky" in scores.reasons[1]
        assert reward.score(*images(7.0)).values.tolist() == [7.0]


def test_more_than_the_server_reads_is_sent_in_parts() -> None:
    reward = Odd()
    with serving(reward, max_body=3000) as url:
        # A sample of 16x16 floats takes 1024 bytes: two fit, with their conditions, and three do not.
        scores = loaded(url).score(*images(1.0, 2.0, 3.0, 13.0, 5.0, size=16))
        assert scores.values[:2].tolist() == [1.0, 2.0]
        assert scores.valid.tolist() == [True, True, True, False, False]
        assert list(scores.reasons) == [3, 4]
        assert reward.calls == [2, 1, 2]
        whole = loaded(url, pixels="uint8").score(*images(0.0, 1.0, 0.0, 1.0, 1.0, size=16))
        assert whole.values.tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
        assert reward.calls[3:] == [5]
        with pytest.raises(
            RewardError, match=r"one sample takes 0\.\d MiB.*reads 0\.00.*--max-body, or set pixels: uint8"
        ):
            loaded(url).score(*images(1.0, size=32))


@pytest.mark.parametrize("kind", [Odd, Group])
def test_bytes_leave_out_what_they_cannot_show(kind: type[Odd]) -> None:
    """Else the reward would see a picture that nobody made, and score the others beside it."""
    reward = kind()
    with serving(reward) as url:
        scores = loaded(url, pixels="uint8").score(*images(1.0, math.nan, math.inf, 0.0))
        assert scores.valid.tolist() == [True, False, False, True]
        assert scores.values[scores.valid].tolist() == [1.0, 0.0]
        assert scores.values[~scores.valid].isnan().all()
        assert scores.reasons == dict.fromkeys((1, 2), "pixels are not finite")
        assert not loaded(url, pixels="uint8").score(*images(math.nan)).valid.any()
    assert reward.calls == [2]


def test_a_group_is_never_divided() -> None:
    group = Group()
    with serving(group, max_body=3000) as url:
        reward = loaded(url)
        assert (Remote(RemoteConfig(url=url)).groupwise, reward.groupwise) == (False, True)
        with pytest.raises(RewardError, match="a group of samples takes"):
            reward.score(*images(1.0, 2.0, 3.0, size=16))
        assert group.calls == []


def test_what_does_not_fit_together_is_an_error() -> None:
    media, conditions = images(1.0)
    with serving(Mean()) as url:
        reward = loaded(url)
        with pytest.raises(ValueError, match="1 samples came with 2 conditions"):
            reward.score(media, conditions * 2)
        with pytest.raises(ValueError, match="scores image, not video"):
            reward.score(Media(videos=media.pixels[None]), conditions)
    with pytest.raises(RuntimeError, match="load"):
        Remote(RemoteConfig(url=url)).score(media, conditions)


def test_bytes_return_as_the_same_bytes() -> None:
    from branchtree_rewards.shared.pixels import to_uint8

    every: Tensor = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 255), every)


@pytest.mark.parametrize("wrong", [{"url": "localhost:80"}, {"fingerprint": "abc"}, {"retries": -1}, {"pixels": "png"}])
def test_wrong_settings_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        RemoteConfig.model_validate({"url": "http://127.0.0.1:1", **wrong})


def test_no_setting_has_the_name_of_a_recipes_own_key() -> None:
    assert not RemoteConfig.model_fields.keys() & RewardSection.model_fields.keys()


def test_the_reward_is_registered_for_both_modalities() -> None:
    entry = registry().reward("remote")
    assert entry.build(RemoteConfig(url="http://127.0.0.1:1")).modalities == {"image", "video"}
    assert entry.build(RemoteConfig(url="http://127.0.0.1:1", modality="video")).modalities == {"video"}
