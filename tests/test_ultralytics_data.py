"""The dataset and the loader of the Ultralytics adapter, against Ultralytics' own on the same pixels. TRAINERS points 1-5, 9 and 11."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, needs, psnr
from detection_scenes import Scene, draw, write_images, write_shards
from torch import Tensor

needs("ultralytics")

from ultralytics.data import augment
from ultralytics.data.build import ContiguousDistributedSampler, build_dataloader, build_yolo_dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import DEFAULT_CFG

from rinr_loader.bundle import pack, parse
from rinr_loader.integrations.ultralytics import build_shard_dataset
from rinr_loader.integrations.ultralytics_data import ShardDetectionDataset
from rinr_loader.integrations.ultralytics_loader import BatchPlan, ShardLoader, Share
from rinr_loader.plan import epoch_order
from rinr_loader.rng import Draws

pytestmark = pytest.mark.filterwarnings("default")  # Ultralytics and Matplotlib warn of their own affairs

SIZES = ((48, 64), (64, 48), (64, 64), (40, 64), (64, 34))
DATA = {"names": {0: "red", 1: "green"}, "nc": 2, "channels": 3}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    drawn = [draw(f"seq{k % 2}/frame.{k:02d}", size=SIZES[k % len(SIZES)], objects=k % 4) for k in range(11)]
    return sorted(drawn, key=lambda scene: scene.key)


@pytest.fixture(scope="module")
def shards(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), train=scenes, val=scenes)


@pytest.fixture(scope="module")
def images(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    return write_images(root, "val", scenes)


def settings(**changes: Any) -> Any:
    args = copy(DEFAULT_CFG)
    for key, value in {"imgsz": 64, "rect": False, "batch": 4, "seed": 3, **changes}.items():
        setattr(args, key, value)
    return args


def ours(root: Path, *, train: bool, batch: int = 4, rect: bool = False, **changes: Any) -> ShardDetectionDataset:
    folder = str(root / ("train" if train else "val"))
    return build_shard_dataset(settings(**changes), folder, train=train, rect=rect, batch=batch, stride=32, device="cpu")


def theirs(images: Path, *, train: bool, batch: int = 4, rect: bool = False, **changes: Any) -> YOLODataset:
    return build_yolo_dataset(settings(**changes), str(images), batch, DATA, mode="train" if train else "val", rect=rect, stride=32)


def batches(dataset: Any, batch: int = 4) -> list[dict[str, Any]]:
    if isinstance(dataset, ShardDetectionDataset):
        return list(ShardLoader(dataset, batch_size=batch))
    return list(build_dataloader(dataset, batch, workers=0, shuffle=False, device="cpu"))


def stem(file: str) -> str:
    return "/".join(Path(file).with_suffix("").parts[-2:])


# --- validation: point 5 ---


@pytest.mark.parametrize("rect", [True, False])
@pytest.mark.parametrize("imgsz", [64, 96])
def test_validation_batches_are_those_of_the_same_pictures_as_files(shards: Path, images: Path, rect: bool, imgsz: int) -> None:
    mine, expected = (batches(build(path, train=False, rect=rect, imgsz=imgsz)) for build, path in ((ours, shards), (theirs, images)))
    assert len(mine) == len(expected) == 3
    for a, b in zip(mine, expected, strict=True):
        assert a.keys() == b.keys()
        assert list(map(stem, a["im_file"])) == list(map(stem, b["im_file"]))
        assert [tuple(x) for x in a["ori_shape"]] == [tuple(x) for x in b["ori_shape"]]
        assert [tuple(x) for x in a["resized_shape"]] == [tuple(int(v) for v in x) for x in b["resized_shape"]]
        for (gain, pad), (their_gain, their_pad) in zip(a["ratio_pad"], b["ratio_pad"], strict=True):
            assert gain == pytest.approx(their_gain, rel=1e-6)
            assert pad == their_pad
        for key in ("cls", "bboxes", "batch_idx"):
            assert a[key].dtype == b[key].dtype
            assert_close(a[key], b[key], "float32")
        assert a["img"].dtype == torch.uint8
        assert a["img"].shape == b["img"].shape
        if imgsz == 64:  # nothing is resized, so the pixels are the same
            assert_close(a["img"], b["img"], "exact")
        else:
            assert psnr(a["img"], b["img"]) > 25


@pytest.mark.parametrize("train", [False, True])
def test_pictures_stored_smaller_than_their_source_keep_its_labels(tmp_path: Path, train: bool) -> None:
    whole, shrunk = (
        batches(ours(write_shards(tmp_path / str(shrink), train=scenes, val=scenes), train=train))[0]
        for shrink, scenes in ((k, [draw(f"{i}", size=SIZES[i], shrink=k) for i in range(4)]) for k in (1, 2))
    )
    for key in ("ori_shape", "resized_shape", "ratio_pad"):
        assert whole[key] == shrunk[key]
    for key in ("cls", "bboxes", "batch_idx"):
        assert_close(whole[key], shrunk[key], "exact")
    assert psnr(whole["img"], shrunk["img"]) > 20


def test_a_label_that_appears_twice_and_a_crowd_are_no_targets(tmp_path: Path) -> None:
    scene, crowded = draw("a"), draw("b", crowd=1)
    bundle = parse(scene.bundle)
    twice = replace(bundle, boxes=bundle.boxes[[0, 1, 0]], classes=bundle.classes[[0, 1, 0]], crowd=np.zeros(3, np.bool_))
    dataset = ours(write_shards(tmp_path, train=[replace(scene, bundle=pack(twice)), crowded]), train=True)
    assert [len(label["cls"]) for label in dataset.labels] == [2, 1]


# --- augmentation: points 4 and 11 ---


class Numbers:
    """Stands in for the module `random` of Ultralytics' augmentation, and deals the numbers of ours."""

    def __init__(self, numbers: list[float], partners: list[int]) -> None:
        self.numbers, self.partners = numbers, partners

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.numbers.pop(0)

    def random(self) -> float:
        return self.numbers.pop(0)

    def choices(self, _: list[int], *, k: int) -> list[int]:
        assert k == 3
        return self.partners

    @staticmethod
    def sequence(plan: BatchPlan, i: int, *, seed: int, mosaic: float) -> tuple[list[float], Tensor]:
        """What our batch drew for its i-th image, in the order in which Ultralytics draws; and its numbers for colour."""
        draws = Draws(seed, plan.epoch, plan.positions)
        gate, centre, affine, mirror, colour = (draws(count)[i].tolist() for count in (4, 2, 8, 2, 4))
        corner = centre if gate[0] < mosaic else []
        # "no" to MixUp and CutMix, and last to BGR
        return [gate[0], *corner, *affine, 1.0, 1.0, mirror[1], mirror[0], colour[3]], torch.tensor(colour)


