"""The end of every encoder: a bundle is decoded as a reader will decode it, and packed with the PSNR that was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rinr_loader.bundle import Bundle, Network, pack
from rinr_loader.decode import decode_batch
from rinr_loader.dictionary import Dictionary
from rinr_loader.picture import Picture
from rinr_loader.quality import psnr


def pack_measured(
    picture: Picture,
    networks: Sequence[Network],
    device: torch.device | str,
    *,
    shared_hash: bytes = bytes(8),
    shared: Mapping[bytes, Dictionary] | None = None,
) -> bytes:
    """Measure what a picture became, and pack it.

    Args:
        picture: What was encoded.
        networks: What it became, as in a bundle.
        device: Where to decode.
        shared_hash: What the bundle names its shared parameters by, zeros for none.
        shared: Those parameters by that hash, as `ShardBuffer` has them.
    """
    return pack_all([picture], [networks], device, shared_hash=shared_hash, shared=shared)[0]


def pack_all(
    pictures: Sequence[Picture],
    networks: Sequence[Sequence[Network]],
    device: torch.device | str,
    *,
    shared_hash: bytes = bytes(8),
    shared: Mapping[bytes, Dictionary] | None = None,
) -> list[bytes]:
    """`pack_measured` for several pictures; those of one size are decoded together."""
    bundles = [
        Bundle(
            stored_size=(picture.pixels.shape[0], picture.pixels.shape[1]),
            source_size=picture.source_size,
            networks=tuple(mine),
            boxes=picture.boxes,
            classes=picture.classes,
            crowd=picture.crowd,
            label=picture.label,
            source_hash=picture.source_hash,
            shared=shared_hash,
        )
        for picture, mine in zip(pictures, networks, strict=True)
    ]
    packed = [b""] * len(bundles)
    for size in dict.fromkeys(bundle.stored_size for bundle in bundles):
        same = [i for i, bundle in enumerate(bundles) if bundle.stored_size == size]
        images = decode_batch([pack(bundles[i]) for i in same], device=device, shared=shared)
        for i, image in zip(same, images, strict=True):
            decoded, source, mask = image.permute(1, 2, 0).cpu().numpy(), pictures[i].pixels, pictures[i].object_mask
            found = psnr(decoded, source, mask) if mask.any() else None
            packed[i] = pack(replace(bundles[i], psnr=psnr(decoded, source), object_psnr=found))
    return packed
