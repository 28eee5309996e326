"""The two readers: PP-OCRv6 and PP-OCRv4, as the packages of RapidOCR hold them, run by onnxruntime on the CPU.

Both read one picture at a time on one thread, so that no other picture and no machine changes what is read. Pictures
are searched for text in their own size, with the longer side shrunk to 960 pixels as in PaddleOCR; RapidOCR's own
default enlarges the shorter side to 736, which reads no better and takes a hundred times as long for small pictures.
"""

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from branchtree.errors import RewardError

Engine = Literal["v6", "v4"]
PACKAGES: dict[Engine, str] = {"v6": "rapidocr", "v4": "rapidocr_onnxruntime"}
INSTALL: dict[Engine, str] = {
    "v6": "pip install 'branchtree-grpo[ocr]'",
    # its requirement opencv-python needs libGL, and would replace the opencv-python-headless of the extra
    "v4": "pip install 'branchtree-grpo[ocr]' && pip install --no-deps rapidocr-onnxruntime",
}
LONGEST_SIDE = 960


class Reader(ABC):
    """Reads the lines of text in a picture."""

    def __init__(self, engine: Any, detect: bool) -> None:
        self._engine, self._detect = engine, detect

    @abstractmethod
    def read(self, picture: NDArray[np.uint8]) -> list[str]:
        """Return the lines in a picture (H, W, 3), RGB, from top to bottom; without detection it is one line."""


class ReaderV6(Reader):
    """PP-OCRv6."""

    def read(self, picture: NDArray[np.uint8]) -> list[str]:
        """Return the lines in a picture."""
        found = self._engine(_bgr(picture), use_det=self._detect, use_cls=False, use_rec=True)
        return list(found.txts or ())


class ReaderV4(Reader):
    """PP-OCRv4."""

    def read(self, picture: NDArray[np.uint8]) -> list[str]:
        """Return the lines in a picture."""
        found, _ = self._engine(_bgr(picture), use_det=self._detect, use_cls=False, use_rec=True)
        return [row[-2] for row in found or ()]  # box, text, confidence; or the last two of them


def open_reader(engine: Engine, detect: bool) -> Reader:
    """Return a reader that has read a picture. Raises RewardError if its package or its weights are missing."""
    package = PACKAGES[engine]
    try:
        reader = _open_v6(detect) if engine == "v6" else _open_v4(detect)
        reader.read(np.full((32, 128, 3), 255, np.uint8))
    except ImportError as error:
        raise RewardError(
            f"reward 'ocr' with engine {engine} needs {package.replace('_', '-')} and onnxruntime, which cannot be "
            f"imported ({error}); {INSTALL[engine]}"
        ) from error
    except Exception as error:  # onnxruntime's exceptions have no class in common
        raise RewardError(f"reward 'ocr': the weights of {package} cannot be read: {error}") from error
    return reader


def weights(engine: Engine) -> list[Path]:
    """Return the files of weights in a reader's package, in order."""
    spec = importlib.util.find_spec(PACKAGES[engine])
    assert spec is not None
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "models").glob("*.onnx"))


def _open_v6(detect: bool) -> Reader:
    from rapidocr import RapidOCR

    one_thread = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    sides = {"Det.limit_type": "max", "Det.limit_side_len": LONGEST_SIDE}
    return ReaderV6(RapidOCR(params={"Global.log_level": "critical", **one_thread, **sides}), detect)


def _open_v4(detect: bool) -> Reader:
    from rapidocr_onnxruntime import RapidOCR

    sides = {"det_limit_type": "max", "det_limit_side_len": LONGEST_SIDE}
    return ReaderV4(RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, **sides), detect)


def _bgr(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture with its channels in OpenCV's order."""
    return np.ascontiguousarray(picture[..., ::-1])
