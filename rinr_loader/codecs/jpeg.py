"""The family `jpeg`: files decoded by what the machine has, torchvision (with nvJPEG on CUDA) or else Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from rinr_loader.errors import BundleError
from rinr_loader.jpeg_header import read_header

RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode_files(files: Sequence[Tensor], sizes: Sequence[tuple[int, int]], names: Sequence[str], device: torch.device) -> list[Tensor]:
    """Decode JPEG files; those of a CPU side by side on as many threads as torch has.

    Args:
        files: Their bytes, uint8, one dimension, in host memory.
        sizes: Height and width that each must have.
        names: What an error calls them.
        device: Where the pictures shall be.

    Returns:
        RGB, uint8, `(3, H, W)` each, on `device`.

    Raises:
        BundleError: A file is damaged, or is another picture than the one described.
    """
    for file, size, name in zip(files, sizes, names, strict=True):
        _check(file, size, name)
    found = _decode_cuda(files, device) if device.type == "cuda" else None
    if found is None:  # also where nvJPEG refuses one of them: the CPU's decoder then tells which is damaged
        with ThreadPoolExecutor(max(1, min(len(files), torch.get_num_threads()))) as pool:
            found = [image.to(device) for image in pool.map(_decode_file, files, names)]
    for image, size, name in zip(found, sizes, names, strict=True):
        if tuple(image.shape) != (3, *size):
            raise _damaged(name, f"a picture of {size[1]}x{size[0]}", f"shape {tuple(image.shape)}")
    return found


def _check(file: Tensor, size: tuple[int, int], name: str) -> None:
    """A decoder allocates what a file asks for: look at it first."""
    try:
        header = read_header(file.numpy().data)
    except ValueError as error:
        raise _damaged(name, "a JPEG, gray or YCbCr", error) from None
    if (header.height, header.width) != size:
        raise _damaged(name, f"a JPEG of {size[1]}x{size[0]}", f"{header.width}x{header.height}")


def _damaged(name: str, expected: object, found: object) -> BundleError:
    return BundleError(f"{name}: expected {expected}, got {found}; the bundle is damaged, fetch or convert it again")


@cache
def _has_op(name: str) -> bool:
    """Whether torchvision is installed, and was built with this operation.

    Its Python functions for them warn at every call since version 0.29 that TorchCodec is to replace them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of every library that it was built without
            import torchvision.io  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.image, name)


def _decode_file(file: Tensor, name: str) -> Tensor:
    try:
        if _has_op("decode_jpeg"):
            image: Tensor = torch.ops.image.decode_jpeg(file, RGB, False)
            return image
        with JpegImageFile(io.BytesIO(file.numpy().tobytes())) as opened:  # not Image.open, which others replace
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    except (RuntimeError, OSError, ValueError, SyntaxError) as error:
        raise _damaged(name, "a JPEG", str(error).partition("\n")[0]) from None


def _decode_cuda(files: Sequence[Tensor], device: torch.device) -> list[Tensor] | None:
    """All of them by nvJPEG; None where that cannot be."""
    if not files or not _has_op("decode_jpegs_cuda"):
        return None
    try:
        images: list[Tensor] = torch.ops.image.decode_jpegs_cuda(list(files), RGB, device)
    except RuntimeError:
        return None
    return images
