import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data_pipelines.exceptions import DataError
from data_pipelines.media import image as image_module
from data_pipelines.media.image import decode_image, image_size, image_tiles, resize
from data_pipelines.media.rules import MediaLayout, choose_grid


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_resize_matches_pillow(picture):
    pixels = decode_image(picture(200, 150))
    for width, height in [(256, 192), (64, 64)]:
        ours = resize(pixels, width, height).permute(1, 2, 0).numpy().astype(int)
        theirs = np.asarray(Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)).astype(
            int
        )
        assert abs(ours - theirs).max() <= 2


def test_tiles_are_cut_row_by_row_with_the_thumbnail_last():
    pixels = torch.zeros((128, 192, 3), dtype=torch.uint8)
    for row in range(2):
        for column in range(3):
            pixels[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] = 40 * (row * 3 + column)
    tiles = image_tiles(pixels, MediaLayout("image", (3, 2), True), 64)
    assert tiles.shape == (7, 3, 64, 64)
    assert tiles.dtype == torch.uint8
    for number in range(6):
        assert (tiles[number] == 40 * number).all()
    assert torch.equal(tiles[6], resize(pixels, 64, 64))


def test_jpeg_fast_path_agrees_with_pillow(picture):
    data = picture(70, 50, "JPEG", quality=90)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(decode_image(data).numpy().astype(int) - theirs).max() <= 4


def test_every_exif_orientation(picture):
    plain = Image.open(io.BytesIO(picture(60, 30)))
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "JPEG", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = encoded(plain, kind, exif=exif, **options)
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
            ours = decode_image(data).numpy().astype(int)
            assert image_size(data) == (ours.shape[1], ours.shape[0]) == (expected.shape[1], expected.shape[0])
            assert abs(ours - expected).max() <= 4


def test_sixteen_bit_grey_is_scaled():
    data = encoded(Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)))
    assert (decode_image(data) == 100).all()


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encoded(half)) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert decode_image(encoded(palette))[0, 0].tolist() == [10, 20, 30]
    assert (decode_image(encoded(palette, transparency=0)) == 255).all()


def test_cmyk_and_grey():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_image(encoded(cmyk, "JPEG"))[4, 4].tolist()
    assert red[0] > 200
    assert max(red[1:]) < 60
    assert decode_image(encoded(Image.new("L", (8, 8), 77), "JPEG")).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_is_refused_not_filled_in(picture, kind):
    data = picture(200, 200, kind)
    if kind != "WEBP":  # a short WebP has no readable header either
        assert image_size(data[: len(data) * 3 // 4]) == (200, 200)
    with pytest.raises(DataError):
        decode_image(data[: len(data) * 3 // 4])


def test_other_files_and_bombs_are_refused(picture, monkeypatch):
    with pytest.raises(DataError, match=r"is empty \(0 bytes\)"):
        image_size(b"")
    for data in (
        b"not an image",
        encoded(Image.new("RGB", (4, 4)), "BMP"),
        encoded(Image.new("RGB", (4, 4)), "TIFF"),
    ):
        with pytest.raises(DataError, match="not a readable image"):
            image_size(data)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="larger than 100 pixels"):
        image_size(picture(20, 20))


def test_a_cap_on_bytes(picture, monkeypatch):
    data = picture(20, 20)
    monkeypatch.setattr(image_module, "MAX_IMAGE_BYTES", len(data) - 1)
    with pytest.raises(DataError, match="larger than"):
        image_size(data)


def test_a_switch_of_another_library_does_not_let_truncated_files_in(picture, monkeypatch):
    data = picture(200, 200, "JPEG")[:-2000]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image = Image.open(io.BytesIO(data))
    image.load()  # Pillow would fill it with grey
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data)


def test_animations_are_refused_and_a_phones_second_picture_is_not(picture):
    first, second = Image.new("RGB", (8, 8), (9, 9, 9)), Image.new("RGB", (8, 8))
    for kind in ("PNG", "WEBP"):
        with pytest.raises(DataError, match=f"animated {kind} with 2 frames"):
            image_size(encoded(first, kind, save_all=True, append_images=[second]))
    phone = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(phone)).n_frames == 2
    assert decode_image(phone)[4, 4].tolist() == [9, 9, 9]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (4000, 1), (1, 4000), (3, 2000)])
def test_extreme_shapes(width, height):
    data = encoded(Image.new("RGB", (width, height), (50, 100, 150)))
    assert image_size(data) == (width, height)
    grid = choose_grid(width, height, 12, 64)
    tiles = image_tiles(decode_image(data), MediaLayout("image", grid, True), 64)
    assert tiles.shape == (grid[0] * grid[1] + 1, 3, 64, 64)
    assert (tiles[:, 0] == 50).all()


def test_modes_by_their_exact_colours():
    grey_alpha = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encoded(grey_alpha))[0, 0].tolist() == [127, 127, 127]
    deep = np.full((4, 4, 4), 0, dtype=np.uint8)
    deep[..., 1], deep[..., 3] = 200, 255
    assert decode_image(encoded(Image.fromarray(deep, "RGBA")))[0, 0].tolist() == [0, 200, 0]
    assert decode_image(encoded(Image.new("1", (4, 4), 1)))[0, 0].tolist() == [255, 255, 255]
