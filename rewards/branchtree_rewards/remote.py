"""The `remote` reward: any reward, scored by `branchtree serve-reward` in another process or on another machine.

The server gets the pixels to the bit, so that its scores are those that the reward would give here on its device.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import pydantic
import torch

import branchtree
from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.protocols import Condition, Media, RewardCard, RewardFootprint
from branchtree.serving.access import authorization, read_token
from branchtree.serving.wire import (
    CONTENT_TYPE,
    EXPECTS,
    MEBIBYTE,
    Info,
    WireError,
    decode_scores,
    encode_request,
)
from branchtree_rewards.shared.http import Caller, CallError
from branchtree_rewards.shared.pixels import to_uint8
from branchtree_rewards.shared.samples import NO_PIXELS, NOT_FINITE, check_batch, invalid_scores, score_rest

BOTH = frozenset({"image", "video"})
QUICK = 10.0  # seconds that a server may take to say how it is
POLL = 0.5  # seconds between two looks at a server that is still loading


def _require_http(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("write the server's address as http://host:port")
    return url


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
        pixels: "float32" sends samples as they are. "uint8" rounds them to bytes: a quarter of the traffic, and the
            same scores from rewards that look at 8-bit pictures, as those with published weights do.
        modality: What the run scores, "image" or "video"; checked at the start.
    """

    url: Annotated[str, pydantic.AfterValidator(_require_http)]
    token_env: str | None = None
    timeout: float = pydantic.Field(default=600, gt=0, le=1e6)
    retries: int = pydantic.Field(default=3, ge=0, le=100)
    wait: float = pydantic.Field(default=0, ge=0, le=1e6)
    serves: str | None = None
    fingerprint: str | None = pydantic.Field(default=None, min_length=12)
    check_version: bool = True
    pixels: Literal["float32", "uint8"] = "float32"
    modality: Literal["image", "video"] | None = None


