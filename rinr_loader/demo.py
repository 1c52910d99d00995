"""The whole path on an embedded default: draw scenes, write a JPEG dataset, convert, verify, train a YOLO from the shards, compare."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rinr_loader.bench import measure, measure_jpeg
from rinr_loader.compare import compare_with_jpeg
from rinr_loader.console import Meter, tell, time_text
from rinr_loader.convert import Job, Progress, convert
from rinr_loader.converters import open_source
from rinr_loader.dataset import RinrDataset
from rinr_loader.errors import ConfigError, ShardError, StorageError
from rinr_loader.pictures import decode_pictures
from rinr_loader.presets import Settings
from rinr_loader.scenes import NAMES, DrawnScene, draw_scenes, find_photographs
from rinr_loader.sheet import Cell, draw_sheet
from rinr_loader.source import Split
from rinr_loader.verify import verify
from rinr_loader.writer import data_yaml, dump_json, write_bytes

WIDTH, HEIGHT = 160, 96
JPEG_QUALITY = 95
REPORT = "demo.json"
SHOWN = 4  # pictures of each split in the sheet

# The smallest YOLO that learns these shapes in a minute: a backbone of four stages, two detection scales.
MODEL = """nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, C2f, [64, True]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, C2f, [128, True]]
head:
  - [[4, 6], 1, Detect, [nc]]
"""


@dataclass(frozen=True)
class DemoRow:
    """One way to store the same pictures: mean bytes of each, PSNR in dB against the JPEG files of the source, decoded images a second."""

    name: str
    bytes: float
    psnr: float | None
    object_psnr: float | None
    images_per_second: float | None


@dataclass(frozen=True)
class Training:
    """What the training came to: validation losses after the first and the last epoch, mAP at an overlap of 50 %."""

    epochs: int
    seconds: float
    first_loss: float
    last_loss: float
    map50: float


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and where it left its files."""

    out: Path
    seconds: float
    device: str
    rows: tuple[DemoRow, ...]
    training: Training
    sheet: Path


def run_demo(out: Path, *, train: int = 24, val: int = 8, epochs: int = 30, seconds: float = 2.0, device: str | None = None) -> DemoReport:
    """Run the demo.

    Args:
        out: A folder that is new, empty, or of an earlier demo, which is then replaced.
        train, val: Scenes of each split.
        epochs: Of the training.
        seconds: For each measurement of speed.
        device: Where to fit, decode and train; CUDA where there is one.

    Raises:
        ConfigError: `out` holds something else, Ultralytics is not installed, or there are no photographs to draw on.
        ShardError: What was written is damaged.
        StorageError: `out` cannot be written.
    """
    started = time.monotonic()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    yolo = _yolo()
    photographs = find_photographs()
    _prepare(out)
    drawn_on = ", ".join(path.name for path in photographs)
    tell(f"demo: {train + val} scenes of {WIDTH}x{HEIGHT} over crops of {drawn_on}; the first is for val alone")
    try:
        _write_split(out / "jpeg", "train", list(draw_scenes(photographs[1:], train, width=WIDTH, height=HEIGHT, seed=0)))
        _write_split(out / "jpeg", "val", list(draw_scenes(photographs[:1], val, width=WIDTH, height=HEIGHT, seed=1)))
        places = b"train: images/train\nval: images/val\n"
        write_bytes(out / "jpeg" / "data.yaml", places + data_yaml((), NAMES))
    except OSError as error:
        raise StorageError(
            f"{error.filename or out}: expected a place that can be written, got {error.strerror or error}; choose another --out"
        ) from None

    source = open_source(out / "jpeg" / "data.yaml")
    with Meter("demo: converting") as meter:

        def on_progress(progress: Progress) -> None:
            meter.update(progress.done, progress.total, before=progress.resumed)

        convert(source, out / "shards", Job(Settings(), device=device), on_progress=on_progress)
    checked = verify(out / "shards", device=device)
    if checked.damage:
        raise ShardError(f"{checked.damage[0]} (and {len(checked.damage) - 1} more)")
    tell(f"demo: verified {checked.samples} samples; training for {epochs} epochs")
    training = _train(yolo, out, epochs, device)
    rows = _compare(out, device, seconds)
    sheet = out / "side_by_side.png"
    _draw(out, sheet, device)
    report = DemoReport(out, time.monotonic() - started, device, tuple(rows), training, sheet)
    write_bytes(out / REPORT, dump_json({"format": "rinr demo", **asdict(report), "out": str(out), "sheet": str(sheet)}))
    return report


