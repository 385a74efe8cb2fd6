"""Weights as 8-bit integers, for devices on which decoding waits for them to be read."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Network = TypeVar("Network", bound=nn.Module)


def quantize(network: Network) -> Network:
    """A copy whose linear layers hold their weights as int8 with a scale for each output, by torchao.

    Activations, embeddings, norms and the head of a hybrid stay as they are. It is for sampling: it can be neither trained nor saved.

    Raises:
        ImportError: if torchao is not installed.
        ValueError: if they are quantized already.
    """
    if is_quantized(network):
        raise ValueError("the network's weights are int8 already, expected one with plain weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels for other machines that it cannot load
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ModuleNotFoundError as error:
            raise ImportError(
                "int8 weights need torchao, which is not installed: pip install 'unicfg[int8]'"
            ) from error
        clone = copy.deepcopy(network)
        quantize_(clone, Int8WeightOnlyConfig(), _is_large)
    return clone


def _is_large(module: nn.Module, name: str) -> bool:
    """All linear layers but those of a hybrid's head, which is small and runs many times a token: it stays in caches."""
    return isinstance(module, nn.Linear) and not name.startswith("head.")


def is_quantized(network: nn.Module) -> bool:
    """Whether some of its weights are no plain tensors."""
    return any(is_traceable_wrapper_subclass(p) for p in network.parameters())


def stored(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is made of: itself, or integers and scales."""
    if not is_traceable_wrapper_subclass(parameter):
        return [parameter.detach()]
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name).detach() for name in names]
