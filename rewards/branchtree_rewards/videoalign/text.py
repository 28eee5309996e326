"""The question that VideoAlign puts to its model about a video.

The template is the publisher's `detailed_special` (KwaiVGI/VideoAlign, `prompt_template.py`, MIT licence), byte for
byte: blanks at the ends of its lines count.
"""

from branchtree_rewards.qwen2vl.questions import VIDEO_PAD, QuestionForm
from branchtree_rewards.shared.source import bundled_text
from branchtree_rewards.videoalign.settings import DIMENSIONS

TEMPLATE = "videoalign_detailed_special.txt"


def question_form() -> QuestionForm:
    """Return the publisher's question, with the three tokens that scores are read at."""
    tokens = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
    return QuestionForm("VideoAlign", bundled_text(TEMPLATE), VIDEO_PAD, tokens)