def _yolo() -> Any:
    """The YOLO class of our adapter, kept quiet and off the network."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    try:
        from rinr_loader.integrations.ultralytics import YOLO
    except ModuleNotFoundError as error:
        raise ConfigError(f"demo: expected the package ultralytics, got {error}; pip install 'rinr-loader[ultralytics]'") from None
    return YOLO


def _prepare(out: Path) -> None:
    """Make the folder; empty it where a demo has written it before."""
    try:
        if out.is_dir() and any(out.iterdir()):
            try:
                ours = json.loads((out / REPORT).read_bytes())["format"] == "rinr demo"
            except (OSError, ValueError, KeyError, TypeError):
                ours = False
            if not ours:
                first = sorted(path.name for path in out.iterdir())[0]
                raise ConfigError(f"{out}: expected an empty folder or an earlier demo, got one with {first}; choose another --out")
            for name in ("jpeg", "shards", "training"):
                shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / REPORT, dump_json({"format": "rinr demo"}))
    except OSError as error:
        raise StorageError(f"{out}: expected a place that can be written, got {error.strerror or error}; choose another --out") from None


def _write_split(root: Path, split: Split, scenes: Sequence[DrawnScene]) -> None:
    """Write scenes as JPEGs with YOLO labels."""
    images, labels = root / "images" / split, root / "labels" / split
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for k, scene in enumerate(scenes):
        Image.fromarray(scene.pixels).save(images / f"{k:04d}.jpg", quality=JPEG_QUALITY)
        corners = scene.boxes.astype(np.float64) / (WIDTH, HEIGHT, WIDTH, HEIGHT)
        rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1).tolist()
        lines = [f"{c} {' '.join(f'{value:.8g}' for value in row)}\n" for c, row in zip(scene.classes.tolist(), rows, strict=True)]
        (labels / f"{k:04d}.txt").write_text("".join(lines))


def _train(yolo: Any, out: Path, epochs: int, device: str) -> Training:
    (out / "training").mkdir()
    config = out / "training" / "tiny.yaml"
    config.write_text(MODEL)
    model = yolo(config)
    losses: list[float] = []

    def after_epoch(trainer: Any) -> None:  # and once more when the best weights are validated, without losses
        losses.append(sum(float(value) for name, value in trainer.metrics.items() if name.startswith("val/")))
        epoch = len(losses)
        if epoch <= epochs and epoch % max(1, epochs // 5) == 0:
            tell(f"demo: epoch {epoch}/{epochs}, validation loss {losses[-1]:.2f}, mAP50 {trainer.metrics['metrics/mAP50(B)']:.2f}")

    model.add_callback("on_fit_epoch_end", after_epoch)
    started = time.monotonic()
    settings = {"imgsz": WIDTH, "batch": 8, "nbs": 8, "workers": 0, "optimizer": "AdamW", "lr0": 0.005, "warmup_epochs": 1}
    quiet = {"plots": False, "verbose": False, "project": str(out.absolute() / "training"), "name": "run"}
    model.train(data=str(out / "shards"), epochs=epochs, device=device, seed=0, **settings, **quiet)
    seconds = time.monotonic() - started
    map50 = float(model.trainer.metrics["metrics/mAP50(B)"])
    return Training(epochs, seconds, losses[0], losses[epochs - 1], map50)


def _compare(out: Path, device: str, seconds: float) -> list[DemoRow]:
    """Bytes, PSNR and speed of the source's files, of the shards, and of JPEGs of as many bytes."""
    files = sorted((out / "jpeg" / "images").rglob("*.jpg"))
    size = sum(file.stat().st_size for file in files) / len(files)
    rows = [DemoRow(f"the source, JPEG quality {JPEG_QUALITY}", size, None, None, measure_jpeg(files, seconds=seconds))]
    source = open_source(out / "jpeg" / "data.yaml")
    for split in ("train", "val"):
        dataset = RinrDataset(out / "shards", split)
        speed = measure(dataset, batch_sizes=(32,), device=device, seconds=seconds).speeds[0].images_per_second
        own, as_many, *_ = compare_with_jpeg(dataset, source, qualities=()).rates
        rows.append(DemoRow(f"{split}: shards", own.bytes, own.psnr, own.object_psnr, speed))
        rows.append(DemoRow(f"{split}: {as_many.name}", as_many.bytes, as_many.psnr, as_many.object_psnr, None))
    return rows


def _draw(out: Path, sheet: Path, device: str) -> None:
    """Draw source, decoded picture and eight times their difference side by side."""
    cells = []
    for split in ("train", "val"):
        dataset = RinrDataset(out / "shards", split)
        some = range(min(SHOWN, len(dataset)))
        for i, decoded in zip(some, decode_pictures(dataset, some, device=device), strict=True):
            source = np.asarray(Image.open(out / "jpeg" / "images" / split / f"{dataset.keys[i]}.jpg").convert("RGB"))
            wrong = np.clip(8 * np.abs(decoded.astype(np.int64) - source), 0, 255).astype(np.uint8)
            psnr = dataset.column("psnr")[i]
            cells += [
                Cell(source, f"{split}/{dataset.keys[i]}: source", dataset.labels[i]["boxes"]),
                Cell(decoded, f"decoded, {psnr:.1f} dB"),
                Cell(wrong, "difference, 8 times"),
            ]
    draw_sheet(cells, columns=3, width=2 * WIDTH, height=2 * HEIGHT).save(sheet)


def remark(report: DemoReport) -> str:
    """What the numbers do and do not say."""
    learned = report.training
    return (
        f"Trained for {learned.epochs} epochs in {time_text(learned.seconds)}: validation loss {learned.first_loss:.2f} to {learned.last_loss:.2f}, "
        f"mAP50 {learned.map50:.2f}.\n"
        "These sizes are toys: a picture this small is cheaper as a JPEG, and on a CPU faster to decode. "
        "That bytes go to the objects of train is what to look at."
    )
