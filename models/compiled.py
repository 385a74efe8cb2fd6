"""A method of a network that is compiled once for each number of rows, and kept for the samplings that follow.

Eager, a decode step of a small model is bound by starting its operations one after another; compiled, by reading its
weights. The first sampling with a number of rows waits for the compiler, some ten seconds to a minute. On a GPU nothing is
compiled: ``models.recorded`` does the same in a second.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.packed import pack
from models.quantized import stored
from models.recorded import RecordedMethod

_FEW_ROWS = 8  # measured: 2.9 against 3.1 ms at 4 rows, 12.5 against 8.5 at 16

_OPTIONS: dict[str, Any] = {"max_autotune": True}
_MOST_KINDS = 8  # kept of a method: on a CPU each has a copy of the weights

# by the network as the caller has it, and the method
_kept: weakref.WeakKeyDictionary[
    nn.Module, dict[str, tuple[Tensor, CompiledMethod | RecordedMethod]]
] = weakref.WeakKeyDictionary()
# what is kept is shared by all threads: looked at under the one, which is held for moments; compiled under the other, for
# the compiler changes settings and classes of the whole process while it works
_looking, _compiling = threading.Lock(), threading.Lock()


def compiled_method(network: nn.Module, method: str) -> CompiledMethod | RecordedMethod:
    """The compiled method of a network: that of the last sampling, unless the weights have changed since."""
    on_gpu = next(network.parameters()).is_cuda
    numbers = _addresses(network) if on_gpu else _checksum(network)
    with _looking:
        methods = _kept.setdefault(network, {})
        if method in methods and torch.equal(methods[method][0], numbers):
            return methods[method][1]
        make = RecordedMethod if on_gpu else CompiledMethod
        made = make(_same_weights(network), method)
        methods[method] = (numbers, made)
        return made


class CompiledMethod:
    """A method of a network, compiled for every kind of arguments that it meets.

    On a CPU the weights become constants of the compiled code, in the layout that is fastest for them: it is a
    snapshot.

    Args:
        network: its weights are not changed afterwards.
        method: takes tensors (R, ...), and tuples of tensors of one kind, which may be None; returns a tensor.
    """

    def __init__(self, network: nn.Module, method: str) -> None:
        self._network, self._method = network, method
        self._packed: nn.Module | None = None
        self._packing = threading.Lock()  # copies all weights: other methods are not to wait
        # the kind that was called last comes last
        self._compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._modules: dict[tuple[Any, ...], list[types.ModuleType]] = {}
        self._failed: set[tuple[Any, ...]] = set()

    @property
    def failed(self) -> bool:
        """Whether nothing can be compiled here."""
        with _looking:
            return bool(self._failed) and not self._compiled

    @property
    def eager(self) -> Any:
        """The network for what is not compiled: other methods, and this one where it cannot be."""
        with self._packing:
            if self._packed is None:
                self._packed = pack(self._network)
            return self._packed

    def __call__(self, *arguments: Any) -> Tensor | None:
        """What the method returns, or None where it cannot be compiled; the reason was a warning then."""
        # all that the compiler would compile anew for, which must happen in _first
        kind = (
            *(_kind(argument) for argument in arguments),
            *(torch.is_inference_mode_enabled(), torch.get_num_threads()),
            _autocast(arguments[0].device.type),
        )
        compiled = self._known(kind)
        if compiled is None:
            with _compiling:
                compiled = self._known(kind)  # another thread may just have made it
                if compiled is None:
                    failed = self.failed or kind in self._failed
                    return None if failed else self._first(kind, arguments)
        return compiled(*arguments)

    def _known(self, kind: tuple[Any, ...]) -> Callable[..., Tensor] | None:
        """What is compiled for a kind; it is the last that was called, then."""
        with _looking:
            compiled = self._compiled.pop(kind, None)
            if compiled is not None:
                self._compiled[kind] = compiled
            return compiled

    def _first(self, kind: tuple[Any, ...], arguments: tuple[Any, ...]) -> Tensor | None:
        rows: Tensor = arguments[0]
        on_cpu = rows.device.type == "cpu"
        # the compiler's own matrix products beat oneDNN's at few rows, not at many
        many = on_cpu and len(rows) > _FEW_ROWS
        method = getattr(self.eager if many else self._network, self._method)
        try:
            import torch._inductor.config as inductor  # only now: it takes a second
            from torch._inductor.codecache import PyCodeCache
            from torch.fx.experimental.proxy_tensor import make_fx

            known = len(PyCodeCache.modules)
            # not torch.compile: looking up whether its code still fits takes as long as a layer at each step, and here the
            # kind says it
            graph = make_fx(lambda *own: method(*own))(*arguments)
            with inductor.patch(freezing=on_cpu), _quietly():
                compiled = torch._inductor.compile(graph, list(arguments), options=_OPTIONS)
                out: Tensor = compiled(*arguments)
        except Exception as error:  # whatever a compiler can fail with
            if is_out_of_memory(error):
                raise
            self._failed.add(kind)
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            warnings.warn(
                f"compile=True, but {self._method} of {type(self._network).__name__} cannot be compiled here, so it runs as "
                f"it is: {reason}",
                stacklevel=4,
            )
            return None
        modules = PyCodeCache.modules[known:]
        weakref.finalize(self, _forget, modules)
        with _looking:
            self._compiled[kind], self._modules[kind] = compiled, modules
            if len(self._compiled) > _MOST_KINDS:
                oldest = next(iter(self._compiled))
                del self._compiled[oldest]
                _forget(self._modules.pop(oldest))
        return out


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the compiler tells of its search for the fastest kernels."""
    from torch._inductor import select_algorithm

    before = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch")
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is full: on a CPU torch has no class of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in ("can't allocate memory", "not enough memory")
    )


def _forget(modules: list[types.ModuleType]) -> None:
    """Let go of compiled code, which holds the weights as constants: the compiler itself never does."""
    from torch._inductor.codecache import PyCodeCache

    for module in modules:
        if module in PyCodeCache.modules:
            PyCodeCache.modules.remove(module)
        sys.modules.pop(module.__name__, None)
    modules.clear()


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(argument: Any) -> Any:
    """What of an argument the compiled code depends on; the tensors of a tuple are alike."""
    if argument is None:
        return None
    tensor = argument[0] if isinstance(argument, tuple) else argument
    return tensor.shape, tensor.dtype, tensor.device


def _same_weights(network: nn.Module) -> nn.Module:
    """A copy that shares its parameters: what is kept must not keep the caller's network alive."""
    clone = copy.copy(network)
    clone.__dict__["_modules"] = {
        name: None if child is None else _same_weights(child)
        for name, child in network._modules.items()
    }
    return clone


def _addresses(network: nn.Module) -> Tensor:
    """Numbers that change where parameters are replaced; those that change in place are read where they lie."""
    parameters = [part for p in network.parameters() for part in stored(p)]
    return torch.tensor([(p.data_ptr(), p.element_size(), p.numel()) for p in parameters])


def _checksum(network: nn.Module) -> Tensor:
    """Numbers for each parameter, which training, a permutation, or another dtype changes."""
    parameters = [part.flatten() for p in network.parameters() for part in stored(p)]
    longest = max(len(p) for p in parameters)
    ramp = torch.arange(longest, dtype=torch.float32, device=parameters[0].device)
    ramp = ramp.mul_(0.7).cos_()
    sums = [number.double() for p in parameters for number in (p.sum(), p.float() @ ramp[: len(p)])]
    sizes = torch.tensor([float(p.element_size()) for p in parameters])
    return torch.cat([torch.stack(sums).cpu(), sizes])
