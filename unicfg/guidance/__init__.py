"""Guidance: the formula, the scale over time, and what reins it in. Imports torch and nothing else."""

from unicfg.guidance import schedules
from unicfg.guidance.core import Guidance, guide, scale_from_beta, scale_from_w

__all__ = ["Guidance", "guide", "scale_from_beta", "scale_from_w", "schedules"]
