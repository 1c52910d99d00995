"""Units: the samples that are fitted together. Planned before anything is encoded, encoded alone, stored whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
import torch

from rinr_loader.annotations import annotate, sidecar
from rinr_loader.bundle import VERSION, Bundle, parse
from rinr_loader.encode import encode_unit
from rinr_loader.errors import ConvertError
from rinr_loader.image import fit_inside, hash_of, read_bytes, read_image
from rinr_loader.index import SUFFIX, encode_key
from rinr_loader.picture import Picture
from rinr_loader.presets import Settings
from rinr_loader.source import SPLITS, Problem, Sample, Source
from rinr_loader.targets import targets_of
from rinr_loader.writer import dump_json, member, write_bytes, write_tar

UNIT = 64  # samples that are fitted together
MISSED = 0.05  # dB by which a target may be missed without a word: a fit is judged on a part of its pixels


@dataclass(frozen=True)
class Job:
    """Everything besides the samples that a conversion's bytes depend on.

    Args:
        settings: Of the encoder.
        size: Width and height that pictures are shrunk to fit inside; None keeps them.
        shard_samples: Samples in a shard.
        val_residuals: Encode val and test with residuals, as train; by default they are encoded blind to their labels.
        device: Where to fit networks, `cpu` or `cuda`; other families than `siren` encode on the CPU.
        shared: Files of shared parameters that bundles name, by their SHA-256 in hexadecimal; `settings.dictionary` says which one.
    """

    settings: Settings = field(default_factory=Settings)
    size: tuple[int, int] | None = None
    shard_samples: int = 1024
    val_residuals: bool = False
    device: str = "cpu"
    shared: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def describe(self) -> dict[str, Any]:
        """As stored in `dataset.json`."""
        # Only networks are fitted on a GPU: the other families encode on the CPU, whatever is there.
        device = torch.device(self.device).type if self.settings.family == "siren" else "cpu"
        build = {"torch": torch.__version__, "device": device, "format": VERSION}
        if self.settings.family != "siren":  # its JPEGs are Pillow's
            build["pillow"] = PIL.__version__
        return {**self.settings.describe(), **_but_settings(self), **build}


def _but_settings(job: Job) -> dict[str, Any]:
    size = None if job.size is None else list(job.size)
    return {"size": size, "shard_samples": job.shard_samples, "val_residuals": job.val_residuals}


@dataclass(frozen=True)
class Unit:
    """Consecutive samples of one shard, at most 64."""

    name: str
    shard: str
    split: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class UnitReport:
    """What is remembered of a finished unit beside its members."""

    print: str  # of the annotations that went in
    hashes: list[str]  # of the source files
    problems: list[list[str]]
    dropped: dict[str, int]
    samples: int
    bytes: int
    source_bytes: int
    psnr: list[float]
    object_psnr: list[float]
    missed: list[list[str]] = field(default_factory=list)  # what was stored below its target
    fallbacks: list[str] = field(default_factory=list)  # what was stored as a JPEG, for its family does not reach its targets


def plan_units(samples: Sequence[Sample], shard_samples: int) -> list[Unit]:
    """Deal samples to shards and units, in order; fixed before anything is encoded.

    Raises:
        ConvertError: There are no samples, a key stands twice, or a key is too long for a tar.
        ValueError: `shard_samples` is below 1.
    """
    if shard_samples < 1:
        raise ValueError(f"shard_samples: expected at least 1, got {shard_samples}")
    if not samples:
        raise ConvertError("source: expected at least one picture, got none; check the path and --source-format")
    units = []
    for split in SPLITS:
        mine = [sample for sample in samples if sample.split == split]
        _check_keys(split, mine)
        for first in range(0, len(mine), shard_samples):
            shard = f"{split}-{first // shard_samples:06d}"
            members = mine[first : first + shard_samples]
            units += [Unit(f"{shard}-{i // UNIT:04d}", shard, split, tuple(members[i : i + UNIT])) for i in range(0, len(members), UNIT)]
    return units


def _check_keys(split: str, samples: Sequence[Sample]) -> None:
    seen: dict[str, str] = {}
    for sample in samples:
        key = encode_key(sample.key)
        member(key + SUFFIX)
        if key.casefold() in seen:
            other = seen[key.casefold()]
            raise ConvertError(f"{split}: expected keys that differ in more than case, got {other!r} and {sample.key!r}; rename one of the files")
        seen[key.casefold()] = sample.key


def check_labels(source: Source) -> None:
    """Check that every box has a class and every class id a name.

    Raises:
        ConvertError: One does not.
    """
    end = len(source.names) or 2**31
    for sample in source.samples:
        boxes = len(sample.boxes)
        if len(sample.classes) != boxes or (sample.crowd is not None and len(sample.crowd) != boxes):
            raise ConvertError(f"{_subject(sample)}: expected a class for each of {boxes} boxes, got {len(sample.classes)}; correct the labels")
        wrong = [number for number in (*sample.classes.tolist(), max(sample.label, 0)) if not 0 <= number < end]
        if wrong:
            raise ConvertError(f"{_subject(sample)}: expected class ids from 0 to {end - 1}, got {wrong[0]}; correct the labels or the names")


def encode_and_store(
    unit: Unit, work: Path, job: Job, threads: int | None = None, on_background: Callable[[], None] | None = None, *, strict: bool = False
) -> UnitReport:
    """Encode one unit and store its members and its report in the working folder, the members last."""
    report, members = encode_samples(unit, job, threads, on_background, strict=strict)
    write_bytes(work / f"{unit.name}.json", dump_json(dataclasses.asdict(report)))
    write_tar(work / f"{unit.name}.tar", members)
    return report


def encode_samples(
    unit: Unit, job: Job, threads: int | None, on_background: Callable[[], None] | None, *, strict: bool = False
) -> tuple[UnitReport, list[tuple[str, bytes]]]:
    """Encode one unit: its report and its tar members.

    Raises:
        ConvertError: `strict`, and a picture or a box cannot be used; before anything is fitted.
    """
    pictures: list[Picture] = []
    read: list[tuple[str, dict[str, object]]] = []
    subjects: list[str] = []
    problems: list[list[str]] = []
    dropped: Counter[str] = Counter()
    hashes, source_bytes = [], 0
    for sample in unit.samples:
        subject = _subject(sample)
        try:
            image = read_image(sample.image)
            height, width = image.pixels.shape[:2]
            annotations = annotate(sample, width, height)
        except ConvertError as error:
            problems.append([subject, str(error)])
            hashes.append(_hash(sample))
            continue
        hashes.append(image.source_hash.hex())
        source_bytes += image.source_bytes
        dropped.update(annotations.dropped)
        problems += [[subject, f"{count} box(es) {reason}"] for reason, count in sorted(annotations.dropped.items())]
        subjects.append(subject)
        read.append((encode_key(sample.key), sidecar(sample, annotations)))
        pixels = fit_inside(image.pixels, job.size)
        pictures.append(
            Picture(
                pixels=pixels,
                source_size=(height, width),
                boxes=annotations.boxes,
                classes=annotations.classes,
                crowd=annotations.crowd,
                label=sample.label,
                source_hash=image.source_hash,
                blind=sample.split != "train" and not job.val_residuals,
                original=image.jpeg if pixels is image.pixels else None,
            )
        )
    if strict and problems:
        raise strict_error(Problem(*problems[0]))
    bundles = encode_unit(pictures, job.settings, unit=unit.name, device=job.device, threads=threads, on_background=on_background, shared=job.shared)
    members: list[tuple[str, bytes]] = []
    for (key, extra), bundle in zip(read, bundles, strict=True):
        members.append((key + SUFFIX, bundle))
        if extra:
            members.append((f"{key}.json", json.dumps(extra, sort_keys=True).encode()))
    parsed = [parse(bundle) for bundle in bundles]
    missed = [
        [subject, reason]
        for subject, picture, bundle, data in zip(subjects, pictures, parsed, bundles, strict=True)
        for reason in _missed(picture, bundle, len(data), job.settings)
    ]
    report = UnitReport(
        print=_print(unit),
        hashes=hashes,
        problems=problems,
        dropped=dict(dropped),
        samples=len(bundles),
        bytes=sum(len(data) for _, data in members),
        source_bytes=source_bytes,
        psnr=[b.psnr for b in parsed if b.psnr is not None],
        object_psnr=[b.object_psnr for b in parsed if b.object_psnr is not None],
        missed=missed,
        fallbacks=[subject for subject, b in zip(subjects, parsed, strict=True) if b.family != job.settings.family],
    )
    return report, members


def _missed(picture: Picture, bundle: Bundle, size: int, settings: Settings) -> list[str]:
    """Which of its targets a picture has missed."""
    reasons = []
    target, object_target = targets_of(picture, settings)
    if target is not None and bundle.psnr is not None and bundle.psnr < target - MISSED:
        reasons.append(f"stored at {bundle.psnr:.1f} dB, below the target of {target:g} dB")
    found = bundle.object_psnr
    if object_target is not None and found is not None and found < object_target - MISSED:
        reasons.append(f"its objects stored at {found:.1f} dB, below the target of {object_target:g} dB")
    if settings.max_bytes is not None and size > settings.max_bytes:
        reasons.append(f"stored in {size} bytes, above the limit of {settings.max_bytes}")
    return reasons


def strict_error(problem: Problem) -> ConvertError:
    """What `--strict` makes of a problem."""
    return ConvertError(f"{problem.subject}: {problem.reason}; mend it, or leave out --strict")


def _subject(sample: Sample) -> str:
    """What a report calls a sample: not its path, which differs between machines."""
    return f"{sample.split}/{sample.key}" + (sample.image.suffix if isinstance(sample.image, Path) else "")


def _hash(sample: Sample) -> str:
    """Hash of a sample's source file, also where it cannot be read as a picture."""
    try:
        return hash_of(read_bytes(sample.image)).hex()
    except ConvertError:
        return ""


def _print(unit: Unit) -> str:
    """A hash of a unit's annotations."""
    digest = hashlib.sha256()
    for s in unit.samples:
        crowd = b"" if s.crowd is None else s.crowd.tobytes()
        about = json.dumps([s.key, s.label, s.relative, s.declared_size, s.extra], sort_keys=True, default=str).encode()
        digest.update(b"".join((about, s.boxes.tobytes(), s.classes.tobytes(), crowd)))
    return digest.hexdigest()[:16]


def load_report(work: Path, unit: Unit) -> UnitReport | None:
    """The report of a unit, None where it is not finished: the tar is written last."""
    if not (work / f"{unit.name}.tar").exists():
        return None
    return UnitReport(**json.loads((work / f"{unit.name}.json").read_bytes()))


def is_unchanged(unit: Unit, report: UnitReport) -> bool:
    """Whether a finished unit still stands for its sources: the same annotations and the same files."""
    return report.print == _print(unit) and report.hashes == [_hash(sample) for sample in unit.samples]
