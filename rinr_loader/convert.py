"""A source dataset to shards: plan units, encode them, assemble shards, describe the dataset. Resumable at every point.

While a conversion runs, `DEST/.rinr/` holds `job.json` (what was asked for) and two files for each finished unit: a tar of its members
and a report. A unit whose files are there and whose sources have not changed is never encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np

from rinr_loader.errors import ConfigError, ConvertError, ShardError
from rinr_loader.fit_dictionary import fitted_job, with_dictionary
from rinr_loader.index import ShardIndex, load_index
from rinr_loader.lanes import check_device
from rinr_loader.presets import check_settings
from rinr_loader.quality import mean_of
from rinr_loader.shared import check_shared, listed, write_shared
from rinr_loader.source import Problem, Source
from rinr_loader.units import (
    Job,
    Unit,
    UnitReport,
    check_labels,
    encode_and_store,
    encode_samples,
    is_unchanged,
    load_report,
    plan_units,
    strict_error,
)
from rinr_loader.writer import (
    DATASET,
    data_yaml,
    describe_dataset,
    describe_shard,
    dump_json,
    make_folder,
    read_tar,
    write_bytes,
    write_index,
    write_tar,
)

__all__ = ["REPORT", "Estimate", "Job", "Progress", "Report", "convert", "estimate"]

WORK = ".rinr"
REPORT = "report.json"


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    done: int  # samples encoded, or found finished
    total: int
    resumed: int  # of `done`, those found finished
    bytes: int  # of the bundles of finished units
    psnr: float | None  # mean over the finished units, in dB


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Args:
        dest: The dataset.
        samples: Samples written, by split.
        problems: What was left out, and why.
        missed: What was stored below its target, or in more bytes than were allowed.
        fallbacks: What was stored as a JPEG, for `tile` does not reach its targets.
        dropped_boxes: Boxes left out, by reason.
        seconds: Time it took.
        psnr, object_psnr: Mean of each split's samples in dB, None where there is nothing to measure.
        bytes: Of all files of the dataset.
        source_bytes: Of the source's picture files.
        shared_bytes: Of the parameters that all samples share.
    """

    dest: Path
    samples: dict[str, int]
    problems: tuple[Problem, ...]
    dropped_boxes: dict[str, int]
    seconds: float
    psnr: dict[str, float | None]
    object_psnr: dict[str, float | None]
    bytes: int
    source_bytes: int
    missed: tuple[Problem, ...] = ()
    fallbacks: tuple[str, ...] = ()
    shared_bytes: int = 0


