"""Guidance: the formula, the scale over time, and what reins it in. Imports torch and nothing else."""

from unicfg.guidance import branches, mitigations, presets, schedules, spaces
from unicfg.guidance.core import Guidance, guide, scale_from_beta, scale_from_w

__all__ = [
    "Guidance",
    "branches",
    "guide",
    "mitigations",
    "presets",
    "scale_from_beta",
    "scale_from_w",
    "schedules",
    "spaces",
]
