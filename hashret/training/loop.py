"""The one training loop of the family."""

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
from hashret.runtime.inputs import device, to_input
from hashret.training.checkpoint import identity_of, load_checkpoint, save_checkpoint
from hashret.training.muon import Muon
from hashret.training.options import TrainingOptions

Terms = dict[str, Tensor]  # of the loss, by name
Labels = NDArray[np.int64]  # numbers of classes; -1 for an image without a label

INIT_IMAGES = 20_000  # images that a member is shown before it is trained
TIMED_STEPS = 8  # steps, from all parts of a training, that at least are timed to plan it
REPORT_EVERY, SAVE_EVERY = 0.2, 30.0  # seconds from one report of progress, and from one checkpoint, to the next


class Training(NamedTuple):
    steps: int  # taken; fewer than planned if interrupted
    total_steps: int  # planned
    batch: int
    seconds: float
    terms: dict[str, float]  # the running mean of each loss term at the end
    held_out: dict[str, float]  # each loss term on images that were never trained on
    interrupted: bool
    curve: list[dict[str, float]]  # "step", and the running mean of each term there, at about a hundred steps

    def to_record(self) -> dict[str, Any]:
        """Return the fields by their names in `config.json`."""
        return {"planned" if name == "total_steps" else name: value for name, value in self._asdict().items()}


class Pairs(NamedTuple):
    """Images that were judged two by two, and whether they are the same."""

    a: Inputs  # (p, h, w, c)
    b: Inputs
    same: NDArray[np.bool_]  # (p,)


class Batch(NamedTuple):
    x: Tensor  # (n, c, h, w), or (n, d)
    labels: Tensor | None  # (n,)
    pairs: Tensor | None = None  # (2, p, c, h, w)
    same: Tensor | None = None  # (p,)


def in_bfloat16(where: torch.device) -> bool:
    """Whether the forward pass of a training is computed in bfloat16 there: on a GPU, and on a processor that can
    multiply such numbers, where steps take two thirds of the time. (PyTorch before 2.11 does not tell.)"""
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return where.type == "cuda" or bool(able.get("avx512_bf16"))


