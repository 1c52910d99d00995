"""The command `rinr`. Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 Ctrl-C.

What a command needs is imported when it runs: torch takes seconds, and a wrong option should be told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

import typer
from typer.core import TyperCommand

from rinr_loader import __version__
from rinr_loader.console import Meter, bytes_text, psnr_text, result, result_json, result_table, tell, warn
from rinr_loader.errors import ConfigError, RinrError

if TYPE_CHECKING:
    from rinr_loader.convert import Progress
    from rinr_loader.presets import Settings
    from rinr_loader.specs import Family

P = ParamSpec("P")

FIT_STEPS = 2000  # of --fit-dictionary where it names none

app = typer.Typer(
    name="rinr",
    help="Convert picture datasets to residual-INR shards, look at them, and check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _command(stopped: str = "stopped") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Turn errors into one line and an exit status; `stopped` is what Ctrl-C leaves to say."""

    def decorate(function: Callable[P, None]) -> Callable[P, None]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except RinrError as error:
                tell(f"error: {error}")
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                tell(stopped)
                raise typer.Exit(130) from None

        return run

    return decorate


# --- options ---


@dataclass(frozen=True)
class PictureSize:
    """What `WxH` says, in pixels."""

    width: int
    height: int


def _size(text: str) -> PictureSize:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or not (1 <= int(match[1]) <= 65535 and 1 <= int(match[2]) <= 65535):
        raise typer.BadParameter(f"expected WIDTHxHEIGHT in pixels, such as 640x360, got {text!r}")
    return PictureSize(int(match[1]), int(match[2]))


def _fraction(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"expected a share from 0 up to but not including 1, got {value}")
    return value


def _source_format(name: str | None) -> str | None:
    if name is not None:
        from rinr_loader.converters import CONVERTERS

        if name not in CONVERTERS:
            raise typer.BadParameter(f"expected one of {', '.join(CONVERTERS)}, got {name!r}")
    return name


