"""The two quantizers behind one interface; both come from vector-quantize-pytorch.

They are used in sequence mode (channels last), because the library's image mode decodes wrongly when the
codebook is narrower than the features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize


class Quantized(NamedTuple):
    """``codes`` (B, C, h, w) with straight-through gradients, ``ids`` (B, h, w), ``loss`` ()."""

    codes: Tensor
    ids: Tensor
    loss: Tensor


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to a few levels (FSQ, Mentzer et al., arXiv 2309.15505, section 3.1).

    Nothing to tune and nothing that collapses: there is no learned codebook.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        # it computes with its levels at once, which the meta device cannot
        with torch.device("cpu"):
            fsq = FSQ(list(levels))
        self.fsq = fsq.to(torch.get_default_device())

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features (B, C, h, w)."""
        b, _, h, w = z.shape
        codes, ids = self.fsq(z.flatten(2).mT)
        codes = codes.mT.reshape(z.shape)
        # the library's int32 indices do not index an embedding or a cross-entropy target
        return Quantized(codes, ids.long().view(b, h, w), z.new_zeros(()))

    def codes(self, ids: Tensor) -> Tensor:
        """Codebook vectors (B, C, h, w) of ids (B, h, w)."""
        b, h, w = ids.shape
        codes: Tensor = self.fsq.indices_to_codes(ids.reshape(b, h * w))
        return codes.mT.reshape(b, -1, h, w)


class VectorQuantizer(nn.Module):
    """A learned codebook with cosine similarity, k-means start and revival of dead codes.

    Settings that train well at this size: decay .99, commitment .25, revival below 2 uses
    (van den Oord et al., arXiv 1711.00937; Yu et al., arXiv 2110.04627, section 3.2).
    """

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.vq = VectorQuantize(
            dim=codebook_dim,
            codebook_size=codebook_size,
            decay=0.99,
            commitment_weight=0.25,
            kmeans_init=True,
            use_cosine_sim=True,
            threshold_ema_dead_code=2,
            rotation_trick=False,
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantize features (B, C, h, w); in training mode this also moves the codebook.

        Raises:
            ValueError: if the codebook was never trained, in eval mode.
        """
        b, _, h, w = z.shape
        frozen = not self.training
        # the library would start its codebook by k-means on whatever it is shown first, frozen or not
        if frozen and not bool(self.vq._codebook.initted):
            raise ValueError(
                "the codebook has not seen an image: expected a trained tokenizer, or one step in training mode"
            )
        codes, ids, loss = self.vq(z.flatten(2).mT, freeze_codebook=frozen)
        return Quantized(codes.mT.reshape(z.shape), ids.view(b, h, w), loss.reshape(()))

    def codes(self, ids: Tensor) -> Tensor:
        """Codebook vectors (B, C, h, w) of ids (B, h, w)."""
        codes: Tensor = self.vq.get_output_from_indices(ids.flatten(1))
        return codes.mT.reshape(ids.shape[0], -1, *ids.shape[1:])


class CodebookStatistics(NamedTuple):
    """``usage`` is the fraction of the codebook seen, ``perplexity`` its effective size."""

    usage: float
    perplexity: float


def codebook_statistics(ids: Tensor, codebook_size: int) -> CodebookStatistics:
    """How much of the codebook a fixed set of images uses.

    Both numbers grow with the number of ids, so compare them on the same validation set only.

    Args:
        ids: codebook indices of any shape, each in [0, V).
        codebook_size: V.

    Raises:
        ValueError: if there are no ids.
    """
    if ids.numel() == 0:
        raise ValueError("ids is empty: expected the indices of at least one image")
    counts = torch.bincount(ids.flatten(), minlength=codebook_size).double()
    p = counts / counts.sum()
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    return CodebookStatistics(float((counts > 0).double().mean()), float(entropy.exp()))
