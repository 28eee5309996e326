"""The server of rewards: what it reads, whom it refuses, in what order it works, and how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from guests import Outcome
from patience import PATIENCE
from reward_servers import CPU, TOKEN, VARIABLE, Mean, parts, serving
from safetensors.torch import save
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media
from branchtree.serving import service as service_module
from branchtree.serving.access import admits, read_token
from branchtree.serving.server import RewardServer, bind
from branchtree.serving.service import NamedAdapter, Service
from branchtree.serving.wire import (
    CONTENT_TYPE,
    ScoreRequest,
    WireError,
    decode_request,
    decode_scores,
    encode_request,
    encode_scores,
)

ODD = [0.1, -0.0, math.nan, math.inf, 1e-45, 1.0]  # what rounding or text would spoil
TYPE = {"Content-Type": CONTENT_TYPE}


def post(url: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/score", content=body, headers=TYPE | headers, timeout=PATIENCE, trust_env=False)


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, timeout=PATIENCE, trust_env=False)


def pixels_of(request: ScoreRequest) -> Tensor:
    assert isinstance(request.media, Media)
    return request.media.pixels


def asking(value: float, count: int = 1) -> bytes:
    return encode_request(Media(images=torch.full((count, 1, 2, 2), value)), [Condition("a prompt")] * count)


def means(answer: httpx.Response, count: int = 1) -> list[float]:
    assert answer.status_code == 200, answer.text
    values: list[float] = decode_scores(answer.content, count).values.tolist()
    return values


# The wire format


def test_a_request_arrives_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "first.png").write_bytes(b"\x89PNG and more")
    (tmp_path / "clip.MP4").write_bytes(bytes(range(256)))
    pixels = torch.tensor(ODD).view(2, 1, 3, 1, 1).transpose(1, 2)
    conditions = [
        Condition(
            'a 猫 "quoted"\n',
            "blurry",
            image=tmp_path / "first.png",
            last_image=tmp_path / "first.png",
            metadata={"a": [1, None, {"b": 0.1}], "huge": 2**70},
            location="prompts.jsonl:1",
        ),
        Condition("", video=tmp_path / "clip.MP4"),
    ]
    conditions[1] = replace(conditions[1], further_images=(tmp_path / "clip.MP4", tmp_path / "first.png"))
    (tmp_path / "server").mkdir()
    request = decode_request(encode_request(Media(videos=pixels, fps=8.0), conditions), tmp_path / "server")
    assert torch.equal(pixels_of(request).view(torch.int32), pixels.contiguous().view(torch.int32))
    assert isinstance(request.media, Media) and (request.media.modality, request.media.fps) == ("video", 8.0)
    first, second = request.conditions
    assert (first.prompt, first.negative_prompt, first.location) == ('a 猫 "quoted"\n', "blurry", "prompts.jsonl:1")
    assert first.metadata == {"a": [1, None, {"b": 0.1}], "huge": 2**70}
    assert first.image == first.last_image
    assert first.image and first.image.read_bytes() == b"\x89PNG and more"
    assert second.video and (second.video.read_bytes(), second.video.suffix) == (bytes(range(256)), ".MP4")
    assert (second.image, second.negative_prompt, second.metadata) == (None, None, {})
    assert second.further_images == (second.video, first.image)


def test_a_condition_without_further_images_is_sent_as_to_older_servers() -> None:
    body = encode_request(Media(images=torch.zeros(1, 3, 2, 2)), [Condition("a", image=Path("gone.png"))])
    assert b"further_images" not in body and b"gone.png" in body


def test_bytes_stand_for_255ths(tmp_path: Path) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    request = decode_request(encode_request(Media(images=pixels), [Condition("all")]), tmp_path)
    assert pixels_of(request).dtype == torch.float32
    assert torch.equal((pixels_of(request).double() * 255).round(), pixels.double())


def test_scores_arrive_to_the_bit() -> None:
    raw = torch.tensor(ODD)
    scores = Scores(raw, raw.isfinite(), raw, {"text.alignment": raw.flip(0)}, {2: "no 'score'", 3: "名"})
    found = decode_scores(encode_scores(scores), len(ODD))
    expected = {"values": raw, "raw": raw, "text.alignment": raw.flip(0)}
    assert parts(found).keys() == {"valid", *expected}
    for name, tensor in expected.items():
        assert torch.equal(parts(found)[name], tensor.view(torch.int32))
    assert torch.equal(found.valid, raw.isfinite())
    assert found.reasons == {2: "no 'score'", 3: "名"}
    bare = decode_scores(encode_scores(Scores(raw, raw.isfinite())), len(ODD))
    assert (bare.raw, bare.details, bare.reasons) == (None, {}, {})


def message(pixels: Tensor | None = None, /, tensors: dict[str, Tensor] | None = None, **header: Any) -> bytes:
    """A request made by hand: right but for what is given."""
    request = {"modality": "image", "conditions": [{"prompt": "a prompt"}]} | header
    own = {"pixels": torch.zeros(1, 3, 2, 2) if pixels is None else pixels, **(tensors or {})}
    return save(own, {"request": json.dumps(request)})


SOUND = save({"samples.wave": torch.zeros(1)}, {"request": '{"modality": "sound", "conditions": [{"prompt": "a"}]}'})
WRONG = {
    "not safetensors": (b"hello", "not safetensors"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not safetensors"),
    "cut short": (message()[:-1], "not safetensors"),
    "no header": (save({"pixels": torch.zeros(1, 3, 2, 2)}), "'request' is not right"),
    "not JSON": (save({"pixels": torch.zeros(1, 3, 2, 2)}, {"request": "[" * 10_000}), "'request' is not right"),
    "no pixels": (save({"more": torch.zeros(1)}, {"request": '{"modality": "image", "conditions": []}'}), "'pixels'"),
    "a tensor more": (message(tensors={"more": torch.zeros(1)}), "must be 'pixels'"),
    "doubles": (message(torch.zeros(1, 3, 2, 2, dtype=torch.float64)), "float32 or uint8, not float64"),
    "one axis too few": (message(torch.zeros(3, 2, 2)), r"images must be \(B, C, H, W\), not \(3, 2, 2\)"),
    "one axis too many": (message(torch.zeros(1, 1, 3, 2, 2)), r"images must be \(B, C, H, W\)"),
    "images as a video": (message(modality="video"), r"videos must be \(B, F, C, H, W\)"),
    "nothing": (message(torch.zeros(0, 3, 2, 2), conditions=[]), r"not \(0, 3, 2, 2\)"),
    "too few conditions": (message(torch.zeros(2, 3, 2, 2)), "2 samples came with 1 conditions"),
    "a kind that nobody registers": (SOUND, "no plug-in here registers the samples 'sound'"),
    "a prompt that is none": (message(conditions=[{"prompt": 3}]), "at conditions.0.prompt"),
    "an unknown key": (message(conditions=[{"prompt": "a", "path": "/etc/passwd"}]), "conditions.0.path: Extra"),
    "a file that nobody names": (message(tensors={"file.0": torch.zeros(2)}), "at most one 'file.N' for each file"),
    "a file's number too high": (message(conditions=[{"prompt": "a", "image": 0}]), "names a file that was not sent"),
    "a file's number below 0": (message(conditions=[{"prompt": "a", "image": -1}]), "names a file that was not sent"),
    "a file of floats": (message(files=[""], tensors={"file.0": torch.zeros(2)}), "'file.0' of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_request_is_refused(how: str, tmp_path: Path) -> None:
    body, reason = WRONG[how]
    with pytest.raises(WireError, match=reason):
        decode_request(body, tmp_path)


@pytest.mark.parametrize("ending", ["/../../x", ".png/../x", "..", ".p\0ng", ".averylongending", "x"])
def test_no_client_chooses_where_a_file_is_written(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    content = {"file.0": torch.ones(3, dtype=torch.uint8)}
    decode_request(message(tensors=content, files=[ending], conditions=[{"prompt": "a", "image": 0}]), folder)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["inside", "inside/0"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"values": torch.zeros(2)},
        {"values": torch.zeros(3), "valid": torch.ones(3, dtype=torch.bool)},
        {"values": torch.zeros(2), "valid": torch.ones(2)},
        {"values": torch.zeros(2), "valid": torch.ones(2, dtype=torch.bool), "raw": torch.zeros(1)},
    ],
)
def test_a_wrong_answer_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(WireError):
        decode_scores(save(tensors), 2)
    with pytest.raises(WireError, match="not safetensors"):
        decode_scores(b"<html>", 2)


def test_a_file_that_cannot_be_read_is_missing_there_too(tmp_path: Path) -> None:
    """Whether that matters is for the reward to say, in whose words the file has its name on the client's side."""
    (tmp_path / "empty.png").touch()
    conditions = [Condition("a", image=tmp_path / "none.png"), Condition("b", image=tmp_path / "empty.png")]
    (tmp_path / "server").mkdir()
    request = decode_request(encode_request(Media(images=torch.zeros(2, 3, 2, 2)), conditions), tmp_path / "server")
    missing, empty = (one.image for one in request.conditions)
    assert missing and not missing.exists() and missing.suffix == ".png"
    assert empty and empty.read_bytes() == b""
    told = request.in_words_of_client(f"no '{missing}', and nothing in '{empty}'")
    assert told == f"no '{tmp_path / 'none.png'}', and nothing in '{tmp_path / 'empty.png'}'"


