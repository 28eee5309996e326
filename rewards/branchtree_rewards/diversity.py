"""The reward `diversity`: how far a sample lies from the other samples of its prompt, without weights.

It sees a prompt's whole group at once. Added to another reward with a small weight it works against a policy that gives
one picture for every noise; alone it rewards noise.
"""

from collections.abc import Sequence

import pydantic
import torch

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.pixels import shrunk
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import NOT_FINITE


class DiversityConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the `diversity` reward.

    Attributes:
        size: Pixels that the longer side is shrunk to before samples are compared; smaller sizes look at composition
            and colour, larger ones at texture and noise too.
    """

    size: int = pydantic.Field(default=32, ge=1, le=1024)


class Diversity(Reward[DiversityConfig]):
    """Scores each sample by its mean distance from the others of its prompt, from 0 to 1.

        score_i = mean over j != i of the root mean square of x_i - x_j

    over all pixels (and frames) in [0, 1]. A sample without others is not valid, and neither is one that is not finite;
    such a sample is not compared with. The conditions are not looked at.
    """

    name = "diversity"
    modalities = frozenset({"image", "video"})
    groupwise = True
    reads_prompt = False

    def _score_batch(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        return self._scores(self._seen(media), conditions)

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        finite = media.pixels.flatten(1).isfinite().all(dim=1)
        points = shrunk(media.pixels.flatten(0, -4), self._config.size).reshape(len(media), -1)
        points = points.where(finite[:, None], torch.zeros_like(points))
        # Differences are formed one by one: the usual short cut over inner products loses small ones to rounding.
        distances = torch.stack([(points - point).square().mean(dim=1).sqrt() for point in points])
        others = finite.sum() - finite.long()
        values = (distances * finite).sum(dim=1) / others.clamp(min=1)
        valid = finite & (others > 0)
        lonely = dict.fromkeys((finite & ~valid).nonzero().flatten().tolist(), "there is no other sample of its prompt")
        broken = dict.fromkeys((~finite).nonzero().flatten().tolist(), NOT_FINITE)
        return Scores(values=values, valid=valid, reasons={**lonely, **broken})


register_rewards = reward_hook((Diversity, DiversityConfig))
