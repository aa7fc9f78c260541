"""The one training loop of the family."""

import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hashret.errors import HashretError
from hashret.files import put_in_place
from hashret.models.base import Member

Images = NDArray[np.uint8]


class Progress(NamedTuple):
    """How far long work has come."""

    stage: str  # "reading", "training", "indexing"
    done: int
    total: int | None  # None when it is not known
    terms: dict[str, float]  # numbers worth watching, such as the running mean of each loss term


class Training(NamedTuple):
    steps: int  # taken; fewer than planned if interrupted
    planned: int
    batch: int
    seconds: float
    terms: dict[str, float]  # the running mean of each loss term at the end
    held_out: dict[str, float]  # each loss term on images that were never trained on
    interrupted: bool


def device() -> torch.device:
    """A CUDA GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_input(images: Images, where: torch.device) -> Tensor:
    """Network input, float32 (n, c, h, w) in [0, 1], from uint8 images (n, h, w, c)."""
    return torch.tensor(images, device=where).permute(0, 3, 1, 2).float().div(255).contiguous()


def train(
    member: Member,
    images: Images,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    batch: int = 256,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Training:
    """Train `member` in place on uint8 images (n, h, w, c), by AdamW under a cosine schedule.

    Say how long by one of `steps`, `epochs` or `budget` (seconds; a warm-up on a copy is timed, and fixes the number
    of steps). One image in twenty, at most 5,000, is held out and only measured. All randomness of a step comes from
    (seed, step), so the same seed and steps give the same weights on the same machine, also when `resume` continues
    from `checkpoint`. On a GPU the forward pass runs in bfloat16. KeyboardInterrupt ends the training early: the
    member is usable, and the checkpoint holds the place. Raises HashretError for fewer than two images, a loss that is
    not finite, or a checkpoint of another training.
    """
    if len(images) < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    where = device()
    member.to(where).train()
    order = np.random.default_rng(seed).permutation(len(images))
    rows, held_out = np.split(order, [len(order) - min(len(order) // 20, 5000)])
    batch = min(batch, len(rows))
    per_epoch = len(rows) // batch
    optimiser = torch.optim.AdamW(member.parameters(), learning_rate, weight_decay=weight_decay)
    identity = _identity(member, images, seed=seed, batch=batch, rates=(learning_rate, weight_decay))

    start = 0
    if resume and checkpoint is not None:
        start, planned = _load_checkpoint(checkpoint, member, optimiser, identity)
        if (steps or (epochs or 0) * per_epoch or planned) != planned:
            raise HashretError(f"the checkpoint is of a training of {planned} steps: resume it without another number")
    elif steps is not None or epochs is not None:
        planned = steps if steps is not None else (epochs or 0) * per_epoch
    else:
        sample = to_input(images[rows[:batch]], where)
        planned = _steps_within(budget or 120.0, member, sample, learning_rate, weight_decay)
    if planned < 1:
        raise ValueError(f"steps, epochs and budget must be positive, not {steps}, {epochs}, {budget}")

    step, interrupted = start, False
    running: dict[str, Tensor] = {}
    began = saved = shown = time.monotonic()
    shuffled = np.empty(0, np.int64)
    try:
        while step < planned:
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                shuffled = np.random.default_rng((seed, epoch)).permutation(rows)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * _schedule(step, planned)
            picked = images[shuffled[i * batch : (i + 1) * batch]]
            terms = _step(member, optimiser, to_input(picked, where), (seed << 32) + step)
            keep = min(0.98, step / (step + 1))
            running = {name: keep * running.get(name, term) + (1 - keep) * term for name, term in terms.items()}
            step += 1
            now = time.monotonic()
            if now - shown > 0.2 or step == planned:
                shown = now
                _report(step, planned, running, progress)
            if checkpoint is not None and now - saved > 30:
                _save_checkpoint(checkpoint, member, optimiser, step, planned, identity)
                saved = now
    except KeyboardInterrupt:
        interrupted = True
        if checkpoint is not None:
            _save_checkpoint(checkpoint, member, optimiser, step, planned, identity)
    seconds = time.monotonic() - began
    measured = _measure(member, images[held_out], where) if len(held_out) > 1 else {}
    return Training(step, planned, batch, seconds, {k: float(v) for k, v in running.items()}, measured, interrupted)


def _step(member: Member, optimiser: torch.optim.Optimizer, x: Tensor, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        terms = member.loss(x)
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return {name: term.detach() for name, term in terms.items()}


def _schedule(step: int, planned: int) -> float:
    """The learning rate as a share of its peak: a linear rise over a tenth of the steps or 100, then a cosine."""
    rise = max(1, min(100, planned // 10))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / planned))


def _steps_within(budget: float, member: Member, x: Tensor, learning_rate: float, weight_decay: float) -> int:
    """How many steps fit into `budget` seconds, by timing a few on a copy of the member."""
    rehearsal = copy.deepcopy(member)
    optimiser = torch.optim.AdamW(rehearsal.parameters(), learning_rate, weight_decay=weight_decay)
    began = time.monotonic()
    times: list[float] = []
    while len(times) < 4 or time.monotonic() - began < min(3.0, budget / 10):
        before = time.monotonic()
        _step(rehearsal, optimiser, x, len(times))
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - before)
    left = budget - (time.monotonic() - began)
    return max(1, int(left / statistics.fmean(times[2:])))


def _report(step: int, planned: int, running: dict[str, Tensor], progress: Callable[[Progress], None] | None) -> None:
    values = {name: float(value) for name, value in running.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise HashretError(f"the loss is not finite at step {step} ({values}): train with a lower learning rate")
    if progress is not None:
        progress(Progress("training", step, planned, values))


def _measure(member: Member, images: Images, where: torch.device, batch: int = 250) -> dict[str, float]:
    """Each loss term in evaluation mode, averaged over batches of equal size as far as they go."""
    member.eval()
    torch.manual_seed(0)
    parts = np.array_split(np.arange(len(images)), math.ceil(len(images) / batch))
    with torch.inference_mode():
        terms = [member.loss(to_input(images[part], where)) for part in parts]
    return {name: statistics.fmean(float(t[name]) for t in terms) for name in terms[0]}


def _identity(member: Member, images: Images, **settings: Any) -> str:
    """What makes two trainings the same one: the architecture, the initial settings and the images."""
    shapes = {name: list(tensor.shape) for name, tensor in member.state_dict().items()}
    told = json.dumps([type(member).__name__, shapes, settings, images.shape], sort_keys=True)
    return hashlib.sha256(told.encode() + hashlib.sha256(np.ascontiguousarray(images).data).digest()).hexdigest()


def _save_checkpoint(
    path: Path, member: Member, optimiser: torch.optim.Optimizer, step: int, planned: int, identity: str
) -> None:
    tensors = {f"member.{name}": tensor for name, tensor in member.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": tensor for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        written,
        {"step": str(step), "planned": str(planned), "identity": identity},
    )
    put_in_place(written, path)


def _load_checkpoint(path: Path, member: Member, optimiser: torch.optim.Optimizer, identity: str) -> tuple[int, int]:
    """Put the member and the optimiser where the checkpoint says; the steps taken and planned."""
    if not path.is_file():
        raise HashretError(f"there is nothing to resume at {path}: train without --resume")
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            if told["identity"] != identity:
                raise HashretError(f"{path} is of another training: train without --resume")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError) as error:
        raise HashretError(f"{path} is damaged ({error}): train without --resume") from None
    member.load_state_dict({n.removeprefix("member."): t for n, t in tensors.items() if n.startswith("member.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(told["step"]), int(told["planned"])