def test_a_prompt_arrives_even_if_it_is_no_whole_text(tmp_path: Path) -> None:
    condition = Condition("a \ud83d cat\0", "\udcff", metadata={"\udcff": "\ud83d"}, location="\udcff.jsonl:1")
    [arrived] = decode_request(encode_request(Media(images=torch.zeros(1, 3, 2, 2)), [condition]), tmp_path).conditions
    assert (arrived, arrived.location) == (condition, condition.location)


def test_what_cannot_be_sent_is_an_error() -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    with pytest.raises(RewardError, match="keep to JSON"):
        encode_request(Media(images=pixels), [Condition("a", metadata={"of": {1, 2}})])


# Who is refused


def test_only_who_shows_the_token_is_served() -> None:
    with serving(Mean(), token=TOKEN) as url:
        assert get(f"{url}/health").json() == {"status": "ready"}
        for wrong in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            for answer in (get(f"{url}/info", **wrong), post(url, asking(1.0), **wrong)):
                assert answer.status_code == 401
                assert "token is missing or wrong" in answer.json()["detail"]
                assert TOKEN not in answer.text
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert get(f"{url}/info", **right).json()["reward"] == "mean"
        assert means(post(url, asking(3.0), **right)) == [3.0]


def test_tokens_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RewardError, match=f"{VARIABLE} is not set"):
        read_token(VARIABLE)
    monkeypatch.setenv(VARIABLE, " \n")
    with pytest.raises(RewardError, match="or empty"):
        read_token(VARIABLE)
    monkeypatch.setenv(VARIABLE, "sécret")
    with pytest.raises(RewardError, match="printable ASCII") as told:
        read_token(VARIABLE)
    assert "sécret" not in str(told.value)
    assert read_token(None) is None
    assert admits(None, None)
    assert not admits("token", "Bearer tökén")


