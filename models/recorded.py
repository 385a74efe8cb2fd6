"""A method of a network on a GPU, recorded once and from then on started as a whole: CUDA graphs.

A decode step is a hundred kernels of a few microseconds each. Started one by one, the GPU waits for the host; as a graph,
the host starts one thing a step. It takes about a second to make, once for a number of rows.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from models import fused

_MOST = 16  # recordings kept of a method; each has its own memory for what is in between
_MOST_SHARE = 8  # of the device's memory one in so many is kept for the samplings that follow

# one recording at a time in a process, on one stream for each device: the libraries below get ready once for each stream
_recording = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


class RecordedMethod:
    """A method of a network on a GPU, recorded for every kind of arguments that it meets.

    Tensors among the arguments are copied to where the recording reads them. Tuples of tensors, as the caches are, are
    read and written where they lie: a recording is valid for their addresses. :meth:`take` gives a sampling the memory of
    an earlier one of the same size, and so its recording; it is kept for as long as the network is. Parameters are read
    where they lie, too: what changes in place is seen.

    Args:
        network: where its parameters lie must not change.
        method: takes tensors on the GPU, the first of them (R, ...), tuples of them and None; returns a tensor; changes
            nothing but the tensors in tuples, and waits for nothing.
    """

    def __init__(self, network: nn.Module, method: str) -> None:
        self.eager: Any = network
        self._method = method
        self._lock = threading.Lock()
        # the one that was used last comes last
        self._held: dict[tuple[Any, ...], _Recording] = {}
        self._memories: list[_Memory] = []
        self.failed = False

    # neither the mode nor the gradients of one sampling may stick to what the next one uses
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Tensor | None:
        """What the method returns, or None where it cannot be recorded; the reason was a warning then."""
        if self.failed:
            return None
        stream = torch.cuda.current_stream(arguments[0].device)
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (stream.cuda_stream, precision, *map(_place, arguments))
        # of two threads at once neither may change what the other is about to start
        with self._lock:
            recording = self._held.pop(key, None) or self._record(arguments, stream)
            if recording is None:
                return None
            self._held[key] = recording
            if len(self._held) > _MOST:
                del self._held[next(iter(self._held))]
            return recording(arguments)

    def _record(self, arguments: tuple[Any, ...], stream: torch.cuda.Stream) -> _Recording | None:
        method = getattr(self.eager, self._method)
        try:
            return _Recording(method, arguments, stream)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # while it records, the allocator cannot
            return _Recording(method, arguments, stream)
        except Exception as error:  # whatever is not allowed in a recording, or Triton lacks
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        if fused.give_up():
            self._warn(f"is recorded without fused kernels: {reason}")
            return self._record(arguments, stream)
        self.failed = True
        self._warn(f"cannot be recorded here, so it runs as it is: {reason}")
        return None

    def _warn(self, what: str) -> None:
        told = f"compile=True, but {self._method} of {type(self.eager).__name__} {what}"
        warnings.warn(told, stacklevel=6)

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, count: int, shape: tuple[int, ...], like: Tensor) -> tuple[list[Tensor], Lease]:
        """Tensors of zeros, of the dtype and on the device of ``like``, that nobody else has.

        They may be given to another once the lease is gone: whoever uses them keeps it.
        """
        lease = Lease()
        stream = torch.cuda.current_stream(like.device).cuda_stream
        with self._lock:
            for memory in self._memories:
                if memory.lease() is None and memory.fits(count, shape, like, stream):
                    for part in memory.parts:
                        part.detach_().zero_()
                    memory.lease = weakref.ref(lease)
                    return memory.parts, lease
            made = [like.new_zeros(shape) for _ in range(count)]
            known = [*self._memories, _Memory(made, stream, weakref.ref(lease))]
            # the newest are kept
            self._memories, left = [], _most_bytes(like.device)
            for memory in reversed(known):
                left -= sum(part.nbytes for part in memory.parts)
                if left < 0:
                    break
                self._memories.insert(0, memory)
            lost = {p.data_ptr() for m in known[: -len(self._memories) or None] for p in m.parts}
            self._held = {k: own for k, own in self._held.items() if not own.addresses & lost}
        return made, lease


class Lease:
    """Says by being there that memory is in use."""


class _Memory:
    """Tensors of one size, the stream whose work on them is in order, and who has them."""

    def __init__(self, parts: list[Tensor], stream: int, lease: weakref.ref[Lease]) -> None:
        self.parts, self.stream, self.lease = parts, stream, lease

    def fits(self, count: int, shape: tuple[int, ...], like: Tensor, stream: int) -> bool:
        first = self.parts[0]
        same = first.shape == shape and first.dtype == like.dtype
        return same and len(self.parts) == count and self.stream == stream


class _Recording:
    """One graph, with the memory that it reads its arguments from and writes its result to."""

    def __init__(
        self, method: Callable[..., Tensor], arguments: tuple[Any, ...], stream: torch.cuda.Stream
    ) -> None:
        own = tuple(part.clone() if isinstance(part, Tensor) else part for part in arguments)
        self._inputs = [(i, part) for i, part in enumerate(own) if isinstance(part, Tensor)]
        tuples = (part for part in own if isinstance(part, tuple))
        self.addresses = {part.data_ptr() for parts in tuples for part in parts}
        self._graph = torch.cuda.CUDAGraph()
        # autocast would keep casts of the weights for longer than they live
        precision = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with _recording:
            if stream.device not in _streams:
                _streams[stream.device] = torch.cuda.Stream(stream.device)
            aside = _streams[stream.device]
            aside.wait_stream(stream)
            try:
                with torch.cuda.stream(aside), precision:
                    method(*own)  # whatever gets ready at the first use must not be recorded
                    self._out = self._capture(method, own)
            finally:
                stream.wait_stream(aside)

    def _capture(self, method: Callable[..., Tensor], own: tuple[Any, ...]) -> Tensor:
        # the workspace of matrix products is to lie in the memory of the graph, which nobody else frees
        torch._C._cuda_clearCublasWorkspaces()
        # not torch.cuda.graph, which gives all free memory back to the device each time
        self._graph.capture_begin(capture_error_mode="thread_local")
        try:
            out = method(*own)
        except BaseException:  # an interrupt, too, must not leave the stream recording
            with suppress(Exception):  # it says again that something went wrong
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        torch._C._cuda_clearCublasWorkspaces()
        return out

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


def _most_bytes(device: torch.device) -> int:
    """Of memory that is kept for the samplings that follow."""
    return int(torch.cuda.get_device_properties(device).total_memory) // _MOST_SHARE
