"""From a picture to the latents of the family `tile`: a network that only the encoder needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from rinr_loader.codecs.tile import OVERLAP, SUPPORT, TILE
from rinr_loader.dictionary import GENERIC, SHIPPED, shipped
from rinr_loader.errors import ConfigError
from rinr_loader.metadata import metadata_of

WIDTH = 64  # channels of the convolutional part


class Analysis(nn.Module):
    """A linear lapped transform, and a small convolutional part that corrects it.

    Args:
        channels: Latents of a tile.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, channels, SUPPORT, TILE, bias=False)
        self.correction = nn.Sequential(
            nn.Conv2d(3, WIDTH, 8, 4, 2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(WIDTH, WIDTH, 4, 2, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(WIDTH, channels, 4, 2, 1),
        )

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that gives the correction."""
        return cast(nn.Conv2d, self.correction[-1])

    def forward(self, image: Tensor) -> Tensor:
        """Latents before steps are divided out.

        Args:
            image: Grey levels around 0 (-127.5 to 127.5), `(N, 3, H, W)` with sides that are multiples of 16.

        Returns:
            float32, `(N, C, H / 16, W / 16)`.
        """
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.training):
            correction = self.correction(image / 64)
        latents: Tensor = self.linear(mirrored(image, OVERLAP)) + 64 * correction.float()
        return latents


def mirrored(image: Tensor, reach: int) -> Tensor:
    """A picture that goes on mirrored over each border; the border's pixels are repeated, as `synthesise` folds them.

    Args:
        image: `(N, 3, H, W)`.
        reach: Pixels on each side.

    Returns:
        `(N, 3, H + 2 * reach, W + 2 * reach)`.
    """
    image = torch.cat([image[:, :, :reach].flip(2), image, image[:, :, -reach:].flip(2)], 2)
    return torch.cat([image[..., :reach].flip(3), image, image[..., -reach:].flip(3)], 3)


def principal_lapped_basis(images: Tensor, channels: int) -> Tensor:
    """Where training starts: the principal components of 16x16 blocks, made to overlap.

    A rotation across the borders of blocks (a time-domain lapped transform: Tran, Liang, Tu, 2003) is taken before the components, and undone
    after them, so the basis is orthonormal, its reconstruction exact, and its blocks have no edges.

    Args:
        images: Grey levels around 0, `(N, 3, H, W)` with sides that are multiples of 16.
        channels: Components to keep, those of the largest variance first.

    Returns:
        `(channels, 3, 24, 24)`.
    """
    filtered = images
    for axis in (2, 3):
        filtered = _across_borders(filtered, axis, _rotation())
    blocks = F.unfold(filtered, TILE, stride=TILE).transpose(1, 2).reshape(-1, 3 * TILE * TILE)
    _, vectors = torch.linalg.eigh(blocks.T.double() @ blocks.double())
    components = vectors.flip(1)[:, :channels].T.reshape(channels, 3, TILE, TILE).float()
    canvas = F.pad(components, (TILE, TILE, TILE, TILE))  # the tile and its neighbours
    for axis in (2, 3):
        canvas = _across_borders(canvas, axis, _rotation().T)
    low, high = TILE - OVERLAP, 2 * TILE + OVERLAP
    return canvas[:, :, low:high, low:high].contiguous()


def _rotation() -> Tensor:
    """What is done to the 8 pixels around a border of two blocks: even parts stay, odd parts are rotated by two cosine transforms."""
    half = OVERLAP
    i = torch.arange(half, dtype=torch.float64)
    second = torch.cos(torch.pi * i[:, None] * (2 * i + 1) / (2 * half)) * (2 / half) ** 0.5
    second[0] /= 2**0.5
    fourth = torch.cos(torch.pi * (2 * i[:, None] + 1) * (2 * i + 1) / (4 * half)) * (2 / half) ** 0.5
    one, reverse = torch.eye(half, dtype=torch.float64), torch.eye(half, dtype=torch.float64).flip(0)
    butterfly = torch.cat([torch.cat([one, reverse], 1), torch.cat([reverse, -one], 1)]) / 2**0.5
    odd = reverse @ second.T @ fourth @ reverse
    rotation: Tensor = butterfly @ torch.block_diag(one, odd) @ butterfly
    return rotation.float()


def _across_borders(image: Tensor, axis: int, rotation: Tensor) -> Tensor:
    """Rotate the pixels around every border of two tiles along one axis."""
    moved = image.movedim(axis, -1)
    count = moved.shape[-1] // TILE - 1
    starts = torch.arange(count) * TILE + TILE - OVERLAP
    index = starts[:, None] + torch.arange(2 * OVERLAP)
    result = moved.clone()
    result[..., index] = moved[..., index] @ rotation.T.to(image)
    back: Tensor = result.movedim(-1, axis)
    return back


def dump_analysis(analysis: Analysis, sha256: str) -> bytes:
    """Serialize an analysis, weights as float16.

    Args:
        analysis: The network.
        sha256: Of the dictionary that it was trained with, in hexadecimal.
    """
    tensors = {name: value.detach().cpu().numpy().astype(np.float16) for name, value in sorted(analysis.state_dict().items())}
    return safetensors.save(tensors, {"dictionary": sha256})


def load_analysis(data: bytes, name: str) -> tuple[Analysis, str]:
    """Read an analysis, and the SHA-256 of its dictionary.

    Args:
        data: The file's bytes.
        name: What an error calls it.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        tensors = safetensors.load(data)
        sha256 = metadata_of(data)["dictionary"]
        analysis = Analysis(len(tensors["linear.weight"]))
        analysis.load_state_dict({key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{name}: expected an analysis network, got {type(error).__name__}: {error}; train the dictionary again") from None
    return analysis.eval(), sha256


def is_analysis(data: bytes) -> bool:
    """Whether a file of shared parameters is an analysis: what encoding needs, and decoding does not."""
    try:
        return "dictionary" in metadata_of(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def analysis_among(files: Mapping[str, bytes], sha256: str) -> Analysis | None:
    """The analysis of a dictionary, where it is one of the files of shared parameters.

    Args:
        files: By the SHA-256 that names them, in hexadecimal.
        sha256: Of the dictionary.

    Raises:
        ConfigError: One of the files is damaged.
    """
    for name, data in files.items():
        if name != sha256 and is_analysis(data):
            analysis, owner = load_analysis(data, name)
            if owner == sha256:
                return analysis
    return None


@cache
def shipped_analysis(name: str = GENERIC) -> Analysis:
    """The analysis of a dictionary that comes with the package."""
    path = SHIPPED / f"{name}.analysis"
    analysis, sha256 = load_analysis(path.read_bytes(), path.name)
    if sha256 != shipped(name).sha256:
        raise ConfigError(f"{path.name}: expected the analysis of {shipped(name).sha256}, got that of {sha256}; install the package again")
    return analysis
