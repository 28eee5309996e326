"""UnifiedReward behind a server that speaks OpenAI's protocol: vLLM, SGLang, or `transformers serve`."""

import base64
import io
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from branchtree.errors import RewardError
from branchtree.plugins import RewardFootprint
from branchtree_rewards.shared.http import Caller, CallError
from branchtree_rewards.unifiedreward.config import UnifiedRewardConfig
from branchtree_rewards.unifiedreward.templates import NoScore, Spoken

JPEG_QUALITY = 95
STARTING = {None, 502, 503, 504}  # statuses, or no answer at all, of a server that may still be starting
MARKERS = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:image|video|/?s)>")  # special tokens of chat models, by their look
POLL = 1.0  # seconds between two looks at a server that is starting
START = "vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward --port 8080"


class ChatServer:
    """A client that asks several questions at once and hands the answers back in order."""

    def __init__(self, config: UnifiedRewardConfig) -> None:
        self._config, self._url = config, config.server or ""
        self._model = config.model
        self._caller: Caller | None = None

    @property
    def name(self) -> str:
        """The name that the model is served under, empty while it is not known."""
        return self._model or ""

    def footprint(self) -> RewardFootprint:
        """Return 0: no weights are in this process."""
        return RewardFootprint(0)

    def load(self, device: torch.device) -> None:
        """Find the server in good health and its model's name; nothing is put on ``device``. Raises RewardError."""
        if self._caller is not None:
            self._caller.close()
        config, headers = self._config, {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise RewardError(
                    f"api_key_env is {config.api_key_env}, but the environment has no variable of that name"
                )
            headers = {"Authorization": f"Bearer {key}"}
        caller = Caller(self._url, config.timeout, config.retries, headers, config.concurrency)
        served = self._served(caller)
        if self._model is None:
            if len(served) != 1:
                listed = ", ".join(map(repr, served)) or "none"
                raise RewardError(f"{self._url} lists {len(served)} models ({listed}); name the one to use as 'model'")
            self._model = served[0]
        elif self._model not in served:
            self._try_model(caller, served)
        self._caller = caller

    def prompt_flaw(self, prompt: str, asked: str) -> str | None:
        """Say that a prompt holds what a chat model's server may take for a special token, if it does."""
        found = MARKERS.search(prompt)
        return found and f"the prompt holds {found[0]}, which a server may not read as text"

    def answers(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[Spoken | NoScore]:
        """Return the server's answers, in the order of the questions; a question without one holds up no other."""
        caller = self._caller
        if caller is None:
            raise RuntimeError("this server was not looked at: call load(device) first")
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="unifiedreward") as pool:
            return list(pool.map(lambda pair: self._answer(caller, *pair), zip(pictures, questions, strict=True)))

    def release(self) -> None:
        """Do nothing: nothing is on the device."""

    def identity(self) -> str:
        """Return the served model's name; a server does not say which weights it serves."""
        return f"served model {self._model}\n"

    def _served(self, caller: Caller) -> list[str]:
        """Return the names that the server lists, once it is up. Raises RewardError."""
        deadline = time.monotonic() + self._config.wait
        while True:
            try:
                body = caller.get("/models", retries=0)
                return [str(entry["id"]) for entry in json.loads(body)["data"]]
            except CallError as error:
                if error.status not in STARTING:
                    return self._unlisted(error)
                if time.monotonic() >= deadline:
                    waited = f" after {self._config.wait:g} s" if self._config.wait else ""
                    raise RewardError(
                        f"the server of unifiedreward is not ready{waited}: {error}; start it, for example with "
                        f"'{START}', or give it time to start with 'wait'"
                    ) from error
            except (ValueError, KeyError, TypeError):
                return self._unlisted(ValueError(f"it answered '{body[:80].decode(errors='replace')}'"))
            time.sleep(POLL)

    def _unlisted(self, error: CallError | ValueError) -> list[str]:
        """Return no names, for a server that is up but lists none: it may still serve the configured model."""
        if isinstance(error, CallError) and error.status in {401, 403}:
            raise RewardError(
                f"the server wants a key: {error}; put it into an environment variable and name that as 'api_key_env'"
            ) from error
        if self._model is None:
            raise RewardError(
                f"'{self._url}' lists no models: {error}; the URL of an OpenAI-compatible server ends in /v1, and one "
                "that lists none needs 'model'"
            ) from error
        return []

    def _try_model(self, caller: Caller, served: Sequence[str]) -> None:
        """Ask a model that is not listed for one token: `transformers serve` lists only what its cache holds."""
        request = {"model": self._model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            caller.post("/chat/completions", json=request)
        except CallError as error:
            listed = ", ".join(map(repr, served)) or "no models"
            ending = "" if self._url.rstrip("/").endswith("/v1") else ", and its URL should end in /v1"
            raise RewardError(
                f"'{self._url}' does not serve '{self._model}': {error}; it lists {listed}{ending}"
            ) from error

    def _answer(self, caller: Caller, picture: Image.Image, question: str) -> Spoken | NoScore:
        """Ask one question about one picture, to be answered greedily."""
        config, stream = self._config, io.BytesIO()
        settings = {"quality": JPEG_QUALITY} if config.image_format == "jpeg" else {}
        picture.save(stream, format=config.image_format.upper(), **settings)
        url = f"data:image/{config.image_format};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        request = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": config.max_tokens}
        try:
            return read_answer(caller.post("/chat/completions", json=request))
        except CallError as error:
            return NoScore(str(error))


def read_answer(body: bytes) -> Spoken | NoScore:
    """Return the text of a chat completion, or why there is none."""
    try:
        choice = json.loads(body)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except ValueError:
        return NoScore(f"the server's answer is not JSON: '{body[:80].decode(errors='replace')}'")
    except (KeyError, IndexError, TypeError, AttributeError):
        return NoScore(f"the server's answer is no chat completion: '{body[:80].decode(errors='replace')}'")
    if not isinstance(text, str):
        return NoScore("the server's answer has no text")
    return Spoken(text, complete=finish != "length")
