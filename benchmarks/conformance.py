"""The checks of ``unicfg.testing`` on our guidance, on diffusers' guiders and on transformers' logits processors.

python benchmarks/conformance.py --out docs/conformance.md
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import guiders
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from tokenizers_vq.files import write_text_atomically
from unicfg import Guidance, guide
from unicfg.guidance import mitigations
from unicfg.guidance.core import Scale
from unicfg.testing import CHECKS, Report, Subject, check, of_guidance, stateless
from unicfg.testing.conformance import STEPS, Run

# these change what scale 1, where guidance is off, leaves alone: it cannot be continuous there
_ON_COND = {"continuous_at_1": "it reins in cond_out as well, which s = 1 returns untouched"}
OUR_EXEMPTIONS = {
    name: _ON_COND
    for name in ("static_threshold", "dynamic_threshold", "plausibility", "top_k_of_cond")
}
OUR_SETTINGS: dict[str, dict[str, Any]] = {
    "apg": {"momentum": -0.5, "threshold": 15.0},
    "top_k_of_cond": {"k": 8},
}


def ours() -> list[Subject]:
    """The formula, and every mitigation as ``Guidance`` applies it, on eps predictions or logits."""
    subjects = [
        stateless("guide, denoiser", guide, affine=True),
        stateless("guide, logits", guide, "logits"),
    ]
    for name in mitigations.__all__:
        mitigation = getattr(mitigations, name)(**OUR_SETTINGS.get(name, {}))
        space: Any = "logits" if getattr(mitigation, "space", "") == "logits" else "eps"
        guidance = Guidance(1.0, (mitigation,))
        subjects.append(of_guidance(name, guidance, space, exempt=OUR_EXEMPTIONS.get(name)))
    return subjects


def of_guider(name: str, guider: Any, *, affine: bool = False) -> Subject:
    """A guider of diffusers, used as its pipelines do: one object, told the step before each call."""
    w = guider.use_original_formulation  # its scale is then w = s - 1

    def begin() -> Run:
        def run(progress: float, cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
            if hasattr(guider, "guidance_scales"):  # one for each band
                guider.guidance_scales = [s - 1 if w else s] * guider.levels
            guider.guidance_scale = s - 1 if w else s
            step = round(progress * (STEPS - 1))
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(0))
            guider.prepare_inputs({"out": (cond_out, uncond_out)})  # starts the momentum at step 0
            guided: Tensor = guider.forward(cond_out, uncond_out).pred
            return guided

        return run

    return Subject(name, begin, "denoiser", affine)


def of_diffusers() -> list[Subject]:
    """The guiders that work on two outputs; the others perturb a model."""
    apg = {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.0}
    own = {
        "ClassifierFreeGuidance": guiders.ClassifierFreeGuidance(),
        "... use_original_formulation": guiders.ClassifierFreeGuidance(
            use_original_formulation=True
        ),
        "... guidance_rescale": guiders.ClassifierFreeGuidance(guidance_rescale=0.7),
        "AdaptiveProjectedGuidance": guiders.AdaptiveProjectedGuidance(**apg),
        "... use_original_formulation ": guiders.AdaptiveProjectedGuidance(
            **apg, use_original_formulation=True
        ),
        "ClassifierFreeZeroStarGuidance": guiders.ClassifierFreeZeroStarGuidance(),
        "TangentialClassifierFreeGuidance": guiders.TangentialClassifierFreeGuidance(),
        "MagnitudeAwareGuidance": guiders.MagnitudeAwareGuidance(),
        "FrequencyDecoupledGuidance": guiders.FrequencyDecoupledGuidance(),
    }
    plain = ("ClassifierFreeGuidance", "... use_original_formulation")
    return [of_guider(name, guider, affine=name in plain) for name, guider in own.items()]


def of_transformers() -> list[Subject]:
    """The processors, each called with the tensors that ``generate`` calls it with."""

    def ids(like: Tensor) -> Tensor:
        return torch.zeros(len(like), 1, dtype=torch.long)

    def batched(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
        processor = ClassifierFreeGuidanceLogitsProcessor(guidance_scale=s)
        out: Tensor = processor(ids(cond_out), torch.cat([cond_out, uncond_out]))
        return out

    def unbatched(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(s, model=None)
        processor.get_unconditional_logits = lambda _: uncond_out[:, None]
        # ``generate`` gives it normalized scores
        out: Tensor = processor(ids(cond_out), cond_out.log_softmax(-1))
        return out

    def dia(cond_out: Tensor, uncond_out: Tensor, s: Scale) -> Tensor:
        # its scale is w = s - 1
        processor = logits_process.DiaClassifierFreeGuidanceLogitsProcessor(guidance_scale=s - 1)
        out: Tensor = processor(ids(cond_out), torch.cat([cond_out, uncond_out]))
        return out

    return [
        stateless("ClassifierFreeGuidanceLogitsProcessor", batched, "logits"),
        stateless("UnbatchedClassifierFreeGuidanceLogitsProcessor", unbatched, "logits"),
        stateless("DiaClassifierFreeGuidanceLogitsProcessor (w)", dia, "logits"),
    ]


def table(reports: list[Report]) -> list[str]:
    """A row a check, a column an implementation."""
    names = [report.subject.name for report in reports]
    lines = [
        "| | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for one in CHECKS:
        marks = [_mark(report.results[one.__name__]) for report in reports]
        lines.append(f"| {one.__name__.replace('_', ' ')} | " + " | ".join(marks) + " |")
    return lines


def _mark(result: str) -> str:
    known = {"pass": "✓", "does not apply": "-"}
    return known.get(result, "○" if result.startswith("not claimed") else "**✗**")


def page(command: str) -> str:
    """The docs page."""
    groups = {
        "unicfg, denoisers": [s for s in ours() if s.kind == "denoiser"],
        "unicfg, logits": [s for s in ours() if s.kind == "logits"],
        f"diffusers {diffusers.__version__}, guiders": of_diffusers(),
        f"transformers {transformers.__version__}, logits processors": of_transformers(),
    }
    lines = [
        "# Conformance",
        "",
        "What holds for guidance as such, checked on this library, on diffusers' guiders and on transformers' logits",
        f"processors. Made by `{command}` with torch {torch.__version__.split('+')[0]}; the checks are",
        "[`unicfg.testing.conformance`](../unicfg/testing/conformance.py), and run on anyone's guidance:",
        "",
        "```python",
        "from unicfg.testing import check, stateless",
        "",
        "print(",
        "    check(",
        '        stateless("mine", lambda cond_out, uncond_out, s: uncond_out + s * (cond_out - uncond_out))',
        "    )",
        ")",
        "```",
        "",
        "A ✗ is a statement about the check: some methods are made that way, and some libraries choose to refuse a scale.",
        "",
        "✓ holds, ✗ does not, - does not apply, ○ is not claimed (why stands below the table).",
        "",
        "| check | what it says |",
        "|---|---|",
        *(
            f"| {c.__name__.replace('_', ' ')} | {' '.join((c.__doc__ or '').split())} |"
            for c in CHECKS
        ),
    ]
    for title, subjects in groups.items():
        reports = [check(subject) for subject in subjects]
        lines += ["", f"## {title}", "", *table(reports), ""]
        for report in reports:
            by_text: dict[str, list[str]] = {}
            for name, text in report.results.items():
                if _mark(text) in ("○", "**✗**"):
                    by_text.setdefault(text, []).append(name.replace("_", " "))
            lines += [
                f"- `{report.subject.name.strip()}`, {', '.join(names)}: {text}"
                for text, names in by_text.items()
            ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/conformance.md"))
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # others' deprecations
        text = page("python benchmarks/conformance.py")
    write_text_atomically(text, options.out)
    print(text)


if __name__ == "__main__":
    main()
