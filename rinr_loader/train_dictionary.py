"""Source datasets to a dictionary and its analysis: pictures are read, some are held out, the rest is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rinr_loader.analysis import Analysis, dump_analysis, load_analysis
from rinr_loader.assemble import assemble, trained_analysis
from rinr_loader.dictionary import Dictionary, load
from rinr_loader.errors import ConfigError, ConvertError
from rinr_loader.image import fit_inside, read_image
from rinr_loader.source import Problem, Sample, Source
from rinr_loader.train_state import Row
from rinr_loader.training import Model, Pictures, TrainSettings, train
from rinr_loader.writer import make_folder, write_bytes

GROUPS = (12, 48, 112, 256)  # where the channel groups of 256 channels end
EVERY, FIRST, MOST = 16, 7, 5  # which pictures of a source are held out, and how many at most
SHOWN = 1024  # pixels of a side of a picture that is held out, at most


@dataclass(frozen=True)
class Material:
    """One source of a training.

    Args:
        name: What provenance and messages call it.
        source: The dataset; only its train split is used.
        weight: How often it is drawn from, against the others.
    """

    name: str
    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class Base:
    """A dictionary that a training begins with, its analysis, and the files of both by their SHA-256 in hexadecimal."""

    dictionary: Dictionary
    analysis: Analysis
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Args:
        dictionary, analysis: The files.
        sha256: Of the dictionary, in hexadecimal.
        bytes: Of the dictionary.
        about: Where it comes from, as the dictionary states it: sources, settings, torch, curve.
        problems: Pictures that were left out, and why.
    """

    dictionary: Path
    analysis: Path
    sha256: str
    bytes: int
    about: dict[str, Any]
    problems: tuple[Problem, ...]