def half_pixel_warp(warp: Callable[..., Any]) -> Callable[..., Any]:
    """cv2.warpAffine with pixel centres at +0.5 instead of at whole numbers."""

    def shifted(image: Any, matrix: Any, **keywords: Any) -> Any:
        full = np.vstack([matrix, [0, 0, 1]]) if matrix.shape[0] == 2 else matrix
        there = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        moved = np.linalg.inv(there) @ full @ there
        return warp(image, moved[: matrix.shape[0]], **keywords)

    return shifted


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "never a mosaic": {"mosaic": 0.0},
    "sometimes a mosaic": {"mosaic": 0.5, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0},
    "everything": {"degrees": 20.0, "shear": 5.0, "flipud": 0.5, "bgr": 0.5, "translate": 0.3, "scale": (0.7, 1.4)},
    "perspective": {"perspective": 0.001, "mosaic": 0.5},
}


@pytest.mark.parametrize("changes", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_augmented_boxes_are_ultralytics_own_for_the_same_numbers(
    shards: Path, images: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    mine, expected = ours(shards, train=True, **changes), theirs(images, train=True, **changes)
    files = [stem(file) for file in expected.im_files]
    plan = BatchPlan(epoch=2, positions=torch.arange(11), samples=mine.order(2))
    batch = mine.build(plan, mine.read(plan))
    monkeypatch.setattr(augment.cv2, "warpAffine", half_pixel_warp(augment.cv2.warpAffine))
    monkeypatch.setattr(augment.cv2, "warpPerspective", half_pixel_warp(augment.cv2.warpPerspective))
    nearness, mosaics = [], 0
    for i, sample in enumerate(plan.samples.tolist()):
        numbers, colour = Numbers.sequence(plan, i, seed=3, mosaic=mine.augmentation.mosaic if mine.augmentation else 0)
        partners = mine.partners(plan, Draws(3, 2, plan.positions)(4))[i].tolist()
        mosaics += partners[0] >= 0
        dealt = Numbers(numbers, [files.index(stem(mine.im_files[k])) for k in partners if k >= 0])
        monkeypatch.setattr(augment, "random", dealt)
        monkeypatch.setattr(augment.np.random, "uniform", lambda low, high, _, c=colour: low + (high - low) * c[:3].double().numpy())
        theirs_i = expected[files.index(stem(mine.im_files[sample]))]
        assert not dealt.numbers, "Ultralytics draws other numbers than this test knows"
        here = batch["batch_idx"] == i
        assert_close(batch["bboxes"][here] * 64, theirs_i["bboxes"] * 64, "boxes")
        assert_close(batch["cls"][here], theirs_i["cls"].float(), "exact")
        nearness.append(psnr(batch["img"][i], theirs_i["img"]))
    assert (mosaics > 0) == (mine.augmentation is not None and mine.augmentation.mosaic > 0)
    assert float(np.median(nearness)) > 24, nearness


def test_training_batches_are_uint8_on_the_device_and_bright(shards: Path) -> None:
    batch = batches(ours(shards, train=True))[0]
    assert batch["img"].dtype == torch.uint8  # the trainer divides by 255
    assert batch["img"].shape == (4, 3, 64, 64)
    assert batch["img"].float().mean() > 40
    assert batch["bboxes"].min() >= 0
    assert batch["bboxes"].max() <= 1
    assert {tuple(t.shape[1:]) for t in (batch["cls"], batch["batch_idx"])} == {(1,), ()}


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_augmentation_depends_on_seed_epoch_and_position_only(shards: Path, batch: int) -> None:
    whole = batches(ours(shards, train=True), 11)[0]
    parts = batches(ours(shards, train=True), batch)
    assert_close(torch.cat([part["img"] for part in parts]), whole["img"], "pixels")
    assert_close(torch.cat([part["bboxes"] for part in parts]), whole["bboxes"], "float32")
    again, other_seed = batches(ours(shards, train=True), 11)[0], batches(ours(shards, train=True, seed=4), 11)[0]
    assert_close(again["img"], whole["img"], "exact")
    assert psnr(other_seed["img"], whole["img"]) < 20


# --- the loader: points 1, 2, 3 and 9 ---


def test_iterating_starts_nothing_before_the_first_batch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ours(shards, train=True)
    read: list[int] = []
    original = dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda samples: (read.append(len(samples)), original(samples))[1])
    loader = ShardLoader(dataset, batch_size=4)
    threads = threading.active_count()
    abandoned, used = enumerate(loader), enumerate(loader)
    assert (read, threading.active_count()) == ([], threads)
    next(used)
    assert len(read) in (1, 2)  # and the one after it, ahead
    assert len(list(used)) == 2
    assert (len(read), threading.active_count()) == (3, threads)
    del abandoned


def test_an_epoch_is_asked_for_when_it_begins(shards: Path) -> None:
    epoch = 5
    loader = ShardLoader(ours(shards, train=True), batch_size=11, epoch=lambda: epoch)
    early = iter(loader)
    epoch = 6
    late = next(iter(loader))
    assert_close(next(early)["img"], late["img"], "exact")
    epoch = 5
    assert psnr(next(iter(loader))["img"], late["img"]) < 20
    loader.sampler.set_epoch(6)  # what the trainer does on several GPUs
    assert_close(next(iter(loader))["img"], late["img"], "exact")


def test_nothing_is_read_ahead_across_an_epochs_end(shards: Path) -> None:
    loader = ShardLoader(ours(shards, train=True), batch_size=4)
    assert any(math.isclose(b["resized_shape"][0][0], 64) for b in loader)
    loader.dataset.mosaic = False  # what _close_dataloader_mosaic does, then close_mosaic and reset
    loader.dataset.close_mosaic(settings())
    loader.reset()
    closed = list(loader)
    never = batches(ours(shards, train=True, mosaic=0.0))
    for a, b in zip(closed, never, strict=True):
        assert_close(a["img"], b["img"], "exact")


def test_closing_frees_what_was_read_and_a_second_loader_may_live_beside(shards: Path) -> None:
    dataset = ours(shards, train=True, cache="ram")
    loader = ShardLoader(dataset, batch_size=4)
    running = iter(loader)
    first = next(running)
    threads = threading.active_count()
    buffer = weakref.ref(dataset.cached)
    second = ShardLoader(ours(shards, train=True, cache="ram"), batch_size=2)
    assert len(list(second)) == 6
    loader.close()
    gc.collect()
    assert buffer() is None
    assert threading.active_count() == threads - 1
    assert next(running, None) is None
    assert_close(next(iter(loader))["img"], first["img"], "exact")  # usable again


@pytest.mark.parametrize("cache", [False, True, "ram"])
def test_cached_bytes_give_the_same_batches(shards: Path, cache: bool | str) -> None:
    for a, b in zip(batches(ours(shards, train=True, cache=cache)), batches(ours(shards, train=True)), strict=True):
        assert_close(a["img"], b["img"], "exact")
        assert_close(a["bboxes"], b["bboxes"], "exact")


def test_tensors_made_while_validating_can_be_written_while_training(shards: Path) -> None:
    for train in (True, False):
        for read_ahead in (True, False):
            loader = ShardLoader(ours(shards, train=train, cache="ram"), batch_size=4, read_ahead=read_ahead)
            with torch.inference_mode():
                batch = next(iter(loader))
            assert not any(value.is_inference() for value in batch.values() if isinstance(value, Tensor))
            assert not loader.dataset.cached.data.is_inference()
            batch["img"] += 1
            assert len(list(loader)) == 3  # with whatever was kept


@pytest.mark.parametrize(("samples", "batch_size"), [(11, 4), (8, 4), (3, 4), (1, 1), (5, 2)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_lengths_are_those_of_ultralytics_loader(scenes: list[Scene], tmp_path: Path, samples: int, batch_size: int, drop_last: bool) -> None:
    dataset = ours(write_shards(tmp_path, train=scenes[:samples]), train=True)
    loader = ShardLoader(dataset, batch_size=batch_size, drop_last=drop_last)
    expected = build_dataloader(list(range(samples)), batch_size, workers=0, drop_last=drop_last, device="cpu")
    assert len(loader) == len(expected) == len(list(loader))
    for name in ("batch_size", "drop_last", "num_workers"):
        assert getattr(loader, name) == getattr(expected, name), name
    assert len(loader.sampler) == len(expected.sampler)
    assert sorted(loader.sampler) == list(range(samples))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_trains_on_as_many_batches_and_together_on_every_sample(shards: Path, world_size: int) -> None:
    loaders = [ShardLoader(ours(shards, train=True), batch_size=2, share=Share(rank, world_size)) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    taken = [k for loader in loaders for k in loader.sampler]
    assert set(taken) == set(range(11))
    assert len(taken) == math.ceil(11 / world_size) * world_size
    files = {file for loader in loaders for batch in loader for file in batch["im_file"]}
    assert len(files) == 11


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_ranks_validate_whole_rectangular_batches_each_sample_once(shards: Path, world_size: int, batch_size: int) -> None:
    dataset = ours(shards, train=False, rect=True, batch=batch_size)
    seen: list[str] = []
    for rank in range(world_size):
        loader = ShardLoader(dataset, batch_size=batch_size, share=Share(rank, world_size, contiguous=True))
        theirs_here = ContiguousDistributedSampler(dataset, num_replicas=world_size, rank=rank, batch_size=batch_size)
        assert list(loader.sampler) == list(theirs_here)
        for batch in loader:
            shapes = {tuple(dataset.batch_shapes[dataset.im_files.index(file) // batch_size]) for file in batch["im_file"]}
            assert shapes == {tuple(batch["img"].shape[2:])}
            seen += batch["im_file"]
    assert seen == dataset.im_files


# --- labels and files ---


def test_labels_have_ultralytics_form(shards: Path, images: Path) -> None:
    mine, expected = ours(shards, train=True), theirs(images, train=True)
    assert len(mine) == len(expected) == len(mine.labels) == len(mine.im_files)
    for a, b in zip(mine.labels, expected.labels, strict=True):
        assert a.keys() == b.keys()
        assert stem(a["im_file"]) == stem(b["im_file"])
        assert tuple(a["shape"]) == tuple(b["shape"])
        for key in ("cls", "bboxes"):
            assert a[key].dtype == b[key].dtype
            assert_close(a[key], b[key], "float32")


@pytest.mark.parametrize("changes", [{"classes": [1]}, {"classes": 0}, {"single_cls": True}, {"fraction": 0.5}, {"fraction": 3}])
def test_selections_are_those_of_the_same_pictures_as_files(shards: Path, images: Path, changes: dict[str, Any]) -> None:
    mine = ours(shards, train=True, **changes)
    expected = theirs(images, train=True, **({"classes": [0]} if changes == {"classes": 0} else changes))
    assert list(map(stem, mine.im_files)) == list(map(stem, expected.im_files))
    for a, b in zip(mine.labels, expected.labels, strict=True):
        assert_close(a["cls"], b["cls"], "exact")
    classes = torch.cat([batch["cls"] for batch in batches(mine)])
    assert not changes.get("single_cls") or not classes.any()


def test_rectangular_training_has_no_mosaic_and_keeps_its_order(shards: Path, images: Path) -> None:
    mine, expected = ours(shards, train=True, rect=True, imgsz=128), theirs(images, train=True, rect=True, imgsz=128)
    assert not mine.mosaic
    assert len({tuple(shape) for shape in expected.batch_shapes}) > 1
    assert list(map(stem, mine.im_files)) == list(map(stem, expected.im_files))
    assert np.array_equal(mine.batch_shapes, expected.batch_shapes)
    assert mine.order(0).tolist() == list(range(11))
    assert [tuple(b["img"].shape[2:]) for b in batches(mine)] == [tuple(shape) for shape in expected.batch_shapes]


def test_every_epoch_has_an_order_of_its_own(shards: Path) -> None:
    dataset = ours(shards, train=True)
    orders = {tuple(dataset.order(epoch).tolist()) for epoch in range(4)}
    assert len(orders) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(11))}
    assert dataset.order(1).tolist() == ours(shards, train=True).order(1).tolist()
    assert dataset.order(1).tolist() == epoch_order([4, 4, 3], seed=3, epoch=1, shuffle=True, shuffle_shards=8).tolist()
