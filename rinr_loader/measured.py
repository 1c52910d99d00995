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
    bundle = Bundle(
        stored_size=(picture.pixels.shape[0], picture.pixels.shape[1]),
        source_size=picture.source_size,
        networks=tuple(networks),
        boxes=picture.boxes,
        classes=picture.classes,
        crowd=picture.crowd,
        label=picture.label,
        source_hash=picture.source_hash,
        shared=shared_hash,
    )
    decoded = decode_batch([pack(bundle)], device=device, shared=shared)[0].permute(1, 2, 0).cpu().numpy()
    mask = picture.object_mask
    return pack(replace(bundle, psnr=psnr(decoded, picture.pixels), object_psnr=psnr(decoded, picture.pixels, mask) if mask.any() else None))
