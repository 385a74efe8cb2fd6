"""The networks, the text condition and the pipeline from text to image.

The shape letters are those of ``unicfg.guidance.core``.
"""

from models.denoiser import LatentDenoiser, LatentDenoiserConfig
from models.hybrid import DiffusionHead, HybridTransformer, HybridTransformerConfig
from models.labels import ClassLabels
from models.pipeline import TextToImage
from models.text import TextTokenizer
from models.token_transformer import MaskedTransformer, TokenTransformer, TokenTransformerConfig

__all__ = [
    "ClassLabels",
    "DiffusionHead",
    "HybridTransformer",
    "HybridTransformerConfig",
    "LatentDenoiser",
    "LatentDenoiserConfig",
    "MaskedTransformer",
    "TextToImage",
    "TextTokenizer",
    "TokenTransformer",
    "TokenTransformerConfig",
]
