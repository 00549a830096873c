"""Image files from strangers: their size from the header, and their pixels, within limits.

In: the bytes of a PNG, JPEG, WebP or GIF file. Out: (height, width), or a PIL image of mode "RGB".

Invariants: limits are checked on the header, before memory for the pixels is taken; both functions agree about the
size, EXIF rotation included; whatever a decoder raises comes out as `InvalidImage` or `ImageTooLarge`.

Leaves out: fetching (the encode worker does it) and what a model makes of the pixels (its processor does).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from workers.models.vision_language_model import ImageTooLarge, InvalidImage, ModelInputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""The formats that are tried. A closed list: each further decoder of Pillow is one more to be attacked through."""

_EXIF_ORIENTATION = 0x0112
_ROTATED_BY_A_QUARTER = frozenset({5, 6, 7, 8})  # EXIF 2.32, tag 0x0112: rows and columns change places
_WITH_ORIENTATION = frozenset({"JPEG", "MPO", "WEBP"})  # reading EXIF of a PNG may decode all of it
_BLACK_TO_WHITE_16_BIT = 257  # 65535 / 255


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted; a file outside these limits is an `ImageTooLarge` or `InvalidImage`.

    `max_bytes`: 20 MiB, which the largest photographs of telephones stay under. `max_pixels`: 8K UHD
    (7680x4320), 100 MB as RGB. `max_aspect_ratio`: 200, as Qwen's image processors have it; one that scales
    the shorter edge to 224 would otherwise make gigabytes of an image one pixel high.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 7680 * 4320
    max_aspect_ratio: int = 200

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_aspect_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"ImageLimits.{name} must be at least 1, not {getattr(self, name)}")


DEFAULT_LIMITS = ImageLimits()


def image_size(image_bytes: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """The (height, width) in pixels that `decode_image` would give, from the file's header.

    Raises `InvalidImage` and `ImageTooLarge`. A file that is cut off after its header is not noticed here.
    """
    with _decoder_errors_mapped(limits):
        image = _open(image_bytes, limits)
        width, height = image.size
        if _orientation(image) in _ROTATED_BY_A_QUARTER:
            width, height = height, width
        return height, width


def blank_image() -> bytes:
    """A small black PNG, for a run that only warms a model up."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()


def decode_image(image_bytes: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The image as mode "RGB", upright; the first frame of an animation; transparent parts over white.

    Raises `InvalidImage` and `ImageTooLarge`.
    """
    with _decoder_errors_mapped(limits):
        image = _open(image_bytes, limits)
        orientation = _orientation(image)
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return _as_rgb(image)


def _open(image_bytes: bytes, limits: ImageLimits) -> Image.Image:
    if len(image_bytes) > limits.max_bytes:
        raise ImageTooLarge(len(image_bytes), limits.max_bytes, "bytes")
    image = Image.open(io.BytesIO(image_bytes), formats=FORMATS)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(width * height, limits.max_pixels, "pixels")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise InvalidImage(
            f"{width}x{height} pixels are a strip; one side may be {limits.max_aspect_ratio} times the other"
        )
    return image


def _orientation(image: Image.Image) -> int:
    if image.format not in _WITH_ORIENTATION:
        return 1
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255, which makes almost everything white.
        image = image.convert("I").point(lambda level: level / _BLACK_TO_WHITE_16_BIT).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


@contextmanager
def _decoder_errors_mapped(limits: ImageLimits) -> Iterator[None]:
    try:
        yield
    except ModelInputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow refuses twice its MAX_IMAGE_PIXELS while it opens the file: only its text tells the number then.
        named = re.search("[0-9]+", str(error))
        num_pixels = int(named.group()) if named else limits.max_pixels + 1
        raise ImageTooLarge(num_pixels, limits.max_pixels, "pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidImage("it is in none of the known formats") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others
        raise InvalidImage(str(error) or type(error).__name__) from error
