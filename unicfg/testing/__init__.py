"""What a test of guidance can be held against: toys whose distributions are known exactly. Imports torch only."""

from unicfg.testing.oracles import (
    GaussianMixture,
    LabelRows,
    MarkovChain,
    MaskedTable,
    all_sequences,
    sequence_index,
    sharpen,
)

__all__ = [
    "GaussianMixture",
    "LabelRows",
    "MarkovChain",
    "MaskedTable",
    "all_sequences",
    "sequence_index",
    "sharpen",
]