def test_a_large_body_is_refused_before_and_while_it_is_read() -> None:
    with serving(Mean(), max_body=2000) as url:
        assert get(f"{url}/info").json()["max_body"] == 2000
        whole = post(url, bytes(2001))
        piecewise = post(url, iter([bytes(1000)] * 3))
        for answer in (whole, piecewise):
            assert answer.status_code == 413
            assert "--max-body" in answer.json()["detail"]
        assert means(post(url, iter([asking(5.0)]))) == [5.0]


def test_other_requests_are_refused_with_a_reason() -> None:
    with serving(Mean()) as url:
        picture = post(url, b"\x89PNG\r\n\x1a\n" + bytes(100), **{"Content-Type": "image/png"})
        assert (picture.status_code, picture.json()["detail"]) == (
            415,
            f"the content type must be {CONTENT_TYPE}, not 'image/png'",
        )
        spoilt = post(url, b"\x89PNG\r\n\x1a\n" + bytes(100))
        assert (spoilt.status_code, "not safetensors" in spoilt.json()["detail"]) == (400, True)
        video = post(url, encode_request(Media(videos=torch.zeros(1, 2, 3, 4, 4), fps=8.0), [Condition("a")]))
        assert (video.status_code, video.json()["detail"]) == (400, "reward 'mean' scores images, not videos")
        assert get(f"{url}/score").status_code == 405
        assert get(f"{url}/docs").status_code == 404
        assert means(post(url, asking(2.0))) == [2.0]


