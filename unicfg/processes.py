"""The processes of one run: ``torchrun`` or ``accelerate launch`` starts them, accelerate joins them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState


def join_processes() -> PartialState:
    """This process among those of the run, with ``process_index`` and ``num_processes``; one process is a run of one.

    Processes that share the CPU talk by gloo. They may wait for each other for days: where cells of a study or images
    are shared out, one process can be done long before another.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def wait_for_all(processes: PartialState) -> None:
    """Wait until every process of the run has come so far.

    Raises:
        ConnectionError: if one has ended.
    """
    with all_alive():
        processes.wait_for_everyone()


@contextmanager
def all_alive() -> Iterator[None]:
    """Say what it means that processes cannot wait for each other.

    Raises:
        ConnectionError: if so.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process of the run has ended: the same run again goes on from what is finished ({error})"
        ) from error
