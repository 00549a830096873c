"""The handwritten digits that the packaged checkpoint is trained and judged on, and their split.

In: scikit-learn's copy of the UCI test set (1797 scans of 8x8 pixels, 17 grey levels). Out: 32x32 grey images
with their labels, in three fixed parts: 1300 for training, 137 for validation, 360 held out.

Invariants: the split depends on nothing but this file and the data (seed 0, stratified by label); no two parts
share an image, which is checked by the pixels' hash and not by the row number alone; the held-out part takes no
part in any choice made while training.

Leaves out: augmentation (see `workers.models.training.augmentation`). scikit-learn is an optional extra
(`pip install nixlbus[train]`) and is imported when the data are read, not with this module.

Source: https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

IMAGE_SIDE_PIXELS = 32
NUM_HELD_OUT = 360
NUM_VALIDATION = 137
SPLIT_SEED = 0

_SCAN_LEVELS = 16  # the scans count set pixels of a 4x4 block: 0..16


@dataclass(frozen=True)
class Digit:
    """One handwritten digit: a 32x32 image of mode "L" (light ink on black) and what it shows, 0 to 9."""

    image: Image.Image
    label: int

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of the pixels, in hexadecimal."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()

    def png_bytes(self) -> bytes:
        """The image as a PNG file."""
        file = io.BytesIO()
        self.image.save(file, format="PNG")
        return file.getvalue()


@dataclass(frozen=True)
class DigitSplit:
    """The three parts of the data, disjoint by content."""

    train: tuple[Digit, ...]
    validation: tuple[Digit, ...]
    held_out: tuple[Digit, ...]


def load_split() -> DigitSplit:
    """Reads the data and splits them: 1300 / 137 / 360.

    Raises `ImportError` without scikit-learn, and `AssertionError` if two parts share an image.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    digits = [_digit(scan, int(label)) for scan, label in zip(scans.images, scans.target, strict=True)]

    def cut(rows: list[Digit], num_cut: int) -> tuple[list[Digit], list[Digit]]:
        labels = [digit.label for digit in rows]
        kept, taken = train_test_split(rows, test_size=num_cut, random_state=SPLIT_SEED, stratify=labels)
        return kept, taken

    rest, held_out = cut(digits, NUM_HELD_OUT)
    train, validation = cut(rest, NUM_VALIDATION)
    assert_disjoint(train, held_out)
    assert_disjoint(train, validation)
    assert_disjoint(validation, held_out)
    return DigitSplit(tuple(train), tuple(validation), tuple(held_out))


def held_out_digits() -> tuple[Digit, ...]:
    """The 360 digits that training never sees, in a fixed order."""
    return load_split().held_out


def held_out_pngs() -> list[tuple[bytes, int]]:
    """The held-out digits as (PNG file, label), in the order of `held_out_digits`."""
    return [(digit.png_bytes(), digit.label) for digit in held_out_digits()]


def assert_disjoint(seen: list[Digit] | tuple[Digit, ...], unseen: list[Digit] | tuple[Digit, ...]) -> None:
    """Raises `AssertionError` if an image of `unseen` is also in `seen`, judged by its pixels."""
    shared = {digit.content_hash for digit in seen} & {digit.content_hash for digit in unseen}
    if shared:
        raise AssertionError(f"{len(shared)} images are in both parts of the data: the split leaks")


def _digit(scan: object, label: int) -> Digit:
    import numpy as np

    levels = np.asarray(scan)
    grey = np.rint(levels / _SCAN_LEVELS * 255).astype(np.uint8)
    side = (IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS)
    return Digit(Image.fromarray(grey).resize(side, Image.Resampling.BICUBIC), label)
