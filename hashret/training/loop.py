"""The training loop that all members share."""

import copy
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashret.data.contents import Inputs
from hashret.errors import HashretError, format_count
from hashret.models.base import Member
from hashret.parallel import Progress
from hashret.runtime.inputs import default_device, to_input
from hashret.training.checkpoint import identity_of, load_checkpoint, save_checkpoint
from hashret.training.muon import Muon
from hashret.training.options import TrainingOptions

Terms = dict[str, Tensor]  # of the loss, by name
Labels = NDArray[np.int64]  # class indices; −1 for an image without a label

INIT_IMAGES = 20_000  # training images that `Member.on_train_start` is given
TIMED_STEPS = 8  # the fewest timed steps of the warm-up, spread over all stages of a training
REPORT_EVERY, SAVE_EVERY = 0.2, 30.0  # seconds between progress reports, and between checkpoints


class Training(NamedTuple):
    """A finished or interrupted training."""

    steps: int  # taken
    total_steps: int  # planned; more than those taken if interrupted
    batch: int
    seconds: float
    terms: dict[str, float]  # the running mean of each loss term at the end
    held_out: dict[str, float]  # the mean of each loss term and metric over held-out images
    interrupted: bool
    curve: list[dict[str, float]]  # "step" and the running mean of each loss term, at about a hundred steps

    def to_record(self) -> dict[str, Any]:
        """Return the fields by their names in `config.json`."""
        return {"planned" if name == "total_steps" else name: value for name, value in self._asdict().items()}


class LabelledPairs(NamedTuple):
    """Pairs of images, and whether the two of each pair are the same."""

    a: Inputs  # (p, h, w, c)
    b: Inputs
    same: NDArray[np.bool_]  # (p,)


class Batch(NamedTuple):
    """The inputs of one training step."""

    x: Tensor  # (n, c, h, w), or (n, d)
    labels: Tensor | None  # (n,)
    pairs: Tensor | None = None  # (2, p, c, h, w)
    same: Tensor | None = None  # (p,)


def in_bfloat16(device: torch.device) -> bool:
    """Return whether the forward pass of training uses bfloat16 on this device: on GPUs and on CPUs with AVX-512 BF16,
    where steps take two thirds of the time. (PyTorch before 2.11 does not report the capability.)"""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cuda" or bool(capabilities.get("avx512_bf16"))


