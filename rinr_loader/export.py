"""Shards back to pictures: a YOLO dataset for detection, a folder per class for classification.

Detection: `OUT/images/<split>/<key>.png`, `OUT/labels/<split>/<key>.txt` (boxes that mark crowds left out, YOLO has no word for them) and
`OUT/data.yaml`. Classification: `OUT/<split>/<class>/<key>.png`, as torchvision's `ImageFolder` reads it. No labels: pictures alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rinr_loader.dataset import RinrDataset, load_metadata
from rinr_loader.errors import ConfigError, ShardError, StorageError
from rinr_loader.pictures import Size, decode_pictures
from rinr_loader.source import SPLITS
from rinr_loader.writer import data_yaml, dump_json, write_bytes

Format = Literal["png", "jpeg"]
MARK = "export.json"  # in a folder that may be written anew
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Exported:
    """What was written: pictures, label boxes, boxes of crowds left out."""

    out: Path
    pictures: int
    boxes: int
    crowds: int


def export(
    path: str | Path,
    out: str | Path,
    *,
    picture_format: Format = "png",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write decoded pictures and their labels.

    Args:
        path: The directory that `rinr convert` wrote, or its data.yaml.
        out: A folder that is new, empty, or of an earlier export, which is then replaced.
        picture_format: JPEG is written at quality 95.
        size: Width and height that pictures fit inside, aspect kept, at most the source's size; the stored size without it.
        limit: Samples of each split, at most.
        device: Where to decode.
        on_progress: Called with the number of pictures written, and of all pictures.

    Raises:
        ConfigError: There is no dataset, or `out` holds something else.
        ShardError: A key would be written outside `out`, or two would be one file.
        StorageError: `out` cannot be written.
        BundleError: A bundle is damaged.
    """
    root, metadata = load_metadata(path)
    out = Path(out)
    datasets = [RinrDataset(root, split) for split in SPLITS if split in metadata["splits"]]
    chosen = [(dataset, range(min(len(dataset), limit or len(dataset)))) for dataset in datasets]
    files = {dataset.split: [_place(out, metadata["task"], dataset, i) for i in indices] for dataset, indices in chosen}
    if len({str(file).casefold() for some in files.values() for file in some}) < sum(map(len, files.values())):
        raise ShardError(f"{root}: expected every picture to have a file of its own, got two with one name; convert it again")
    try:
        _prepare(out)
        done, total, boxes, crowds = 0, sum(len(indices) for _, indices in chosen), 0, 0
        for dataset, indices in chosen:
            for i, pixels in zip(indices, decode_pictures(dataset, indices, size=_fit(size), device=device), strict=True):
                _save(pixels, files[dataset.split][i], picture_format)
                if metadata["task"] == "detect":
                    label = dataset.labels[i]
                    _write_labels(out, files[dataset.split][i], label)
                    boxes, crowds = boxes + int((~label["crowd"]).sum()), crowds + int(label["crowd"].sum())
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        if metadata["task"] == "detect":
            places = "".join(f"{split}: images/{split}\n" for split in files).encode()
            write_bytes(out / "data.yaml", places + data_yaml((), metadata["names"]))
    except OSError as error:
        raise StorageError(
            f"{error.filename or out}: expected a place that can be written, got {error.strerror or error}; choose another OUT"
        ) from None
    return Exported(out, done, boxes, crowds)


def _prepare(out: Path) -> None:
    """Make the folder; empty it where an export has written it before."""
    if out.is_dir() and any(out.iterdir()):
        try:
            ours = json.loads((out / MARK).read_bytes())["format"] == "rinr export"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            first = sorted(path.name for path in out.iterdir())[0]
            raise ConfigError(f"{out}: expected an empty folder or an earlier export, got one with {first}; choose another OUT")
        for name in ("images", "labels", *SPLITS):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "data.yaml").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / MARK, dump_json({"format": "rinr export"}))


def _place(out: Path, task: str, dataset: RinrDataset, i: int) -> Path:
    """File of a sample without suffix; a key cannot lead out of the folder.

    Raises:
        ShardError: It would.
    """
    label = dataset.labels[i]
    segments = label["key"].split("/")
    if any(segment in ("", ".", "..") or "\\" in segment or "\0" in segment for segment in segments):
        raise ShardError(f"{dataset.split}: expected a key that names a file, got {label['key']!r}; convert it again")
    if task != "classify":
        return out.joinpath("images", dataset.split, *segments)
    number = label["label"]
    name = _folder(dataset.names[number]) if 0 <= number < len(dataset.names) else "unlabelled" if number < 0 else f"class_{number}"
    return out.joinpath(dataset.split, name, *(segments[1:] if len(segments) > 1 and segments[0] == name else segments))


def _folder(name: str) -> str:
    """A class name as the name of one folder."""
    quoted = quote(name, safe=" !#$&'()+,;=@[]{}~" + "".join(character for character in name if ord(character) > 127))
    return quoted.replace(".", "%2E") if set(name) <= {"."} else quoted


def _fit(size: tuple[int, int] | None) -> Callable[[Size, Size], Size] | None:
    if size is None:
        return None

    def fit(source: Size, _stored: Size) -> Size:
        ratio = min(size[0] / source[1], size[1] / source[0], 1.0)
        return max(1, round(source[0] * ratio)), max(1, round(source[1] * ratio))

    return fit


def _save(pixels: NDArray[np.uint8], file: Path, picture_format: Format) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if picture_format == "png":
        image.save(f"{file}.png")
    else:
        image.save(f"{file}.jpg", quality=JPEG_QUALITY, optimize=True)


def _write_labels(out: Path, file: Path, label: Mapping[str, Any]) -> None:
    """Write a label file where YOLO looks for it: the last folder `images` of the picture's path becomes `labels`."""
    parts = list(file.relative_to(out).parts)
    last = max(i for i, part in enumerate(parts[:-1]) if part == "images")
    parts[last] = "labels"
    place = out.joinpath(*parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    height, width = label["size"]
    kept = ~label["crowd"]
    corners = label["boxes"][kept].astype(np.float64) / (width, height, width, height)
    rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    lines = [f"{name} {x:.8g} {y:.8g} {w:.8g} {h:.8g}\n" for name, (x, y, w, h) in zip(label["classes"][kept].tolist(), rows.tolist(), strict=True)]
    Path(f"{place}.txt").write_text("".join(lines))
