"""Checkpoints: one file from which an interrupted training resumes and reaches the same weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hashret.durable import write_durably
from hashret.errors import HashretError
from hashret.model_folder import tensor_bytes
from hashret.models.base import Member


def identity_of(
    member: Member, settings: Mapping[str, Any] | None, arrays: Sequence[NDArray[Any]], **values: Any
) -> str:
    """Return a digest of all that determines a training: architecture, settings, images and their labels, and other
    values by name."""
    shapes = {name: list(tensor.shape) for name, tensor in member.state_dict().items()}
    description = [type(member).__name__, dict(settings or {}), shapes, values, arrays[0].shape]
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for array in arrays:
        digest.update(hashlib.sha256(np.ascontiguousarray(array).data).digest())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, member: Member, optimiser: torch.optim.Optimizer, step: int, total_steps: int, identity: str
) -> None:
    """Write the weights and the state of the optimiser after `step` of `total_steps` steps, atomically."""
    tensors = {f"member.{name}": tensor for name, tensor in member.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": tensor for name, tensor in state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "planned": str(total_steps), "identity": identity}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, save(tensors, metadata | {"sha256": _digest(tensors, *metadata.values())}))


def load_checkpoint(path: Path, member: Member, optimiser: torch.optim.Optimizer, identity: str) -> tuple[int, int]:
    """Load a checkpoint into the member and the optimiser. Return the numbers of steps taken and planned.

    Raise HashretError for a checkpoint that is missing, damaged, or of a training with another identity.
    """
    if not path.is_file():
        raise HashretError(f"there is no checkpoint {path} to resume from: train without --resume")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["identity"] != identity:
                raise HashretError(f"{path} is of another training: train without --resume")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata["sha256"] != _digest(tensors, metadata["step"], metadata["planned"], metadata["identity"]):
            raise ValueError("its contents have changed")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise HashretError(f"{path} is damaged ({error}): train without --resume") from None
    member.load_state_dict({n.removeprefix("member."): t for n, t in tensors.items() if n.startswith("member.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"]), int(metadata["planned"])


def _digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    digest = hashlib.sha256(" ".join(texts).encode())
    for part in tensor_bytes({name: tensor.numpy() for name, tensor in tensors.items()}):
        digest.update(part)
    return digest.hexdigest()
