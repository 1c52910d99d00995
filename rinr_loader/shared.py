"""The shared parameters of a dataset: files `DEST/shared/<sha256>.bin`, listed in `dataset.json` with their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rinr_loader.analysis import is_analysis
from rinr_loader.dictionary import HASH_BYTES, Dictionary, load
from rinr_loader.errors import ConfigError, ShardError
from rinr_loader.writer import hash_file, make_folder, write_bytes

FOLDER, SUFFIX = "shared", ".bin"
AGAIN = "fetch or convert the dataset again"


def listed(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each file by the SHA-256 that names it, as `dataset.json` says."""
    return dict(metadata.get("shared") or {})


def path_of(root: Path, sha256: str) -> Path:
    """Where a file of shared parameters lies."""
    return root / FOLDER / f"{sha256}{SUFFIX}"


def write_shared(root: Path, files: Mapping[str, bytes], scratch: Path | None = None) -> dict[str, int]:
    """Write files of shared parameters, each whole or not at all.

    Args:
        root: The dataset.
        files: By the SHA-256 that names them, in hexadecimal.
        scratch: See `writer.atomic`.

    Returns:
        What `dataset.json` lists.

    Raises:
        ValueError: A name is not the hash of its file.
        StorageError: The place cannot be written.
    """
    for sha256, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ValueError(f"shared: expected a file of SHA-256 {sha256}, got {found}")
        path = path_of(root, sha256)
        make_folder(path.parent)
        write_bytes(path, data, scratch)
    return {sha256: len(data) for sha256, data in files.items()}


def find_shared(root: Path) -> dict[str, int]:
    """What lies in a dataset's folder, as `dataset.json` should list it.

    Raises:
        ShardError: A file's name is not its hash.
    """
    found = {}
    for path in sorted((root / FOLDER).glob("*")):
        sha256 = hash_file(path)
        if path.name != f"{sha256}{SUFFIX}":
            raise ShardError(
                f"{FOLDER}/{path.name}: expected the name {sha256}{SUFFIX}, that of its content, got another; fetch it again, or remove it"
            )
        found[sha256] = path.stat().st_size
    return found


def check_shared(root: Path, metadata: Mapping[str, Any]) -> None:
    """Check that all listed files are there with their sizes; opens none.

    Raises:
        ShardError: One is not.
    """
    for sha256, size in listed(metadata).items():
        path = path_of(root, sha256)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ShardError(f"{path}: expected the shared parameters of the dataset, got {error.strerror}; {AGAIN}") from None
        if found != size:
            raise ShardError(f"{path}: expected {size} bytes, got {found}; the file is damaged, {AGAIN}")


def load_shared(root: Path, metadata: Mapping[str, Any]) -> dict[bytes, Dictionary]:
    """The shared parameters of a dataset, by the hash that bundles name them by.

    A dictionary's analysis, which lies beside one that was fitted to the dataset, is checked by its hash alone: decoding does without it.

    Raises:
        ConfigError: A file is of another version than this build reads, or no file of shared parameters.
        ShardError: A file is gone or damaged.
    """
    found = {}
    for sha256 in listed(metadata):
        data = _read(path_of(root, sha256), sha256)
        if not is_analysis(data):
            found[bytes.fromhex(sha256)[:HASH_BYTES]] = load(data, f"{FOLDER}/{sha256}{SUFFIX}")
    return found


def open_shared(*files: str | Path) -> dict[bytes, Dictionary]:
    """Read files of shared parameters for what is decoded without its dataset: `decode_batch`, or shards read with webdataset.

    Args:
        files: `DEST/shared/*.bin`, any of them; an analysis among them is left out.

    Returns:
        What `shared=` takes: shared parameters by the hash that bundles name them by.

    Raises:
        ConfigError: A file cannot be read, is damaged, or is of another version.

    Example:
        >>> open_shared()
        {}
    """
    found = {}
    for file in map(Path, files):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file}: expected a file of shared parameters, got {error.strerror or error}; pass DEST/shared/*.bin") from None
        if not is_analysis(data):
            dictionary = load(data, str(file))
            found[dictionary.key] = dictionary
    if files and not found:
        names = ", ".join(str(file) for file in files)
        raise ConfigError(f"{names}: expected a dictionary, got the network that encodes with it; pass the other of DEST/shared/*.bin, or both")
    return found


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: expected the shared parameters of the dataset, got {error.strerror}; {AGAIN}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ShardError(f"{path}: expected SHA-256 {sha256}, got {found}; the file is damaged, {AGAIN}")
    return data
