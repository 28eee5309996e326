"""The frames that conditions give: what samples are to start from, or be an edit of."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from branchtree.data.frames import first_frame
from branchtree.errors import DataError
from branchtree.plugins import Condition


def first_frames(conditions: Sequence[Condition]) -> tuple[list[Image.Image | None], dict[int, str]]:
    """Return the first frame of each condition, None where it has none; and, by row, why one cannot be read."""
    read: dict[tuple[Path | None, Path | None], Image.Image | None] = {}
    reasons: dict[int, str] = {}
    for row, condition in enumerate(conditions):
        source = (condition.image, condition.video)
        try:
            read[source] = read[source] if source in read else first_frame(condition)
        except DataError as error:
            reasons[row] = str(error)
    return [read.get((condition.image, condition.video)) for condition in conditions], reasons
