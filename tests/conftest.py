"""What all tests share: the one skip rule, the tolerances, the pictures that are drawn where no real data is at hand.

Tests of what needs something name it, and this file alone decides whether it is there:

    @pytest.mark.real_data("dac_sdc", "kodak")   folders below $RINR_TEST_DATA; the fixture `real_data` is that path
    @pytest.mark.cuda                            a CUDA device; RINR_REQUIRE_CUDA=1 turns the skip into a failure
    @pytest.mark.requires("nvidia.dali")         optional packages, by the name they are imported by
    needs("ultralytics")                         the same for a whole file, called before it imports from them
    @pytest.mark.slow                            left out by `make test`
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

# Before anything imports torch or Ultralytics: one thread a process, no network, the user's own settings left alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
_settings = tempfile.mkdtemp(prefix="rinr-test-settings-")
atexit.register(shutil.rmtree, _settings, ignore_errors=True)
os.environ["YOLO_CONFIG_DIR"] = _settings

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("RINR_TEST_DATA") or REPOSITORY.parent / "shared" / "data").resolve()


# --- the skip rule ---


@cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is absent
        return False


def _absent(modules: Iterable[str]) -> str | None:
    absent = [module for module in modules if not _importable(module)]
    return f"needs the optional package {absent[0]}" if absent else None


def needs(*modules: str) -> None:
    """Skip the test file that calls this, unless these optional packages are installed."""
    reason = _absent(modules)
    if reason:
        pytest.skip(reason, allow_module_level=True)


def _missing(item: pytest.Item) -> str | None:
    """Say what `item` needs that is not here, or None."""
    absent = _absent(module for marker in item.iter_markers("requires") for module in marker.args)
    if absent:
        return absent
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        return "needs a CUDA device"
    fixtures: tuple[str, ...] = getattr(item, "fixturenames", ())
    folders = [str(name) for marker in item.iter_markers("real_data") for name in marker.args]
    if folders or "real_data" in fixtures or item.get_closest_marker("real_data"):
        for folder in (REAL_DATA, *(REAL_DATA / name for name in folders)):
            if not folder.is_dir():
                return f"needs real data: {folder} is no folder; set RINR_TEST_DATA"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason is None:
        return
    demanded = {
        "RINR_REQUIRE_CUDA": item.get_closest_marker("cuda") is not None and not torch.cuda.is_available(),
        "RINR_TEST_DATA": "real data" in reason,  # whoever names a folder wants its tests to run
    }
    for variable, concerned in demanded.items():
        if concerned and os.environ.get(variable, "0") not in ("", "0"):
            pytest.fail(f"{variable} is set, but this test {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets."""
    return REAL_DATA


# --- comparing ---

Kind = Literal["exact", "float32", "float16", "bfloat16", "pixels", "boxes"]

# (relative, absolute): the one place for tolerances.
TOLERANCES: dict[Kind, tuple[float, float]] = {
    "exact": (0.0, 0.0),
    "float32": (1e-5, 1e-5),
    "float16": (2e-3, 2e-3),
    "bfloat16": (2e-2, 2e-2),
    "pixels": (0.0, 1.0),  # uint8 of the same picture computed in another order: rounding may fall on the other side
    "boxes": (0.0, 1e-2),  # pixels
}


def assert_close(actual: torch.Tensor | ArrayLike, expected: torch.Tensor | ArrayLike, kind: Kind = "float32") -> None:
    """Assert that shape, dtype and values agree, within the tolerance of `kind`."""
    relative, absolute = TOLERANCES[kind]
    a, b = torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()
    if kind == "pixels":
        assert a.dtype == b.dtype == torch.uint8, f"pixels: expected uint8, got {a.dtype} and {b.dtype}"
        a, b = a.to(torch.int16), b.to(torch.int16)
    torch.testing.assert_close(a, b, rtol=relative, atol=absolute, equal_nan=True)


