"""The checks of guidance find each mistake that they were made for, and ours has none."""

import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from unicfg import Guidance, guide
from unicfg.guidance import branches
from unicfg.testing import CHECKS, Subject, check, of_guidance, stateless

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import conformance


@pytest.mark.parametrize("subject", conformance.ours(), ids=lambda subject: subject.name)
def test_our_guidance_passes(subject):
    report = check(subject)
    assert report.passed, report.faults
    assert set(report.results) == {one.__name__ for one in CHECKS}


def gated(c, u, s):
    return guide(c, u, s) if isinstance(s, torch.Tensor) or s > 1 else c.clone()


def whole_batch_norm(c, u, s):
    g = guide(c, u, s)
    return g * (c.std() / g.std().clamp(min=1e-9)) if s != 1.0 else c.clone()


def divided_by_deviation(c, u, s):
    return guide(c, u, s) / c.std() * c.std()


def in_half(c, u, s):
    return u + s * (c - u)


def some_channels(c, u, s):
    return torch.cat([guide(c[:, :2], u[:, :2], s), c[:, 2:].square().sqrt()], 1)


def jumps(c, u, s):
    return guide(c, u, s) if s in (0.0, 1.0) else u + s * (c - u - 0.3 * c)


def centred_by_norm(c, u, s):
    g = guide(c, u, s)
    return g * (c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)) ** 0.5


def forgetful(kind):
    """Momentum that is never reset and moves at every call."""
    memory = [torch.zeros(())]

    def rule(c, u, s):
        if memory[0].shape != c.shape or kind == "second":
            memory[0] = memory[0] if memory[0].shape == c.shape else torch.zeros_like(c)
        direction = c - u + 0.5 * memory[0]
        memory[0] = direction
        return c + (s - 1) * direction

    return rule


PLANTED = [
    ("identity_at_1", stateless("x", in_half)),
    ("identity_at_0", stateless("x", gated)),
    ("between_0_and_1", stateless("x", gated)),
    ("acts", stateless("x", lambda c, u, s: c.clone())),
    ("continuous_at_1", stateless("x", jumps)),
    ("same_in_every_space", stateless("x", some_channels, affine=True)),
    ("batch_invariant", stateless("x", whole_batch_norm)),
    ("scale_for_each_sample", stateless("x", lambda c, u, s: guide(c, u, float(s)))),
    ("keeps_the_dtype", stateless("x", lambda c, u, s: guide(c.float(), u.float(), s))),
    ("rounds_once", stateless("x", in_half)),
    ("defined_on_constants", stateless("x", divided_by_deviation)),
    ("no_overflow", stateless("x", in_half)),
    ("keeps_masks", stateless("x", in_half, "logits")),
    ("ignores_a_constant", stateless("x", centred_by_norm, "logits")),
    ("starts_anew", stateless("x", forgetful("first"))),
    ("same_at_a_second_evaluation", stateless("x", forgetful("second"))),
]


@pytest.mark.parametrize(("name", "subject"), PLANTED, ids=[name for name, _ in PLANTED])
def test_each_check_finds_its_mistake(name, subject):
    assert name in check(subject).faults


def test_every_check_has_a_planted_mistake():
    assert [name for name, _ in PLANTED] == [one.__name__ for one in CHECKS]


def test_what_is_not_claimed_is_not_counted_and_what_is_raised_is_a_fault():
    report = check(stateless("x", gated, exempt={"identity_at_0": "a design"}))
    assert report.results["identity_at_0"] == "not claimed: a design"
    assert "identity_at_0" not in report.faults and "between_0_and_1" in report.faults
    assert report.results["keeps_masks"] == "does not apply"

    def broken(c, u, s):
        raise KeyError("no such thing")

    report = check(stateless("x", broken))
    assert report.faults["acts"] == "KeyError: 'no such thing'" and not report.passed
    assert "acts" in str(report)
    with pytest.raises(ValueError, match="expected a number: the checks set it"):
        of_guidance("x", Guidance(branches.negative(3.0, 1.0)), "eps")
    with pytest.raises(ValueError, match=r"exempt names \['identity'\], expected some of"):
        check(Subject("x", lambda: None, exempt={"identity": "typo"}))


def test_a_masked_logit_of_the_naive_formula_is_nan():
    """What ``keeps_masks`` is for: -inf - (-inf)."""
    masked = torch.tensor([[-math.inf, 0.0]])
    assert in_half(masked, masked, 2.0).isnan().any()
    assert not guide(masked, masked, 2.0).isnan().any()


def test_the_page_of_the_docs_is_what_the_checks_say():
    page = (Path(__file__).parents[1] / "docs/conformance.md").read_text()
    for library in ("diffusers", "transformers", "torch"):
        if f"{library} {version(library).split('+')[0]}" not in page:
            pytest.skip(f"the page was made with another {library}")
    made = conformance.page("python benchmarks/conformance.py")
    assert marks(made) == marks(page)


def marks(page):
    """The tables; the digits of an error may differ between machines."""
    return [line for line in page.splitlines() if line.startswith("|")]
