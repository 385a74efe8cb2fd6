"""A decode step that is compiled once for each number of rows, and kept for the samplings that follow.

Eager, a step of a small model is bound by starting its operations one after another; compiled, by reading its weights.
The first sampling with a number of rows waits for the compiler, some ten seconds to a minute.
"""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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


class Stepping(Protocol):
    """What is asked of a network: one token more, with all shapes fixed."""

    def step(
        self, previous: Tensor, place: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """What the network says of token ``place`` (), after ``previous`` (R, ...), the token before it."""


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
        network: with a method ``step``; its weights are not changed afterwards.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network
        self._compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.failed = False

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
        # strides tell a view of some rows from a cache of its own; a length or a prompt makes no difference
        kind = (previous.shape, previous.dtype, previous.device, cache.keys[0].stride())
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
        import torch._inductor.config as inductor  # only now: it takes a second

        previous: Tensor = arguments[0]
        on_cpu = previous.device.type == "cpu"
        # the compiler's own matrix products beat oneDNN's at few rows, not at many
        many = on_cpu and len(previous) > _FEW_ROWS
        compiled = torch.compile(
            _own_function(pack(self._network) if many else self._network),
            fullgraph=True,
            dynamic=False,
            options=_OPTIONS,
        )
        try:
            with inductor.patch(freezing=on_cpu, autotune_num_choices_displayed=0):
                out: Tensor = compiled(*arguments)
        except Exception as error:  # whatever a compiler can fail with
            self.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            warnings.warn(
                f"compile=True, but the step cannot be compiled here, so it runs as it is: {reason}",
                stacklevel=2,
            )
            return None
        self._compiled[kind] = compiled
        return out


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
    """Two numbers a parameter, which training changes."""
    sums = [
        torch.stack(
            [p.detach().sum(dtype=torch.float64), p.detach().abs().sum(dtype=torch.float64)]
        )
        for p in network.parameters()
    ]
    return torch.stack(sums).cpu()
