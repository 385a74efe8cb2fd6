"""Images to discrete tokens and continuous latents, and back.

One autoencoder serves every family: token models read and write its ``ids``, diffusion models its ``latents``.

Shape letters: B batch, H W image pixels, h w latent grid, C latent channels, V codebook size.
"""

from tokenizers_vq.cards import Facts
from tokenizers_vq.images import to_float, to_images
from tokenizers_vq.losses import AdversarialLoss, reconstruction_loss
from tokenizers_vq.quantizers import codebook_statistics
from tokenizers_vq.tokenizer import VQTokenizer, VQTokenizerConfig

__all__ = [
    "AdversarialLoss",
    "Facts",
    "VQTokenizer",
    "VQTokenizerConfig",
    "codebook_statistics",
    "reconstruction_loss",
    "to_float",
    "to_images",
]
