"""Samples of a dataset as decoded pictures, each at a size of its own: for people to look at, not for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rinr_loader.dataset import RinrDataset
from rinr_loader.decode import decode, whole

PIXELS = 4_000_000  # decoded together, at most; 16 bytes of scratch each
Size = tuple[int, int]


def decode_pictures(
    dataset: RinrDataset,
    indices: Sequence[int],
    *,
    size: Callable[[Size, Size], Size] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[NDArray[np.uint8]]:
    """Decode samples one after the other; neighbours of one size are decoded together.

    Args:
        dataset: Where they are.
        indices: Which samples.
        size: From a sample's source size and stored size (height, width) to its output size; the stored size without it.
        device: Where to decode.

    Yields:
        RGB, uint8, `(H, W, 3)`, in the order of `indices`.
    """
    source, stored = (dataset.column(name)[list(indices)].tolist() for name in ("source_size", "stored_size"))
    sizes = [tuple(b) if size is None else size(tuple(a), tuple(b)) for a, b in zip(source, stored, strict=True)]
    first = 0
    while first < len(indices):
        height, width = sizes[first]
        last = first + 1
        while last < len(indices) and sizes[last] == sizes[first] and (last + 1 - first) * height * width <= PIXELS:
            last += 1
        buffer = dataset.read(indices[first:last]).to(device)
        images = decode(buffer, whole(buffer, (height, width)), size=(height, width))
        yield from images.permute(0, 2, 3, 1).cpu().numpy()
        first = last