# How it works


class Failing(Mean):
    """Fails in different ways, by the prompt."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        prompt = conditions[0].prompt
        if prompt == "raise":
            raise ZeroDivisionError("one line\nand another")
        if prompt == "short":
            return Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool))
        return super().score(media, conditions)


def test_a_failing_reward_is_reported_and_the_server_lives_on() -> None:
    with serving(Failing()) as url:
        for prompt, reason in (
            ("raise", "reward 'mean' failed: ZeroDivisionError: one line and another"),
            (
                "short",
                "reward 'mean' must give 1 values and valid flags for as many samples, as "
                "branchtree.plugins.Scores says, but its 'values' has the shape (3,), not (1,)",
            ),
        ):
            answer = post(url, encode_request(Media(images=torch.zeros(1, 1, 2, 2)), [Condition(prompt)]))
            assert (answer.status_code, answer.json()["detail"]) == (500, reason)
        assert means(post(url, asking(4.0))) == [4.0]


class Slow(Mean):
    """Takes its time, or as long as it is held, and notes who called when."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.order: list[float] = []
        self.inside = 0
        self.most = 0
        self.entered, self.go = threading.Event(), threading.Event()

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.threads.add(threading.get_ident())
        self.order.append(media.pixels.mean().item())
        self.entered.set()
        time.sleep(0.02)
        assert self.go.wait(PATIENCE)
        self.inside -= 1
        return super().score(media, conditions)


def test_requests_are_scored_one_at_a_time() -> None:
    reward = Slow()
    reward.go.set()
    with serving(reward) as url, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(post, url, asking(float(number))) for number in range(8)]
        assert [means(answer.result()) for answer in asked] == [[float(number)] for number in range(8)]
    assert (reward.most, len(reward.threads)) == (1, 1)
    assert sorted(reward.order) == [float(number) for number in range(8)]


def test_requests_are_scored_in_their_order() -> None:
    reward = Slow()
    reward.go.set()

    async def ask() -> list[bytes]:
        service = Service(NamedAdapter("slow", {}, reward), CPU, 2**20)
        await service.load()
        return await asyncio.gather(*(service.score(asking(float(number))) for number in range(8)))

    answers = asyncio.run(ask())
    assert [decode_scores(answer, 1).values.item() for answer in answers] == reward.order == list(range(8))


