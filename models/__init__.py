"""The networks, the text condition and the pipeline from text to image.

The shape letters are those of ``unicfg.guidance.core``.
"""

from models.labels import ClassLabels
from models.pipeline import TextToImage
from models.text import TextTokenizer
from models.token_transformer import TokenTransformer, TokenTransformerConfig

__all__ = [
    "ClassLabels",
    "TextToImage",
    "TextTokenizer",
    "TokenTransformer",
    "TokenTransformerConfig",
]