def load_base(path: Path) -> Base:
    """Read `NAME.bin`, and `NAME.analysis` beside it.

    Raises:
        ConfigError: One of them cannot be read, or they do not belong together.
    """
    files = []
    for file in (path, path.with_suffix(".analysis")):
        try:
            files.append(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{file}: expected a file, got {error.strerror or error}; a dictionary is NAME.bin and NAME.analysis") from None
    dictionary = load(files[0], str(path))
    analysis, owner = load_analysis(files[1], str(path.with_suffix(".analysis")))
    if owner != dictionary.sha256:
        raise ConfigError(f"{path.with_suffix('.analysis')}: expected the analysis of {dictionary.sha256}, got that of {owner}; take its own")
    return Base(dictionary, analysis, {hashlib.sha256(data).hexdigest(): data for data in files})


def groups_of(channels: int) -> tuple[int, ...]:
    """Where the channel groups of a number of channels end, in the shares of the shipped dictionary."""
    return tuple(max(round(end * channels / GROUPS[-1]), i + 1) for i, end in enumerate(GROUPS))


def state_of(out: Path) -> Path:
    """Where an unfinished training is kept."""
    return out.with_name(f"{out.name}.state")


def train_dictionary(
    materials: Sequence[Material],
    out: Path,
    settings: TrainSettings,
    *,
    base: Base | None = None,
    report: Callable[[Row], None] = lambda row: None,
    progress: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train a dictionary, from where an earlier call was stopped.

    Args:
        materials: What it is trained on.
        out: File of the dictionary, `NAME.bin`; its analysis becomes `NAME.analysis`, and `NAME.bin.state` stands until both are written.
        settings: Steps, seed, shapes.
        base: What to begin with, instead of the principal components of the pictures; `settings` must have grown from its dictionary.
        report: Called with each row of the validation curve.
        progress: Called with the number of steps that are done.

    Raises:
        ConfigError: A source has no pictures to train on, `out` is already there, or the state is damaged or of another training.
        StorageError: The files cannot be written.
    """
    state, analysis = state_of(out), out.with_suffix(".analysis")
    for path in (out, analysis):
        if path.exists() and not state.exists():
            raise ConfigError(f"{path}: expected a new file, got one that is there; choose another, or remove it")
    make_folder(out.parent)
    problems: list[Problem] = []
    training: list[list[Tensor]] = []
    held: list[Tensor] = []
    origins = []
    for material in materials:
        samples = [sample for sample in material.source.samples if sample.split == "train"]
        pictures, left_out = read_pictures(samples, settings.crop)
        problems += [Problem(f"{material.name}: {problem.subject}", problem.reason) for problem in left_out]
        used, kept = hold_out(pictures)
        if not used:
            size = f"{settings.crop}x{settings.crop}"
            raise ConfigError(f"{material.name}: expected pictures of at least {size} in its split train, got none of {len(samples)}; leave it out")
        training.append(used)
        held += kept
        about_source = {"name": material.name, "format": material.source.format, "weight": material.weight}
        origins.append({**about_source, "pictures": len(used), "held_out": len(kept), "sha256": hash_of_pictures(pictures)})
    if not held:
        raise ConfigError(f"sources: expected a picture to validate on beside those to train on, got {len(training[0])} picture; add some")
    found = Pictures(training, held, [material.weight for material in materials])
    origin: dict[str, Any] = {"sources": origins}
    begun = known = None
    if base is not None:
        origin["base"] = {"sha256": base.dictionary.sha256, **base.dictionary.about}
        begun, known = Model.from_dictionary(base.dictionary, base.analysis, settings), base.dictionary.channels
    model, curve = train(found, settings, state, report, model=begun, known=known, origin=origin, progress=progress)
    dictionary, network, about = finish(model, found, settings, origin, curve)
    sha256 = load(dictionary, out.name).sha256  # before anything is written: of a training that fell apart only the state is left
    write_bytes(out, dictionary)
    write_bytes(analysis, network)
    state.unlink(missing_ok=True)
    return Trained(out, analysis, sha256, len(dictionary), about, tuple(problems))


def finish(
    model: Model, pictures: Pictures, settings: TrainSettings, origin: dict[str, Any], curve: Sequence[Row]
) -> tuple[bytes, bytes, dict[str, Any]]:
    """The files of a trained model: the dictionary, its analysis, and what the dictionary says of where it comes from."""
    about = {**origin, "settings": asdict(settings), "torch": torch.__version__, "curve": list(curve)}
    dictionary = assemble(model, pictures, settings, about)
    return dictionary, dump_analysis(trained_analysis(model), hashlib.sha256(dictionary).hexdigest()), about


def read_pictures(samples: Sequence[Sample], least: int, size: tuple[int, int] | None = None) -> tuple[list[Tensor], list[Problem]]:
    """Read pictures into memory, uint8 `(3, H, W)`.

    Args:
        samples: Which.
        least: Pixels that each side must have.
        size: Width and height that they are shrunk to fit inside.

    Returns:
        The pictures in order, and those that were left out with the reason.
    """
    pictures, problems = [], []
    for sample in samples:
        subject = f"{sample.split}/{sample.key}"
        try:
            pixels = fit_inside(read_image(sample.image).pixels, size)
        except ConvertError as error:
            problems.append(Problem(subject, str(error)))
            continue
        height, width = pixels.shape[:2]
        if min(height, width) < least:
            problems.append(Problem(subject, f"smaller than the {least}x{least} pixels of a crop: {width}x{height}"))
        else:
            pictures.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    return pictures, problems


def hold_out(pictures: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those to train on, and the middle of those to validate on: every 16th, at most 5; the last of fewer than 8, none of a single one."""
    held = set(list(range(FIRST, len(pictures), EVERY))[:MOST])
    if not held and len(pictures) > 1:
        held = {len(pictures) - 1}
    return [picture for i, picture in enumerate(pictures) if i not in held], [middle(pictures[i]) for i in sorted(held)]


def middle(picture: Tensor) -> Tensor:
    """The middle of a picture: a large one would take gigabytes to validate on."""
    y, x = (max(0, side - SHOWN) // 2 for side in picture.shape[1:])
    return picture[:, y : y + SHOWN, x : x + SHOWN]


def hash_of_pictures(pictures: Sequence[Tensor]) -> str:
    """A hash of pixels, of all pictures in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(str(tuple(picture.shape)).encode() + picture.numpy().tobytes())
    return digest.hexdigest()
