"""Residual-INR bundles for PyTorch: convert datasets, decode them where you train, feed the usual trainers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rinr_loader.bundle import Bundle, pack, parse
    from rinr_loader.convert import Job, Report
    from rinr_loader.dataset import RinrDataset
    from rinr_loader.decode import decode_batch
    from rinr_loader.errors import BundleError, ConfigError, ConvertError, RinrError, ShardError, StorageError
    from rinr_loader.geometry import Placements
    from rinr_loader.loader import Batch, DataLoader, Targets
    from rinr_loader.presets import Settings
    from rinr_loader.reader import ShardBuffer
    from rinr_loader.shared import open_shared
    from rinr_loader.source import Sample, Source

__version__ = "0.1.0"

# No name of a module stands here: `from rinr_loader import decode` must not depend on what was imported before.
_HOME = {
    "Batch": "loader",
    "Bundle": "bundle",
    "BundleError": "errors",
    "ConfigError": "errors",
    "ConvertError": "errors",
    "DataLoader": "loader",
    "Job": "convert",
    "Placements": "geometry",
    "Report": "convert",
    "RinrDataset": "dataset",
    "RinrError": "errors",
    "Sample": "source",
    "Settings": "presets",
    "ShardBuffer": "reader",
    "ShardError": "errors",
    "Source": "source",
    "StorageError": "errors",
    "Targets": "loader",
    "decode_batch": "decode",
    "open_shared": "shared",
    "pack": "bundle",
    "parse": "bundle",
}

__all__ = [
    "Batch",
    "Bundle",
    "BundleError",
    "ConfigError",
    "ConvertError",
    "DataLoader",
    "Job",
    "Placements",
    "Report",
    "RinrDataset",
    "RinrError",
    "Sample",
    "Settings",
    "ShardBuffer",
    "ShardError",
    "Source",
    "StorageError",
    "Targets",
    "decode_batch",
    "open_shared",
    "pack",
    "parse",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a bundle can be inspected without loading torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'rinr_loader' has no attribute {name!r}")
    value = getattr(import_module(f"rinr_loader.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
