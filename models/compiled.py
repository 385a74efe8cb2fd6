"""A decode step that is compiled once for each number of rows, and kept for the samplings that follow.

Eager, a step of a small model is bound by starting its operations one after another; compiled, by reading its weights.
The first sampling with a number of rows waits for the compiler, some ten seconds to a minute.
"""

from __future__ import annotations

import copy
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import KVCache
from models.packed import pack

_FEW_ROWS = 8  # measured: 2.9 against 3.1 ms at 4 rows, 12.5 against 8.5 at 16

_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    # the network is a private copy: looking at all its attributes at each step would take as long as a layer
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
}
# of the last network that was compiled, by the network as the caller has it
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, CompiledStep]] = (
    weakref.WeakKeyDictionary()
)


def compiled_step(network: nn.Module) -> CompiledStep:
    """The compiled step of a network: that of the last sampling, unless the weights have changed since."""
    sums = _checksum(network)
    known = _kept.get(network)
    if known is not None and torch.equal(known[0], sums):
        return known[1]
    step = CompiledStep(_same_weights(network))
    _kept[network] = (sums, step)
    return step


class CompiledStep:
    """``network.step``, compiled for every number of rows that it meets.

    On a CPU the weights become constants of the compiled code, in the layout that is fastest for them: it is a
    snapshot.

    Args:
        network: with a method ``step(previous (R, ...), place (), keys, values)``, one token more with all shapes fixed, as
            ``TokenTransformer`` has it; its weights are not changed afterwards.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network
        self._packed: nn.Module | None = None
        self._compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.failed = False

    @property
    def eager(self) -> Any:
        """The network for what is not compiled: chunks, and everything where nothing can be."""
        if self._packed is None:
            self._packed = pack(self._network)
        return self._packed

    def __call__(self, previous: Tensor, cache: KVCache) -> Tensor | None:
        """What the network says of the token after ``previous`` (R, ...), the last one; the cache is extended.

        Returns:
            (R, ...), or None where this machine cannot compile; the reason was a warning then.
        """
        if self.failed:
            return None
        place = torch.tensor(cache.length, device=previous.device)
        # a column of all tokens so far has their number as its stride, which is a shape to the compiler
        previous = previous.clone(memory_format=torch.contiguous_format)
        arguments = (previous, place, cache.keys, cache.values)
        # all that the compiler would compile anew for, which must happen in _first
        kind = (
            *(previous.shape, previous.dtype, previous.device, cache.keys[0].dtype),
            *(torch.is_inference_mode_enabled(), torch.get_num_threads()),
            torch.is_autocast_enabled(previous.device.type),
        )
        compiled = self._compiled.get(kind)
        if compiled is None:
            out = self._first(kind, arguments)
            if out is None:
                return None
        else:
            out = compiled(*arguments)
        cache.length += 1
        return out

    def _first(self, kind: tuple[Any, ...], arguments: tuple[Any, ...]) -> Tensor | None:
        previous: Tensor = arguments[0]
        on_cpu = previous.device.type == "cpu"
        # the compiler's own matrix products beat oneDNN's at few rows, not at many
        many = on_cpu and len(previous) > _FEW_ROWS
        try:
            import torch._inductor.config as inductor  # only now: it takes a second
            from torch._inductor.codecache import PyCodeCache

            known = len(PyCodeCache.modules)
            compiled = torch.compile(
                _own_function(self.eager if many else self._network),
                fullgraph=True,
                dynamic=False,
                options=_OPTIONS,
            )
            with inductor.patch(freezing=on_cpu, autotune_num_choices_displayed=0):
                out: Tensor = compiled(*arguments)
        except Exception as error:  # whatever a compiler can fail with
            if is_out_of_memory(error):
                raise
            self.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            warnings.warn(
                f"compile=True, but the step cannot be compiled here, so it runs as it is: {reason}",
                stacklevel=4,
            )
            return None
        weakref.finalize(self, _forget, PyCodeCache.modules[known:])
        self._compiled[kind] = compiled
        return out


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


def _own_function(network: Any) -> Callable[..., Tensor]:
    """The step of ``network`` as a function with code of its own.

    Functions that share their code share what was compiled for it, and without guards on the network another one's
    weights would serve.
    """

    def step(
        previous: Tensor, place: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
    ) -> Tensor:
        out: Tensor = network.step(previous, place, keys, values)
        return out

    return types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__
    )


def _same_weights(network: nn.Module) -> nn.Module:
    """A copy that shares its parameters: what is kept must not keep the caller's network alive."""
    clone = copy.copy(network)
    clone.__dict__["_modules"] = {
        name: None if child is None else _same_weights(child)
        for name, child in network._modules.items()
    }
    return clone


def _checksum(network: nn.Module) -> Tensor:
    """Numbers for each parameter, which training, a permutation, or another dtype changes."""
    parameters = [p.detach().flatten() for p in network.parameters()]
    longest = max(len(p) for p in parameters)
    ramp = torch.arange(longest, dtype=torch.float32, device=parameters[0].device)
    ramp = ramp.mul_(0.7).cos_()
    sums = [number.double() for p in parameters for number in (p.sum(), p.float() @ ramp[: len(p)])]
    sizes = torch.tensor([float(p.element_size()) for p in parameters])
    return torch.cat([torch.stack(sums).cpu(), sizes])
