"""A method of a network on a GPU, recorded once and from then on started as a whole: CUDA graphs.

A decode step is a hundred kernels of a few microseconds each. Started one by one, the GPU waits for the host; as a graph,
the host starts one thing a step. It takes a second to make, once for a number of rows, and no compiler.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 16  # recordings kept of a method; each has its own memory for what is in between
_MOST_BYTES = 1 << 28  # of memory kept for the samplings that follow

# one recording at a time in a process, on one stream for each device: the libraries below get ready once for each stream
_recording = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


class RecordedMethod:
    """A method of a network on a GPU, recorded for every kind of arguments that it meets.

    Tensors among the arguments are copied to where the recording reads them. Tuples of tensors, as the caches are, are
    read and written where they lie: a recording is valid for their addresses. :meth:`take` gives a sampling the memory of
    an earlier one of the same size, and so its recording. Parameters are read where they lie, too: what changes in place
    is seen.

    Args:
        network: where its parameters lie must not change.
        method: takes tensors on the GPU, the first of them (R, ...), tuples of them and None; returns a tensor; changes
            nothing but the tensors in tuples, and waits for nothing.
    """

    def __init__(self, network: nn.Module, method: str) -> None:
        self.eager: Any = network
        self._method = method
        # the one that was used last comes last
        self._held: dict[tuple[Any, ...], _Recording] = {}
        self._lock = threading.Lock()
        self._memories: list[tuple[list[Tensor], weakref.ref[Lease]]] = []
        self.failed = False

    def __call__(self, *arguments: Any) -> Tensor | None:
        """What the method returns, or None where it cannot be recorded; the reason was a warning then."""
        if self.failed:
            return None
        stream = torch.cuda.current_stream(arguments[0].device)
        precision = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (stream.cuda_stream, precision, *map(_place, arguments))
        with (
            self._lock
        ):  # of two threads at once neither may change what the other is about to start
            recording = self._held.pop(key, None)
            if recording is None:
                try:
                    recording = _Recording(getattr(self.eager, self._method), arguments, stream)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever is not allowed in a recording
                    self.failed = True
                    self._warn(error)
                    return None
            self._held[key] = recording
            if len(self._held) > _MOST:
                del self._held[next(iter(self._held))]
            return recording(arguments)

    def take(self, count: int, shape: tuple[int, ...], like: Tensor) -> tuple[list[Tensor], Lease]:
        """Tensors of zeros, of the dtype and on the device of ``like``, that nobody else has.

        They may be given to another once the lease is gone: whoever uses them keeps it.
        """
        lease = Lease()
        with self._lock:
            for i, (own, before) in enumerate(self._memories):
                fits = len(own) == count and own[0].shape == shape and own[0].dtype == like.dtype
                if fits and before() is None:
                    torch._foreach_zero_(own)
                    self._memories[i] = own, weakref.ref(lease)
                    return own, lease
            made = [like.new_zeros(shape) for _ in range(count)]
            # the newest are kept; what is larger than all has steps that take longer than a recording
            known, left = [*self._memories, (made, weakref.ref(lease))], _MOST_BYTES
            self._memories = []
            for held in reversed(known):
                left -= sum(part.nbytes for part in held[0])
                if left < 0:
                    break
                self._memories.insert(0, held)
        return made, lease

    def _warn(self, error: Exception) -> None:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        warnings.warn(
            f"compile=True, but {self._method} of {type(self.eager).__name__} cannot be recorded here, so it runs as it is: "
            f"{reason}",
            stacklevel=5,
        )


class Lease:
    """Says by being there that memory is in use."""


class _Recording:
    """One graph, with the memory that it reads its arguments from and writes its result to."""

    def __init__(
        self, method: Callable[..., Tensor], arguments: tuple[Any, ...], stream: torch.cuda.Stream
    ) -> None:
        own = tuple(part.clone() if isinstance(part, Tensor) else part for part in arguments)
        self._inputs = [(i, part) for i, part in enumerate(own) if isinstance(part, Tensor)]
        self._graph = torch.cuda.CUDAGraph()
        with _recording:
            aside = _streams.setdefault(stream.device, torch.cuda.Stream(stream.device))
            aside.wait_stream(stream)
            with torch.cuda.stream(aside):
                method(*own)  # whatever gets ready at the first use must not be recorded
                # not torch.cuda.graph, which gives all free memory back to the device each time
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._out = method(*own)
                finally:
                    self._graph.capture_end()
            stream.wait_stream(aside)

    def __call__(self, arguments: tuple[Any, ...]) -> Tensor:
        for i, held in self._inputs:
            held.copy_(arguments[i])
        self._graph.replay()
        return self._out.clone()  # the next step writes over it


def _place(argument: Any) -> Any:
    """What of an argument a recording depends on: of tensors in a tuple also where they lie."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype
    if argument is None:
        return None
    return argument[0].shape, argument[0].dtype, *(part.data_ptr() for part in argument)
