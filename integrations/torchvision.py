"""Shards in scripts shaped like torchvision's reference scripts: the dataset is what is swapped, by its import.

    from rinr_loader.integrations.torchvision import DataLoader, ImageFolder   # or CocoDetection

    train = ImageFolder("DEST/train", transform)        # transform: torchvision's own, unchanged
    loader = DataLoader(train, batch_size=256, sampler=RandomSampler(train), num_workers=8, pin_memory=True)

Why the dataset, not the loader: it is where a script names its data and its transforms, and everything around it goes on working: samplers,
`DistributedSampler`, batches grouped by aspect ratio, `Subset`, collate functions, `len`, `dataset.classes`. Nothing is lost by it, because
torch's `DataLoader` asks a map-style dataset for whole batches (`__getitems__`), which are decoded together; crops, resizes, flips, dtype
and normalisation of the transform happen in the decode (see `torchvision_transforms`).

torch's own `DataLoader` works, with images decoded on the CPU. On a GPU they are decoded where the model is, which worker processes and
pinned memory would only hinder, so the same import brings a `DataLoader` that turns `num_workers` into threads that read ahead.

Random numbers come from torch's global generator, as in torchvision: `torch.manual_seed` repeats a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import Dataset, Subset, get_worker_info

from rinr_loader import ConfigError, Placements, RinrDataset, ShardBuffer
from rinr_loader.boxes import place_objects
from rinr_loader.decode import decode
from rinr_loader.pipeline import ahead

try:
    from torchvision import tv_tensors

    from rinr_loader.integrations.torchvision_transforms import Recipe, place, read_transform
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "torchvision":
        raise
    message = "rinr_loader.integrations.torchvision: expected the package torchvision, got none; run `pip install 'rinr-loader[torchvision]'`"
    raise ImportError(message) from None

__all__ = ["CocoDetection", "DataLoader", "ImageFolder"]

Item = tuple[Tensor, Any]


class _ShardDataset(Dataset[Item]):
    """One split of shards as a map-style dataset whose batches are read and decoded together."""

    def __init__(self, root: str | Path, device: torch.device | str | None) -> None:
        path = Path(root)
        if (path / "dataset.json").exists():
            raise ConfigError(f"{path}: expected the folder of a split, got the whole dataset; pass {path / 'train'} or another split")
        self.root = str(root)
        self.source = RinrDataset(path.parent, split=path.name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __len__(self) -> int:
        return len(self.source)

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """Size of an image as stored, in pixels: what torchvision's samplers group by, without decoding."""
        height, width = self.source.labels[index]["stored_size"]
        return height, width

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected {-len(self)} to {len(self) - 1}, got {index}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        if get_worker_info() is not None and self.device.type != "cpu":
            raise ConfigError(
                f"num_workers: expected 0 with images decoded on {self.device}, got worker processes; import DataLoader from "
                "rinr_loader.integrations.torchvision, or pass num_workers=0 and pin_memory=False"
            )
        return self.build(self.source.read(indices), indices)

    def build(self, buffer: ShardBuffer, indices: Sequence[int]) -> list[Item]:
        """Turn samples that were read into image and target of each."""
        recipe = self._recipe()
        placements, sizes = place(recipe, buffer.source_size, buffer.stored_size)
        # Images of different sizes are decoded together, each in the corner of one that holds all, and cut out.
        height, width = (int(side) for side in sizes.amax(0))
        images = decode(
            buffer.to(self.device),
            placements.to(self.device),
            size=(height, width),
            fill=0,
            antialias=recipe.antialias,
            dtype=recipe.dtype,
            normalize=recipe.normalize,
        )
        pictures = [image[:, :h, :w].contiguous() for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
        targets = self._targets(buffer, indices, placements, (height, width))
        return [self._finish(picture, target, recipe.rest) for picture, target in zip(pictures, targets, strict=True)]

    def _recipe(self) -> Recipe:
        raise NotImplementedError

    def _targets(self, buffer: ShardBuffer, indices: Sequence[int], placements: Placements, size: tuple[int, int]) -> Iterable[Any]:
        raise NotImplementedError

    def _finish(self, image: Tensor, target: Any, rest: Sequence[Callable[..., Any]]) -> Item:
        raise NotImplementedError


class ImageFolder(_ShardDataset):
    """`torchvision.datasets.ImageFolder` from shards: images and class numbers.

    Args:
        root: Folder of one split of a converted dataset, such as `DEST/train`.
        transform: A transform of `torchvision.transforms` or its `v2`, or a function of a uint8 tensor `(3, H, W)`. None gives floats in [0, 1].
        target_transform: A function of the class number.
        device: Where images are decoded and returned; CUDA where there is one.

    `classes`, `class_to_idx`, `targets` and `samples` (here: keys and classes) are those of torchvision's class.

    Raises:
        ConfigError: The folder is no split of a dataset, or a picture has no class.

    Example:
        >>> image, label = ImageFolder(path / "train", v2.Compose([v2.RandomResizedCrop(32), v2.ToImage()]))[0]
        >>> image.shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        root: str | Path,
        transform: Any = None,
        target_transform: Callable[[int], Any] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(root, device)
        self.transform, self.target_transform = transform, target_transform
        self.classes = list(self.source.names)
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        self.targets: list[int] = self.source.column("label").tolist()
        self.samples = list(zip(self.source.keys, self.targets, strict=True))
        self.imgs = self.samples
        if -1 in self.targets:
            raise ConfigError(
                f"{root}: expected a class for every picture, got {self.targets.count(-1)} of {len(self)} without; convert a folder with a "
                "folder for each class, or use CocoDetection for boxes"
            )

    def _recipe(self) -> Recipe:
        return read_transform(self.transform)

    def _targets(self, buffer: ShardBuffer, indices: Sequence[int], placements: Placements, size: tuple[int, int]) -> Iterable[Any]:
        labels: list[int] = buffer.label.tolist()
        return labels

    def _finish(self, image: Tensor, target: Any, rest: Sequence[Callable[..., Any]]) -> Item:
        for step in rest:
            image = step(image)
        return image, target if self.target_transform is None else self.target_transform(target)


class CocoDetection(_ShardDataset):
    """`torchvision.datasets.CocoDetection` from shards, with the targets that torchvision's detection models take.

    A target is a dict of `boxes` (float32 xyxy in pixels of the image, `(n, 4)`), `labels` (int64, the class id plus 1, because 0 is the background),
    `image_id` (the index in the dataset), `area` (of the boxes, float32) and `iscrowd` (int64). So what a script does to turn COCO's annotations into
    this form is left out. Boxes that a crop leaves without an area are dropped.

    Args:
        root: Folder of one split of a converted dataset, such as `DEST/train`.
        annFile: Not used: annotations are in the shards.
        transforms: A transform of image and target of `torchvision.transforms.v2`. None gives floats in [0, 1].
        device: Where images are decoded and returned; CUDA where there is one.
        keep_crowd: Keep boxes that mark a crowd or an ignored region, with `iscrowd` 1: evaluation wants them, training does not.

    `classes` begins with `__background__`, so `num_classes=len(dataset.classes)`.

    Raises:
        ConfigError: The folder is no split of a dataset, or the dataset has classes of pictures instead of boxes.

    Example:
        >>> image, target = CocoDetection(path / "train")[0]
        >>> sorted(target)
        ['area', 'boxes', 'image_id', 'iscrowd', 'labels']
    """

    def __init__(
        self,
        root: str | Path,
        annFile: str | Path | None = None,
        *,
        transforms: Any = None,
        device: torch.device | str | None = None,
        keep_crowd: bool = False,
    ) -> None:
        super().__init__(root, device)
        self.transforms, self.keep_crowd = transforms, keep_crowd
        self.classes = ["__background__", *self.source.names]
        if self.source.metadata["task"] == "classify":
            raise ConfigError(f"{root}: expected boxes, got a dataset with a class for each picture; use ImageFolder")

    def _recipe(self) -> Recipe:
        return read_transform(self.transforms)

    def _targets(self, buffer: ShardBuffer, indices: Sequence[int], placements: Placements, size: tuple[int, int]) -> Iterable[Any]:
        boxes, row, output = place_objects(placements, buffer.box, buffer.object_start, size=size)
        kept = ~buffer.crowd[row] | self.keep_crowd
        columns = {"boxes": boxes[kept], "labels": buffer.class_id[row][kept] + 1, "iscrowd": buffer.crowd[row][kept].long()}
        counts = output[kept].bincount(minlength=len(indices)).tolist()
        parts = [column.to(self.device).split(counts) for column in columns.values()]
        for index, *values in zip(indices, *parts, strict=True):
            yield {"image_id": int(index), **dict(zip(columns, values, strict=True))}

    def _finish(self, image: Tensor, target: Any, rest: Sequence[Callable[..., Any]]) -> Item:
        if rest:  # what they take for an image and for boxes is told by the type
            boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
            image, target = tv_tensors.Image(image), {**target, "boxes": boxes}
        for step in rest:
            image, target = step(image, target)
        boxes = target["boxes"]
        return image, {**target, "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])}


class DataLoader(torch.utils.data.DataLoader[Any]):
    """torch's `DataLoader`, with threads that read ahead for the datasets of this module and their `Subset`s; any other dataset is left to torch.

    Arguments are torch's. For shards, `num_workers` is the number of threads, images stay on the dataset's device whatever `pin_memory` says, and
    what is about worker processes has no meaning.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        self.threads = num_workers
        self.shards = batch_size is not None and isinstance(_resolve(dataset)[0], _ShardDataset)
        self.depth = num_workers * (prefetch_factor or 2)
        processes: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "timeout": timeout,
            "worker_init_fn": worker_init_fn,
            "multiprocessing_context": multiprocessing_context,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "pin_memory_device": pin_memory_device,
            "in_order": in_order,
        }
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            generator=generator,
            **({} if self.shards else processes),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches() if self.shards else super().__iter__()

    def _batches(self) -> Iterator[Any]:
        jobs = (partial(_read, self.dataset, batch) for batch in self.batch_sampler or ())
        for shards, indices, buffer in ahead(jobs, threads=self.threads, depth=self.depth):
            yield self.collate_fn(shards.build(buffer, indices))


def _resolve(dataset: Dataset[Any], indices: Sequence[int] = ()) -> tuple[Dataset[Any], Sequence[int]]:
    """The dataset that a `Subset` is of, and where these of its samples are there."""
    while isinstance(dataset, Subset):
        indices = [dataset.indices[i] for i in indices]
        dataset = dataset.dataset
    return dataset, indices


def _read(dataset: Dataset[Any], indices: Sequence[int]) -> tuple[Any, Sequence[int], ShardBuffer]:
    shards: Any
    shards, indices = _resolve(dataset, indices)
    return shards, indices, shards.source.read(indices)
