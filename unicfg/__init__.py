"""unicfg: classifier-free guidance, written once, for autoregressive, masked, diffusion, flow and hybrid models.

A model that runs with and without its condition gives a direction; guidance goes further along it. The formula
stands in ``unicfg.guidance.core``, the samplers in ``unicfg.sampling``, the training wrapper in
``unicfg.training.dropout``.
"""

from unicfg.guidance import Guidance, guide, scale_from_beta, scale_from_w
from unicfg.sampling import (
    Branch,
    guided_call,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)
from unicfg.training import ConditionDropout, drop_condition

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "ConditionDropout",
    "Guidance",
    "drop_condition",
    "guide",
    "guided_call",
    "sample_autoregressive",
    "sample_diffusion",
    "sample_hybrid",
    "sample_masked",
    "scale_from_beta",
    "scale_from_w",
]
