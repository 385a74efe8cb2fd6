"""The processes of one run: ``torchrun`` or ``accelerate launch`` starts them, accelerate joins them."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def join_processes() -> PartialState:
    """This process among those of the run, with ``process_index`` and ``num_processes``; one process is a run of one.

    Processes that share the CPU talk by gloo. They may wait for each other for days: where cells of a study or images
    are shared out, one process can be done long before another.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
