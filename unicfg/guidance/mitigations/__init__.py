"""Mitigations: what reins in the extrapolation after it, each one small, per sample and without side effects.

A mitigation is a callable ``(guided, cond_out, uncond_out) -> guided``. It may say in an attribute ``space`` in which
coordinates it is meant (see :mod:`unicfg.guidance.spaces`, or "logits"); ``Guidance`` then converts all three outputs
to that space and the result back, so that it does the same whatever the model predicts. Without the attribute it sees
the outputs as they are. One with the space "logits" treats each row of V by itself: in masked sampling it is given those
of the step only, (B, K, V), and one without the attribute all, (B, L, V). A new one goes beside its kind: a frozen
dataclass with a ``space`` and a ``__call__``.

None of them is told s: they see ``guided - cond_out``, which is (s - 1) times the direction.
"""

from unicfg.guidance.mitigations.denoising import (
    apg,
    cfg_zero_star,
    dynamic_threshold,
    frequency_decoupled,
    magnitude_aware,
    mimic_scale,
    norm_clamp,
    rescale,
    static_threshold,
    tcfg,
    zero_init,
)
from unicfg.guidance.mitigations.logits import (
    kl_scale,
    kl_trust_region,
    plausibility,
    project_logits,
    temperature_matching,
    top_k_of_cond,
)

__all__ = [
    "apg",
    "cfg_zero_star",
    "dynamic_threshold",
    "frequency_decoupled",
    "kl_scale",
    "kl_trust_region",
    "magnitude_aware",
    "mimic_scale",
    "norm_clamp",
    "plausibility",
    "project_logits",
    "rescale",
    "static_threshold",
    "tcfg",
    "temperature_matching",
    "top_k_of_cond",
    "zero_init",
]
