"""Guidance in other people's models, one module a host library; a host is imported only by its own module.

- ``unicfg.integrations.transformers``: causal language models, and the token models of images and audio there.
- ``unicfg.integrations.diffusers``: a guider, and pipelines without guiders.
- ``unicfg.integrations.k_diffusion``: denoisers (x, sigma) for any sampler of that kind.

A model of one's own needs no integration: see ``unicfg.guided_call`` and the samplers.
"""