def split(images: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows to train on, and those that are held out: one in twenty, at most 5,000, drawn with `seed`."""
    rows, held_out = np.split(np.random.default_rng(seed).permutation(images), [images - min(images // 20, 5000)])
    return rows, held_out


def train(
    member: Member,
    images: Inputs,
    options: TrainingOptions,
    *,
    labels: Labels | None = None,
    pairs: Pairs | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Training:
    """Train `member` in place on uint8 images (n, h, w, c), or vectors (n, d), by AdamW under a cosine schedule.

    `labels`, int64 (n,), are for members that learn from them. Of `pairs`, at most one for eight images of a batch is
    drawn in each step, for `Member.pair_loss`. A budget is spent by timing a warm-up on a copy, which fixes the number
    of steps. The rows that `split` holds out are only measured. All randomness of a step comes from (seed, step), so
    the same seed and steps give the same weights on the same machine, also when the training resumes from a checkpoint,
    which must be of the same images, seed, rates, member, and `settings` of the member. The forward pass runs in
    bfloat16 where that is faster (`in_bfloat16`). Ctrl-C ends the training after the step that is under way: the member
    is usable, and the checkpoint holds the place. A second Ctrl-C does not wait, and leaves the checkpoint as it was.
    Raises HashretError for fewer than two images, a loss that is not finite, or a checkpoint that is damaged or of
    another training.
    """
    if len(images) < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    own, seed, checkpoint = member.training_defaults, options.seed, options.checkpoint
    learning_rate = own.learning_rate if options.learning_rate is None else options.learning_rate
    weight_decay = own.weight_decay if options.weight_decay is None else options.weight_decay
    where = device()
    member.to(where).to(memory_format=torch.channels_last).train()
    rows, held_out = split(len(images), seed)
    batch = min(options.batch or own.batch, len(rows))
    per_epoch = len(rows) // batch
    optimiser = _optimiser(member, learning_rate, weight_decay)
    arrays = [array for array in (images, labels, *(pairs or ())) if array is not None]
    identity = identity_of(
        member, settings, arrays, seed=seed, batch=batch, rates=(learning_rate, weight_decay, own.muon)
    )

    def draw(picked: NDArray[np.int64], step: int | None = None) -> Batch:
        told = None if labels is None else torch.from_numpy(labels[picked]).to(where)
        x = to_input(images[picked], where)
        if pairs is None or step is None:
            return Batch(x, told)
        drawn = np.random.default_rng((seed, step, 1)).permutation(len(pairs.same))[: max(1, batch // 8)]
        both = torch.stack([to_input(side[drawn], where) for side in (pairs.a, pairs.b)])
        return Batch(x, told, both, torch.from_numpy(pairs.same[drawn]).to(where))

    loss = torch.compile(_loss) if options.compiled else _loss
    entered = time.monotonic()
    torch.manual_seed(seed)
    member.on_train_start(*draw(np.sort(rows[:INIT_IMAGES]))[:2])
    start = 0
    asked_for = options.steps if options.steps is not None else options.epochs and options.epochs * per_epoch
    if options.resume and checkpoint is not None:
        start, total_steps = load_checkpoint(checkpoint, member, optimiser, identity)
        if asked_for not in (None, total_steps):
            steps = format_count(total_steps, "step")
            raise HashretError(f"the checkpoint is of a training of {steps}: resume it without steps or epochs")
    elif asked_for is not None:
        total_steps = asked_for
    else:
        left = options.seconds - (time.monotonic() - entered)
        total_steps = _steps_within(left, member, draw(rows[:batch], 0), learning_rate, weight_decay, loss)

    step, whole, interrupted = start, True, False  # whole: the weights are those that so many steps give
    running: dict[str, Tensor] = {}
    curve: list[dict[str, float]] = []
    began = saved = shown = time.monotonic()
    shuffled = np.empty(0, np.int64)
    try:
        with _ctrl_c_waits() as pressed, torch.backends.cudnn.flags(enabled=True, deterministic=True):
            while step < total_steps and not pressed:
                epoch, i = divmod(step, per_epoch)
                if i == 0 or step == start:
                    shuffled = np.random.default_rng((seed, epoch)).permutation(rows)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * _schedule(step, total_steps)
                picked = draw(shuffled[i * batch : (i + 1) * batch], step)
                whole = False
                member.on_step_start(step, total_steps)
                terms = _step(member, optimiser, picked, (seed << 32) + step, loss)
                step, whole = step + 1, True
                keep = min(0.98, 1 - 1 / step)
                running = {name: keep * running.get(name, term) + (1 - keep) * term for name, term in terms.items()}
                if step % max(1, total_steps // 100) == 0:
                    curve.append({"step": step} | {name: float(value) for name, value in running.items()})
                now = time.monotonic()
                saving = now - saved > SAVE_EVERY
                if saving or now - shown > REPORT_EVERY or step == total_steps:
                    shown = now
                    _report(step, total_steps, running, progress)
                if checkpoint is not None and saving:
                    save_checkpoint(checkpoint, member, optimiser, step, total_steps, identity)
                    saved = now
            interrupted = bool(pressed)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and whole and checkpoint is not None:
        save_checkpoint(checkpoint, member, optimiser, step, total_steps, identity)
    seconds = time.monotonic() - began
    member.eval()
    measured = _measure(member, draw, held_out) if len(held_out) > 1 else {}
    last = {name: float(value) for name, value in running.items()}
    return Training(step, total_steps, batch, seconds, last, measured, interrupted, curve)


@contextmanager
def _ctrl_c_waits() -> Iterator[list[int]]:
    """Within, the first Ctrl-C only adds to the list, where Python would break off the line that is being run.

    A step that is broken off has changed some of the weights and statistics, and no training can go on from it to the
    same result. Threads other than the main one never see Ctrl-C, and a program that has taken it keeps it.
    """
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
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
    """The learning rate as a share of its peak: a linear rise over a tenth of the steps or 100, then a cosine."""
    rise = max(1, min(100, total_steps // 10))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _steps_within(
    budget: float,
    member: Member,
    batch: Batch,
    learning_rate: float,
    weight_decay: float,
    loss: Callable[[Member, Batch], Terms],
) -> int:
    """How many steps fit into `budget` seconds, by timing a few on a copy of the member."""
    warm_up = copy.deepcopy(member)
    optimiser = _optimiser(warm_up, learning_rate, weight_decay)
    began = time.monotonic()
    times: list[float] = []
    while len(times) < 2 + TIMED_STEPS or time.monotonic() - began < min(3.0, budget / 10):
        before = time.monotonic()
        warm_up.on_step_start(len(times) % TIMED_STEPS, TIMED_STEPS)
        _step(warm_up, optimiser, batch, len(times), loss)
        if batch.x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - before)
    left = budget - (time.monotonic() - began)
    return max(1, int(left / statistics.fmean(times[2:])))


def _report(
    step: int, total_steps: int, running: dict[str, Tensor], progress: Callable[[Progress], None] | None
) -> None:
    values = {name: float(value) for name, value in running.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise HashretError(f"the loss is not finite at step {step} ({values}): train with a lower learning rate")
    if progress is not None:
        progress(Progress("training", step, total_steps, values))


def _measure(
    member: Member, draw: Callable[[NDArray[np.int64]], Batch], rows: NDArray[np.int64], batch: int = 250
) -> dict[str, float]:
    """Each loss term, averaged over batches of equal size as far as they go."""
    torch.manual_seed(0)
    parts = np.array_split(rows, math.ceil(len(rows) / batch))
    with torch.no_grad():  # a penalty on derivatives can undo this, but not inference_mode
        terms = [_loss(member, b) | member.metrics(b.x) for b in map(draw, parts)]
    return {name: statistics.fmean(float(t[name]) for t in terms) for name in terms[0]}
