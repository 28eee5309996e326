"""The `remote` reward: any reward, scored by `branchtree serve-reward` in another process or on another machine.

The server gets the samples to the bit, so that its scores are those that the reward would give here on its device.
"""

import hashlib
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pydantic
import torch

import branchtree
from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins import Condition, Media, Samples
from branchtree.plugins.registry import registry
from branchtree.serving.access import authorization, read_token
from branchtree.serving.wire import CONTENT_TYPE, EXPECTS, MEBIBYTE, Info, WireError, decode_scores, encode_request
from branchtree_rewards.shared.http import Caller, CallError
from branchtree_rewards.shared.pixels import to_uint8
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import NO_PIXELS, find_flaws, invalid_scores, score_rest, with_pixels

QUICK = 10.0  # seconds that a server may take to say how it is
POLL = 0.5  # seconds between two looks at a server that is still loading


class RemoteConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the `remote` reward.

    Attributes:
        url: Where `branchtree serve-reward` listens, as in "http://127.0.0.1:8765".
        token_env: The environment variable that holds the token which the server asks for.
        timeout: Seconds that one request may take, the wait for other clients' requests included.
        retries: How often a request that failed is sent again, after pauses that double.
        wait: Seconds to wait at the start for a server that does not answer yet, or is still loading.
        serves: The name of the reward that must be served there.
        fingerprint: The fingerprint that the served reward must have, or at least its first 12 digits.
        check_version: Whether the server must run the same version of branchtree.
        pixels: "float32" sends images and videos as they are. "uint8" rounds them to bytes: a quarter of the traffic,
            and the same scores from rewards that look at 8-bit pictures, as those with published weights do.
        modality: What the run scores: "image", "video" or another kind of samples; checked at the start.
    """

    url: str
    token_env: str | None = None
    timeout: float = pydantic.Field(default=600, gt=0, le=1e6)
    retries: int = pydantic.Field(default=3, ge=0, le=100)
    wait: float = pydantic.Field(default=0, ge=0, le=1e6)
    serves: str | None = None
    fingerprint: str | None = pydantic.Field(default=None, min_length=12)
    check_version: bool = True
    pixels: Literal["float32", "uint8"] = "float32"
    modality: str | None = None

    @pydantic.field_validator("url")
    @classmethod
    def _is_of_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("write the server's address as http://host:port")
        return url


class Remote(Reward[RemoteConfig]):
    """Sends samples, and the files that conditions name, to a server, and gives back its reward's scores to the bit.

    Samples whose request got no answer, retries included, are not valid, and neither are those on which the served
    reward failed. A server that refuses requests, or that serves something else than it did at the start, ends the run
    with RewardError. Until `load` asks it, modalities are all that are registered here, and whether the served reward
    reads prompts or must see a prompt's whole group is not known.
    """

    name = "remote"
    modalities = frozenset()
    reads_prompt = False
    groupwise = False
    _caller: Caller
    _info: Info

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.modalities = frozenset(registry().samples if config.modality is None else {config.modality})

    def load(self, device: torch.device) -> None:
        """Ask the server, which has its own device, what it serves. Raises RewardError if that is not as expected."""
        headers = authorization(read_token(self._config.token_env))
        config = self._config
        self._info = info = self._ask_what_is_served(Caller(config.url, min(config.timeout, QUICK), 0, headers))
        if fault := self._mismatch(info):
            raise RewardError(f"the server at {config.url} {fault}")
        headers |= {EXPECTS: info.identity, "Content-Type": CONTENT_TYPE}
        self._caller = Caller(config.url, config.timeout, config.retries, headers)
        weakref.finalize(self, self._caller.close)
        self.reads_prompt, self.groupwise = info.reads_prompt, info.groupwise
        if config.modality is None:
            self.modalities = frozenset(info.modalities)
        if config.pixels == "uint8" and not self.modalities & {"image", "video"}:
            raise RewardError(
                f"pixels: uint8 is for images and videos, and '{info.reward}' at {config.url} scores "
                f"{', '.join(sorted(self.modalities))}; leave it out"
            )
        super().load(torch.device("cpu"))

    def fingerprint(self) -> str:
        """Return the served reward's fingerprint, or a digest of what else identifies it and of how pixels are sent."""
        self._require_loaded()
        info = self._info
        if info.fingerprint and self._config.pixels == "float32":
            return info.fingerprint
        return hashlib.sha256(f"{info.fingerprint or info.identity} {self._config.pixels}".encode()).hexdigest()

    def _score_batch(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        if not isinstance(media, Media):
            return self._scores(media, conditions)
        seen = self._seen(media)  # other flaws are for the served reward to find
        return score_rest(seen, conditions, self._find_unsendable(media), self._scores)

    def _find_unsendable(self, media: Media) -> dict[int, str]:
        """Return why samples are not sent, by row. Bytes cannot show pixels that are not finite."""
        if self._config.pixels == "uint8":
            return find_flaws(media, (), lambda media: None, lambda condition: None)
        return dict.fromkeys(range(len(media)), NO_PIXELS) if 0 in media.pixels.shape[1:] else {}

    def _scores(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        """Score by one request, or by more where one would be too large for the server."""
        info, sent = self._info, media
        if isinstance(media, Media) and self._config.pixels == "uint8":
            sent = with_pixels(media, to_uint8(media.pixels))
        size = sum(tensor.nbytes for tensor in sent.tensors.values())
        body = encode_request(sent, conditions) if size < info.max_body else None
        if body is not None and len(body) <= info.max_body:
            return self._request(body, len(media))
        if len(media) == 1 or info.groupwise:
            can_shrink = isinstance(media, Media) and self._config.pixels == "float32"
            raise RewardError(
                f"{'a group of samples' if info.groupwise else 'one sample'} takes "
                f"{(len(body) if body else size) / MEBIBYTE:.1f} MiB, and the server at {self._config.url} reads "
                f"{info.max_body / MEBIBYTE:g} MiB at most; start it with a larger --max-body"
                + (", or set pixels: uint8" if can_shrink else "")
            )
        half = len(media) // 2
        halves = (slice(0, half), slice(half, None))
        return Scores.concatenate([self._scores(media[rows], conditions[rows]) for rows in halves])

    def _request(self, body: bytes, count: int) -> Scores:
        try:
            return decode_scores(self._caller.post("/score", content=body), count)
        except WireError as error:
            reason = f"{self._config.url} gave an answer that cannot be read: {error}"
        except CallError as error:
            if not error.passing:
                raise self._refused(error) from error
            reason = str(error)
        scores = invalid_scores(count, dict.fromkeys(range(count), reason))
        return replace(scores, raw=scores.values)

    def _ask_what_is_served(self, caller: Caller) -> Info:
        deadline = time.monotonic() + self._config.wait
        try:
            while not self._is_ready(caller, deadline):
                time.sleep(POLL)
            return Info.model_validate_json(caller.get("/info"))
        except CallError as error:
            raise self._refused(error) from error
        except pydantic.ValidationError as error:
            raise RewardError(
                f"{self._config.url} is no server of branchtree serve-reward, or one of another version"
            ) from error
        finally:
            caller.close()

    def _is_ready(self, caller: Caller, deadline: float) -> bool:
        try:
            caller.get("/health")
        except CallError as error:
            if not error.passing or time.monotonic() >= deadline:
                raise RewardError(
                    f"{error}; start 'branchtree serve-reward' there, or give it more time with 'wait', in seconds"
                ) from error
            return False
        return True

    def _mismatch(self, info: Info) -> str | None:
        """Say in what the server differs from the settings, if it does."""
        config, served, version = self._config, info.fingerprint or "", branchtree.__version__
        if config.serves not in {None, info.reward}:
            return f"serves '{info.reward}', not '{config.serves}'"
        if config.fingerprint and not served.lower().startswith(config.fingerprint.lower()):
            return f"serves '{info.reward}' with fingerprint {info.fingerprint}, not {config.fingerprint}"
        if config.check_version and info.version != version:
            return (
                f"runs branchtree {info.version}, and this is {version}; install the same on both, or set "
                "check_version: false"
            )
        if config.modality not in {None, *info.modalities}:
            return f"serves '{info.reward}', which scores {', '.join(info.modalities)}, not {config.modality}"
        return None

    def _refused(self, error: CallError) -> RewardError:
        """Return the error of a refused request, with what to change."""
        advice = {
            401: "; name its variable as 'token_env'",
            409: "; give the run what it began with, or begin it again",
        }
        if self._config.token_env:
            advice[401] = f"; check the token in {self._config.token_env} on both sides"
        return RewardError(f"{error}{advice.get(error.status or 0, '')}")


register_rewards = reward_hook((Remote, RemoteConfig))
