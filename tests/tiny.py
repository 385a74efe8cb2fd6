"""Small models that several test files share."""

import torch

from models import (
    HybridTransformer,
    HybridTransformerConfig,
    LatentDenoiser,
    LatentDenoiserConfig,
    MaskedTransformer,
    TextToImage,
    TextTokenizer,
    TokenTransformer,
    TokenTransformerConfig,
)
from tokenizers_vq import VQTokenizer, VQTokenizerConfig
from unicfg import ConditionDropout

CAPTIONS = ["a red circle", "a blue square on grey", "a tiger in 3d style", "two green stars"]


def transformer(seed: int = 0, **changes) -> TokenTransformer:
    """A random transformer whose logits are far enough apart for sampling to be interesting."""
    torch.manual_seed(seed)
    sizes = {"codebook_size": 24, "grid": 4, "condition_vocabulary": 12, "condition_length": 3}
    sizes |= {"width": 32, "depth": 2, "heads": 4} | changes
    model = TokenTransformer(TokenTransformerConfig(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    return model


def wrapped_transformer(seed: int = 0, **changes) -> ConditionDropout:
    model = transformer(seed, **changes)
    null = torch.zeros(model.config.condition_length, dtype=torch.long)
    return ConditionDropout(model, null).eval()


FAMILIES = ["ar", "masked", "diffusion", "flow", "hybrid"]
CLASSES = {
    "ar": (TokenTransformer, TokenTransformerConfig, {"codebook_size": 24}),
    "masked": (MaskedTransformer, TokenTransformerConfig, {"codebook_size": 24}),
    "diffusion": (LatentDenoiser, LatentDenoiserConfig, {"latent_channels": 2}),
    "flow": (
        LatentDenoiser,
        LatentDenoiserConfig,
        {"latent_channels": 2, "patch": 2, "path": "straight", "space": "flow"},
    ),
    "hybrid": (
        HybridTransformer,
        HybridTransformerConfig,
        {"latent_channels": 2, "head_width": 16, "head_depth": 2},
    ),
    "hybrid masked": (
        HybridTransformer,
        HybridTransformerConfig,
        {"latent_channels": 2, "head_width": 16, "head_depth": 2, "order": "masked"},
    ),
}


def network(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random network of any family, its zero layers and all others large enough to matter."""
    torch.manual_seed(seed)
    cls, config, own = CLASSES[family]
    sizes = {"grid": 4, "condition_vocabulary": 12, "condition_length": 3, "width": 32}
    model = cls(config(**(sizes | {"depth": 2, "heads": 4} | own | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            factor = 6.0 if family in ("ar", "masked") else 2.0
            zero = not parameter.any()
            parameter.data = 0.3 * torch.randn_like(parameter) if zero else factor * parameter.data
    return model


def wrapped(family: str, seed: int = 0, **changes) -> ConditionDropout:
    model = network(family, seed, **changes)
    null = torch.zeros(model.config.condition_length, dtype=torch.long)
    return ConditionDropout(model, null).eval()


def pipeline(seed: int = 0, family: str = "ar") -> TextToImage:
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, width=16, depth=1, levels=(5, 5)))
    text = TextTokenizer.train(CAPTIONS, vocabulary=300, length=12)
    sizes = {"condition_vocabulary": text.vocabulary, "condition_length": 12}
    sizes |= {"codebook_size": 25} if family in ("ar", "masked") else {}
    model = network(family, seed, **sizes)
    return TextToImage(text, ConditionDropout(model, text.null_condition), tokenizer, family)
