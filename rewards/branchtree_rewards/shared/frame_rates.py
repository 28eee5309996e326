"""Settings of frame rates."""

from typing import Annotated, Any

import pydantic

ClipFps = Annotated[float | None, pydantic.Field(ge=0.1, le=1000)]
SampleFps = Annotated[float | None, pydantic.Field(gt=0, le=1000)]


class NoPlainFps(pydantic.BaseModel, frozen=True):
    """Settings of a reward whose score depends on frame rates; a plain `fps`, which could mean two, is refused."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _tells_rates_apart(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "fps" in settings:
            sampling = ", or 'sample_fps' for the frames a second that the model is shown"
            raise ValueError(
                "'fps' could mean two rates; write 'clip_fps' for the frames a second at which the clip plays"
                + (sampling if "sample_fps" in cls.model_fields else "")
            )
        return settings