def test_a_request_that_nobody_waits_for_is_not_scored() -> None:
    reward = Slow()
    with serving(reward) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, url, asking(1.0))
        assert reward.entered.wait(PATIENCE)
        impatient = httpx.Timeout(PATIENCE, read=0.3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/score", content=asking(99.0), headers=TYPE, timeout=impatient, trust_env=False)
        reward.go.set()
        assert means(first.result()) == [1.0]
        assert means(post(url, asking(2.0))) == [2.0]
    assert reward.order == [1.0, 2.0]


class Held(Mean):
    """Loads when it is told to, or fails to."""

    groupwise = True

    def __init__(self, fault: Exception | None = None) -> None:
        self.go, self.fault, self.released = threading.Event(), fault, threading.Event()

    def load(self, device: torch.device) -> None:
        assert self.go.wait(PATIENCE)
        if self.fault:
            raise self.fault

    def fingerprint(self) -> str:
        return "0123456789abcdef"

    def release(self) -> None:
        self.released.set()


def test_health_is_told_while_the_reward_loads() -> None:
    reward = Held()
    with serving(reward, name="held", options={"batch": 3}, until_ready=False) as url:
        health = get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for answer in (get(f"{url}/info"), post(url, asking(1.0))):
            assert (answer.status_code, answer.json()["detail"]) == (503, "the reward is being loaded; come again")
        reward.go.set()
        while get(f"{url}/health").status_code != 200:
            time.sleep(0.01)
        told = get(f"{url}/info").json()
    assert (told["reward"], told["options"], told["modalities"]) == ("held", {"batch": 3}, ["image"])
    assert (told["groupwise"], told["fingerprint"]) == (True, "0123456789abcdef")


@pytest.mark.parametrize(
    ("fault", "told"),
    [(RewardError("no such file"), "^no such file$"), (OSError("disk"), "'mean' cannot be loaded")],
)
def test_a_reward_that_cannot_be_loaded_ends_the_server(fault: Exception, told: str) -> None:
    reward = Held(fault)
    reward.go.set()
    server = RewardServer(Service(NamedAdapter("mean", {}, reward), CPU, 1000), bind("127.0.0.1", 0, None), None)
    with pytest.raises(RewardError, match=told):
        server.run(lambda _: None)


def test_an_idle_reward_may_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "IDLE", 0.05)
    reward = Held()
    reward.go.set()
    with serving(reward) as url:
        assert means(post(url, asking(1.0))) == [1.0]
        assert reward.released.wait(PATIENCE)


# How it starts


def test_others_reach_a_server_only_with_a_token() -> None:
    with pytest.raises(RewardError, match="give --token-env NAME"):
        bind("0.0.0.0", 0, None)
    with bind("0.0.0.0", 0, TOKEN) as bound:
        assert bound.getsockname()[0] == "0.0.0.0"
    with bind("localhost", 0, None) as bound:
        assert bound.getsockname()[0] in {"127.0.0.1", "::1"}
    with pytest.raises(RewardError, match="host 'no such host' is not known"):
        bind("no such host", 0, TOKEN)


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RewardError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use"):
            bind("127.0.0.1", port, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digit"], "no reward 'digit' is installed; did you mean 'digits'?"),
        (["digits", "measure=loss"], "digits.measure: input should be 'log_prob' or 'accuracy'"),
        (["digits", "measures=accuracy"], "digits.measures: unknown key 'measures'; did you mean 'measure'?"),
        (["digits", "accuracy"], "write it as key=value"),
        (["digits", "--host", "0.0.0.0"], "give --token-env NAME"),
        (["digits", "--token-env", "BRANCHTREE_NO_SUCH_TOKEN"], "BRANCHTREE_NO_SUCH_TOKEN is not set"),
        (["digits", "--device", "gpu"], "device 'gpu': write auto, cpu or cuda"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_loaded(
    command: Callable[..., Outcome], words: list[str], told: str
) -> None:
    outcome = command("serve-reward", *words)
    assert outcome.code == 2
    assert told in outcome.err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named(
    command: Callable[..., Outcome], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = command("serve-reward", "digits")
    assert outcome.code == 2
    assert f"needs the package '{package}'; run: pip install 'branchtree-grpo[serve]'" in outcome.err