def psnr(actual: torch.Tensor | ArrayLike, expected: torch.Tensor | ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, written out here so that it does not lean on what it tests."""
    a, b = torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype == torch.uint8, f"expected uint8, got {a.dtype} and {b.dtype}"
    mse = float((a.double() - b.double()).square().mean())
    return float("inf") if mse == 0 else 10 * float(np.log10(255.0**2 / mse))


def assert_psnr(actual: torch.Tensor | ArrayLike, expected: torch.Tensor | ArrayLike, *, at_least: float) -> None:
    """Assert that two uint8 images of one layout are at least so near, in dB."""
    measured = psnr(actual, expected)
    assert measured >= at_least, f"PSNR: expected at least {at_least} dB, got {measured:.2f} dB"


# --- pictures ---


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is on it.

    image: uint8 RGB, shape (height, width, 3). boxes: float32 xyxy in pixels, shape (n, 4), tight around each shape.
    classes: int64, shape (n,): 0 ellipse, 1 rectangle, 2 triangle.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


SCENE_NAMES = ("ellipse", "rectangle", "triangle")


def draw_scene(seed: int, *, width: int = 96, height: int = 64, objects: int = 2) -> Scene:
    """Draw `objects` textured shapes over a smooth background with some grain; the same arguments give the same picture.

    Args:
        seed: Any int.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        objects: How many; fewer where there is no room, for boxes never overlap.
    """
    rng = np.random.default_rng([seed, width, height, objects])
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase, slope = rng.uniform(0, 6, 3), rng.uniform(-0.08, 0.08, (3, 2))
    waves = np.stack([np.sin(phase[c] + slope[c, 0] * x + slope[c, 1] * y) for c in range(3)], axis=-1)
    canvas = 110 + 50 * waves + rng.normal(0, 3, (height, width, 3))

    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    for _ in range(20 * objects):
        if len(boxes) == objects:
            break
        w, h = (int(rng.integers(max(3, side // 6), max(4, side // 2))) for side in (width, height))
        if w >= width or h >= height:
            continue
        left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        if any(left < x2 and x1 < left + w and top < y2 and y1 < top + h for x1, y1, x2, y2 in boxes):
            continue
        kind = int(rng.integers(0, len(SCENE_NAMES)))
        mask = Image.new("1", (width, height))
        corner = (left, top, left + w - 1, top + h - 1)
        draw = ImageDraw.Draw(mask)
        if kind == 2:
            draw.polygon([(left, top + h - 1), (left + w - 1, top + h - 1), (left + w // 2, top)], fill=1)
        else:
            (draw.ellipse, draw.rectangle)[kind](corner, fill=1)
        stripes = np.where(((x + y) // 4) % 2 == 0, 1.0, 0.6)[..., None]
        canvas = np.where(np.asarray(mask)[..., None], rng.uniform(60, 250, 3) * stripes, canvas)
        boxes.append((left, top, left + w, top + h))
        classes.append(kind)
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        classes=np.asarray(classes, np.int64),
    )


@pytest.fixture(scope="session")
def scenes() -> Callable[..., Scene]:
    """`draw_scene`, remembering what it has drawn in this run."""
    return cache(draw_scene)


@pytest.fixture(scope="session")
def write_yolo() -> Callable[..., Path]:
    """Write a YOLO dataset of drawn scenes: `write_yolo(folder, train=6, val=2)` returns its data.yaml."""

    def write(folder: Path, *, train: int = 6, val: int = 2, width: int = 96, height: int = 64, objects: int = 2) -> Path:
        for split, count, first in (("train", train, 0), ("val", val, 10_000)):
            for name in ("images", "labels"):
                (folder / name / split).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                scene = draw_scene(first + k, width=width, height=height, objects=objects)
                Image.fromarray(scene.image).save(folder / "images" / split / f"{k:04d}.png")
                centre, extent = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2, scene.boxes[:, 2:] - scene.boxes[:, :2]
                rows = np.concatenate([centre, extent], axis=1) / np.array([width, height, width, height])
                lines = [f"{c} {' '.join(f'{value:.6f}' for value in row)}" for c, row in zip(scene.classes, rows, strict=True)]
                (folder / "labels" / split / f"{k:04d}.txt").write_text("\n".join(lines) + "\n")
        names = "".join(f"  {k}: {name}\n" for k, name in enumerate(SCENE_NAMES))
        (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}")
        return folder / "data.yaml"

    return write


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Give every test the same global torch randomness, and the default dtype back after it."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
