"""What the commands print when they are done: for people, or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rinr_loader.compare import Comparison
from rinr_loader.console import bytes_text, psnr_text, result, result_json, result_table, tell, time_text, warn
from rinr_loader.convert import REPORT, Estimate, Report
from rinr_loader.dictionary import shipped
from rinr_loader.info import Info, Quality
from rinr_loader.source import SPLITS, Problem
from rinr_loader.verify import Verification

if TYPE_CHECKING:
    from rinr_loader.demo import DemoReport
    from rinr_loader.train_dictionary import Trained
    from rinr_loader.train_state import Row

BLURRED = 3.0  # dB
TOLD = 10  # problems that are told one by one
CLASSES = 20  # classes likewise


def convert_report(report: Report, *, as_json: bool) -> None:
    """Tell what a conversion wrote and what it left out."""
    if report.problems:
        warn(f"{len(report.problems)} problem(s), all of them in {report.dest / REPORT}:")
        _tell_first(report.problems)
    if report.missed:
        warn(f"{len(report.missed)} target(s) missed, all of them in {report.dest / REPORT}:")
        _tell_first(report.missed)
    if report.fallbacks:
        count = len(report.fallbacks)
        first = ", ".join(report.fallbacks[:TOLD]) + (f", and {count - TOLD} more in {report.dest / REPORT}" if count > TOLD else "")
        warn(f"{count} picture(s) stored as JPEGs, which come nearer to what was asked for than tile does: {first}")
    if as_json:
        result_json(asdict(report))
        return
    samples = ", ".join(f"{split} {report.samples[split]}" for split in SPLITS if split in report.samples)
    result(f"{report.dest}: {samples} samples in {time_text(report.seconds)}")
    total = sum(report.samples.values())
    share = f", {report.bytes / report.source_bytes:.2f} times the source files' {bytes_text(report.source_bytes)}" if report.source_bytes else ""
    result(f"  bytes   {bytes_text(report.bytes)} ({bytes_text((report.bytes - report.shared_bytes) / total)} a sample){share}")
    if report.shared_bytes:
        result(f"  shared  {bytes_text(report.shared_bytes)} of them are shared by all samples, however many there are")
    for split in report.samples:
        result(f"  PSNR    {split}: {psnr_text(report.psnr[split])}, objects {psnr_text(report.object_psnr[split])}")
    _warn_of_blurred_objects(report)
    if report.dropped_boxes:
        result("  boxes left out  " + ", ".join(f"{count} {reason}" for reason, count in sorted(report.dropped_boxes.items())))


def curve_row(row: Row) -> None:
    """Tell a row of a validation curve: bits a pixel and PSNR, linear and filtered, at a few quantization steps."""
    rates = [f"{r['bpp']:.3f} bpp {r['linear_psnr']:.2f} / {r['filtered_psnr']:.2f} dB" for r in row["rates"]]
    tell(f"validation after {row['step']} steps: {', '.join(rates)}")


def trained_report(trained: Trained, *, as_json: bool) -> None:
    """Tell what a training wrote and what it left out."""
    if trained.problems:
        warn(f"{len(trained.problems)} picture(s) left out:")
        _tell_first(trained.problems)
    if as_json:
        result_json(asdict(trained))
        return
    result(f"{trained.dictionary}: {bytes_text(trained.bytes)}, SHA-256 {trained.sha256}")
    result(f"{trained.analysis}: what encoding with it needs")
    for source in trained.about["sources"]:
        result(f"  {source['name']}  {source['pictures']} pictures, {source['held_out']} held out, weight {source['weight']:g}")


def _tell_first(problems: Sequence[Problem]) -> None:
    for problem in problems[:TOLD]:
        tell(f"  {problem.subject}: {problem.reason}")
    if len(problems) > TOLD:
        tell(f"  and {len(problems) - TOLD} more")


def _warn_of_blurred_objects(report: Report) -> None:
    """Say it where the objects of a split that was encoded blind to its labels are far from those that training sees."""
    train = report.object_psnr.get("train")
    for split, found in report.object_psnr.items():
        if train is not None and found is not None and found < train - BLURRED:
            warn(
                f"{split}: its objects have {train - found:.0f} dB less than those of train, since it is encoded without a look at its labels; "
                "small ones may be lost. Keep plain pictures for it, or convert with --val-residuals."
            )


def estimate_report(estimate: Estimate, *, as_json: bool) -> None:
    """Tell what a conversion should take."""
    if as_json:
        result_json(asdict(estimate))
        return
    result(f"estimated from {estimate.tried} of {estimate.samples} samples; nothing was written")
    result(f"  time    {time_text(3600 * estimate.hours)} ({estimate.hours:.3f} hours) on this machine in one process")
    result(f"  bytes   {bytes_text(estimate.bytes)} ({bytes_text(estimate.bytes / estimate.samples)} a sample) of bundles")
    result(f"  PSNR    {psnr_text(estimate.psnr)}, objects {psnr_text(estimate.object_psnr)}")


def info_report(info: Info, compared: Sequence[Comparison], *, sheet: Path | None, as_json: bool) -> None:
    """Tell what a dataset holds."""
    looked = [split for split, about in info.splits.items() if split != "train" and about.saw_labels]
    if looked:
        warn(f"{' and '.join(looked)} were encoded with a look at the labels; scores on them say more than a detector can do")
    if as_json:
        about = {**asdict(info), "jpeg": [asdict(comparison) for comparison in compared], "sheet": sheet}
        result_json(about)
        return
    names = ("family", "preset", "mode", "size", "target_psnr", "object_psnr", "max_bytes", "refine", "layers")
    settings = ", ".join(f"{name} {info.codec[name]}" for name in names if info.codec.get(name))
    if sha256 := info.codec.get("dictionary"):
        settings += f", dictionary {sha256[:12]}... ({'the package' if sha256 == shipped().sha256 else 'the dataset'}'s own)"
    result(f"{info.path}: {info.samples} samples, task {info.task}, {len(info.names)} classes; {settings}")
    result("")
    rows = [
        (split, str(s.samples), str(s.objects), str(s.shards), str(s.residuals), *_quality(s.psnr), *_quality(s.object_psnr))
        for split, s in info.splits.items()
    ]
    result_table(("split", "samples", "objects", "shards", "residuals", "PSNR", "worst", "objects' PSNR", "worst"), rows)
    result("")
    result_table(("bytes", "a sample", "all", "share"), _byte_rows(info))
    if info.streams.samples:
        result("")
        parts = [(name, f"{size:,.0f} bytes") for name, size in info.streams.bytes.items()]
        result_table((f"streams of {info.streams.samples} tile samples", "a sample"), parts)
    if info.bytes.source:
        ratio = info.bytes.total / info.bytes.source
        result(f"The picture files it was made from: {bytes_text(info.bytes.source)}; stored are {ratio:.2f} times as many.")
    if not compared:
        result("Pass --source SOURCE to compare with the same pictures as JPEG.")
    for comparison in compared:
        result("")
        result(f"{comparison.split}, on {comparison.pictures} of its pictures, all at the stored size:")
        rates = [(r.name, bytes_text(r.bytes), psnr_text(r.psnr), psnr_text(r.object_psnr)) for r in comparison.rates]
        result_table(("", "a sample", "PSNR", "objects' PSNR"), rates)
    result("")
    families = [(name, str(found.samples), bytes_text(found.bytes / found.samples)) for name, found in info.families.items()]
    result_table(("family", "samples", "a bundle"), families)
    result("")
    result_table(("network", "count"), [(name, str(count)) for name, count in info.groups.items()])
    _class_table(info)
    if info.worst:
        result("")
        worst = [(f"{p.split}/{p.key}", psnr_text(p.psnr), psnr_text(p.object_psnr)) for p in info.worst]
        result_table(("lowest PSNR", "PSNR", "objects' PSNR"), worst)
    if sheet is not None:
        result(f"They are drawn in {sheet}")


def _quality(quality: Quality) -> tuple[str, str]:
    return psnr_text(quality.mean), psnr_text(quality.worst)


def _byte_rows(info: Info) -> list[tuple[str, str, str, str]]:
    parts = asdict(info.bytes)
    names = {name: name for name in ("background", "residual", "header", "tar", "index", "shared", "other", "total")}
    if "tile" in info.families and not info.bytes.residual:  # one stream holds both; the table of streams tells them apart
        names["background"] = "background, residual"
        del names["residual"]
    return [
        (told, bytes_text(parts[name] / info.samples), bytes_text(parts[name]), f"{parts[name] / info.bytes.total:.1%}")
        for name, told in names.items()
    ]


def _class_table(info: Info) -> None:
    if not any(info.classes.values()):
        return
    result("")
    common = Counter(info.classes).most_common()
    rows = [(name, str(count)) for name, count in common[:CLASSES]]
    result_table(("class", "objects" if info.task == "detect" else "pictures"), rows)
    if len(common) > CLASSES:
        result(f"and {len(common) - CLASSES} more; --json lists all")


def verify_report(found: Verification, path: Path, *, as_json: bool) -> None:
    """Tell what was checked and all damage."""
    if as_json:
        result_json(asdict(found))
        return
    for damage in found.damage:
        result(damage)
    told = f"{len(found.damage)} thing(s) damaged" if found.damage else "all is well"
    result(f"{path}: {found.shards} shards, {found.samples} samples, {bytes_text(found.bytes)} read; {told}")


def demo_report(report: DemoReport, *, as_json: bool) -> None:
    """Tell what the demo measured."""
    if as_json:
        result_json(asdict(report))
        return
    from rinr_loader.demo import remark

    result("")
    rows = [
        (
            r.name,
            bytes_text(r.bytes),
            psnr_text(r.psnr),
            psnr_text(r.object_psnr),
            "-" if r.images_per_second is None else f"{r.images_per_second:.0f}",
        )
        for r in report.rows
    ]
    result_table(("160x96", "bytes an image", "PSNR", "objects' PSNR", "decoded images/s"), rows)
    result(remark(report))
    result(f"Source, decoded and difference side by side: {report.sheet}")
    result(f"Everything is in {report.out}; it took {time_text(report.seconds)} on {report.device}.")
