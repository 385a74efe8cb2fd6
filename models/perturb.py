"""Our transformers, made worse on purpose: the weak model of ``unicfg.guidance.branches.weak`` that needs no training.

A perturbed network shares all weights with the one that it is made from. Only the image tokens feel it: the condition
is encoded as ever. Any family:

    worse = perturb_attention(pipe.network, layers=[3])
    pipe(prompts, seeds=[0], guidance=Guidance(branches.weak(2.0)), branches={"weak": Branch(model=worse)})
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from models.blocks import Attend, Block, Modulation
from models.body import Body
from unicfg.sampling.tokens import at_places

Network = TypeVar("Network", bound=nn.Module)


class _OwnValue(Block):
    """A block in which each image token attends to itself alone."""

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        modulation: Modulation | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        def own_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attend(q, k, v)  # a cache has to move on
            return v if places is None else at_places(v, places, dim=2)

        return super().forward(x, own_value, modulation, places)


class _Skipped(Block):
    """A block that is left out."""

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        modulation: Modulation | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        return x if places is None else at_places(x, places)


def perturb_attention(network: Network, layers: Sequence[int]) -> Network:
    """The network with the attention map of some layers replaced by the identity.

    Perturbed-attention guidance (Ahn et al., arXiv 2403.17377, section 4.2). Our layers attend to the condition and
    the image at once, so both are cut off.

    Args:
        network: the bare network of any family.
        layers: which blocks, from 0; negative ones count from the last.

    Raises:
        TypeError: if the network is none of this library's transformers.
        ValueError: if a layer is not there, or none is given.
    """
    return _with_blocks(network, layers, _OwnValue)


def skip_layers(network: Network, layers: Sequence[int]) -> Network:
    """The network without some of its layers, as in skip-layer guidance of Stable Diffusion 3.5.

    Args:
        network: the bare network of any family.
        layers: which blocks, from 0; negative ones count from the last.

    Raises:
        TypeError: if the network is none of this library's transformers.
        ValueError: if a layer is not there, or none is given.
    """
    return _with_blocks(network, layers, _Skipped)


def _with_blocks(network: Network, layers: Sequence[int], kind: type[Block]) -> Network:
    body = getattr(network, "body", None)
    if not isinstance(body, Body):
        raise TypeError(
            f"network is a {type(network).__name__}, expected a bare network of this library, as in pipe.network"
        )
    depth = len(body.blocks)
    if (
        not isinstance(layers, Sequence)
        or not layers
        or any(not -depth <= layer < depth for layer in layers)
    ):
        raise ValueError(f"layers is {layers!r}, expected a list of some of 0 to {depth - 1}")
    chosen = {layer % depth for layer in layers}
    blocks = nn.ModuleList(
        _as_kind(block, kind) if i in chosen else block for i, block in enumerate(body.blocks)
    )
    return _with_child(network, "body", _with_child(body, "blocks", blocks))


def _with_child(module: Network, name: str, child: nn.Module) -> Network:
    """A shallow copy with another child."""
    clone = copy.copy(module)
    held = clone.__dict__
    # or a hook on one of the two would be on both
    held.update({key: copy.copy(own) for key, own in held.items() if "_hooks" in key})
    held["_modules"] = {**dict(module.named_children()), name: child}
    return clone


def _as_kind(block: nn.Module, kind: type[Block]) -> nn.Module:
    changed = copy.copy(block)
    changed.__class__ = kind
    return changed
