"""Small models that several test files share."""

import torch

from models import TextToImage, TextTokenizer, TokenTransformer, TokenTransformerConfig
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


def pipeline(seed: int = 0) -> TextToImage:
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, width=16, depth=1, levels=(5, 5)))
    text = TextTokenizer.train(CAPTIONS, vocabulary=300, length=12)
    model = transformer(
        seed, codebook_size=25, condition_vocabulary=text.vocabulary, condition_length=12
    )
    return TextToImage(text, ConditionDropout(model, text.null_condition), tokenizer)
