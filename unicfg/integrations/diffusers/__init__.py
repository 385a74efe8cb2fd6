"""Guidance in diffusers: a guider for modular pipelines, and pipelines that have no guiders.

- :func:`guided_pipeline`: ``guided_pipeline(pipe, Guidance(3.0))("a cat")``, for pipelines that guide by themselves.
- :class:`GuidanceGuider`: ``pipe.update_components(guider=GuidanceGuider(Guidance(3.0)))``, for modular pipelines.
"""

from unicfg.integrations.hosts import require_host

require_host("diffusers")

# ruff: noqa: E402 - what follows imports the host, whose absence is to be told first
from unicfg.integrations.diffusers.guider import GuidanceGuider
from unicfg.integrations.diffusers.layouts import LAYOUTS, Layout
from unicfg.integrations.diffusers.pipelines import GuidedPipeline, guided_pipeline

__all__ = ["LAYOUTS", "GuidanceGuider", "GuidedPipeline", "Layout", "guided_pipeline"]
