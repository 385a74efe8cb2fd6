"""Guidance in transformers: ``model.generate(ids, custom_generate=guided_generate, uncond_ids=..., guidance=...)``."""

from unicfg.integrations.hosts import require_host

require_host("transformers")

from unicfg.integrations.transformers.generate import guided_generate  # noqa: E402
from unicfg.integrations.transformers.processor import GuidedLogitsProcessor  # noqa: E402

__all__ = ["GuidedLogitsProcessor", "guided_generate"]
