"""What a training needs to go on as if it had not been stopped: weights, the optimizer's moments and the curve, in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from rinr_loader.errors import ConfigError
from rinr_loader.metadata import metadata_of
from rinr_loader.writer import write_bytes

Row: TypeAlias = dict[str, Any]  # of the validation curve: `step`, and `rates` at a few quantization steps


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, curve: list[Row], about: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all.

    Args:
        path: The file.
        model, optimizer: As they are after `step` steps.
        step: Steps that are done.
        curve: The validation curve so far.
        about: What a training must agree in to go on from here, as JSON.

    Raises:
        StorageError: The place cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"step": step, "curve": curve, "about": about})
    # One entry: with two, safetensors would write them in any order.
    write_bytes(path, safetensors.save(tensors, {"training": json.dumps({"state": text, "sha256": _digest(tensors, text)})}))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> tuple[int, list[Row]]:
    """Take a model and its optimizer to where a state has them.

    Returns:
        Steps that are done, and the validation curve so far.

    Raises:
        ConfigError: It is damaged, or of another training.
    """
    try:
        data = path.read_bytes()
        tensors = safetensors.load(data)
        metadata = json.loads(metadata_of(data)["training"])
        if metadata["sha256"] != _digest(tensors, metadata["state"]):
            raise ValueError("content that its hash does not fit")
        found = json.loads(metadata["state"])
        _check_same(path, found["about"], json.loads(json.dumps(about)))
        model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, what = name.split(".")
                moments.setdefault(int(number), {})[what] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(found["step"]), list(found["curve"])
    except OSError as error:
        raise ConfigError(f"{path}: expected the state of a training, got {error.strerror}; check its permissions") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: expected the state of a training, got {type(error).__name__}: {error}; remove it to begin anew") from None


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if not names:
        return
    told = [f"other {n}" if isinstance(wanted.get(n), list | dict) else f"{n} {found.get(n)} instead of {wanted.get(n)}" for n in names]
    raise ConfigError(
        f"{path}: expected the state of this training, got that of another ({', '.join(told)}); "
        "repeat what it was begun with, or remove it to begin anew"
    )
