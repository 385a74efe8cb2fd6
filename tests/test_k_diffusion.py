"""Guided denoisers in samplers of k-diffusion's interface, which are written here by hand."""

import itertools
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unicfg import Branch, ConditionDropout, Guidance, guide, sample_diffusion
from unicfg.guidance import branches, mitigations, schedules
from unicfg.integrations.k_diffusion import guided
from unicfg.testing import GaussianMixture

SHAPE = (3, 2, 2)  # C, h, w
DOCS = Path(__file__).parent.parent / "docs" / "integrations" / "k-diffusion.md"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many calls on tiny tensors: a second thread takes longer to join than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Exploding:
    """x = x0 + sigma * eps with sigma = t / (1 - t): a path of ``sample_diffusion`` for k-diffusion's levels."""

    def coefficients(self, t):
        return torch.ones_like(t), t / (1 - t)

    def time(self, ratio):
        return ratio.double() / (1 + ratio.double())


def mixture():
    """Two classes in 12 dimensions, which are C * h * w."""
    generator = torch.Generator().manual_seed(0)
    return GaussianMixture(
        weights=torch.tensor([0.3, 0.2, 0.5]),
        means=0.4 * torch.randn(3, 12, generator=generator),
        variances=torch.tensor([0.4, 0.6, 0.5]),
        labels=torch.tensor([0, 1, 1]),
        path=Exploding(),
        space="x0",
    )


