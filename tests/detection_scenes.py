"""Datasets for the tests of the Ultralytics adapter: pictures with rectangles on them, as shards and as the same pixels in PNGs.

Nothing is fitted: a background is a network with random weights, an object a residual whose only nonzero parameters are the biases
of its last layer, so it adds one colour to its rectangle and the label is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.bundle import Bundle, Network, NetworkSpec, pack
from rinr_loader.codecs import siren
from rinr_loader.decode import decode_batch
from rinr_loader.index import encode_key
from rinr_loader.writer import data_yaml, describe_dataset, describe_shard, dump_json, write_index, write_tar

NAMES = ("red", "green")
BACKGROUND = NetworkSpec("background", depth=2, width=8, dtype="int8", w0=4.0)
RESIDUAL = NetworkSpec("residual", depth=1, width=4, dtype="float16", w0=4.0)
COLOURS = ((0.45, -0.3, -0.3), (-0.3, 0.45, -0.3))


@dataclass(frozen=True)
class Scene:
    """One sample: its key, its bytes and its labels (xyxy in pixels)."""

    key: str
    bundle: bytes
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


def draw(key: str, *, size: tuple[int, int] = (64, 64), objects: int = 2, seed: int = 0, crowd: int = 0, shrink: int = 1) -> Scene:
    """Draw a scene; the last `crowd` objects are marked as crowds, and the picture is stored at 1 / `shrink` of its size."""
    rng = np.random.default_rng([seed, *hashlib.sha256(key.encode()).digest()[:8]])
    height, width = size
    extent = np.stack([rng.integers(min(12, side), max(13, side // 2), objects) for side in (width, height)], 1)
    corner = np.stack([rng.integers(0, side - extent[:, axis] + 1) for axis, side in enumerate((width, height))], 1)
    boxes = np.concatenate([corner, corner + extent], 1).astype(np.float32)
    classes = rng.integers(0, len(NAMES), objects)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    flat = siren.initialise(BACKGROUND, generator, 1) * 0.7
    networks = [
        Network(BACKGROUND, (0, 0, width // shrink, height // shrink), 0.5, siren.to_bytes(flat, BACKGROUND, siren.row_scales(flat, BACKGROUND))[0])
    ]
    for k, (box, class_id) in enumerate(zip((boxes.astype(int) // shrink).tolist(), classes, strict=True)):
        flat = torch.zeros(1, RESIDUAL.rows + RESIDUAL.weights)
        siren.layers(flat, RESIDUAL)[-1][1][0, :, 0] = torch.tensor(COLOURS[class_id])
        networks.append(Network(RESIDUAL, tuple(box), 1.0, siren.to_bytes(flat, RESIDUAL, None)[0], object=k))
    flags = np.arange(objects) >= objects - crowd
    bundle = Bundle((height // shrink, width // shrink), size, tuple(networks), boxes, classes, flags)
    return Scene(key, pack(bundle), boxes, classes)


def write_shards(root: Path, *, shard_samples: int = 4, codec: Mapping[str, object] | None = None, **splits: Sequence[Scene]) -> Path:
    """Write a dataset of shards with these splits; return `root`."""
    described = {}
    for split, scenes in splits.items():
        (root / split).mkdir(parents=True)
        described[split] = []
        for number, first in enumerate(range(0, len(scenes), shard_samples)):
            path = root / split / f"{split}-{number:06d}.tar"
            write_tar(path, [(f"{encode_key(scene.key)}.rinr", scene.bundle) for scene in scenes[first : first + shard_samples]])
            index = write_index(path)
            described[split].append((describe_shard(root, path, index), index))
    (root / "dataset.json").write_bytes(dump_json(describe_dataset(described, names=NAMES, codec=codec or {}, source={})))
    (root / "data.yaml").write_bytes(data_yaml(splits, NAMES))
    return root


def write_images(root: Path, split: str, scenes: Sequence[Scene]) -> Path:
    """Write the decoded pixels as PNGs with YOLO labels; return the folder of images."""
    for scene in scenes:
        pixels = decode_batch([scene.bundle])[0].permute(1, 2, 0).numpy()
        image, label = (root / kind / split / f"{scene.key}{suffix}" for kind, suffix in (("images", ".png"), ("labels", ".txt")))
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
        low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
        rows = np.concatenate([(low + high) / 2, high - low], 1) / np.tile(pixels.shape[1::-1], 2)
        lines = [f"{c} {' '.join(map(repr, row))}" for c, row in zip(scene.classes.tolist(), rows.tolist(), strict=True)]
        label.write_text("\n".join(lines))
    return root / "images" / split


MODEL = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [[3, 4], 1, Detect, [nc]]
"""


def write_model(path: Path) -> Path:
    """Write the smallest YOLO that learns these scenes, with strides 8 and 16."""
    path.write_text(MODEL)
    return path


def write_yaml(path: Path, **splits: str | Path) -> Path:
    """Write a data.yaml."""
    names = "".join(f"  {k}: {name}\n" for k, name in enumerate(NAMES))
    path.write_text("".join(f"{split}: {folder}\n" for split, folder in splits.items()) + f"names:\n{names}")
    return path
