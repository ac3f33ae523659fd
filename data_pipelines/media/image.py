"""Images to tiles: decode one file safely, resize it to its grid, cut it.

Resizing is bicubic with antialiasing on uint8: equal to Pillow within 2 of 255 and several times faster than float.
Shape legend: H, W pixels of the image; T tiles; P tile side.
"""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch.nn.functional import interpolate

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaLayout

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 2**26
"""Largest image decoded: 67 million pixels, 200 MB as RGB."""
MAX_IMAGE_BYTES = 2**27
"""Largest image file read."""

_EXIF_ORIENTATION = 0x0112
_SWAPS_AXES = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels after EXIF rotation, from the header alone.

    Raises:
        DataError: Not a JPEG, PNG or WebP file, or larger than `MAX_PIXELS`.
    """
    image = open_image(data)
    swapped = _orientation(image) in _SWAPS_AXES
    return (image.height, image.width) if swapped else (image.width, image.height)


def decode_image(data: bytes) -> torch.Tensor:
    """Decode to RGB, upright, as [H, W, 3] uint8.

    EXIF rotation is applied; transparency is laid over white; CMYK, palette and 16-bit images are converted.

    Raises:
        DataError: Empty, wrong kind of file, too large, truncated or damaged.
    """
    image = open_image(data)
    turn = _UPRIGHT.get(_orientation(image))
    if image.format == "JPEG" and image.mode in ("RGB", "L") and turn is None:
        try:
            return torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True))
        except ValueError:
            pass  # also raised for harmless warnings; Pillow tells those from a truncated file
    try:
        rgb = _to_rgb(image)
        array = np.array(rgb if turn is None else rgb.transpose(turn))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image cannot be decoded: {error}") from error
    return torch.from_numpy(array)


def image_tiles(image: torch.Tensor, layout: MediaLayout, tile_size: int) -> torch.Tensor:
    """Cut an image into its grid, row by row, thumbnail last.

    Args:
        image: [H, W, 3] uint8.
        layout: Grid and thumbnail.
        tile_size: P.

    Returns:
        [T, 3, P, P] uint8.
    """
    columns, rows = layout.grid
    whole = resize(image, columns * tile_size, rows * tile_size)
    grid = whole.view(3, rows, tile_size, columns, tile_size).permute(1, 3, 0, 2, 4)
    tiles = grid.reshape(rows * columns, 3, tile_size, tile_size)
    if layout.thumbnail:
        tiles = torch.cat([tiles, resize(image, tile_size, tile_size)[None]])
    return tiles


def resize(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Bicubic with antialiasing: [H, W, 3] uint8 -> [3, height, width] uint8, contiguous."""
    batch = image.permute(2, 0, 1)[None]
    if batch.shape[-2:] != (height, width):
        batch = interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
    return batch[0].contiguous()


def open_image(data: bytes) -> Image.Image:
    """Open an image of an accepted kind and size; nothing is decoded yet.

    Raises:
        DataError: Empty, wrong kind of file, too large, animated, or a header that cannot be read.
    """
    if not data:
        raise DataError("image file is empty (0 bytes)")
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"image file of {len(data)} bytes is larger than {MAX_IMAGE_BYTES} bytes")
    # A switch of the whole process, which other libraries turn on: half a picture would be trained on as grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower and an error
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its text holds a memory address, another one every time
        raise DataError(f"not a readable image ({', '.join(FORMATS)} are accepted)") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"not a readable image ({', '.join(FORMATS)} are accepted): {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"image of {image.width}x{image.height} pixels is larger than {MAX_PIXELS} pixels")
    # Not MPO: a phone's JPEG that carries a second picture, of which the first is the photo.
    frames = int(getattr(image, "n_frames", 1))
    if image.format in ("PNG", "WEBP") and frames > 1:
        raise DataError(f"animated {image.format} with {frames} frames; attach it as a video, or save one frame")
    return image


def _orientation(image: Image.Image) -> int:
    # Not image.getexif(): for a PNG that would decode all pixels in search of a late chunk.
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged tag block raises whatever its parser met; the pixels are still good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