class Remote:
    """Sends samples to a server, and gives back its reward's scores.

    Samples whose request got no answer, retries included, are not valid, and neither are those on which the served
    reward failed. A server that refuses requests, or that serves something else than it did at the start, ends the run.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._caller: Caller | None = None
        self._info: Info | None = None

    @property
    def modalities(self) -> frozenset[str]:
        """The configured one, or what the server's reward scores; before `load`, all that it might."""
        served = BOTH if self._info is None else frozenset(self._info.modalities)
        return served if self._config.modality is None else frozenset({self._config.modality})

    @property
    def groupwise(self) -> bool:
        """Whether the served reward must see a prompt's whole group at once; known after `load`."""
        return self._info is not None and self._info.groupwise

    @property
    def reads_prompt(self) -> bool:
        """Whether the served reward reads prompts; known after `load`."""
        return self._info is not None and self._info.reads_prompt

    def footprint(self) -> RewardFootprint:
        """Return 0: no weights are in this process."""
        return RewardFootprint(0)

    def load(self, device: torch.device) -> None:
        """Ask the server what it serves, and compare that with the settings; the server has its own device.

        Raises:
            RewardError: there is no server, or another one than was expected.
        """
        headers = authorization(read_token(self._config.token_env))
        config = self._config
        info = self._ask_what_is_served(Caller(config.url, min(config.timeout, QUICK), 0, headers))
        for fault in (self._wrong_reward(info), self._wrong_version(info), self._wrong_modality(info)):
            if fault:
                raise RewardError(f"the server at {config.url} {fault}")
        headers |= {EXPECTS: info.identity, "Content-Type": CONTENT_TYPE}
        self._caller, self._info = Caller(config.url, config.timeout, config.retries, headers), info
        weakref.finalize(self, self._caller.close)

    def fingerprint(self) -> str:
        """Return the served reward's fingerprint, or a digest of what else identifies it and of how pixels are sent."""
        _, info = self._require_loaded()
        if info.fingerprint and self._config.pixels == "float32":
            return info.fingerprint
        return hashlib.sha256(f"{info.fingerprint or info.identity} {self._config.pixels}".encode()).hexdigest()

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score sample i against condition i.

        Args:
            media: Images (B, C, H, W) or videos (B, F, C, H, W), as the served reward's modalities say.
            conditions: B conditions; the files that they name are sent along.

        Returns:
            Scores (B,) on the CPU, to the bit those of the served reward.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: the media are of another kind, or there are not B conditions.
            RewardError: the server refuses requests as they are set up.
        """
        self._require_loaded()
        check_batch(media, conditions, self.modalities)
        nothing = dict.fromkeys(range(len(media)), NO_PIXELS) if 0 in media.pixels.shape[1:] else {}
        return score_rest(media, conditions, nothing, self._score)

    def _score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score by one request, or by more where one would be too large for the server."""
        _, info = self._require_loaded()
        pixels = media.pixels.detach().float().cpu()
        finite = pixels.flatten(1).isfinite().all(dim=1)
        if self._config.pixels == "uint8":
            pixels = to_uint8(pixels.nan_to_num())
        body = encode_request(pixels, media.fps, conditions) if pixels.nbytes < info.max_body else None
        if body is not None and len(body) <= info.max_body:
            scores = self._request(body, len(media))
            return scores if self._config.pixels == "float32" else _masked(scores, finite.logical_not().tolist())
        if len(media) == 1 or info.groupwise:
            size = (len(body) if body else pixels.nbytes) / MEBIBYTE
            raise RewardError(
                f"{'a group of samples' if info.groupwise else 'one sample'} takes {size:.1f} MiB, and the server at "
                f"{self._config.url} reads {info.max_body / MEBIBYTE:g} MiB at most; start it with a larger --max-body"
                + (", or set pixels: uint8" if self._config.pixels == "float32" else "")
            )
        half = len(media) // 2
        first, second = slice(0, half), slice(half, None)
        return Scores.concatenate([self._score(media[rows], conditions[rows]) for rows in (first, second)])

    def _request(self, body: bytes, count: int) -> Scores:
        caller, _ = self._require_loaded()
        try:
            return decode_scores(caller.post("/score", content=body), count)
        except WireError as error:
            return _invalid(count, f"{self._config.url} gave an answer that cannot be read: {error}")
        except CallError as error:
            if error.passing:
                return _invalid(count, str(error))
            raise RewardError(f"{error}{self._advice(error.status)}") from error

    def _ask_what_is_served(self, caller: Caller) -> Info:
        try:
            self._await_ready(caller)
            return Info.model_validate_json(caller.get("/info"))
        except CallError as error:
            raise RewardError(f"{error}{self._advice(error.status)}") from error
        except pydantic.ValidationError as error:
            raise RewardError(
                f"{self._config.url} is no server of branchtree serve-reward, or one of another version"
            ) from error
        finally:
            caller.close()

    def _await_ready(self, caller: Caller) -> None:
        deadline = time.monotonic() + self._config.wait
        while True:
            try:
                caller.get("/health")
                return
            except CallError as error:
                if not error.passing or time.monotonic() >= deadline:
                    raise RewardError(
                        f"{error}; start 'branchtree serve-reward' there, or give it more time with 'wait', in seconds"
                    ) from error
            time.sleep(POLL)

    def _wrong_reward(self, info: Info) -> str | None:
        config = self._config
        if config.serves not in {None, info.reward}:
            return f"serves '{info.reward}', not '{config.serves}'"
        wanted = (config.fingerprint or "").lower()
        if wanted and not (info.fingerprint or "").lower().startswith(wanted):
            return f"serves '{info.reward}' with fingerprint {info.fingerprint}, not {config.fingerprint}"
        return None

    def _wrong_version(self, info: Info) -> str | None:
        if not self._config.check_version or info.version == branchtree.__version__:
            return None
        return (
            f"runs branchtree {info.version}, and this is {branchtree.__version__}; install the same on both, or set "
            "check_version: false"
        )

    def _wrong_modality(self, info: Info) -> str | None:
        if self._config.modality in {None, *info.modalities}:
            return None
        return f"serves '{info.reward}', which scores {', '.join(info.modalities)}, not {self._config.modality}"

    def _advice(self, status: int | None) -> str:
        """What to change when the server refuses."""
        if status == 401:
            variable = self._config.token_env
            return (
                f"; check the token in {variable} on both sides" if variable else "; name its variable as 'token_env'"
            )
        return "; give the run what it began with, or begin it again" if status == 409 else ""

    def _require_loaded(self) -> tuple[Caller, Info]:
        if self._caller is None or self._info is None:
            raise RuntimeError("the remote reward was not loaded: call load(device) first")
        return self._caller, self._info


def _invalid(count: int, reason: str) -> Scores:
    scores = invalid_scores(count, dict.fromkeys(range(count), reason))
    return replace(scores, raw=scores.values)


def _masked(scores: Scores, spoilt: Sequence[bool]) -> Scores:
    """Mask the rows whose pixels were not finite, which bytes cannot show."""
    reasons = {row: NOT_FINITE for row, bad in enumerate(spoilt) if bad}
    valid = scores.valid & ~torch.tensor(spoilt)
    return replace(scores, valid=valid, reasons={**scores.reasons, **reasons})


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `remote` reward to the registry."""
    register(
        "remote",
        build=Remote,
        config=RemoteConfig,
        summary="Any reward, scored by branchtree serve-reward in another process or on another machine.",
        card=RewardCard(
            modalities=BOTH,
            checkpoint="that of the served reward",
            size=0,
            licence="that of the served reward",
            non_commercial=None,
            source="branchtree",
        ),
    )
