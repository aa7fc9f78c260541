"""Inference in full float32 precision, whatever precision the process has chosen."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from hashret.process import full_float32 as float32_switches
from hashret.process import one_torch_thread, short_switch_interval


@contextmanager
def full_float32(device: torch.device, single_thread: bool = False) -> Iterator[None]:
    """Run inference in float32 without TF32, bfloat16 or autocast. Meanwhile the threads of this process release the
    interpreter lock more often. With `single_thread` only the calling thread works."""
    with (
        short_switch_interval(),
        float32_switches() as threads,
        one_torch_thread(threads) if single_thread else nullcontext(),
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
