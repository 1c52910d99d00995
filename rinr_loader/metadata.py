"""What a safetensors file says of itself: the library reads it from files only, not from bytes."""

from __future__ import annotations

import json


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file's bytes, an entry for each name.

    Raises:
        KeyError, RecursionError, TypeError, ValueError: There is none. After `safetensors.load`, which limits how deep JSON can nest, no
            `RecursionError`.
    """
    found: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return found