def convert(
    source: Source,
    dest: Path | str,
    job: Job | None = None,
    *,
    workers: int = 1,
    strict: bool = False,
    fit_dictionary: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    on_fit: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert a source dataset to a directory of residual-INR shards.

    Interrupted at any moment, the same call goes on where it was and gives the same bytes as an undisturbed one.

    Args:
        source: What to convert, from `rinr_loader.converters.open_source` or of your own making.
        dest: The directory to write; new, empty, or holding the same conversion unfinished.
        job: Codec settings, size and shards; defaults without it.
        workers: Processes that fit units side by side. The bytes do not depend on it.
        strict: Make the first picture or label that cannot be used an error.
        fit_dictionary: Steps in which the shipped dictionary is fitted to the pictures of the train split first; of family `tile`.
        on_progress: Called after every picture.
        on_fit: Called after every step of that fit, with the steps that are done and their number.

    Returns:
        What was written and what was left out.

    Raises:
        ConvertError: There is nothing to convert, a key does not fit a tar, or `strict` met a problem.
        ConfigError: `dest` holds another dataset or another unfinished conversion, the device is not there, or the settings do not fit
            together.
        ShardError: `dest` holds the finished dataset, but a file of it is gone or damaged.
        StorageError: `dest` cannot be written, or is full.
    """
    started = time.monotonic()
    job, dest = job or Job(), Path(dest)
    check_device(job.device)
    check_settings(job.settings)
    if fit_dictionary < 0 or (fit_dictionary and job.settings.family != "tile"):
        wrong = f"{fit_dictionary} with family {job.settings.family}"
        raise ConfigError(f"fit_dictionary: expected steps with family tile, or 0, got {wrong}; leave it out, or choose family tile")
    job = with_dictionary(job)
    units = plan_units(source.samples, job.shard_samples)
    check_labels(source)
    if strict and source.problems:
        raise strict_error(source.problems[0])
    asked = _fingerprint(source, job) | ({"fit_dictionary": fit_dictionary} if fit_dictionary else {})
    work = _open(dest, asked)
    if work is not None:
        if fit_dictionary:
            job = fitted_job(source, job, fit_dictionary, work, lambda step: on_fit(step, fit_dictionary) if on_fit else None)
        _Run(work, job, units, strict, on_progress).run(workers)
        _assemble(source, dest, work, job, units, asked)
        _clean(dest)
    return _report(dest, time.monotonic() - started)


def _fingerprint(source: Source, job: Job) -> dict[str, Any]:
    """What must be the same for a conversion to be the same one: settings and the list of samples."""
    keys = hashlib.sha256("\n".join(f"{s.split}/{s.key}" for s in source.samples).encode()).hexdigest()[:16]
    return {**job.describe(), "source_format": source.format, "samples": keys, "names": list(source.names)}


def _open(dest: Path, fingerprint: dict[str, Any]) -> Path | None:
    """Make or find the working folder; None where the dataset is already complete."""
    work = dest / WORK
    if (dest / DATASET).exists():
        _clean(dest)  # a run was killed when everything was done
    wanted = json.loads(json.dumps(fingerprint))
    if dest.exists() and not dest.is_dir():
        raise ConfigError(f"{dest}: expected a folder, got a file; choose another DEST")
    make_folder(dest)
    there = sorted(path.name for path in dest.iterdir())
    if (work / "job.json").exists():
        found = _read_job(work / "job.json")
        if found != wanted:
            raise ConfigError(f"{dest}: {_difference('an unfinished conversion', found, wanted)}; run the same command again, or choose another DEST")
        return work
    if DATASET in there:
        found = _read_job(dest / DATASET, "codec", "job")
        if found != wanted:
            raise ConfigError(f"{dest}: {_difference('another dataset', found, wanted)}; choose another DEST")
        return None
    if there and there != [WORK]:
        raise ConfigError(f"{dest}: expected an empty folder or an unfinished conversion, got {', '.join(there[:3])}; choose another DEST")
    make_folder(work)
    write_bytes(work / "job.json", dump_json(wanted))
    return work


def _read_job(path: Path, *keys: str) -> dict[str, Any]:
    """What a file of this or of any other program says was asked for; nothing where it does not say."""
    try:
        found = json.loads(path.read_bytes())
        for key in keys:
            found = found[key]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _clean(dest: Path) -> None:
    """Remove the working folder. Renamed first: half of one would look like an unfinished conversion."""
    done = dest / f"{WORK}-done"
    if (dest / WORK).exists():
        (dest / WORK).replace(done)
    shutil.rmtree(done, ignore_errors=True)


def _difference(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    told = [f"{name} {found.get(name)} instead of {wanted.get(name)}" if name not in ("samples", "names") else f"other {name}" for name in names]
    return f"expected the conversion asked for, got {what} ({', '.join(told[:4])})"


class _Run:
    """Encodes the units that are not finished yet and keeps count."""

    def __init__(self, work: Path, job: Job, units: Sequence[Unit], strict: bool, on_progress: Callable[[Progress], None] | None) -> None:
        self.work, self.job, self.units, self.strict, self.on_progress = work, job, units, strict, on_progress
        self.done = self.resumed = self.bytes = 0
        self.psnr: list[float] = []

    def run(self, workers: int) -> None:
        for leftover in self.work.glob(".*.tmp"):  # of a run that was killed
            leftover.unlink()
        waiting = []
        for unit in self.units:
            report = load_report(self.work, unit)
            if report is not None and is_unchanged(unit, report):
                self.resumed += len(unit.samples)
                self._count(unit, report, len(unit.samples))
            else:
                # Gone before its new report is written: a run killed in between would take old members for new ones.
                (self.work / f"{unit.name}.tar").unlink(missing_ok=True)
                waiting.append(unit)
        for shard in {(unit.split, unit.shard) for unit in waiting}:  # assembled before a source changed
            (self.work.parent / shard[0] / f"{shard[1]}.tar").unlink(missing_ok=True)
        if workers <= 1 or len(waiting) <= 1:
            for unit in waiting:
                ticks = [0]
                report = encode_and_store(unit, self.work, self.job, None, lambda ticks=ticks: self._tick(ticks), strict=self.strict)  # type: ignore[misc]
                self._count(unit, report, len(unit.samples) - ticks[0])
        else:
            self._run_processes(waiting, workers)

    def _run_processes(self, waiting: Sequence[Unit], workers: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        before = set(active_children())
        # Spawned, not forked: a forked child inherits locks of torch's threads.
        pool = ProcessPoolExecutor(min(workers, len(waiting)), mp_context=get_context("spawn"))
        try:
            futures = {pool.submit(encode_and_store, unit, self.work, self.job, threads, strict=self.strict): unit for unit in waiting}
            for future in as_completed(futures):
                self._count(futures[future], future.result(), len(futures[future].samples))
        except BrokenProcessPool:
            message = "workers: expected to finish, got one that was killed (out of memory?); run the same command with fewer --workers"
            raise ConvertError(message) from None
        except BaseException:
            for child in set(active_children()) - before:  # a unit takes minutes; what it has not finished is lost anyway
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tick(self, ticks: list[int]) -> None:
        ticks[0] += 1
        self.done += 1
        self._tell()

    def _count(self, unit: Unit, report: UnitReport, samples: int) -> None:
        if self.strict and report.problems:
            raise strict_error(Problem(*report.problems[0]))
        self.done += samples
        self.bytes += report.bytes
        self.psnr += report.psnr
        self._tell()

    def _tell(self) -> None:
        if self.on_progress is not None:
            mean = sum(self.psnr) / len(self.psnr) if self.psnr else None
            self.on_progress(Progress(self.done, sum(len(u.samples) for u in self.units), self.resumed, self.bytes, mean))


def _assemble(source: Source, dest: Path, work: Path, job: Job, units: Sequence[Unit], asked: dict[str, Any]) -> None:
    """Join units to shards, then describe them; `dataset.json` comes last and makes the directory a dataset."""
    shared = write_shared(dest, job.shared, work)
    splits: dict[str, list[tuple[dict[str, Any], ShardIndex]]] = {}
    for split, shard in dict.fromkeys((unit.split, unit.shard) for unit in units):
        path = dest / split / f"{shard}.tar"
        make_folder(path.parent)
        if not path.exists():
            parts = [work / f"{unit.name}.tar" for unit in units if unit.shard == shard]
            write_tar(path, (member for part in parts for member in read_tar(part)), work)
        index = write_index(path, work)
        if len(index):
            splits.setdefault(split, []).append((describe_shard(dest, path, index), index))
        else:  # none of its pictures could be read
            path.unlink()
            path.with_suffix(".safetensors").unlink()
    reports = [report for unit in units if (report := load_report(work, unit))]
    problems = [[p.subject, p.reason] for p in source.problems] + [problem for report in reports for problem in report.problems]
    if not splits:
        raise ConvertError(f"source: expected at least one readable picture, got none ({problems[0][0]}: {problems[0][1]}); check the files")
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    about = {"format": source.format, "bytes": sum(r.source_bytes for r in reports)}
    codec = {**job.describe(), "job": asked}
    missed = [entry for report in reports for entry in report.missed]
    fallbacks = [subject for report in reports for subject in report.fallbacks]
    write_bytes(dest / REPORT, dump_json({"problems": problems, "missed": missed, "fallbacks": fallbacks, "dropped_boxes": dict(dropped)}), work)
    write_bytes(dest / "data.yaml", data_yaml(splits, source.names), work)
    described = describe_dataset(splits, names=source.names, codec=codec, source=about, shared=shared)
    write_bytes(dest / DATASET, dump_json(described), work)


def _report(dest: Path, seconds: float) -> Report:
    """What a finished dataset says of itself."""
    described = json.loads((dest / DATASET).read_bytes())
    left_out = json.loads((dest / REPORT).read_bytes())
    indexes = {split: [_open_shard(dest, row) for row in table["shards"]] for split, table in described["splits"].items()}
    check_shared(dest, described)
    files = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    return Report(
        dest=dest,
        samples={split: table["samples"] for split, table in described["splits"].items()},
        problems=tuple(Problem(*problem) for problem in left_out["problems"]),
        dropped_boxes=left_out["dropped_boxes"],
        seconds=seconds,
        psnr={split: mean_of([index.psnr for index in found]) for split, found in indexes.items()},
        object_psnr={split: mean_of([index.object_psnr for index in found]) for split, found in indexes.items()},
        bytes=files,
        source_bytes=described["source"]["bytes"],
        missed=tuple(Problem(*entry) for entry in left_out.get("missed", [])),
        fallbacks=tuple(left_out.get("fallbacks", [])),
        shared_bytes=sum(listed(described).values()),
    )


def _open_shard(dest: Path, row: dict[str, Any]) -> ShardIndex:
    """The index of a finished shard; a dataset that has lost files is not finished."""
    try:
        size, data = (dest / row["path"]).stat().st_size, (dest / row["index"]).read_bytes()
    except OSError as error:
        raise ShardError(f"{error.filename}: expected a file of the dataset, got {error.strerror}; remove {dest} and convert again") from None
    if size != row["bytes"]:
        raise ShardError(f"{dest / row['path']}: expected {row['bytes']} bytes, got {size}; remove {dest} and convert again")
    return load_index(data, name=row["index"], shard_bytes=size)


@dataclass(frozen=True)
class Estimate:
    """What a conversion should cost, extrapolated from a few samples: hours on this machine, bytes of bundles, mean PSNR in dB."""

    samples: int
    tried: int
    hours: float
    bytes: int
    psnr: float | None
    object_psnr: float | None


def estimate(source: Source, job: Job | None = None, *, samples: int = 8) -> Estimate:
    """Encode a few samples, evenly spread over the source, and extrapolate. Writes nothing.

    Raises:
        ConvertError: There is nothing to convert, or none of the samples can be read.
        ConfigError: The settings do not fit together.
    """
    job = job or Job()
    check_settings(job.settings)
    plan_units(source.samples, job.shard_samples)  # the same checks as a conversion
    check_labels(source)
    chosen = [source.samples[i] for i in sorted(set(np.linspace(0, len(source.samples) - 1, samples).round().astype(int).tolist()))]
    started = time.monotonic()
    report, _ = encode_samples(Unit("estimate", "estimate", "train", tuple(chosen)), job, None, None)
    if not report.samples:
        raise ConvertError(f"source: expected readable pictures, got none of {len(chosen)} tried ({report.problems[0][1]}); check the files")
    each = (time.monotonic() - started) / report.samples
    psnr = [mean_of([np.array(values, np.float32)]) for values in (report.psnr, report.object_psnr)]
    total = len(source.samples)
    return Estimate(total, report.samples, each * total / 3600, round(report.bytes / report.samples * total), psnr[0], psnr[1])
