"""The errors of this package.

    RinrError
    ├── BundleError    the bytes of one bundle are damaged, truncated or of an unknown version
    ├── ShardError     a shard, its index or a dataset directory is damaged or inconsistent
    ├── StorageError   reading or writing failed: missing, denied, no space left
    ├── ConvertError   a source dataset cannot be converted
    └── ConfigError    the settings do not fit together or do not fit the data

A message reads *subject: expected, got; do this*. Wrong argument types raise the builtin TypeError and ValueError.
"""


class RinrError(Exception):
    """Base of every error that this package raises about data or settings."""


class BundleError(RinrError):
    """The bytes of one bundle are damaged, truncated or of an unknown version."""


class ShardError(RinrError):
    """A shard, its index or a dataset directory is damaged or inconsistent."""


class StorageError(RinrError):
    """Reading or writing failed: the place is missing, denied or full."""


class ConvertError(RinrError):
    """A source dataset cannot be converted."""


class ConfigError(RinrError):
    """The settings do not fit together, or do not fit the data."""
