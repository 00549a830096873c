"""Files from strangers: sizes, pixels, and one of two errors for everything else."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from workers.models.images import FORMATS, ImageLimits, decode_image, image_size
from workers.models.vision_language_model import ImageTooLarge, InvalidImage, ModelInputError


def file_of(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=image_format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


SAMPLE = file_of(Image.effect_noise((40, 30), 50))


@pytest.mark.parametrize("image_format", FORMATS)
def test_each_format_is_read_with_its_size_from_the_header(image_format: str) -> None:
    content = file_of(Image.new("RGB", (60, 20), (200, 10, 10)), image_format)
    image = decode_image(content)
    assert image_size(content) == (20, 60) == (image.height, image.width)
    assert image.mode == "RGB"
    red, green, _ = image.getpixel((30, 10))  # type: ignore[misc]
    assert red > 150 > green


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(1000)])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    for read in (image_size, decode_image):
        with pytest.raises(InvalidImage, match="Send a whole"):
            read(content)


def test_a_format_that_is_not_listed_is_refused() -> None:
    with pytest.raises(InvalidImage, match="known formats"):
        decode_image(file_of(Image.new("RGB", (8, 8)), "TIFF"))


@given(st.integers(0, len(SAMPLE) - 30))
def test_a_file_that_is_cut_off_is_refused(num_bytes: int) -> None:
    with pytest.raises(InvalidImage):
        decode_image(SAMPLE[:num_bytes])


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_harmless_or_a_typed_error(position: int, flipped: int) -> None:
    damaged = bytearray(SAMPLE)
    damaged[position] ^= flipped
    with contextlib.suppress(ModelInputError):
        assert decode_image(bytes(damaged)).mode == "RGB"


def test_a_file_over_the_byte_limit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ImageTooLarge, match="Scale it down") as caught:
        image_size(SAMPLE, ImageLimits(max_bytes=100))
    assert (caught.value.amount, caught.value.limit, caught.value.unit) == (len(SAMPLE), 100, "bytes")


@pytest.mark.parametrize("read", [image_size, decode_image])
def test_more_pixels_than_the_limit_are_refused_from_the_header(read: object) -> None:
    with pytest.raises(ImageTooLarge) as caught:
        read(png_header(8000, 5000))  # type: ignore[operator]
    assert (caught.value.amount, caught.value.limit, caught.value.unit) == (40_000_000, 33_177_600, "pixels")


@pytest.mark.parametrize("side", [10_000, 65_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_too_large_and_nothing_else(side: int) -> None:
    for read in (image_size, decode_image):
        with pytest.raises(ImageTooLarge) as caught:
            read(png_header(side, side))
        assert (caught.value.amount, caught.value.unit) == (side * side, "pixels")


def test_a_strip_that_a_processor_would_blow_up_is_refused() -> None:
    with pytest.raises(InvalidImage, match="201x1"):
        image_size(file_of(Image.new("L", (201, 1))))
    assert image_size(file_of(Image.new("L", (200, 1)))) == (1, 200)


def test_a_photograph_is_turned_upright_and_its_size_with_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    content = file_of(Image.new("RGB", (64, 32)), "JPEG", exif=exif)
    image = decode_image(content)
    assert image_size(content) == (64, 32) == (image.height, image.width)


def test_transparent_ink_is_shown_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    decoded = decode_image(file_of(image))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (0, 0, 0)


def test_sixteen_bits_keep_their_greys() -> None:
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 0x4000)
    image.putpixel((1, 0), 0xFFFF)
    decoded = decode_image(file_of(image))
    assert decoded.getpixel((0, 0)) == (0x40 - 1, 0x40 - 1, 0x40 - 1)
    assert decoded.getpixel((1, 0)) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    content = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_aspect_ratio"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ImageLimits(**{name: 0})
