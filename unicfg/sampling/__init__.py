"""Guided samplers: plain functions, model first. Imports torch and nothing else."""

from unicfg.sampling.autoregressive import TokenStep, Uncached, sample_autoregressive
from unicfg.sampling.branches import Branch
from unicfg.sampling.calls import guided_call
from unicfg.sampling.classifier import ClassifierDenoiser, ClassifierTokens
from unicfg.sampling.diffusion import sample_diffusion
from unicfg.sampling.hybrid import LatentStep, sample_hybrid
from unicfg.sampling.masked import UnmaskingStep, sample_masked
from unicfg.sampling.paths import cosine, linear, straight
from unicfg.sampling.recorder import Recorder, Step, Trace
from unicfg.sampling.solvers import DenoisingStep
from unicfg.sampling.tokens import TokenFilter

__all__ = [
    "Branch",
    "ClassifierDenoiser",
    "ClassifierTokens",
    "DenoisingStep",
    "LatentStep",
    "Recorder",
    "Step",
    "TokenFilter",
    "TokenStep",
    "Trace",
    "Uncached",
    "UnmaskingStep",
    "cosine",
    "guided_call",
    "linear",
    "sample_autoregressive",
    "sample_diffusion",
    "sample_hybrid",
    "sample_masked",
    "straight",
]
