"""The dictionary of a conversion: the shipped one, one of the user's, or either of them fitted to the pictures that are being converted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from rinr_loader.analysis import Analysis, analysis_among, load_analysis, shipped_analysis
from rinr_loader.codecs.tile import TILE
from rinr_loader.dictionary import Dictionary, load, shipped
from rinr_loader.errors import ConfigError
from rinr_loader.source import Sample, Source
from rinr_loader.train_dictionary import finish, hash_of_pictures, hold_out, load_base, read_pictures
from rinr_loader.training import Model, Pictures, TrainSettings, train
from rinr_loader.units import Job
from rinr_loader.writer import write_bytes

SAMPLE = 256  # pictures that it is fitted to, at most
DICTIONARY, ANALYSIS, STATE = "dictionary.bin", "dictionary.analysis", "dictionary-{}.state"


def with_dictionary(job: Job) -> Job:
    """A job of family `tile` that names no dictionary, with the shipped one: every dataset carries its own copy."""
    if job.settings.family != "tile" or job.settings.dictionary:
        return job
    base = shipped()
    return replace(job, settings=replace(job.settings, dictionary=base.sha256), shared={**job.shared, base.sha256: base.data})


def with_own_dictionary(job: Job, path: Path) -> Job:
    """A job of family `tile` with a dictionary that `rinr train-dictionary` wrote, `NAME.bin` and `NAME.analysis` beside it.

    Raises:
        ConfigError: One of them cannot be read, or they do not belong together.
    """
    base = load_base(path)
    return replace(job, settings=replace(job.settings, dictionary=base.dictionary.sha256), shared=base.files)


def fitted_job(source: Source, job: Job, steps: int, work: Path, progress: Callable[[int], None] = lambda step: None) -> Job:
    """Give a job a dictionary of its own.

    What is finished is kept in the working folder: a call after the dictionary is there takes it as it is, whatever became of the pictures.

    Args:
        source: What is converted; at most 256 pictures of its train split are taken, evenly spaced.
        job: Of family `tile`; its size and seed hold for the fit too.
        steps: Gradient steps, at least 1.
        work: Working folder of the conversion.
        progress: Called with the number of steps that are done.

    Returns:
        The job with the dictionary that was fitted, and its analysis, as shared files.

    Raises:
        ConfigError: No picture can be fitted to, or what is in the working folder is damaged.
        StorageError: The working folder cannot be written.
    """
    dictionary, analysis = work / DICTIONARY, work / ANALYSIS
    if not (dictionary.exists() and analysis.exists()):
        _fit(source, job, steps, work, progress)
    files = {hashlib.sha256(data).hexdigest(): data for data in (dictionary.read_bytes(), analysis.read_bytes())}
    sha256 = load(dictionary.read_bytes(), str(dictionary)).sha256
    _, owner = load_analysis(analysis.read_bytes(), str(analysis))
    if owner != sha256:
        raise ConfigError(f"{analysis}: expected the analysis of {sha256}, got that of {owner}; remove {work} and convert again")
    return replace(job, settings=replace(job.settings, dictionary=sha256), shared=files)


def _fit(source: Source, job: Job, steps: int, work: Path, progress: Callable[[int], None]) -> None:
    """Train, and write the dictionary and its analysis."""
    pictures = _sample(source, job.size)
    # Half of the pictures hold the crop, so that datasets of small pictures can be fitted to; the others are left out.
    side = int(np.median([min(picture.shape[1:]) for picture in pictures])) if pictures else 0
    crop = min(TrainSettings.crop, side // TILE * TILE)
    large = [picture for picture in pictures if crop and min(picture.shape[1:]) >= crop]
    used, held = hold_out(large)
    if not used:
        raise ConfigError(f"dictionary: expected pictures of at least {TILE}x{TILE} in the split train to fit to, got none; do without the fit")
    found = Pictures([used], held or used, [1.0])
    base, network = _base(job)
    settings = TrainSettings.like(base, steps=steps, seed=job.settings.seed, crop=crop)
    pixels = hash_of_pictures(large)
    origin = {"base": base.sha256, "sources": [{"format": source.format, "pictures": len(used), "held_out": len(held), "sha256": pixels}]}
    state = work / STATE.format(pixels[:16])  # where a picture has changed, another training begins
    model = Model.from_dictionary(base, network, settings)
    model, curve = train(found, settings, state, model=model, origin=origin, progress=progress)
    dictionary, analysis, _ = finish(model, found, settings, origin, curve)
    write_bytes(work / DICTIONARY, dictionary)
    write_bytes(work / ANALYSIS, analysis)


def _base(job: Job) -> tuple[Dictionary, Analysis]:
    """What a fit begins with: the dictionary that the job names, and its analysis."""
    sha256 = job.settings.dictionary
    own = analysis_among(job.shared, sha256)
    return (shipped(), shipped_analysis()) if own is None else (load(job.shared[sha256], sha256), own)


def _sample(source: Source, size: tuple[int, int] | None) -> list[Tensor]:
    """Pictures of the train split, evenly spaced; those that cannot be read are reported when they are converted."""
    train_split: Sequence[Sample] = [sample for sample in source.samples if sample.split == "train"]
    chosen = sorted(set(np.linspace(0, len(train_split) - 1, SAMPLE).round().astype(int).tolist())) if train_split else []
    return read_pictures([train_split[i] for i in chosen], TILE, size)[0]
