"""Inference in float32 as it is, whatever the process has chosen."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from hashret.process import full_float32 as float32_switches
from hashret.process import one_torch_thread, short_switch_interval


@contextmanager
def full_float32(where: torch.device, single_thread: bool = False) -> Iterator[None]:
    """Inference in float32 as it is, without TF32, bf16 or autocast, whatever this process has chosen; its threads hand
    the interpreter on sooner meanwhile. With `alone` the calling thread does all the work."""
    with (
        short_switch_interval(),
        float32_switches() as threads,
        one_torch_thread(threads) if single_thread else nullcontext(),
        torch.inference_mode(),
        torch.autocast(where.type, enabled=False),
    ):
        yield
