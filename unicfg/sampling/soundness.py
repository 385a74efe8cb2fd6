"""Numbers that a sampling cannot go on with: which they are, when they are looked for, and what the error says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHECK_MODEL = (
    "expected finite numbers (in logits also -inf, which masks a token): look at the model's weights and at its dtype, "
    "for float16 ends at 65504"
)
CHECK_GUIDANCE = "expected a scale nearer to 1, or other mitigations"
CHECK_LATENTS = "expected outputs of the model about as large as its latents, a scale nearer to 1, or a mitigation"


@dataclass(frozen=True)
class Rule:
    """What outputs of a model may not hold.

    Attributes:
        trouble: what an error says of outputs that do.
        broken: whether outputs of any shape do, by one operation over all that are sound.
        peaks: of each sample of (B, ...) a number (B,), by one operation, that is NaN or +inf where it does.
    """

    trouble: str
    broken: Callable[[Tensor], bool]
    peaks: Callable[[Tensor], Tensor]

    def samples(self, out: Tensor) -> Tensor:
        """Which samples of (B, ...) do, bool (B,)."""
        return ~(self.peaks(out) < math.inf)


def _nan_or_inf(out: Tensor) -> bool:
    return out.numel() > 0 and not bool(out.amax() < math.inf)  # the largest is NaN if any is


def _largest(out: Tensor) -> Tensor:
    if not out.numel() or not out.is_floating_point():
        return out.new_zeros(len(out), dtype=torch.float32)
    return out.reshape(len(out), -1).amax(1)


def _not_finite(out: Tensor) -> bool:
    # where the sum is finite, all are
    return not (math.isfinite(float(out.sum())) or bool(out.isfinite().all()))


def _farthest_from_0(out: Tensor) -> Tensor:
    if not out.numel() or not out.is_floating_point():
        return out.new_zeros(len(out), dtype=torch.float32)
    return torch.linalg.vector_norm(out.reshape(len(out), -1), math.inf, dim=1)


LOGITS = Rule("holds NaN or +inf", _nan_or_inf, _largest)
"""Of logits: -inf masks a token and is let through."""

LATENTS = Rule("is not finite", _not_finite, _farthest_from_0)
"""Of latents and of predictions for them, where no infinity means anything."""


class Watch:
    """Looks whether the numbers of a sampling are sound: on a CPU at once, elsewhere at the end.

    To look at a number on a GPU is to wait for it, and for all that was asked of it before.

    Args:
        device: of the numbers; None looks at once wherever they are.
        rule: what the model's outputs may not hold.
    """

    def __init__(self, device: torch.device | None = None, rule: Rule = LOGITS) -> None:
        self.rule, self.at_once = rule, device is None or device.type == "cpu"
        self._seen: list[tuple[str, str, Tensor]] = []

    def see(self, what: str, broken: Tensor, advice: str) -> None:
        """Look, or note to look later, whether something is wrong.

        Args:
            what: is wrong, and at which step.
            broken: the samples in which it is, bool (B,), or numbers (B,) that are NaN or +inf there.
            advice: what to do about it.

        Raises:
            FloatingPointError: if it is in some, and is looked at.
        """
        self._seen.append((what, advice, broken))
        if self.at_once:
            self.finish()

    def see_outputs(self, outputs: Mapping[str, Tensor], step: str) -> None:
        """:meth:`see` the outputs (B, ...) of branches, before they are guided: guidance saturates +inf.

        Raises:
            FloatingPointError: see :meth:`see`; looking at once it names all branches that are unsound.
        """
        if not self.at_once:
            for name, out in outputs.items():
                self.see(self._of_branches([name], step), self.rule.peaks(out), CHECK_MODEL)
        elif any(self.rule.broken(out) for out in outputs.values()):
            each = {name: places_of(self.rule.samples(out)) for name, out in outputs.items()}
            broken = [name for name, samples in each.items() if samples]
            samples = sorted({i for of_branch in each.values() for i in of_branch})
            raise unsound(self._of_branches(broken, step), samples, CHECK_MODEL)

    def see_guided(self, out: Tensor, step: str) -> None:
        """:meth:`see` a guided output (B, ...), after those of its branches.

        Raises:
            FloatingPointError: see :meth:`see`.
        """
        if not self.at_once or self.rule.broken(out):
            what = f"the guided output {self.rule.trouble} at {step}, where those of its branches are sound"
            self.see(what, self.rule.peaks(out), CHECK_GUIDANCE)

    def see_latents(self, latents: Tensor, where: str) -> None:
        """:meth:`see` whether finite outputs have carried latents (B, ...) beyond what a float holds.

        Args:
            latents: (B, ...).
            where: they are, as in "after the last step".

        Raises:
            FloatingPointError: see :meth:`see`.
        """
        if not self.at_once or LATENTS.broken(latents):
            self.see(f"the latents are not finite {where}", LATENTS.peaks(latents), CHECK_LATENTS)

    def finish(self) -> None:
        """Look at what was noted.

        Raises:
            FloatingPointError: says of the first that is broken what it is, in which samples, and what to do.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        # one look at all of a dtype; what is no flag is broken where it is not below +inf
        by_dtype = {
            dtype: iter(torch.stack([own for *_, own in seen if own.dtype == dtype]).tolist())
            for dtype in {own.dtype for *_, own in seen}
        }
        for what, advice, own in seen:
            values = next(by_dtype[own.dtype])
            flags = values if own.dtype == torch.bool else [not v < math.inf for v in values]
            if any(flags):
                raise unsound(what, [i for i, broken in enumerate(flags) if broken], advice)

    def _of_branches(self, names: list[str], step: str) -> str:
        return f"the model's output {self.rule.trouble} at {step}, in the branches {names}"


def unsound(what: str, samples: Sequence[int], advice: str) -> FloatingPointError:
    """The error of every sampler for numbers that it cannot go on with.

    Args:
        what: is wrong, and at which step.
        samples: their places in the batch.
        advice: what to do.
    """
    return FloatingPointError(f"{what}, of the samples {list(samples)}: {advice}")


def places_of(flags: Tensor) -> list[int]:
    """Where flags (B,) are true."""
    places: list[int] = flags.nonzero().flatten().tolist()
    return places
