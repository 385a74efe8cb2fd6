"""Guided samplers: plain functions, model first. Imports torch and nothing else."""

from unicfg.sampling.autoregressive import TokenStep, sample_autoregressive
from unicfg.sampling.tokens import TokenFilter

__all__ = ["TokenFilter", "TokenStep", "sample_autoregressive"]
