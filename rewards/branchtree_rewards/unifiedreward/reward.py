"""The `unifiedreward` reward: a vision-language model is asked for a score between 1 and 5, and its words are read.

UnifiedReward (Wang et al., arXiv 2503.05236). The model runs in this process, or behind a server that speaks OpenAI's
protocol. An answer that holds no score in the form asked for is not valid; it is never read as some number.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media, RewardFootprint
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import elongated
from branchtree_rewards.shared.scale import transform
from branchtree_rewards.shared.source import RANDOM_SMALL, refuse_name
from branchtree_rewards.unifiedreward.config import LOCAL, REMOTE, UnifiedRewardConfig
from branchtree_rewards.unifiedreward.local import LocalModel
from branchtree_rewards.unifiedreward.server import ChatServer
from branchtree_rewards.unifiedreward.templates import AXES, OTHERS, NoScore, fill_template, read_axes, read_field


class UnifiedReward(Reward[UnifiedRewardConfig]):
    """Asks a vision-language model how well each image shows its prompt.

    The score `raw` is the model's number, from 1 to 5; details hold the three axes, NaN where the model was not asked
    for them or did not give them. A sample whose answer holds no score is not valid.
    """

    name = "unifiedreward"

    def __init__(self, config: UnifiedRewardConfig) -> None:
        super().__init__(config)
        self._scale = transform(config.scale)
        local = config.server is None or config.path == RANDOM_SMALL
        self._backend: LocalModel | ChatServer = LocalModel(config) if local else ChatServer(config)

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of the weights on an accelerator, 0 for a server's; None if files are damaged."""
        return self._backend.footprint()

    def load(self, device: torch.device) -> None:
        """Load the model to ``device``, or find the server in good health. Raises RewardError."""
        self._check_template()
        self._backend.load(device)
        self._check_template()  # again: the name of a server's only model is known once it is asked
        super().load(torch.device("cpu"))  # where pictures are made of pixels

    def _check_template(self) -> None:
        template = self._config.template
        refuse_name(self._backend.name, OTHERS[template], f"it was not trained on template '{template}'; set template")

    def release(self) -> None:
        """Leave the device until the next ``score``, if the recipe asks for it with ``offload``."""
        self._backend.release()

    def fingerprint(self) -> str:
        """Return a digest of the settings that change a score, and of the weights, or of a server's name for them."""
        self._require_loaded()
        neutral = {*LOCAL, *REMOTE, "server"} - {"dtype", "image_format"}
        settings = self._config.model_dump_json(exclude=neutral)
        return hashlib.sha256((self._backend.identity() + settings).encode()).hexdigest()

    def _shape_flaw(self, media: Media) -> str | None:
        return elongated(media)

    def _prompt_flaw(self, prompt: str) -> str | None:
        asked = fill_template(self._config.template, prompt)
        return super()._prompt_flaw(prompt) or self._backend.prompt_flaw(prompt, asked)

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        questions = [fill_template(self._config.template, condition.prompt) for condition in conditions]
        pictures, size = to_pil(media.pixels), self._config.resize
        if size is not None:
            pictures = [picture.resize((size, size)) for picture in pictures]
        answers = self._backend.answers(pictures, questions)
        raw = torch.full((len(answers),), math.nan, dtype=torch.float32)
        details = {name: torch.full_like(raw, math.nan) for name in AXES}
        reasons = {}
        for row, answer in enumerate(answers):
            if isinstance(answer, NoScore):
                reasons[row] = answer.reason
                continue
            score = read_field(answer, self._config.measured)
            if isinstance(score, NoScore):
                reasons[row] = score.reason
            else:
                raw[row] = score
            for name, value in read_axes(answer, self._config.template).items():
                details[name][row] = value
        return Scores(self._scale(raw), raw.isfinite(), raw, details, reasons)


register_rewards = reward_hook((UnifiedReward, UnifiedRewardConfig))
