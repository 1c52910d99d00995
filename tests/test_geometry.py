"""Placements, matrices, resize, letterbox and flips; equal to Ultralytics' where it has the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from painting import numbered, paint
from PIL import Image
from torch import Tensor

from rinr_loader.boxes import place_boxes
from rinr_loader.geometry import Flip, Letterbox, Placements, Resize, area_scale, fit_long_side, flip, invert, letterbox_gain, scale_offset, warp
from rinr_loader.rng import Draws


def no_random(count: int) -> Tensor:
    raise AssertionError("this transform is not random")


def sizes(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs)


side = st.integers(1, 3000)
target = st.tuples(st.integers(8, 640), st.integers(8, 640))

# --- placements ---


def some_placements(*, scaled: bool = False) -> Placements:
    return Placements(
        output=torch.tensor([0, 1, 1]),
        sample=torch.tensor([2, 0, 1]),
        matrix=torch.tensor([2.0, 1.0, 0.5])[:, None, None] * torch.tensor([[1.0, 0, 3], [0, 1, 4], [0, 0, 0]])
        + torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]]),
        clip=torch.tensor([[0.0, 0, 10, 20]]).repeat(3, 1),
        area_scale=torch.tensor([5.0, 6.0, 7.0]) if scaled else None,
    )


def test_concatenate_and_select_keep_every_column() -> None:
    plain, scaled = some_placements(), some_placements(scaled=True)
    both = Placements.concatenate([plain, scaled])
    assert len(both) == 6
    for name in ("output", "sample", "matrix", "clip"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(plain, name), getattr(scaled, name)]))
    assert area_scale(both).tolist() == [0.25, 1.0, 4.0, 5.0, 6.0, 7.0]
    assert Placements.concatenate([plain, plain]).area_scale is None
    chosen = both.select(torch.tensor([5, 0]))
    assert chosen.sample.tolist() == [1, 2]
    assert area_scale(chosen).tolist() == [7.0, 0.25]
    assert both.select(both.sample == 2).output.tolist() == [0, 0]


def test_concatenate_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        Placements.concatenate([])


def test_to_moves_every_column() -> None:
    moved = some_placements(scaled=True).to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in ("output", "sample", "matrix", "clip", "area_scale"))
    assert some_placements().to("meta").area_scale is None


# --- matrices ---

entry = st.floats(-3, 3)


@given(entries=st.lists(entry, min_size=9, max_size=9))
def test_invert(entries: list[float]) -> None:
    matrix = torch.tensor(entries, dtype=torch.float64).view(3, 3) + 10 * torch.eye(3, dtype=torch.float64)
    assert_close(invert(matrix.repeat(2, 1, 1)) @ matrix, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))


def affine(entries: list[float]) -> Tensor:
    matrix = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    matrix[:, :2] += torch.tensor(entries, dtype=torch.float64).view(2, 2, 3) / 8
    return matrix


@given(first=st.lists(entry, min_size=12, max_size=12), second=st.lists(entry, min_size=12, max_size=12))
def test_warping_twice_is_warping_by_the_product(first: list[float], second: list[float]) -> None:
    a, b = affine(first), affine(second)
    one_by_one, at_once = warp(warp(some_placements(), a), b), warp(some_placements(), b @ a)
    assert_close(one_by_one.matrix, at_once.matrix, "float16")
    point = torch.tensor([1.5, -2.0, 1.0], dtype=torch.float64)
    before = some_placements().matrix.double()[1] @ point
    assert_close(at_once.matrix.double()[1] @ (b @ a)[1] @ point, before, "float16")


def test_warp_scales_the_meant_area() -> None:
    forward = scale_offset(torch.tensor([[2.0, 3.0], [1.0, 0.5]]), torch.zeros(2, 2)).double()
    assert warp(some_placements(), forward).area_scale is None
    assert_close(area_scale(warp(some_placements(), forward)), torch.tensor([0.25 * 6, 1 * 0.5, 4 * 0.5]))
    assert_close(area_scale(warp(some_placements(scaled=True), forward)), torch.tensor([5.0 * 6, 6 * 0.5, 7 * 0.5]))
    given_area = warp(some_placements(), forward, area=torch.tensor([10.0, 100.0]))
    assert_close(area_scale(given_area), torch.tensor([2.5, 100.0, 400.0]))


# --- resize and letterbox ---


@given(height=side, width=side, size=target)
def test_resize_maps_corner_to_corner(height: int, width: int, size: tuple[int, int]) -> None:
    placements = Resize()(sizes((height, width)), size=size, random=no_random)
    far = placements.matrix[0] @ torch.tensor([size[1], size[0], 1.0])
    assert_close(far, torch.tensor([width, height, 1.0]), "float32")
    assert placements.matrix[0, :2, 2].tolist() == [0, 0]
    assert placements.clip[0].tolist() == [0, 0, width, height]
    assert placements.matrix.dtype == placements.clip.dtype == torch.float32


def visible(placements: Placements, size: tuple[int, int], row: int = 0) -> tuple[list[int], list[int]]:
    """Output columns and rows where an unrotated placement shows."""
    matrix, clip = placements.matrix[row].double(), placements.clip[row].double()
    x = (torch.arange(size[1]) + 0.5) * matrix[0, 0] + matrix[0, 2]
    y = (torch.arange(size[0]) + 0.5) * matrix[1, 1] + matrix[1, 2]
    columns, rows = (x >= clip[0]) & (x < clip[2]), (y >= clip[1]) & (y < clip[3])
    return columns.nonzero().flatten().tolist(), rows.nonzero().flatten().tolist()


@given(height=side, width=side, size=target, scaleup=st.booleans(), center=st.booleans())
def test_letterbox_shows_one_rectangle_of_the_right_size_and_shape(
    height: int, width: int, size: tuple[int, int], scaleup: bool, center: bool
) -> None:
    placements = Letterbox(scaleup=scaleup, center=center)(sizes((height, width)), size=size, random=no_random)
    ratio = min(size[0] / height, size[1] / width)
    ratio = ratio if scaleup else min(ratio, 1.0)
    for shown, extent, total in zip(visible(placements, size), (width, height), (size[1], size[0]), strict=True):
        assert shown == list(range(shown[0], shown[0] + len(shown)))  # in one piece, at least one pixel
        assert abs(len(shown) - max(extent * ratio, 1)) <= 0.5 + 1e-3
        before, after = shown[0], total - shown[-1] - 1
        assert before == 0 if not center else abs(before - after) <= 2
    if scaleup:
        shown_columns, shown_rows = visible(placements, size)
        assert len(shown_columns) == size[1] or len(shown_rows) == size[0]


def loaded_like_ultralytics(folder: Path, height: int, width: int, long_side: int) -> tuple[int, int]:
    from ultralytics.data.base import BaseDataset

    file = folder / f"{height}x{width}.png"
    Image.new("RGB", (width, height)).save(file)
    dataset = SimpleNamespace(
        ims=[None],
        im_files=[str(file)],
        npy_files=[folder / "none.npy"],
        cache=None,
        cv2_flag=1,
        imgsz=long_side,
        augment=False,
        channels=3,
        prefix="",
    )
    resized: tuple[int, int]
    image, original, resized = BaseDataset.load_image(dataset, 0)
    assert original == (height, width)
    assert image.shape[:2] == resized
    return resized


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("long_side", [64, 97])
@pytest.mark.parametrize("size", [(37, 50), (50, 37), (64, 64), (360, 640), (1, 300), (97, 97), (33, 200), (97, 20)])
def test_fit_long_side_is_how_ultralytics_loads(tmp_path: Path, size: tuple[int, int], long_side: int) -> None:
    assert tuple(fit_long_side(sizes(size), long_side)[0].tolist()) == loaded_like_ultralytics(tmp_path, *size, long_side)


def normalized_labels(boxes: Tensor, height: int, width: int) -> tuple[object, np.ndarray]:
    """Boxes in pixels as Ultralytics keeps them: normalised centre and size."""
    from ultralytics.utils.instance import Instances

    xyxy = boxes.double().numpy() / np.array([width, height, width, height])
    xywh = np.concatenate([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], axis=1).astype(np.float32)
    return Instances(xywh, bbox_format="xywh", normalized=True), np.arange(len(boxes), dtype=np.float32)[:, None]


@pytest.mark.requires("ultralytics")
@pytest.mark.parametrize("long_side", [None, 128])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scaleup", [True, False])
def test_letterbox_equals_ultralytics(scaleup: bool, center: bool, long_side: int | None) -> None:
    from ultralytics.data.augment import LetterBox

    generator = torch.Generator().manual_seed(3)
    for size in ((128, 128), (96, 128), (160, 64), (101, 99)):
        source_size = torch.randint(5, 300, (40, 2), generator=generator)
        corners = torch.rand(40, 6, 2, 2, generator=generator).sort(2).values * source_size.flip(1)[:, None, None]
        boxes = corners.flatten(2)  # [40, 6, 4]
        transform = Letterbox(scaleup=scaleup, center=center, long_side=long_side)
        placements = transform(source_size, size=size, random=no_random)
        ours, classes, batch_index = place_boxes(placements, boxes.flatten(0, 1), torch.arange(6).repeat(40), torch.arange(41) * 6, size=size)
        assert batch_index.tolist() == torch.arange(40).repeat_interleave(6).tolist()
        assert classes.tolist() == torch.arange(6).repeat(40).tolist()
        gain, offset = letterbox_gain(source_size, size, scaleup=scaleup, center=center, long_side=long_side)
        loaded = source_size if long_side is None else fit_long_side(source_size, long_side)
        for k, (height, width) in enumerate(loaded.tolist()):
            instances, cls = normalized_labels(boxes[k], *source_size[k].tolist())
            height_0, width_0 = source_size[k].tolist()
            theirs = LetterBox(new_shape=size, scaleup=scaleup, center=center)(
                {"img": np.zeros((height, width, 3), np.uint8), "instances": instances, "cls": cls, "ratio_pad": (height / height_0, width / width_0)}
            )
            theirs["instances"].convert_bbox("xyxy")
            assert_close(ours[batch_index == k], theirs["instances"].bboxes, "boxes")
            (gain_h, gain_w), pad = theirs["ratio_pad"]
            assert_close(gain[k], torch.tensor([gain_w, gain_h], dtype=torch.float64))
            assert offset[k].tolist() == list(pad)
            # And the pixels cover what theirs cover.
            shown_columns, shown_rows = visible(placements, size, k)
            filled = LetterBox(new_shape=size, scaleup=scaleup, center=center, padding_value=0)(image=np.full((height, width, 3), 255, np.uint8))
            at = np.argwhere(filled[..., 0] > 0)
            ties = (loaded[k].flip(0) * gain[k] * source_size[k].flip(0) / loaded[k].flip(0)) % 1
            if not torch.isclose(ties, torch.tensor(0.5, dtype=ties.dtype)).any():
                assert (shown_rows[0], shown_rows[-1]) == (at[:, 0].min(), at[:, 0].max())
                assert (shown_columns[0], shown_columns[-1]) == (at[:, 1].min(), at[:, 1].max())


# --- flips ---


def two_images() -> tuple[list[np.ndarray], Placements]:
    images = [numbered(20, 30, channel=1), numbered(25, 10, channel=2)]
    return images, Letterbox()(sizes((20, 30), (25, 10)), size=(40, 60), random=no_random)


def test_flips_mirror_the_chosen_images() -> None:
    images, placements = two_images()
    plain = paint(placements, images, (40, 60))
    flipped = paint(flip(placements, size=(40, 60), horizontal=torch.tensor([True, False])), images, (40, 60))
    assert np.array_equal(flipped[0], plain[0][:, ::-1])
    assert np.array_equal(flipped[1], plain[1])
    both = flip(placements, size=(40, 60), horizontal=torch.tensor([False, True]), vertical=torch.tensor([True, True]))
    flipped = paint(both, images, (40, 60))
    assert np.array_equal(flipped[0], plain[0][::-1])
    assert np.array_equal(flipped[1], plain[1][::-1, ::-1])


@given(horizontal=st.lists(st.booleans(), min_size=2, max_size=2), vertical=st.lists(st.booleans(), min_size=2, max_size=2))
def test_flipping_twice_changes_nothing(horizontal: list[bool], vertical: list[bool]) -> None:
    _, placements = two_images()
    masks = {"horizontal": torch.tensor(horizontal), "vertical": torch.tensor(vertical)}
    once = flip(placements, size=(40, 60), **masks)
    if any(horizontal + vertical):
        assert not torch.equal(once.matrix, placements.matrix)
    assert_close(flip(once, size=(40, 60), **masks).matrix, placements.matrix)


def test_flip_transform_flips_as_often_as_it_says() -> None:
    count = 4000
    transform = Flip(Resize(), horizontal=0.3, vertical=0.8)
    placements = transform(torch.full((count, 2), 10), size=(10, 10), random=Draws(0, 0, torch.arange(count)))
    horizontal, vertical = placements.matrix[:, 0, 0] < 0, placements.matrix[:, 1, 1] < 0
    assert abs(float(horizontal.float().mean()) - 0.3) < 0.04
    assert abs(float(vertical.float().mean()) - 0.8) < 0.04
    assert abs(float((horizontal & vertical).float().mean()) - 0.24) < 0.04
    never = Flip(Resize(), horizontal=0.0, vertical=0.0)(torch.full((count, 2), 10), size=(10, 10), random=Draws(0, 0, torch.arange(count)))
    assert not (never.matrix[:, :2, :2] < 0).any()


@pytest.mark.cuda
def test_geometry_is_the_same_on_a_gpu() -> None:
    source_size = sizes((480, 640), (33, 57), (1080, 1920))
    transform = Flip(Letterbox(long_side=320), horizontal=0.5, vertical=0.5)
    random = Draws(1, 0, torch.arange(3))
    here = transform(source_size, size=(320, 320), random=random)
    there = transform(source_size.cuda(), size=(320, 320), random=Draws(1, 0, torch.arange(3).cuda()))
    assert there.matrix.is_cuda
    assert_close(there.matrix, here.matrix)
    assert_close(there.clip, here.clip, "exact")