def split(images: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and the held-out rows: one in twenty, at most 5,000, drawn with `seed`."""
    rows, held_out = np.split(np.random.default_rng(seed).permutation(images), [images - min(images // 20, 5000)])
    return rows, held_out


def train(
    member: Member,
    images: Inputs,
    options: TrainingOptions,
    *,
    labels: Labels | None = None,
    pairs: LabelledPairs | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Training:
    """Train `member` in place on uint8 images (n, h, w, c) or float32 vectors (n, d), with AdamW or Muon and a cosine
    schedule.

    `labels`, int64 (n,), are for members that learn from labels. Of `pairs`, each step draws one per eight images of a
    batch, for `Member.pair_loss`. A time budget fixes the number of steps by timing a warm-up on a copy of the member.
    The rows that `split` holds out are only measured. All randomness of a step comes from (seed, step): on one machine
    the same seed and steps give the same weights, also after resuming from a checkpoint, which must be of the same
    images, seed, learning rate, weight decay, member and `settings`. The forward pass uses bfloat16 where that is
    faster (`in_bfloat16`). Ctrl-C ends the training after the current step; the member is then usable, and the
    checkpoint is saved. A second Ctrl-C ends it at once and leaves the checkpoint unchanged.

    Raise HashretError for fewer than two images, a loss that is not finite, or a checkpoint that is damaged or of
    another training.
    """
    if len(images) < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    defaults, seed, checkpoint = member.training_defaults, options.seed, options.checkpoint
    learning_rate = defaults.learning_rate if options.learning_rate is None else options.learning_rate
    weight_decay = defaults.weight_decay if options.weight_decay is None else options.weight_decay
    device = default_device()
    member.to(device).to(memory_format=torch.channels_last).train()
    rows, held_out = split(len(images), seed)
    batch_size = min(options.batch or defaults.batch, len(rows))
    steps_per_epoch = len(rows) // batch_size
    optimiser = _optimiser(member, learning_rate, weight_decay)
    arrays = [array for array in (images, labels, *(pairs or ())) if array is not None]
    identity = identity_of(
        member, settings, arrays, seed=seed, batch=batch_size, rates=(learning_rate, weight_decay, defaults.muon)
    )

    def load_batch(indices: NDArray[np.int64], step: int | None = None) -> Batch:
        batch_labels = None if labels is None else torch.from_numpy(labels[indices]).to(device)
        x = to_input(images[indices], device)
        if pairs is None or step is None:
            return Batch(x, batch_labels)
        drawn = np.random.default_rng((seed, step, 1)).permutation(len(pairs.same))[: max(1, batch_size // 8)]
        both = torch.stack([to_input(side[drawn], device) for side in (pairs.a, pairs.b)])
        return Batch(x, batch_labels, both, torch.from_numpy(pairs.same[drawn]).to(device))

    loss = torch.compile(_loss) if options.compiled else _loss
    entered = time.monotonic()
    torch.manual_seed(seed)
    member.on_train_start(*load_batch(np.sort(rows[:INIT_IMAGES]))[:2])
    start = 0
    requested = options.steps if options.steps is not None else options.epochs and options.epochs * steps_per_epoch
    if options.resume and checkpoint is not None:
        start, total_steps = load_checkpoint(checkpoint, member, optimiser, identity)
        if requested not in (None, total_steps):
            steps = format_count(total_steps, "step")
            raise HashretError(f"the checkpoint is of a training of {steps}: resume it without steps or epochs")
    elif requested is not None:
        total_steps = requested
    else:
        remaining = options.seconds - (time.monotonic() - entered)
        first = load_batch(rows[:batch_size], 0)
        total_steps = _steps_within(remaining, member, first, learning_rate, weight_decay, loss)

    # `complete`: the weights are those after exactly `step` steps, so that a checkpoint of them is valid.
    step, complete, interrupted = start, True, False
    running: dict[str, Tensor] = {}
    curve: list[dict[str, float]] = []
    began = saved = reported = time.monotonic()
    shuffled = np.empty(0, np.int64)
    try:
        with _deferred_ctrl_c() as interrupts, torch.backends.cudnn.flags(enabled=True, deterministic=True):
            while step < total_steps and not interrupts:
                epoch, i = divmod(step, steps_per_epoch)
                if i == 0 or step == start:
                    shuffled = np.random.default_rng((seed, epoch)).permutation(rows)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * _schedule(step, total_steps)
                batch = load_batch(shuffled[i * batch_size : (i + 1) * batch_size], step)
                complete = False
                member.on_step_start(step, total_steps)
                terms = _step(member, optimiser, batch, (seed << 32) + step, loss)
                step, complete = step + 1, True
                decay = min(0.98, 1 - 1 / step)
                running = {name: decay * running.get(name, term) + (1 - decay) * term for name, term in terms.items()}
                if step % max(1, total_steps // 100) == 0:
                    curve.append({"step": step} | {name: float(value) for name, value in running.items()})
                now = time.monotonic()
                saving = now - saved > SAVE_EVERY
                if saving or now - reported > REPORT_EVERY or step == total_steps:
                    reported = now
                    _report(step, total_steps, running, progress)
                if checkpoint is not None and saving:
                    save_checkpoint(checkpoint, member, optimiser, step, total_steps, identity)
                    saved = now
            interrupted = bool(interrupts)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and complete and checkpoint is not None:
        save_checkpoint(checkpoint, member, optimiser, step, total_steps, identity)
    seconds = time.monotonic() - began
    member.eval()
    measured = _measure(member, load_batch, held_out) if len(held_out) > 1 else {}
    last = {name: float(value) for name, value in running.items()}
    return Training(step, total_steps, batch_size, seconds, last, measured, interrupted, curve)


@contextmanager
def _deferred_ctrl_c() -> Iterator[list[int]]:
    """Append to the yielded list at the first Ctrl-C, instead of raising KeyboardInterrupt.

    An interrupted step would have changed only some of the weights and statistics, and no training could resume from
    them. Threads other than the main one never receive Ctrl-C, and a handler that the program has set stays.
    """
    interrupts: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupts
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _optimiser(member: Member, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    if not member.training_defaults.muon:
        return torch.optim.AdamW(member.parameters(), learning_rate, weight_decay=weight_decay)
    dtype = torch.bfloat16 if in_bfloat16(next(member.parameters()).device) else torch.float32
    return Muon(member.parameters(), learning_rate, weight_decay=weight_decay, dtype=dtype)


def _step(
    member: Member, optimiser: torch.optim.Optimizer, batch: Batch, seed: int, loss: Callable[[Member, Batch], Terms]
) -> Terms:
    torch.manual_seed(seed)
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=in_bfloat16(batch.x.device)):
        terms = loss(member, batch)
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return {name: term.detach() for name, term in terms.items()}


def _loss(member: Member, batch: Batch) -> Terms:
    terms = member.loss(batch.x) if batch.labels is None else member.labelled_loss(batch.x, batch.labels)
    if batch.pairs is None or batch.same is None:
        return terms
    return terms | {"verdicts": member.pair_loss(batch.x, batch.pairs, batch.same)}


def _schedule(step: int, total_steps: int) -> float:
    """Return the learning rate as a share of its peak: a linear warm-up over a tenth of the steps, at most 100, then a
    cosine decay."""
    warm_up = max(1, min(100, total_steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _steps_within(
    budget: float,
    member: Member,
    batch: Batch,
    learning_rate: float,
    weight_decay: float,
    loss: Callable[[Member, Batch], Terms],
) -> int:
    """Return the number of steps that fit into `budget` seconds, from the mean time of some steps on a copy."""
    trial = copy.deepcopy(member)
    optimiser = _optimiser(trial, learning_rate, weight_decay)
    began = time.monotonic()
    times: list[float] = []
    while len(times) < 2 + TIMED_STEPS or time.monotonic() - began < min(3.0, budget / 10):
        before = time.monotonic()
        trial.on_step_start(len(times) % TIMED_STEPS, TIMED_STEPS)
        _step(trial, optimiser, batch, len(times), loss)
        if batch.x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - before)
    remaining = budget - (time.monotonic() - began)
    return max(1, int(remaining / statistics.fmean(times[2:])))


def _report(
    step: int, total_steps: int, running: dict[str, Tensor], progress: Callable[[Progress], None] | None
) -> None:
    values = {name: float(value) for name, value in running.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise HashretError(f"the loss is not finite at step {step} ({values}): train with a lower learning rate")
    if progress is not None:
        progress(Progress("training", step, total_steps, values))


def _measure(
    member: Member, load_batch: Callable[[NDArray[np.int64]], Batch], rows: NDArray[np.int64], batch_size: int = 250
) -> dict[str, float]:
    """Return the means of all loss terms and metrics over batches of nearly equal size."""
    torch.manual_seed(0)
    parts = np.array_split(rows, math.ceil(len(rows) / batch_size))
    with torch.no_grad():  # not inference_mode, which penalties on derivatives cannot undo
        terms = [_loss(member, batch) | member.metrics(batch.x) for batch in map(load_batch, parts)]
    return {name: statistics.fmean(float(t[name]) for t in terms) for name in terms[0]}
