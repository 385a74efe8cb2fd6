"""Schedules: callables from progress to the scale s.

Progress is the fraction of sampling done, 0.0 at the first step and 1.0 at the last, whether steps are token
positions, unmasking rounds or denoising steps; so a schedule moves between families unchanged.

Schedules nest: wherever a scale is expected another schedule may stand, and it sees the same progress.
``interval(linear(1, 4), 0.2, 0.8)`` follows the ramp inside the interval and is 1 outside it. To add one, write
a callable; a frozen dataclass prints its own settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unicfg.guidance.core import Scale, Schedule

__all__ = [
    "at_levels",
    "constant",
    "cosine",
    "decay",
    "interval",
    "linear",
    "log_snr_interval",
    "noise_interval",
    "power_cosine",
    "table",
]


def _at(scale: Scale | Schedule, progress: float) -> Scale:
    """The value of a nested scale or schedule."""
    if isinstance(scale, Tensor) or not callable(scale):
        return scale
    return scale(progress)


@dataclass(frozen=True)
class constant:
    """The same scale at every step."""

    scale: Scale | Schedule

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        return _at(self.scale, progress)


@dataclass(frozen=True)
class linear:
    """A straight line from ``start`` to ``end``.

    Upwards, ``linear(1, s)``: Muse (arXiv 2301.00704, section 2.7) and MAR; VAR's w = cfg * progress is
    ``linear(1, 1 + cfg)``. Downwards: MAGNeT (arXiv 2401.04577).
    """

    start: Scale | Schedule
    end: Scale | Schedule

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        return _blend(_at(self.start, progress), _at(self.end, progress), progress)


@dataclass(frozen=True)
class cosine:
    """Half a cosine from ``start`` to ``end``: flat at both ends, steepest in the middle."""

    start: Scale | Schedule
    end: Scale | Schedule

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        rise = (1 - math.cos(math.pi * progress)) / 2
        return _blend(_at(self.start, progress), _at(self.end, progress), rise)


@dataclass(frozen=True)
class power_cosine:
    """From 1 up to ``scale`` along (1 - cos(pi * progress^power)) / 2: the larger ``power``, the later.

    MDT (arXiv 2303.14389) with power 4, RAR (arXiv 2411.00776) with 1.2 to 2.75 over token positions.

    Raises:
        ValueError: if ``power`` is not positive.
    """

    scale: Scale | Schedule
    power: float

    def __post_init__(self) -> None:
        """Check the power."""
        if not self.power > 0:
            raise ValueError(f"power is {self.power}, expected a number > 0")

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        rise = (1 - math.cos(math.pi * progress**self.power)) / 2
        return _blend(1.0, _at(self.scale, progress), rise)


@dataclass(frozen=True)
class interval:
    """``scale`` where start <= progress <= end (both ends included), ``outside`` elsewhere.

    With ``outside=1`` no unconditional rows are run there: Kynkaanniemi et al., arXiv 2404.07724.

    Raises:
        ValueError: unless 0 <= start <= end <= 1.
    """

    scale: Scale | Schedule
    start: float
    end: float
    outside: Scale | Schedule = 1.0

    def __post_init__(self) -> None:
        """Check the ends."""
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"interval is [{self.start}, {self.end}], expected 0 <= start <= end <= 1"
            )

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        return _at(self.scale if self.start <= progress <= self.end else self.outside, progress)


@dataclass(frozen=True)
class decay:
    """From ``scale`` towards 1: 1 + (scale - 1) * exp(-rate * progress).

    The first steps decide on the composition and get all of the guidance, the last ones little.

    Raises:
        ValueError: if ``rate`` is negative.
    """

    scale: Scale | Schedule
    rate: float = 3.0

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}, expected a finite number >= 0")

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        return _blend(1.0, _at(self.scale, progress), math.exp(-self.rate * progress))


@dataclass(frozen=True)
class noise_interval:
    """``scale`` at noise levels low <= sigma / alpha <= high (both ends included), ``outside`` elsewhere.

    For denoisers: the same stretch of noise whatever the path, the number of steps and their spacing. On the paths of
    EDM, where alpha is 1, it is the interval in sigma of Kynkaanniemi et al., arXiv 2404.07724, equation 5 (whose lower
    end is excluded).

    Raises:
        ValueError: unless 0 <= low <= high; when called outside of ``sample_diffusion``, which alone knows the levels.
    """

    scale: Scale | Schedule
    low: float
    high: float
    outside: Scale | Schedule = 1.0

    def __post_init__(self) -> None:
        """Check the ends."""
        if not 0 <= self.low <= self.high:
            raise ValueError(f"interval is [{self.low}, {self.high}], expected 0 <= low <= high")

    def __call__(self, progress: float) -> Scale:
        """Refuse: progress alone does not tell the noise level."""
        raise ValueError(
            "noise_interval needs the noise levels of a sampling, which only sample_diffusion has: expected interval() "
            "in other samplers, or at_levels() in a loop of your own"
        )

    def at_levels(self, ratios: Sequence[float]) -> Schedule:
        """The schedule of a sampling whose steps are at these sigma / alpha."""
        inside = (self.low <= ratio <= self.high for ratio in ratios)
        return table([self.scale if within else self.outside for within in inside])


MOST_LOG_SNR = 1400.0  # beyond it a ratio of floats is 0 or infinite


def log_snr_interval(
    scale: Scale | Schedule, low: float, high: float, outside: Scale | Schedule = 1.0
) -> noise_interval:
    """``scale`` where low <= log(alpha^2 / sigma^2) <= high: a :class:`noise_interval` in log-SNR.

    Raises:
        ValueError: unless low <= high.
    """
    if not low <= high:
        raise ValueError(f"interval is [{low}, {high}], expected low <= high")
    least, most = (math.exp(-min(max(end, -MOST_LOG_SNR), MOST_LOG_SNR) / 2) for end in (high, low))
    return noise_interval(scale, least, most, outside)


def at_levels(scale: Scale | Schedule, ratios: Sequence[float]) -> Scale | Schedule:
    """A scale or schedule for a sampling whose steps are at these sigma / alpha, nested schedules included."""
    if hasattr(scale, "at_levels"):
        scale = scale.at_levels(ratios)
    if isinstance(scale, Tensor) or not dataclasses.is_dataclass(scale):
        return scale
    changes = {}
    for field in dataclasses.fields(scale):
        value = getattr(scale, field.name)
        if isinstance(value, tuple):
            changes[field.name] = tuple(at_levels(entry, ratios) for entry in value)
        elif callable(value):
            changes[field.name] = at_levels(value, ratios)
    schedule: Schedule = dataclasses.replace(scale, **changes)
    return schedule


def is_steady(scale: object) -> bool:
    """Whether a scale, or every weight of branches, is known to be the same at all progress; a function is not."""
    if isinstance(scale, (int, float, Tensor)):
        return True
    if isinstance(scale, constant):
        return is_steady(scale.scale)
    if isinstance(scale, table):
        return len(scale.values) == 1 and is_steady(scale.values[0])
    if not hasattr(scale, "fixed_at") or not dataclasses.is_dataclass(scale):
        return False
    parts = [getattr(scale, field.name) for field in dataclasses.fields(scale)]
    flat = [entry for part in parts for entry in (part if isinstance(part, tuple) else (part,))]
    return all(is_steady(entry) for entry in flat if not isinstance(entry, (str, bool)))


@dataclass(frozen=True)
class table:
    """One value a step, from any list: the nearest value for a sampling of another length.

    Raises:
        ValueError: if ``values`` is empty.
    """

    values: Sequence[Scale | Schedule]

    def __post_init__(self) -> None:
        """Keep the values from changing under the schedule."""
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ValueError("values is empty, expected at least one scale")

    def __call__(self, progress: float) -> Scale:
        """The scale at ``progress``."""
        # floor(x + .5), not round(): Python rounds halves to even, which would skip entries
        index = math.floor(progress * (len(self.values) - 1) + 0.5)
        return _at(self.values[index], progress)


def _blend(start: Scale, end: Scale, weight: float) -> Scale:
    return (1 - weight) * start + weight * end
