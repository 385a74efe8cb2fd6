"""A copy of a network that computes the same on a CPU, faster for a few rows at a time.

A decode step multiplies a handful of rows by every weight matrix, so its time is that of reading the weights. The
plain matrix product is up to twice as slow as that at 2 to 4 rows, which is just where guidance at batch 1 lives;
oneDNN's blocked weight layout is not. On other devices and dtypes the network is used as it is.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_LAYOUT_ROWS = (
    16  # the layout is chosen for this many rows and is as good for fewer (measured 1 to 64)
)


class PackedLinear(nn.Module):
    """A linear layer whose weight was copied into oneDNN's blocked layout. Inference only.

    Shape: (..., in) -> (..., out).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # plain attributes, not buffers: blocked tensors cannot be saved or moved, and need not be
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _LAYOUT_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def can_pack(linear: nn.Linear) -> bool:
    """Whether this layer has a faster packed form on this machine."""
    return (
        type(linear) is nn.Linear  # a subclass may compute something else
        and type(linear.weight.data) is Tensor  # and a subclass of Tensor, as int8 weights are
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(network: Network) -> Network:
    """A shallow copy of ``network`` in which every linear layer that can be packed is.

    The copy shares all other parameters and is a snapshot: training the original does not change its packed
    weights. Made once per sampling, which takes about as long as two decode steps.
    """
    if torch.is_autocast_enabled("cpu"):
        return network  # autocast knows nothing of packed weights
    clone = copy.copy(network)
    clone.__dict__["_modules"] = {
        name: PackedLinear(child)
        if isinstance(child, nn.Linear) and can_pack(child)
        else pack(child)
        for name, child in network.named_children()
    }
    return clone
