"""The DejaVu fonts that matplotlib carries, drawn without importing matplotlib."""

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageFont

from data_pipelines.exceptions import DataError

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")


@cache
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels.

    Raises:
        DataError: matplotlib, which carries the fonts, is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise DataError("the demo pictures use the fonts inside matplotlib: pip install matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf"
    # The basic layout engine: the other one is a system library that may or may not be there.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
