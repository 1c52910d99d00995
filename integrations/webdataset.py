"""Shards read with `webdataset` alone: a decoder for `.rinr` members, one by one or a batch at a time.

    dataset = webdataset.WebDataset(urls, shardshuffle=100).decode(rinr_decoder())
    for sample in dataset:
        sample["rinr"].image, sample["rinr"].boxes

    dataset = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).batched(16, collation_fn=rinr_collation(size=(224, 224)))
    for images, targets in dataset:
        ...

The second decodes a batch together, which is many times as fast on a GPU. Only bytes pass through webdataset's shuffle buffer. `__key__` is the
key as the tar has it; `rinr_loader.index.decode_key` turns it into the source's. `KEY.json`, where a sample has one, is decoded by webdataset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rinr_loader import Batch, ConfigError, Targets
from rinr_loader.boxes import place_objects
from rinr_loader.decode import decode, whole
from rinr_loader.dictionary import Dictionary
from rinr_loader.reader import buffer_of

__all__ = ["Decoded", "rinr_collation", "rinr_decoder"]

if find_spec("webdataset") is None:
    raise ImportError("rinr_loader.integrations.webdataset: expected the package webdataset, got none; run `pip install 'rinr-loader[webdataset]'`")

Size = tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """One decoded sample.

    Args:
        image: RGB, uint8 in [0, 255], `(3, H, W)`.
        boxes: Float32 xyxy in pixels of `image`, `(n, 4)`.
        classes: Class id of each box, int64, `(n,)`.
        crowd: Whether a box marks a crowd or an ignored region, bool, `(n,)`.
        label: Class id of the whole picture, -1 where there is none.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    label: int


def rinr_decoder(
    *, size: Size | None = None, device: torch.device | str = "cpu", antialias: bool = True, shared: Mapping[bytes, Dictionary] | None = None
) -> Callable[[str, bytes], Decoded | None]:
    """Make a handler for `WebDataset.decode` that turns each `.rinr` member into a `Decoded`.

    Args:
        size: Height and width of the images, in pixels; None gives each at its stored size.
        device: Where images are decoded and returned.
        antialias: Filter where an image gets smaller than stored.
        shared: Shared parameters that do not come with the package, as `rinr_loader.open_shared("DEST/shared/NAME.bin")` gives them.

    Returns:
        A function of a member's suffix and bytes, as webdataset calls it; None for every suffix but `.rinr`. It can be pickled. A damaged member
        is a `BundleError`, which webdataset raises as the cause of its `DecodingError`.
    """
    return partial(_handle, size=size, device=torch.device(device), antialias=antialias, shared=shared)


def rinr_collation(
    *, size: Size | None = None, device: torch.device | str = "cpu", antialias: bool = True, shared: Mapping[bytes, Dictionary] | None = None
) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """Make a function for `WebDataset.batched(n, collation_fn=...)` that decodes the `.rinr` members of a batch together.

    Args:
        size: Height and width of the images, in pixels; None takes the stored size, which must then be the same for the whole batch.
        device: Where images are decoded and returned.
        antialias: Filter where an image gets smaller than stored.
        shared: Shared parameters that do not come with the package, as `rinr_loader.open_shared("DEST/shared/NAME.bin")` gives them.

    Returns:
        A function of a list of samples, as webdataset calls it. It gives the batch of `rinr_loader.DataLoader`: images uint8 `(N, 3, H, W)` and
        `Targets`, with the keys of the source. It can be pickled, and raises `BundleError` with the key of a damaged member.
    """
    return partial(_collate, size=size, device=torch.device(device), antialias=antialias, shared=shared)


def _handle(suffix: str, data: bytes, **options: Any) -> Decoded | None:
    if suffix.rpartition(".")[2] != "rinr":
        return None
    batch = _decode([data], None, **options)
    found = batch.targets
    return Decoded(batch.images[0], found.boxes, found.classes, found.crowd, int(found.labels[0]))


def _collate(samples: Sequence[Mapping[str, Any]], **options: Any) -> Batch:
    for sample in samples:
        if not isinstance(sample.get("rinr"), bytes):
            found = type(sample["rinr"]).__name__ if "rinr" in sample else ", ".join(name for name in sample if not name.startswith("__"))
            advice = "read rinr shards, and use batched() without decode()"
            raise ConfigError(f"{sample['__key__']}: expected the bytes of a .rinr member, got {found or 'nothing'}; {advice}")
    keys = [str(sample["__key__"]) for sample in samples]
    return _decode([sample["rinr"] for sample in samples], keys, **options)


def _decode(
    bundles: Sequence[bytes],
    keys: Sequence[str] | None,
    *,
    size: Size | None,
    device: torch.device,
    antialias: bool,
    shared: Mapping[bytes, Dictionary] | None,
) -> Batch:
    buffer = buffer_of(bundles, keys, shared).to(device)
    if size is None:
        sizes = {(height, width) for height, width in buffer.stored_size.tolist()}
        if len(sizes) != 1:
            raise ConfigError(f"size: expected one size for images stored at {sorted(sizes)}, got None; pass size=(height, width)")
        size = sizes.pop()
    placements = whole(buffer, size)
    images = decode(buffer, placements, size=size, antialias=antialias)
    boxes, row, batch_index = place_objects(placements, buffer.box, buffer.object_start, size=size)
    return Batch(images, Targets(boxes, buffer.class_id[row], buffer.crowd[row], batch_index, buffer.label, buffer.keys))