MIXTURE = mixture()
NULL = {"cond": MIXTURE.null_condition}
COND = torch.tensor([[0], [1], [1]])
SIGMAS = torch.tensor([20.0, 10.0, 5.0, 2.0, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64)


class Denoiser(nn.Module):
    """The exact denoiser of the mixture in k-diffusion's interface; notes the rows and levels of its calls."""

    def __init__(self, toy=MIXTURE):
        super().__init__()
        self.toy, self.rows, self.levels = toy, [], []
        self.eval()

    def forward(self, x, sigma, cond, shift=0.0):
        assert sigma.shape == x.shape[:1]
        self.rows.append(len(x))
        self.levels.append(float(sigma[0]))
        out = self.toy.predict(x.flatten(1), cond[:, 0], torch.ones_like(sigma), sigma, "x0")
        return out.view_as(x).to(x.dtype) + shift


def euler(model, x, sigmas, extra_args):
    for sigma, following in itertools.pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def heun(model, x, sigmas, extra_args):
    """Trapezoidal in x / (1 + sigma), as unicfg's; two evaluations a step, one where the sampling ends."""
    rows = x.new_ones(len(x))

    def slope(x, sigma):
        denoised = model(x, sigma * rows, **extra_args)
        return (x - denoised) / sigma - denoised

    for sigma, following in itertools.pairwise(sigmas):
        here, width = x / (1 + sigma), following / (1 + following) - sigma / (1 + sigma)
        first = slope(x, sigma)
        x = (1 + following) * (here + width * first)
        if following > 0:
            x = (1 + following) * (here + width * (first + slope(x, following)) / 2)
    return x


def midpoint(model, x, sigmas, extra_args):
    """Evaluates between the levels of the grid, as DPM-Solver-2 does."""
    rows = x.new_ones(len(x))
    for sigma, following in itertools.pairwise(sigmas[:-1]):
        between = (sigma * following).sqrt()
        slope = (x - model(x, sigma * rows, **extra_args)) / sigma
        ahead = x + slope * (between - sigma)
        x = x + (ahead - model(ahead, between * rows, **extra_args)) / between * (following - sigma)
    return x


def start(batch=3, seed=0):
    return 20.0 * torch.randn(
        batch, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


GUIDANCES = {
    "a number": Guidance(3.0),
    "between": Guidance(0.5),
    "each its own": Guidance(torch.tensor([1.0, 2.0, 0.0])),
    "ramp": Guidance(schedules.linear(1, 5)),
    "interval": Guidance(schedules.interval(4.0, 0.3, 0.7)),
    "noise interval": Guidance(schedules.noise_interval(schedules.linear(2, 4), 0.3, 6.0)),
    "weights": Guidance(branches.weights(cond=schedules.linear(2, 2), uncond=-1.0)),
    "rescaled": Guidance(6.0, (mitigations.rescale(0.7),)),
    "clipped": Guidance(6.0, (mitigations.dynamic_threshold(0.9),)),
    "fitted": Guidance(6.0, (mitigations.cfg_zero_star(),)),
    "held": Guidance(6.0, (mitigations.cfg_zero_star(), mitigations.zero_init(0.2))),
    "projected": Guidance(6.0, (mitigations.apg(0.0, 3.0, momentum=-0.5),)),
}


# a Heun step of theirs cannot know that a sample stands still, and goes half a step
ALIKE = [
    (name, own) for name in GUIDANCES for own in (euler, heun) if (name, own) != ("held", heun)
]


@pytest.mark.parametrize(("name", "sampler"), ALIKE)
def test_it_samples_what_sample_diffusion_samples(name, sampler):
    """The same path, levels and steps: every schedule and mitigation means the same in both."""
    guidance = GUIDANCES[name]
    ours = []
    sample_diffusion(
        lambda x, cond, t: MIXTURE(x.flatten(1).double(), cond, t).view_as(x).to(x.dtype),
        COND,
        uncond=MIXTURE.null_condition,
        guidance=guidance,
        seeds=[0, 1, 2],
        shape=SHAPE,
        path=Exploding(),
        space="x0",
        solver="heun" if sampler is heun else "ddim",
        times=(SIGMAS / (1 + SIGMAS)).tolist(),
        callback=lambda step: ours.append((step.x, step.x0)),
    )
    model, theirs = guided(Denoiser(), guidance, NULL, sigmas=SIGMAS), []

    def noting(x, sigma, **extra):
        out = model(x, sigma, **extra)
        theirs.append((x, out))
        return out

    sampler(noting, ours[0][0].double(), SIGMAS, {"cond": COND})
    if sampler is heun:
        theirs = theirs[::2]  # the first evaluation of each step
    assert len(theirs) == len(ours) == 7
    for (x, out), (own_x, own_out) in zip(theirs, ours, strict=True):
        torch.testing.assert_close(x, own_x.double(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out, own_out.double(), atol=2e-4, rtol=2e-4)


def test_a_call_is_the_formula_on_two_separate_passes():
    x, sigma, denoiser = start() / 5, torch.full((3,), 4.0, dtype=torch.float64), Denoiser()
    cond_out = denoiser(x, sigma, COND)
    uncond_out = denoiser(x, sigma, MIXTURE.null_condition.expand(3, 1))
    for s in (-1.0, 0.5, 3.0, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)):
        out = guided(denoiser, Guidance(s), NULL)(x, sigma, cond=COND)
        torch.testing.assert_close(out, guide(cond_out, uncond_out, s))
    assert torch.equal(guided(denoiser, Guidance(1.0), NULL)(x, sigma, cond=COND), cond_out)
    assert torch.equal(guided(denoiser, Guidance(0.0), NULL)(x, sigma, cond=COND), uncond_out)
    assert not torch.allclose(cond_out, uncond_out)


def test_rows_are_those_that_a_step_needs():
    denoiser = Denoiser()
    late = Guidance(schedules.interval(3.0, 0.5, 1.0))
    euler(guided(denoiser, late, NULL, sigmas=SIGMAS), start(), SIGMAS, {"cond": COND})
    assert denoiser.rows == [3, 3, 3, 6, 6, 6, 6]
    denoiser.rows.clear()
    by_noise = Guidance(schedules.noise_interval(3.0, 1.0, 5.0, outside=0.0))
    euler(guided(denoiser, by_noise, NULL), start(), SIGMAS, {"cond": COND})
    assert denoiser.rows == [3, 3, 6, 6, 6, 3, 3]


def progresses(levels, sigmas=SIGMAS):
    """What a schedule is asked for when a denoiser is called at these levels."""
    seen = []

    def schedule(progress):
        seen.append(progress)
        return 2.0

    model = guided(Denoiser(), Guidance(schedule), NULL, sigmas=sigmas)
    found = []
    for level in levels:
        seen.clear()
        model(start() / 20, torch.full((3,), level, dtype=torch.float64), cond=COND)
        assert len(set(seen)) == 1
        found.append(seen[0])
    return found


def test_progress_is_that_of_the_grid_and_goes_on_between_its_levels():
    assert progresses(SIGMAS[:-1].tolist()) == [i / 6 for i in range(7)]
    # what a sampler in half precision makes of a level is still that level
    assert progresses([0.4 * (1 + 5e-5), 0.4 * (1 - 5e-5)]) == [5 / 6, 5 / 6]
    between = progresses([math.sqrt(20 * 10), math.sqrt(0.4 * 0.1), 28.0, 0.01])
    assert between == pytest.approx([0.5 / 6, 5.5 / 6, 0.0, 1.0])
    assert progresses([30.0, 20.0, 5.0], torch.tensor([20.0, 0.0])) == [0.0, 0.0, 0.0]


@settings(max_examples=15)
@given(st.lists(st.floats(1e-3, 100.0), min_size=2, max_size=8, unique=True), st.data())
def test_progress_falls_with_no_level(levels, data):
    """On any grid it is in [0, 1], exact at the grid's levels, and never smaller at a lower level."""
    grid = sorted(levels, reverse=True)
    if min(a / b for a, b in itertools.pairwise(grid)) < 1.001:
        return
    asked = sorted(
        data.draw(st.lists(st.floats(1e-4, 200.0), min_size=2, max_size=5)), reverse=True
    )
    found = progresses(asked, torch.tensor([*grid, 0.0], dtype=torch.float64))
    assert found == sorted(found) and found[0] >= 0 and found[-1] <= 1
    last = max(len(grid) - 1, 1)
    exact = progresses(grid, torch.tensor([*grid, 0.0], dtype=torch.float64))
    assert exact == [i / last for i in range(len(grid))]


def test_evaluations_between_the_levels_are_guided_smoothly():
    """A ramp seen at mid points keeps a solver's second order: half the steps, a fourth of the error."""
    ramp = Guidance(schedules.linear(1, 3))

    def sample(steps):
        sigmas = torch.linspace(math.log(20), math.log(0.1), steps + 1, dtype=torch.float64).exp()
        # one more level, where nothing is evaluated, so that progress ends at 0.1 whatever the steps
        grid = torch.tensor([20.0, 0.1, 0.0], dtype=torch.float64)
        model = guided(Denoiser(), ramp, NULL, sigmas=grid)
        return midpoint(model, start(), torch.cat([sigmas, torch.zeros(1)]), {"cond": COND})

    exact = sample(80)
    coarse, fine = (float((sample(n) - exact).abs().max()) for n in (10, 20))
    assert fine < coarse / 2.8


def test_noise_intervals_hold_at_levels_that_are_no_grid_points():
    denoiser = Denoiser()
    model = guided(denoiser, Guidance(schedules.noise_interval(3.0, 1.0, 6.9)), NULL, sigmas=SIGMAS)
    for level in (7.0, 6.8, 1.0, 0.99):
        model(start() / 20, torch.full((3,), level), cond=COND)
    assert denoiser.rows == [3, 6, 6, 3]


MOMENTUM = Guidance(6.0, (mitigations.apg(0.0, momentum=-0.75),))


@pytest.mark.parametrize("sampler", [euler, heun])
def test_momentum_begins_anew_with_each_sampling(sampler):
    fresh = [
        sampler(
            guided(Denoiser(), MOMENTUM, NULL, sigmas=SIGMAS), start(3, i), SIGMAS, {"cond": COND}
        )
        for i in range(2)
    ]
    one = guided(Denoiser(), MOMENTUM, NULL, sigmas=SIGMAS)
    assert [
        torch.equal(sampler(one, start(3, i), SIGMAS, {"cond": COND}), fresh[i]) for i in (0, 1)
    ]
    for i in (0, 1, 0):
        assert torch.equal(sampler(one, start(3, i), SIGMAS, {"cond": COND}), fresh[i])
    # a sampling that was broken off leaves nothing behind either, and neither does one of another batch
    sampler(one, start(2, 7), SIGMAS[:4], {"cond": COND[:2]})
    assert torch.equal(sampler(one, start(3, 1), SIGMAS, {"cond": COND}), fresh[1])
    without = Guidance(6.0, (mitigations.apg(0.0),))
    plain = sampler(guided(Denoiser(), without, NULL), start(3, 0), SIGMAS, {"cond": COND})
    assert not torch.allclose(plain, fresh[0])
    assert MOMENTUM.mitigations == (mitigations.apg(0.0, momentum=-0.75),)


def test_momentum_outlasts_a_level_that_is_lifted_by_churn():
    """Levels that go down, up a little and down again are one sampling, unless they reach the top."""
    sigma = torch.tensor([20.0, 10.0, 14.0, 5.0], dtype=torch.float64)
    model, other = (guided(Denoiser(), MOMENTUM, NULL, sigmas=SIGMAS) for _ in range(2))
    outs = [model(start(seed=i), level.expand(3), cond=COND) for i, level in enumerate(sigma)]
    alone = other(start(seed=2), sigma[2].expand(3), cond=COND)
    assert not torch.allclose(outs[2], alone)
    anew = model(start(seed=5), torch.full((3,), 28.0, dtype=torch.float64), cond=COND)
    alone = guided(Denoiser(), MOMENTUM, NULL, sigmas=SIGMAS)(
        start(seed=5), torch.full((3,), 28.0, dtype=torch.float64), cond=COND
    )
    assert torch.equal(anew, alone)


def test_samples_do_not_depend_on_the_batch():
    guidance = Guidance(6.0, (mitigations.apg(0.0, 3.0, momentum=-0.5), mitigations.rescale()))
    model = guided(Denoiser(), guidance, NULL, sigmas=SIGMAS)
    together = heun(model, start(), SIGMAS, {"cond": COND})
    for i in range(3):
        alone = heun(model, start()[i : i + 1], SIGMAS, {"cond": COND[i : i + 1]})
        torch.testing.assert_close(alone[0], together[i])


def test_other_branches_and_arguments():
    x, sigma = start() / 5, torch.full((3,), 4.0, dtype=torch.float64)
    other = mixture()
    object.__setattr__(other, "variances", other.variances * 4)  # a denoiser that blurs
    denoiser, blurred = Denoiser(), Denoiser(other)
    negative = torch.tensor([[1], [0], [0]])
    u = denoiser(x, sigma, MIXTURE.null_condition.expand(3, 1))
    c, n, w = denoiser(x, sigma, COND), denoiser(x, sigma, negative), blurred(x, sigma, COND)
    denoiser.rows.clear(), blurred.rows.clear()
    away = guided(
        denoiser,
        Guidance(branches.negative(3.0, 1.5)),
        NULL,
        branches={"negative": {"cond": negative}},
    )
    torch.testing.assert_close(away(x, sigma, cond=COND), u + 3 * (c - u) - 1.5 * (n - u))
    auto = guided(
        denoiser, Guidance(branches.weak(2.0)), NULL, branches={"weak": Branch(model=blurred)}
    )
    torch.testing.assert_close(auto(x, sigma, cond=COND), c + (c - w))
    assert denoiser.rows == [9, 3] and blurred.rows == [3]
    # an argument with a row for each sample goes to every branch, so does a number
    shift = torch.arange(3.0, dtype=torch.float64).view(3, 1, 1, 1)
    model = guided(denoiser, Guidance(3.0), NULL)
    torch.testing.assert_close(
        model(x, sigma, cond=COND, shift=shift), model(x, sigma, cond=COND) + shift
    )
    torch.testing.assert_close(
        model(x, sigma, cond=COND, shift=2.0), model(x, sigma, cond=COND) + 2
    )


def test_a_negative_condition_for_each_sample_may_take_the_place_of_null():
    x, sigma, negative = start() / 5, torch.full((3,), 4.0, dtype=torch.float64), 1 - COND
    out = guided(Denoiser(), Guidance(3.0), {"cond": negative})(x, sigma, cond=COND)
    denoiser = Denoiser()
    expected = guide(denoiser(x, sigma, COND), denoiser(x, sigma, negative), 3.0)
    torch.testing.assert_close(out, expected)


def test_half_precision_comes_back_in_it():
    guidance = Guidance(6.0, (mitigations.rescale(),))
    x, sigma = (start() / 5).half(), torch.full((3,), 4.0).half()
    out = guided(Denoiser(), guidance, NULL)(x, sigma, cond=COND)
    exact = guided(Denoiser(), guidance, NULL)(x.double(), sigma.double(), cond=COND)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("scale", "fine"),
    [
        (2.0, True),
        (torch.tensor([1.0, 2.0, 3.0]), True),
        (schedules.constant(2.0), True),
        (schedules.noise_interval(2.0, 1.0, 6.0), True),
        (lambda progress: 2.0, False),  # which nobody can know
        (branches.weights(cond=2.0, uncond=-1.0), True),
        (schedules.linear(1, 3), False),
        (schedules.interval(3.0, 0.49, 0.51), False),
        (schedules.noise_interval(schedules.cosine(1, 3), 1.0, 6.0), False),
        (schedules.decay(3.0), False),
        (schedules.table([1.0, 2.0]), False),
        (branches.negative(schedules.linear(1, 3), 0.0), False),
        (lambda progress: 3.0 if progress < 0.5 else 1.0, False),
        (lambda progress: math.exp(progress), False),
    ],
)
def test_without_levels_only_what_does_not_depend_on_progress(scale, fine):
    x, sigma = start() / 5, torch.full((3,), 4.0, dtype=torch.float64)
    model = guided(Denoiser(), Guidance(scale), NULL)
    if fine:
        known = guided(Denoiser(), Guidance(scale), NULL, sigmas=SIGMAS)
        assert torch.equal(model(x, sigma, cond=COND), known(x, sigma, cond=COND))
    else:
        with pytest.raises(ValueError, match=r"expected sigmas|expected a finite number"):
            model(x, sigma, cond=COND)


def test_bad_arguments_are_refused_by_name():
    x, sigma = start(), torch.full((3,), 4.0)
    for mitigation in (mitigations.zero_init(), mitigations.apg(momentum=-0.5)):
        with pytest.raises(
            ValueError, match=r"sigmas is None, and the mitigation .* goes by the steps"
        ):
            guided(Denoiser(), Guidance(3.0, (mitigation,)), NULL)
    with pytest.raises(ValueError, match=r"kl_trust_region works on logits"):
        guided(Denoiser(), Guidance(3.0, (mitigations.kl_trust_region(1.0),)), NULL)
    for bad in ([1.0], [1.0, 2.0, 0.0], [2.0, 1.0, -1.0], [math.inf, 1.0], [2.0, math.nan]):
        with pytest.raises(ValueError, match="expected at least two levels that fall"):
            guided(Denoiser(), Guidance(3.0), NULL, sigmas=bad)
    with pytest.raises(ValueError, match="null is None"):
        guided(Denoiser(), Guidance(3.0), None)
    for wrong in (3.0, None):
        with pytest.raises(TypeError, match=f"guidance is {wrong}, expected a Guidance"):
            guided(Denoiser(), wrong, NULL)
    with pytest.raises(ValueError, match="training mode"):
        guided(Denoiser().train(), Guidance(3.0), NULL)
    with pytest.raises(TypeError, match=r"without \['cond'\]"):
        guided(Denoiser(), Guidance(3.0), NULL)(x, sigma)
    for wrong in (torch.tensor([1.0, 2.0, 2.0]), torch.tensor(4.0), torch.full((2,), 4.0)):
        with pytest.raises(ValueError, match=r"sigma is .*expected one level for all samples"):
            guided(Denoiser(), Guidance(3.0), NULL)(x, wrong, cond=COND)
    with pytest.raises(ValueError, match=r"the denoiser returned \(3, 12\) for x \(3, 3, 2, 2\)"):
        guided(lambda x, sigma, cond: x.flatten(1), Guidance(3.0), NULL)(x, sigma, cond=COND)
    with pytest.raises(ValueError, match="cfg_pp"):
        guided(Denoiser(), Guidance(branches.cfg_pp()), NULL)(x, sigma, cond=COND)
    with pytest.raises(FloatingPointError, match=r"holds NaN .*'uncond'"):
        broken = guided(
            lambda x, sigma, cond: x / (cond - 2).view(-1, 1, 1, 1) * 0, Guidance(3.0), NULL
        )
        broken(x, sigma, cond=COND)


def test_the_network_of_a_dropout_wrapper_in_k_diffusions_shell():
    """A network trained under ConditionDropout, in a shell that scales as k-diffusion's do."""

    class Network(nn.Module):
        def forward(self, x, cond, t):
            return (cond + t[:, None]).view(-1, 1, 1, 1) * x

    wrapped = ConditionDropout(Network(), torch.tensor([0.25])).eval()

    def denoiser(x, sigma, cond):
        scale = 1 / (sigma.square() + 1).sqrt().view(-1, 1, 1, 1)
        return x - wrapped(x * scale, cond, sigma.log()) * sigma.view(-1, 1, 1, 1)

    x, sigma, cond = start(), torch.full((3,), 4.0, dtype=torch.float64), torch.rand(3, 1)
    with torch.no_grad():
        out = guided(denoiser, Guidance(3.0), {"cond": wrapped.null_condition})(x, sigma, cond=cond)
        null = wrapped.null_condition.expand(3, 1)
        expected = guide(denoiser(x, sigma, cond), denoiser(x, sigma, null), 3.0)
    torch.testing.assert_close(out, expected)


def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, DOCS.name, "exec"), {})


def test_no_host_is_imported():
    code = (
        "import sys, unicfg.integrations.k_diffusion\n"
        "assert not {'k_diffusion', 'diffusers', 'transformers', 'models'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
