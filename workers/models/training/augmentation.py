"""How training varies the scans: small affine maps, contrast, noise and inversion.

In and out: float tensors [images, 1, 32, 32] with values 0..1. The strengths are those of a first working
recipe; none was tuned on the held-out digits.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_ROTATION_RADIANS = 12 * math.pi / 180
_SCALE = 0.15
_SHEAR = 0.15
_SHIFT_PIXELS = 2.2
_CONTRAST_MIN = 0.7
_NOISE = 0.04
_SHARE_INVERTED = 0.3


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random variation of each image: a new tensor of the same shape, values 0..1."""
    grid = functional.affine_grid(_affine_maps(images, generator), list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, align_corners=False)
    num_images = images.shape[0]
    contrast = _CONTRAST_MIN + (1 - _CONTRAST_MIN) * torch.rand(num_images, 1, 1, 1, generator=generator)
    noise = _NOISE * torch.randn(images.shape, generator=generator)
    images = (images * contrast + noise).clamp(0, 1)
    inverted = torch.rand(num_images, 1, 1, 1, generator=generator) < _SHARE_INVERTED
    return torch.where(inverted, 1 - images, images)


def _affine_maps(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    num_images, side_pixels = images.shape[0], images.shape[-1]

    def uniform(bound: float) -> torch.Tensor:
        return (2 * torch.rand(num_images, generator=generator) - 1) * bound

    angle, shear = uniform(_ROTATION_RADIANS), uniform(_SHEAR)
    scale_x, scale_y = 1 + uniform(_SCALE), 1 + uniform(_SCALE)
    shift = 2 * _SHIFT_PIXELS / side_pixels  # affine_grid's coordinates run from -1 to 1
    rows = [
        torch.stack([scale_x * angle.cos(), -scale_x * angle.sin() + shear, uniform(shift)], dim=1),
        torch.stack([scale_y * angle.sin(), scale_y * angle.cos(), uniform(shift)], dim=1),
    ]
    return torch.stack(rows, dim=1)