def _device(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:NUMBER, got {name!r}")
    return name


def _show_version(wanted: bool) -> None:
    if wanted:
        result(f"rinr {__version__}")
        raise typer.Exit


def _chosen_device(name: str | None) -> str:
    """The device asked for, or CUDA where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of this machine, got {name} where {torch.cuda.device_count()} CUDA device(s) are usable; use cpu")
    return name


def _local(path: str, name: str) -> Path:
    """A path, not a URL."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
        raise ConfigError(f"{name}: expected a local path, got {path}; reading and writing object storage is not there yet, copy it to a local disk")
    return Path(path)


Dest = Annotated[str, typer.Argument(metavar="DEST", help="The directory that `rinr convert` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]
Device = Annotated[str | None, typer.Option(callback=_device, metavar="cpu|cuda", help="Where to compute; CUDA where there is one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Samples of each split, at most.")]


class _OptionalSteps(TyperCommand):
    """A command whose --fit-dictionary may stand without its number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for i in reversed([i for i, argument in enumerate(args) if argument == "--fit-dictionary"]):
            if not re.fullmatch(r"[+-]?\d+", args[i + 1] if i + 1 < len(args) else ""):
                args.insert(i + 1, str(FIT_STEPS))
        return super().parse_args(ctx, args)


# --- commands ---


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Convert picture datasets to residual-INR shards, look at them, and check them."""


@app.command("convert", cls=_OptionalSteps)
@_command("stopped; the same command again continues where it was")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or file of a picture dataset; its format is detected.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="The directory to write; an unfinished conversion there is continued.")],
    source_format: Annotated[str | None, typer.Option(callback=_source_format, metavar="NAME", help="Format of SOURCE, not detected.")] = None,
    family: Annotated[Literal["tile", "siren", "jpeg"], typer.Option(help="What pictures are stored as, see docs/CODECS.md.")] = "tile",
    preset: Annotated[
        Literal["paper", "fast", "balanced", "best"] | None,
        typer.Option(help="Shapes and steps, time against quality; of siren.", show_default="balanced"),
    ] = None,
    mode: Annotated[
        Literal["qre", "re", "de", "be", "bs"] | None,
        typer.Option(help="What is stored, see docs/FORMAT.md; tile has qre and be.", show_default="qre"),
    ] = None,
    size: Annotated[PictureSize | None, typer.Option(parser=_size, metavar="WxH", help="Shrink pictures to fit inside; never enlarges.")] = None,
    target_psnr: Annotated[float | None, typer.Option(min=1, max=99, metavar="DB", help="PSNR at which a picture is good enough.")] = None,
    object_psnr: Annotated[float | None, typer.Option(min=1, max=99, metavar="DB", help="PSNR at which an object is good enough.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Bytes of a picture with its labels at most; of tile and jpeg.")] = None,
    refine: Annotated[int | None, typer.Option(min=0, metavar="N", help="Steps that refine latents; of tile.", show_default="0")] = None,
    layers: Annotated[int | None, typer.Option(min=1, max=2, metavar="1|2", help="Layers of the synthesis; of tile.", show_default="2")] = None,
    dictionary: Annotated[
        str | None, typer.Option(metavar="NAME.bin", help="A shared dictionary of your own, with NAME.analysis: see train-dictionary; of tile.")
    ] = None,
    fit_dictionary: Annotated[
        int | None, typer.Option(min=1, metavar="[STEPS]", help="Fit the shared dictionary to the pictures first, 2000 steps; of tile.")
    ] = None,
    shard_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of a shard.")] = 1024,
    limit: Limit = None,
    val_fraction: Annotated[float, typer.Option(callback=_fraction, metavar="F", help="Share of train that becomes val, if there is none.")] = 0.0,
    val_residuals: Annotated[bool, typer.Option("--val-residuals", help="Encode val and test with a look at their labels too.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all randomness.")] = 0,
    device: Device = None,
    amp: Annotated[bool, typer.Option("--amp", help="Fit with half-precision products; on CUDA only.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes side by side; the bytes do not depend on it.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Make the first picture or label that cannot be used an error.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fit 8 samples and tell what the conversion would take; writes nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a picture dataset to shards. Interrupted, the same command continues."""
    source_path, dest_path = _local(source, "SOURCE"), _local(dest, "DEST")
    from rinr_loader import reports
    from rinr_loader.convert import Job, convert, estimate
    from rinr_loader.converters import open_source
    from rinr_loader.fit_dictionary import with_own_dictionary

    chosen = _chosen_device(device)
    if amp and chosen == "cpu":
        raise typer.BadParameter("works on CUDA only; leave it out", param_hint="--amp")
    if val_residuals:
        warn("--val-residuals: the pictures of val and test get better where their labels are; scores on them say more than a detector can do")
    given = {"preset": preset, "mode": mode, "target_psnr": target_psnr, "object_psnr": object_psnr, "seed": seed, "half": amp or None}
    settings = _settings(family, {**given, "max_bytes": max_bytes, "refine": refine, "layers": layers})
    for option, value in (("--dictionary", dictionary), ("--fit-dictionary", fit_dictionary)):
        if value and family != "tile":
            raise typer.BadParameter(f"is of family tile, and not of {family}; leave it out, or choose --family tile", param_hint=option)
    job = Job(settings, None if size is None else (size.width, size.height), shard_samples, val_residuals, chosen)
    if dictionary is not None:
        job = with_own_dictionary(job, _local(dictionary, "--dictionary"))
    found = open_source(source_path, source_format=source_format, val_fraction=val_fraction, limit=limit)
    if dry_run:
        if fit_dictionary:
            warn("--fit-dictionary: the estimate is made with the dictionary that the fit begins with, and leaves out its time")
        reports.estimate_report(estimate(found, job), as_json=as_json)
        return
    with ExitStack() as stage:
        meters: dict[str, Meter] = {}

        def meter_of(label: str, unit: str) -> Meter:
            if label not in meters:
                stage.close()  # the bar of the stage before
                meters[label] = stage.enter_context(Meter(label, unit))
            return meters[label]

        def on_fit(done: int, total: int) -> None:
            meter_of("fitting the dictionary", "steps").update(done, total, note="now its tables" if done == total else "")

        def on_progress(progress: Progress) -> None:
            note = ", ".join(filter(None, [psnr_text(progress.psnr) if progress.psnr else "", bytes_text(progress.bytes) if progress.bytes else ""]))
            meter_of("converting", "images").update(progress.done, progress.total, before=progress.resumed, note=note)

        if not fit_dictionary:
            meter_of("converting", "images").update(0, len(found.samples))
        processes = workers or _workers(chosen if family == "siren" else "cpu")
        report = convert(
            found, dest_path, job, workers=processes, strict=strict, fit_dictionary=fit_dictionary or 0, on_progress=on_progress, on_fit=on_fit
        )
    reports.convert_report(report, as_json=as_json)


def _settings(family: Family, given: dict[str, Any]) -> Settings:
    """Settings of the options that were given; one that the family has no meaning for is told, even where it is the default."""
    from rinr_loader.presets import UNDERSTOOD, Settings, check_settings

    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in UNDERSTOOD[family]:
            option = "--amp" if name == "half" else f"--{name.replace('_', '-')}"
            families = [other for other, names in UNDERSTOOD.items() if name in names]
            wrong = f"is of family {' and '.join(families)}, and not of {family}; leave it out, or choose --family {families[0]}"
            raise typer.BadParameter(wrong, param_hint=option)
    settings = Settings(family=family, **given)
    try:
        check_settings(settings)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return settings


def _workers(device: str) -> int:
    """One process for each eight cores: within a process, threads share the work on a unit."""
    return 1 if device.startswith("cuda") else max(1, (os.cpu_count() or 1) // 8)


@app.command()
@_command()
def info(
    dest: Dest,
    worst: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the ten pictures with the lowest PSNR.")] = None,
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="What DEST was converted from: compare with JPEG on these pictures.")] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures of each split for that comparison.")] = 32,
    as_json: Json = False,
) -> None:
    """Tell what a converted dataset holds: counts, bytes, PSNR, shapes, classes."""
    path = _local(dest, "DEST")
    from rinr_loader import reports
    from rinr_loader.compare import compare_with_jpeg
    from rinr_loader.converters import CONVERTERS, open_source
    from rinr_loader.dataset import RinrDataset
    from rinr_loader.info import describe, draw_worst

    about = describe(path)
    compared = []
    if source is not None:
        known = about.source_format if about.source_format in CONVERTERS else None
        found = open_source(_local(source, "--source"), source_format=known)
        compared = [compare_with_jpeg(RinrDataset(path, split), found, samples=samples) for split in about.splits]
    if worst is not None:
        sheet = draw_worst(about)
        try:
            sheet.save(worst, "PNG")
        except OSError as error:
            raise ConfigError(f"--worst: expected a place that can be written, got {worst} ({error.strerror or error}); choose another") from None
    reports.info_report(about, compared, sheet=worst, as_json=as_json)


@app.command()
@_command()
def verify(dest: Dest, device: Device = None, as_json: Json = False) -> None:
    """Check every byte of a dataset and decode every sample; list all damage."""
    path = _local(dest, "DEST")
    from rinr_loader import reports
    from rinr_loader.verify import verify as check

    with Meter("verifying", "shards") as meter:
        found = check(path, device=_chosen_device(device), on_progress=meter.update)
    reports.verify_report(found, path, as_json=as_json)
    if found.damage:
        raise typer.Exit(1)


@app.command()
@_command()
def index(dest: Dest, as_json: Json = False) -> None:
    """Rebuild the indexes and dataset.json from the shards; refuses where a bundle is damaged."""
    path = _local(dest, "DEST")
    from rinr_loader.reindex import reindex

    made = reindex(path)
    if as_json:
        result_json(asdict(made))
    else:
        result(f"{path}: {made.shards} shards, {made.samples} samples; {len(made.changed)} index(es) changed")


@app.command()
@_command()
def export(
    dest: Dest,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write: new, empty, or of an earlier export.")],
    picture_format: Annotated[Literal["png", "jpeg"], typer.Option("--format", help="Of the pictures.")] = "png",
    size: Annotated[PictureSize | None, typer.Option(parser=_size, metavar="WxH", help="Fit pictures inside, at most the source's size.")] = None,
    limit: Limit = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write decoded pictures and their labels: a YOLO dataset, or a folder for each class."""
    path, place = _local(dest, "DEST"), _local(out, "OUT")
    from rinr_loader.export import export as write

    with Meter("exporting") as meter:
        fit = None if size is None else (size.width, size.height)
        done = write(path, place, picture_format=picture_format, size=fit, limit=limit, device=_chosen_device(device), on_progress=meter.update)
    if as_json:
        result_json(asdict(done))
    else:
        result(f"{done.out}: {done.pictures} pictures, {done.boxes} boxes" + (f"; {done.crowds} crowd boxes left out" if done.crowds else ""))


@app.command()
@_command()
def bench(
    dest: Dest,
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    size: Annotated[PictureSize | None, typer.Option(parser=_size, metavar="WxH", help="Of the decoded pictures; as stored without it.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, metavar="N", help="May stand several times; 1, 8, 32 and 128 without it.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For each batch size.")] = 2.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure how many images a second are read and decoded."""
    path = _local(dest, "DEST")
    from rinr_loader.bench import BATCH_SIZES, measure
    from rinr_loader.dataset import RinrDataset

    shape = None if size is None else (size.height, size.width)
    speeds = measure(RinrDataset(path, split), batch_sizes=batch_size or BATCH_SIZES, size=shape, device=_chosen_device(device), seconds=seconds)
    if as_json:
        result_json(asdict(speeds))
        return
    result(f"{speeds.device}, torch {speeds.torch}, {speeds.threads} thread(s), {speeds.size[1]}x{speeds.size[0]}")
    rows = [(str(s.batch_size), f"{s.images_per_second:.1f}", f"{s.read_ms:.2f}", f"{s.decode_ms:.2f}") for s in speeds.speeds]
    result_table(("batch", "images/s", "read ms", "decode ms"), rows)


@app.command("train-dictionary")
@_command("stopped; the same command again continues where it was")
def train_dictionary_command(
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Picture datasets; only their split train is used.")],
    out: Annotated[str, typer.Option(metavar="NAME.bin", help="The dictionary to write; NAME.analysis comes with it.")],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Gradient steps.")] = 30_000,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all randomness.")] = 0,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="How often each SOURCE is drawn from, against the others.", show_default="all alike")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=16, max=768, metavar="N", help="Latents of a tile.", show_default="256, or what --from has")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--from", metavar="NAME.bin", help="A dictionary to go on from, with NAME.analysis; --channels may add some.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Crops of a step.")] = 6,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Pictures of each SOURCE, at most; all are held in memory.")] = None,
    as_json: Json = False,
) -> None:
    """Train what pictures of the family tile share: basis, filter and tables. Interrupted, the same command continues."""
    place, paths = _local(out, "--out"), [_local(path, "SOURCE") for path in source]
    if place.suffix != ".bin":
        raise typer.BadParameter(f"expected a file NAME.bin, got {out!r}", param_hint="--out")
    shares = _weights(weights, len(paths))
    from rinr_loader import reports
    from rinr_loader.converters import open_source
    from rinr_loader.train_dictionary import Material, groups_of, load_base, train_dictionary
    from rinr_loader.training import TrainSettings

    settings, begun = TrainSettings(steps=steps, seed=seed, batch=batch), None
    if base is not None:
        begun = load_base(_local(base, "--from"))
        settings = settings.grown(begun.dictionary, channels or 0)
    elif channels is not None:
        settings = replace(settings, channels=channels, groups=groups_of(channels))
    found = [Material(path.resolve().name, open_source(path, limit=limit), share) for path, share in zip(paths, shares, strict=True)]
    with Meter("training", "steps") as meter:
        before: list[int] = []

        def on_step(done: int) -> None:
            if not before:
                before.append(done)
                tell(f"going on after step {done} of {steps}" if done else f"training for {steps} steps")
            meter.update(done, steps, before=before[0], note="now the tables" if done == steps else "")

        trained = train_dictionary(found, place, settings, base=begun, report=reports.curve_row, progress=on_step)
    reports.trained_report(trained, as_json=as_json)


def _weights(text: str | None, count: int) -> list[float]:
    """One positive number for each source."""
    if text is None:
        return [1.0] * count
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 < weight < float("inf") for weight in found):
        raise typer.BadParameter(
            f"expected {count} positive number(s) with commas between, one for each SOURCE, got {text!r}", param_hint="--weights"
        )
    return found


@app.command()
@_command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to write: new, empty, or of an earlier demo.")] = "demo",
    as_json: Json = False,
) -> None:
    """Draw a small dataset, convert it, verify it, train a YOLO from the shards, and tell what came out."""
    place = _local(out, "--out")
    from rinr_loader import reports
    from rinr_loader.demo import run_demo

    reports.demo_report(run_demo(place), as_json=as_json)
