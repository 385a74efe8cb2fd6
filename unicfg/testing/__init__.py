"""What guidance can be held against: toys whose distributions are known, and checks. Imports torch only."""

from unicfg.testing.conformance import CHECKS, Report, Subject, check, of_guidance, stateless
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
    "CHECKS",
    "GaussianMixture",
    "LabelRows",
    "MarkovChain",
    "MaskedTable",
    "Report",
    "Subject",
    "all_sequences",
    "check",
    "of_guidance",
    "sequence_index",
    "sharpen",
    "stateless",
]
