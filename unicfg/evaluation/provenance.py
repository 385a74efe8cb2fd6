"""What it takes to make images again: networks, samplers and versions."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

import unicfg
from models import TextToImage


def settings_of(pipe: TextToImage) -> dict[str, Any]:
    """With what network a family was sampled, and how."""
    return {
        "network": type(pipe.network).__name__,
        "parameters": sum(p.numel() for p in pipe.network.parameters()),
        "config": asdict(pipe.network.config),
        "tokenizer": asdict(pipe.tokenizer.config),
        "sampler": pipe.sampler_settings(),
        "weights_sha256": pipe.digest(),
        "device": str(pipe.device),
    }


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    return {
        "unicfg": unicfg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
