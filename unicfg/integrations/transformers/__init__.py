"""Guidance in transformers: ``model.generate(ids, custom_generate=guided_generate, uncond_ids=..., guidance=...)``."""

from unicfg.integrations.hosts import require_host

require_host("transformers")
