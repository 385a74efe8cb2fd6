"""Diffusion sampling: parity with diffusers, orders on analytic mixtures, spaces, branches, seeds, inpainting, errors."""

import copy
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import DDIMInverseScheduler, EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from unicfg import ConditionDropout, Guidance, guide
from unicfg.guidance.schedules import interval
from unicfg.guidance.schedules import linear as ramp
from unicfg.guidance.spaces import SPACES, convert, join
from unicfg.sampling import sample_diffusion
from unicfg.sampling.branches import Guided
from unicfg.sampling.paths import cosine, linear, straight
from unicfg.sampling.randomness import generators, normal
from unicfg.sampling.solvers import integrate, time_grid

# diffusers hands tensors to numpy in a way that numpy 2 is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

COND = torch.tensor([[1.0], [-0.5], [2.0], [0.7]])
NULL = torch.tensor([0.0])
SEEDS = [0, 1, 2, 3]
SHAPE = (2, 3, 3)
SOLVERS = ("ddim", "heun", "dpmpp_2m")


class Toy(torch.nn.Module):
    """A nonlinear network of nothing in particular that knows what it predicts."""

    latent_shape = SHAPE

    def __init__(self, path=None, space="v"):
        super().__init__()
        self.path, self.space = path or cosine(), space
        self.rows = []
        self.eval()

    def forward(self, x, cond, t):
        self.rows.append(len(x))
        t = t.view(-1, 1, 1, 1)
        mixed = x + 0.5 * x.roll(1, -1) - 0.3 * x.roll(1, -3)
        return torch.tanh(mixed + cond.view(-1, 1, 1, 1) * (1 + t)) * (0.4 + t)


class InSpace(Toy):
    """The predictions of a toy for v, told in another space."""

    def forward(self, x, cond, t):
        alpha, sigma = self.path.coefficients(t.double().view(-1, 1, 1, 1))
        out = convert(
            super().forward(x, cond, t).double(), x.double(), alpha, sigma, "v", self.space
        )
        return out.to(x.dtype)


class Mixture:
    """The exact denoiser of a mixture of Gaussians: two classes, and both together where the class is 0."""

    means = torch.tensor([[1.5, 0.0], [0.5, 1.5], [-1.0, -1.0], [-1.5, 0.5]], dtype=torch.float64)
    shares = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.4, 0, 0], [0, 0, 0.5, 0.5]]).double()
    std = 0.4
    latent_shape = (2,)

    def __init__(self, path, space):
        self.path, self.space = path, space

    def __call__(self, x, cond, t):
        x_, mu = x.double()[:, None], self.means
        alpha, sigma = self.path.coefficients(t.double().view(-1, 1, 1))
        variance = (alpha * self.std) ** 2 + sigma**2
        apart = x_ - alpha * mu  # (R, K, 2)
        log = self.shares[cond[:, 0].long()].log() - (apart**2).sum(-1) / (2 * variance[..., 0])
        weights = log.softmax(-1)[..., None]
        x0 = (weights * (mu + alpha * self.std**2 * apart / variance)).sum(1)
        eps = (weights * sigma * apart / variance).sum(1)
        return join(x0, eps, alpha[:, 0], sigma[:, 0], self.space).to(x.dtype)


def name(build):
    """Id of a parameter: schedulers are built inside the tests, where what their library warns of is let pass."""
    made = build.func if isinstance(build, partial) else build
    # no repr of a function: it has an address, in which two processes differ
    return getattr(made, "__name__", str(made)[:30])


def run(model, cond=COND, seeds=SEEDS, s=3.0, **arguments):
    arguments = {"uncond": NULL, "steps": 10} | arguments
    if "times" in arguments:
        del arguments["steps"]
    guidance = s if isinstance(s, Guidance) else Guidance(s)
    return sample_diffusion(model, cond, seeds=seeds, guidance=guidance, **arguments)


def by_hand(model, scheduler, time_of, s=3.0, steps=10, noise_source=False, start=1.0):
    """The loop of a diffusers pipeline, for a model that predicts what the scheduler expects.

    A pipeline starts a variance-preserving state at noise of deviation 1; ``start`` makes that the path's sigma.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    sources = generators(SEEDS)
    x = normal(sources, SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0)) * start
    for i, timestep in enumerate(scheduler.timesteps):
        scaled = (
            scheduler.scale_model_input(x, timestep)
            if hasattr(scheduler, "scale_model_input")
            else x
        )
        t = torch.full((4,), float(time_of(scheduler, i)))
        c, u = model(scaled, COND, t), model(scaled, NULL.expand(4, 1), t)
        extra = {"generator": sources} if noise_source else {}
        x = scheduler.step(u + s * (c - u), timestep, x, **extra).prev_sample
    return x


def of_timestep(scheduler, i):
    return (float(scheduler.timesteps[i]) + 1) / 1000


def of_ratio(scheduler, i):
    return linear().time(scheduler.sigmas[i])


def of_sigma(scheduler, i):
    return scheduler.sigmas[i]


# --- our solvers beside those of diffusers


PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("space", PREDICTIONS)
def test_ddim_is_that_of_diffusers(space):
    """From 900 of 1000 on: at the very end of the path alpha, known to them in float32, is divided by."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=PREDICTIONS[space])
    model = Toy(linear(), space)
    start = float((1 - scheduler.alphas_cumprod[900]).sqrt())
    theirs = by_hand(model, scheduler, of_timestep, start=start)
    times = [(900 - 100 * i + 1) / 1000 for i in range(10)] + [0.0]
    torch.testing.assert_close(run(model, times=times), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_fresh_noise_is_that_of_diffusers(eta):
    scheduler = DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    step = scheduler.step
    scheduler.step = None  # a deep copy would bind it to the original
    model = Toy(linear(), "v")
    scheduler.set_timesteps(10)
    sources = generators(SEEDS)
    x = normal(sources, SHAPE)
    for i, timestep in enumerate(scheduler.timesteps):
        t = torch.full((4,), of_timestep(scheduler, i))
        c, u = model(x, COND, t), model(x, NULL.expand(4, 1), t)
        fresh = normal(sources, SHAPE)
        x = step(u + 3.0 * (c - u), timestep, x, eta=eta, variance_noise=fresh).prev_sample
    torch.testing.assert_close(run(model, eta=eta), x, atol=2e-4, rtol=2e-4)
    assert (run(model) - x).abs().max() > 0.1


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("space", PREDICTIONS)
def test_dpmpp_2m_is_that_of_diffusers(space, karras):
    scheduler = DPMSolverMultistepScheduler(
        timestep_spacing="leading", prediction_type=PREDICTIONS[space], use_karras_sigmas=karras
    )
    assert scheduler.config.algorithm_type == "dpmsolver++" and scheduler.config.solver_order == 2
    model = Toy(linear(), space)
    scheduler.set_timesteps(10)
    times = linear().time(scheduler.sigmas)
    start = float(linear().coefficients(times)[1][0])
    theirs = by_hand(model, scheduler, of_ratio, start=start)
    ours = run(model, solver="dpmpp_2m", times=times)
    # a karras grid starts at alpha = 1 / 157, where eps is a poor way to say anything
    close = 5e-3 if karras and space == "eps" else 2e-4
    torch.testing.assert_close(ours, theirs, atol=close, rtol=close)
    assert (run(model, solver="ddim", times=times) - theirs).abs().max() > 1e-2


def test_heun_is_that_of_diffusers():
    """In their coordinates a Heun step is trapezoidal in sigma / alpha, in ours in tau: the two agree in the limit."""
    scheduler = HeunDiscreteScheduler(prediction_type="v_prediction")
    model = Toy(linear(), "v")
    errors = []
    for steps in (20, 80):
        scheduler.set_timesteps(steps)
        ratios = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
        ours = run(model, solver="heun", times=linear().time(ratios))
        theirs = by_hand(model, scheduler, of_ratio, steps=steps)
        errors.append(float((ours - theirs).abs().max()))
    assert errors[1] < errors[0] / 8, errors  # a sixteenth, at second order


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_that_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    model = Toy(straight(), "flow")
    theirs = by_hand(model, scheduler, of_sigma)
    scheduler.set_timesteps(10)
    ours = run(model, times=scheduler.sigmas)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    grid = time_grid(straight(), 10, shift=shift)
    torch.testing.assert_close(grid.float(), scheduler.sigmas)


# --- a scheduler of diffusers inside our sampler


@pytest.mark.parametrize(
    ("scheduler", "space", "time_of"),
    [
        (partial(DDIMScheduler, clip_sample=False), "eps", of_timestep),
        (partial(DDIMScheduler, clip_sample=False, prediction_type="sample"), "x0", of_timestep),
        (partial(DDIMScheduler), "eps", of_timestep),  # clips: the scheduler's settings hold
        (partial(DPMSolverMultistepScheduler), "eps", of_ratio),
        (partial(DPMSolverMultistepScheduler, use_karras_sigmas=True), "eps", of_ratio),
        (partial(DPMSolverMultistepScheduler, prediction_type="v_prediction"), "v", of_ratio),
        (partial(EulerDiscreteScheduler), "eps", of_ratio),
        (
            partial(EulerDiscreteScheduler, use_karras_sigmas=True, timestep_spacing="leading"),
            "eps",
            of_ratio,
        ),
        (partial(HeunDiscreteScheduler), "eps", of_ratio),
        (partial(UniPCMultistepScheduler), "eps", of_ratio),
    ],
    ids=name,
)
def test_a_scheduler_gives_what_its_own_loop_gives(scheduler, space, time_of):
    scheduler = scheduler()
    model = Toy(linear(), space)
    theirs = by_hand(model, scheduler, time_of)
    ours = run(model, scheduler=scheduler)
    assert ours.dtype == torch.float32
    # rounding of the time of a table is amplified by 1 / alpha = 157 at the first step
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_scheduler_gives_what_its_own_loop_gives(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    model = Toy(straight(), "flow")
    ours = run(model, scheduler=scheduler)
    torch.testing.assert_close(ours, by_hand(model, scheduler, of_sigma), atol=1e-5, rtol=1e-5)


def test_flow_sigmas_of_a_multistep_scheduler():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    model = Toy(straight(), "flow")
    ours = run(model, scheduler=scheduler)
    torch.testing.assert_close(ours, by_hand(model, scheduler, of_sigma), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(DDPMScheduler, clip_sample=False, prediction_type="v_prediction"),
        partial(EulerAncestralDiscreteScheduler, prediction_type="v_prediction"),
        partial(
            DPMSolverMultistepScheduler,
            algorithm_type="sde-dpmsolver++",
            prediction_type="v_prediction",
        ),
    ],
    ids=name,
)
def test_a_stochastic_scheduler_draws_from_the_seeds(scheduler):
    scheduler = scheduler()
    model = Toy(linear(), "v")
    together = run(model, scheduler=scheduler)
    torch.manual_seed(99)
    assert torch.equal(run(model, scheduler=scheduler), together)
    alone = run(model, COND[2:3], [2], scheduler=scheduler)
    torch.testing.assert_close(alone[0], together[2], atol=1e-6, rtol=1e-6)
    time_of = of_ratio if hasattr(scheduler, "sigmas") else of_timestep
    theirs = by_hand(model, scheduler, time_of, noise_source=True)
    torch.testing.assert_close(together, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(DDIMScheduler, clip_sample=False, timestep_spacing="trailing"),
        partial(DPMSolverMultistepScheduler, prediction_type="v_prediction"),
        partial(EulerDiscreteScheduler, prediction_type="sample"),
        partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True),
        partial(FlowMatchEulerDiscreteScheduler),
    ],
    ids=name,
)
def test_one_denoiser_gives_the_same_sample_on_any_path_and_in_any_space(scheduler):
    """The exact denoiser of one distribution, told for four paths: a scheduler cannot see the difference."""
    scheduler = scheduler()
    cond = torch.ones(4, 1)
    flow = hasattr(scheduler, "scale_noise") or scheduler.config.get("use_flow_sigmas")
    kinds = [(straight(), "flow"), (straight(), "x0"), (cosine(True), "v"), (linear(True), "x0")]
    if not flow:
        kinds += [(linear(), "eps"), (linear(), "score")]
    found = [
        run(Mixture(path, space), cond, scheduler=scheduler, s=2.0, steps=20)
        for path, space in kinds
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-3, rtol=2e-3)


def test_a_scheduler_is_left_as_it_was():
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(3)
    before = copy.deepcopy(scheduler.__dict__)
    model = Toy(linear(), "eps")
    nested = []

    def sample_inside(step):
        if step.index == 4:
            nested.append(run(model, scheduler=scheduler))

    outer = run(model, scheduler=scheduler, callback=sample_inside)
    assert torch.equal(nested[0], outer)
    assert scheduler.step_index == before["_step_index"]
    assert torch.equal(scheduler.timesteps, before["timesteps"])


def test_a_fractional_timestep_lies_between_its_neighbours_in_log_ratio():
    """Without sigmas the noise level comes from the table of alphas."""
    scheduler = DDIMScheduler(clip_sample=False)
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
    seen = []

    class Fractional:
        config, alphas_cumprod = {}, scheduler.alphas_cumprod
        timesteps = torch.tensor([500.25, 100.0])

        def set_timesteps(self, steps):
            pass

        def step(self, out, timestep, x):
            return SimpleNamespace(prev_sample=x - 0.1 * out)

    run(Toy(linear(), "eps"), scheduler=Fractional(), callback=seen.append)
    expected = (0.75 * table[500].log() + 0.25 * table[501].log()).exp()
    alpha, sigma = linear().coefficients(torch.tensor([seen[0].t, seen[1].t]).double())
    torch.testing.assert_close(
        sigma / alpha, torch.stack([expected, table[100]]), atol=0, rtol=1e-4
    )


# --- order and distribution, on a denoiser that is known exactly


def solve(path, solver, times, s=2.0):
    """Guided samples (16, 2) of the mixture in float64, all from the same states at ``times[0]``."""
    model, cond = Mixture(path, "v"), torch.ones(16, 1)
    alpha, sigma = path.coefficients(times[:1])
    eps, x0 = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0)).double()

    def evaluate(index, progress, x, t):
        t = torch.full((len(x),), t, dtype=x.dtype)
        c, u = model(x, cond, t), model(x, 0 * cond, t)
        return Guided(guide(c, u, s), s, {"cond": c, "uncond": u})

    return integrate(evaluate, alpha * x0 + sigma * eps, times, path, "v", solver)


def stretch(steps):
    """Without either end, where the solvers have other orders."""
    return torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)


@cache
def reference(path):
    return solve(path, "heun", stretch(640))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("path", [straight(), cosine()], ids=str)
def test_each_solver_converges_at_its_order(path, solver, order):
    """The slope of log error over log steps, under guidance."""
    errors = [
        (solve(path, solver, stretch(n)) - reference(path)).square().mean().sqrt().log2()
        for n in (20, 40, 80)
    ]
    slopes = [float(errors[i] - errors[i + 1]) for i in range(2)]
    print(f"{solver} on {path}: slopes {slopes}, last error {float(errors[-1].exp2()):.2e}")
    assert abs(slopes[-1] - order) < 0.2, slopes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("path", "spacing"),
    [
        (straight(), "uniform"),
        (cosine(True), "uniform"),
        (cosine(), "karras"),
        (linear(), "karras"),
    ],
    ids=str,
)
def test_unguided_samples_follow_the_data(path, spacing, solver):
    """Shares, means and deviations of the two components of class 1, within five standard errors."""
    n = 800
    model = Mixture(path, "x0")
    x = run(
        model,
        torch.ones(n, 1),
        range(n),
        s=1.0,
        path=path,
        solver=solver,
        spacing=spacing,
        steps=40,
    ).double()
    means = Mixture.means[:2]
    nearest = torch.cdist(x, means).argmin(1)
    share = float((nearest == 0).double().mean())
    # the components lie 4.5 deviations apart: hardly a sample is nearest to the wrong one
    assert abs(share - 0.6) < 5 * math.sqrt(0.24 / n)
    for k in range(2):
        part = x[nearest == k]
        assert (part.mean(0) - means[k]).abs().max() < 5 * 0.4 / math.sqrt(len(part)) + 0.01
        assert (part.std(0) - 0.4).abs().max() < 5 * 0.4 / math.sqrt(2 * len(part)) + 0.02


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("path", [straight(), cosine()], ids=str)
def test_fresh_noise_keeps_the_marginals(path, eta):
    n = 800
    model = Mixture(path, "x0")
    x = run(model, torch.ones(n, 1), range(n), s=1.0, steps=60, eta=eta).double()
    mean = 0.6 * Mixture.means[0] + 0.4 * Mixture.means[1]
    apart = Mixture.means[0] - Mixture.means[1]
    deviation = (0.16 + 0.24 * apart.square()).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * deviation / math.sqrt(n) + 0.02).all()
    assert ((x.std(0) - deviation).abs() < 5 * deviation / math.sqrt(2 * n) + 0.02).all()


def test_guidance_moves_samples_away_from_the_other_class():
    x = {
        s: run(Mixture(straight(), "flow"), torch.ones(64, 1), range(64), s=s)
        for s in (0.0, 1.0, 4.0)
    }
    gap = Mixture.means[:2].mean(0) - Mixture.means[2:].mean(0)
    along = [float((x[s].double() @ gap).mean()) for s in x]
    assert along[0] < along[1] < along[2]


# --- what must not matter, and what must


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", [straight(), cosine(), linear()], ids=str)
def test_all_spaces_give_the_same_guided_sample(path, solver):
    times = [0.95, 0.8, 0.6, 0.4, 0.2, 0.05, 0.0]
    found = {
        space: run(InSpace(path, space), times=times, solver=solver, s=4.0) for space in SPACES
    }
    for space in SPACES:
        torch.testing.assert_close(found[space], found["v"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_one_equals_no_guidance_and_zero_the_null_condition(solver):
    wrapped = ConditionDropout(Toy(), NULL).eval()
    plain = sample_diffusion(wrapped.model, COND, seeds=SEEDS, steps=10, solver=solver)
    assert torch.equal(run(wrapped, s=1.0, uncond=None, solver=solver), plain)
    null = sample_diffusion(wrapped.model, NULL.expand(4, 1), seeds=SEEDS, steps=10, solver=solver)
    assert torch.equal(run(wrapped, s=0.0, uncond=None, solver=solver), null)
    assert not torch.equal(plain, null)


@pytest.mark.parametrize("s", [-1.0, 0.5, 3.0, torch.tensor([0.0, 1.0, 2.0, 5.0])], ids=str)
def test_batched_pass_equals_two_passes(s):
    model, seen = Toy(), []
    run(model, s=s, callback=seen.append)
    for step in seen:
        t = torch.full((4,), step.t)
        cond_out, uncond_out = model(step.x, COND, t), model(step.x, NULL.expand(4, 1), t)
        torch.testing.assert_close(step.cond_out, cond_out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(step.uncond_out, uncond_out, atol=1e-6, rtol=1e-5)
        assert torch.equal(step.guided, guide(step.cond_out, step.uncond_out, s))
        assert (cond_out - uncond_out).abs().max() > 0.01


def test_forward_rows_are_counted():
    def rows(s, **arguments):
        model = Toy()
        run(model, s=s, steps=5, **arguments)
        return model.rows

    assert rows(1.0) == [4] * 5 == rows(0.0)
    assert rows(3.0) == [8] * 5 == rows(0.5)
    assert rows(Guidance(interval(3.0, 0.25, 0.5))) == [4, 8, 8, 4, 4]
    assert rows(3.0, solver="dpmpp_2m") == [8] * 5
    assert rows(3.0, solver="heun") == [8] * 9
    # the second evaluation of a Heun step is that of the next grid point
    assert rows(Guidance(interval(3.0, 0.25, 0.5)), solver="heun") == [4, 8, 8, 8, 8, 4, 4, 4, 4]
    scheduler = HeunDiscreteScheduler(prediction_type="v_prediction")
    assert rows(3.0, scheduler=scheduler, path=None) == [8] * 9


def test_conditions_are_encoded_once():
    class Encoded:
        def __init__(self, rows):
            self.values = rows

        def take(self, index):
            return Encoded(self.values[index])

    class Encoding(Toy):
        calls = 0

        def encode_condition(self, cond):
            self.calls += 1
            return Encoded(cond)

        def forward(self, x, cond, t):
            return super().forward(x, cond.values, t)

    model, guidance = Encoding(), Guidance(interval(3.0, 0.3, 0.6))
    assert torch.equal(run(model, s=guidance), run(Toy(), s=guidance))
    assert model.calls == 1


@pytest.mark.parametrize("arguments", [{}, {"eta": 1.0}, {"solver": "heun"}], ids=str)
def test_the_same_seed_gives_the_same_sample_in_any_batch(arguments):
    together = run(Toy(), **arguments)
    for i in range(4):
        alone = run(Toy(), COND[i : i + 1], [i], **arguments)
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-6)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    turned = run(Toy(), COND.flip(0), SEEDS[::-1], **arguments)
    torch.testing.assert_close(turned.flip(0), together, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(Toy(), seeds=[4, 5, 6, 7], **arguments), together)


def test_the_first_draw_is_the_initial_noise():
    for path, times in ((straight(), [1.0, 0.0]), (cosine(), [0.6, 0.0])):
        seen = []
        run(Toy(path), times=times, callback=seen.append)
        _, sigma = path.coefficients(torch.tensor(times[0]))
        torch.testing.assert_close(seen[0].x, sigma * normal(generators(SEEDS), SHAPE))


def test_the_callback_sees_every_step():
    seen = []
    x = run(Toy(), s=Guidance(ramp(1, 4)), solver="dpmpp_2m", steps=4, callback=seen.append)
    assert [step.index for step in seen] == [0, 1, 2, 3]
    assert [step.progress for step in seen] == [0, 1 / 3, 2 / 3, 1]
    assert [step.scale for step in seen] == pytest.approx([1, 2, 3, 4])
    assert [step.t for step in seen] == [1.0, 0.75, 0.5, 0.25]
    assert seen[0].uncond_out is None and seen[1].uncond_out is not None
    torch.testing.assert_close(seen[-1].x0, x)  # the last step goes to sigma = 0
    seen = []
    run(Toy(), solver="heun", steps=4, callback=seen.append)
    assert [step.index for step in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_terminal_snr(solver):
    for path in (cosine(True), linear(True), straight()):
        for space in ("v", "flow", "x0"):
            x = run(InSpace(path, space), solver=solver)
            assert x.isfinite().all() and x.abs().max() < 20
        for space in ("eps", "score"):
            model = Toy(path, space)
            with pytest.raises(ValueError, match="alpha is 0, where the space"):
                run(model, solver=solver)
            assert not model.rows  # before the model is run
            assert run(model, times=[0.9, 0.5, 0.0], solver=solver).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_may_stop_above_the_data(solver):
    """On its way to 0 the same solver passes through the same point, where the progress does not matter."""
    times = [1.0, 0.7, 0.4]
    seen = []
    run(Toy(), times=[*times, 0.0], solver=solver, callback=seen.append)
    torch.testing.assert_close(run(Toy(), times=times, solver=solver), seen[-1].x)


@settings(deadline=None)
@given(shift=st.floats(0.01, 100))
def test_a_shifted_grid_goes_from_exactly_1_to_exactly_0(shift):
    grid = time_grid(straight(), 7, shift=shift)
    assert grid[0] == 1 and grid[-1] == 0 and bool((grid.diff() < 0).all())


@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "RePaintScheduler"])
def test_a_scheduler_whose_step_needs_more_is_refused(name):
    import diffusers

    with pytest.raises(ValueError, match=rf"{name}, whose step\(\) needs"):
        run(Toy(), scheduler=getattr(diffusers, name)())


def test_a_grid_may_end_before_the_data():
    half = run(Toy(), times=[1.0, 0.7, 0.4])
    seen = []
    run(Toy(), times=[1.0, 0.7, 0.4, 0.0], callback=seen.append)
    as_tensor = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    assert torch.equal(half, run(Toy(), times=as_tensor))
    # the progress of the last steps differs, a constant scale does not
    assert torch.equal(half, seen[-1].x)


def test_time_grids():
    uniform = time_grid(cosine(), 4)
    assert uniform.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = time_grid(cosine(), 10, "karras")
    alpha, sigma = cosine().coefficients(grid)
    ratio = sigma / alpha
    assert len(grid) == 11 and grid[-1] == 0 and (grid.diff() < 0).all()
    assert ratio[0] == pytest.approx(80) and ratio[9] == pytest.approx(0.002)
    between = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10, dtype=torch.float64) ** 7
    torch.testing.assert_close(ratio[:10], between)
    assert time_grid(straight(), 10, "karras")[0] == pytest.approx(80 / 81)
    assert time_grid(straight(), 1, "karras")[0] == pytest.approx(80 / 81)

    class Short:  # ends at sigma / alpha = 3, before 80
        def coefficients(self, t):
            return 1 - 0.75 * t, 0.75 * t

        def time(self, ratio):
            return ratio / (1 + ratio) / 0.75

    assert time_grid(Short(), 10, "karras")[0] == pytest.approx(1)


# --- inpainting


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eta": 0.7},
        {"solver": "heun"},
        {"solver": "dpmpp_2m", "spacing": "karras"},
        {"scheduler": partial(DDIMScheduler, clip_sample=False, prediction_type="v_prediction")},
        {"scheduler": partial(EulerDiscreteScheduler, prediction_type="v_prediction")},
    ],
    ids=lambda a: name(next(iter(a.values()), "ddim")),
)
def test_inpainting_keeps_the_known_region(arguments):
    if "scheduler" in arguments:
        arguments = {"scheduler": arguments["scheduler"]()}
    init = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1:, 1:] = True
    full = mask.expand(4, 2, 3, 3)
    seen = []
    model = Toy(linear())
    x = run(model, init=init, mask=mask, callback=seen.append, **arguments)
    assert torch.equal(x[~full], init[~full])
    other = run(model, seeds=[9, 8, 7, 6], init=init, mask=mask, **arguments)
    assert torch.equal(other[~full], init[~full])
    assert (other - x)[full].abs().min() > 0
    noise = normal(generators(SEEDS), SHAPE)
    for step in seen:  # equation 8a, with the sample's own noise
        alpha, sigma = linear().coefficients(torch.tensor(step.t).double())
        known = alpha * init + sigma * noise
        torch.testing.assert_close(step.x[~full], known[~full], atol=1e-4, rtol=1e-4)
    # the rest is not what would have been drawn without it
    assert (run(model, **arguments) - x)[full].abs().max() > 1e-3


def test_masks_of_every_shape():
    init = torch.ones(SHAPE)
    mask = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    expected = run(Toy(), init=init, mask=mask)
    for same in (mask.expand(4, 3, 3), mask.expand(4, 1, 3, 3), mask.expand(4, *SHAPE)):
        assert torch.equal(run(Toy(), init=init.expand(4, *SHAPE), mask=same), expected)
    all_new = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(run(Toy(), init=init, mask=all_new), run(Toy()))
    assert torch.equal(run(Toy(), init=init, mask=~all_new), init.expand(4, *SHAPE))
    rows = torch.zeros(4, 3, 3, dtype=torch.bool)
    rows[1] = True
    mixed = run(Toy(), init=init, mask=rows)
    assert torch.equal(mixed[0], init)
    assert torch.equal(mixed[1], run(Toy())[1])


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "solver is 'euler', expected one of ddim, heun, dpmpp_2m, cfg_pp"),
        ({"spacing": "log"}, "spacing is 'log', expected one of uniform, karras"),
        ({"space": "noise"}, "space is 'noise': the model predicts v, not noise"),
        ({"space": "eps"}, "space is 'eps': the model predicts v, not eps"),
        ({"path": straight()}, "path is straight.*: the model is trained on cosine"),
        ({"path": "cosine"}, "path is 'cosine': "),
        ({"shape": (1, 3, 3)}, r"shape is \(1, 3, 3\): the model makes \(2, 3, 3\)"),
        ({"steps": 0}, "steps is 0, expected an int of at least 1"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"shift": 0.0}, "shift is 0"),
        ({"shift": math.nan}, "shift is nan"),
        ({"shift": 3.0, "spacing": "karras"}, "shift is 3.0 with spacing 'karras'"),
        ({"eta": 1.5}, "eta is 1.5, expected a number between 0 and 1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"eta": 0.5, "solver": "heun"}, "eta is 0.5 with solver 'heun'"),
        ({"times": [1.0]}, "times is"),
        ({"times": [0.5, 0.7, 0.0]}, "times is .*falling"),
        ({"times": [1.1, 0.0]}, "times is"),
        ({"times": [1.0, -0.1]}, "times is"),
        ({"times": [math.nan, 0.0]}, "times is"),
        ({"times": [1.0, 0.0], "shift": 2.0}, "times is given with"),
        ({"seeds": [0, 1]}, "seeds has 2 entries for a batch of 4"),
        ({"uncond": None}, "needs an unconditional branch"),
        ({"s": torch.ones(3) * 2}, "3 values for a batch of 4"),
        ({"init": torch.zeros(SHAPE)}, "mask is None, expected both"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, "init is None, expected both"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    model = Toy()
    with pytest.raises(ValueError, match=message):
        run(model, **arguments)
    assert not model.rows  # before the model is run


def test_bad_inpainting_sizes_are_refused():
    init, mask = torch.zeros(SHAPE), torch.ones(3, 3, dtype=torch.bool)
    for bad in (init[:1], init.expand(3, *SHAPE), init.long(), init / 0):
        with pytest.raises(ValueError, match="init"):
            run(Toy(), init=bad, mask=mask)
    for bad in (mask[:2], mask.expand(3, 3, 3), mask.expand(4, 3, 3, 3), mask.float()):
        with pytest.raises(ValueError, match="mask"):
            run(Toy(), init=init, mask=bad)


def test_what_the_model_does_not_declare_must_be_given():
    def network(x, cond, t):
        return x

    given = {"shape": SHAPE, "path": cosine(), "space": "v"}
    assert run(network, **given).shape == (4, *SHAPE)
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        with pytest.raises(ValueError, match=f"{name} is None and the model has no .*{name}"):
            run(network, **rest)
    with pytest.raises(ValueError, match="path is 'cosine', expected an object"):
        run(network, **given | {"path": "cosine"})
    with pytest.raises(ValueError, match="space is 'noise', expected one of"):
        run(network, **given | {"space": "noise"})
    assert torch.equal(run(Toy(), **given), run(Toy()))  # the same as declared is no conflict


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        run(Toy().train())
    with pytest.raises(TypeError, match=r"guidance is 3\.0"):
        sample_diffusion(Toy(), COND, seeds=SEEDS, guidance=3.0)

    class Doubled(Toy):  # predicts a variance, too
        def forward(self, x, cond, t):
            return torch.cat([x, x], 1)

    with pytest.raises(ValueError, match=r"returned \(4, 4, 3, 3\) for x \(4, 2, 3, 3\)"):
        run(Doubled())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_a_broken_model_stops_with_the_step_and_the_branch(value, branch, with_scheduler):
    class Broken(Toy):
        def forward(self, x, cond, t):
            out = super().forward(x, cond, t)
            null = (cond == 0).view(-1, 1, 1, 1)
            hit = (null if branch == "uncond" else ~null) & (t < 0.8).view(-1, 1, 1, 1)
            return out.masked_fill(hit, value)

    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    with pytest.raises(FloatingPointError, match=rf"at step 3, .*\['{branch}'"):
        run(Broken(linear()), scheduler=scheduler if with_scheduler else None)


@pytest.mark.parametrize("part", ["set_timesteps", "timesteps", "step", "config"])
def test_a_scheduler_that_lacks_something_is_refused(part):
    parts = {"set_timesteps": print, "timesteps": [1], "step": print, "config": {}}
    parts |= {"alphas_cumprod": torch.ones(2)}
    del parts[part]
    with pytest.raises(ValueError, match=f"SimpleNamespace, which lacks {part}: expected one"):
        run(Toy(), scheduler=SimpleNamespace(**parts))


@pytest.mark.parametrize(
    ("scheduler", "model", "message"),
    [
        (partial(EDMEulerScheduler), Toy(), "lacks alphas_cumprod"),
        (partial(KDPM2DiscreteScheduler), Toy(), "between its noise levels"),
        (partial(DDIMInverseScheduler), Toy(), "expected falling noise"),
        (
            partial(FlowMatchEulerDiscreteScheduler),
            Toy(cosine()),
            "inf, and the model's path ends at 157",
        ),
        (partial(FlowMatchEulerDiscreteScheduler), Toy(straight(), "eps"), "alpha is 0, where"),
        (
            partial(UniPCMultistepScheduler, use_flow_sigmas=True),
            Toy(straight()),
            "prediction_type 'epsilon'",
        ),
        (
            partial(DPMSolverMultistepScheduler, prediction_type="flow_prediction"),
            Toy(),
            "'flow_prediction'",
        ),
        (
            partial(DDIMScheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            Toy(linear(True)),
            "alpha = 0 with prediction_type 'epsilon'",
        ),
    ],
    ids=name,
)
def test_schedulers_that_cannot_be_followed_are_refused(scheduler, model, message):
    scheduler = scheduler()
    with pytest.raises(ValueError, match=message):
        run(model, scheduler=scheduler)
    assert not model.rows


@pytest.mark.parametrize(
    "arguments",
    [
        {"solver": "heun"},
        {"spacing": "karras"},
        {"shift": 2.0},
        {"eta": 0.5},
        {"times": [1.0, 0.0]},
    ],
    ids=str,
)
def test_a_scheduler_makes_the_steps_itself(arguments):
    with pytest.raises(ValueError, match="scheduler is given, which makes the steps itself"):
        run(Toy(), scheduler=DDIMScheduler(), **arguments)


def test_a_scheduler_with_noise_of_its_own_is_refused():
    class Noisy(DDIMScheduler):
        def step(self, out, timestep, x):
            stepped = super().step(out, timestep, x)
            return SimpleNamespace(prev_sample=stepped.prev_sample + torch.randn_like(x))

    with pytest.raises(ValueError, match="draws noise that no seed determines"):
        run(Toy(), scheduler=Noisy(prediction_type="v_prediction"))


def test_other_samplers_walk_rows_of_their_own():
    """``integrate`` for a head on tokens: rows (R, D), a generator each, any evaluation."""
    rows, seen = 5, []
    x = normal(generators(range(rows)), (3,))

    def evaluate(index, progress, x, t):
        seen.append((index, progress, t))
        return Guided(torch.tanh(x), 1.0, {"cond": torch.tanh(x)})

    grid = time_grid(straight(), 4)
    out = integrate(evaluate, x, grid, straight(), "flow", "heun")
    assert out.shape == (rows, 3)
    assert seen == [(i, i / 3, 1 - i / 4) for pair in ((0, 1), (1, 2), (2, 3), (3,)) for i in pair]
    one, two = (
        integrate(evaluate, x, grid, straight(), "flow", eta=1.0, sources=generators(range(rows)))
        for _ in range(2)
    )
    assert torch.equal(one, two) and not torch.equal(one, out)


def test_networks_may_run_in_half_precision():
    class Half(Toy):
        def forward(self, x, cond, t):
            return super().forward(x, cond, t).bfloat16()

    x = run(Half())
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, run(Toy()), atol=0.2, rtol=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"eta": 1.0}, {"solver": "heun"}, {"solver": "dpmpp_2m"}, {"scheduler": DDIMScheduler}],
    ids=str,
)
def test_a_gpu_draws_what_the_cpu_draws(arguments):
    if "scheduler" in arguments:
        arguments = {"scheduler": DDIMScheduler(prediction_type="v_prediction")}
    arguments = arguments | {"init": torch.ones(SHAPE), "mask": torch.eye(3).bool()}
    on_cpu = run(Toy(linear()), **arguments)
    on_gpu = run(Toy(linear()).cuda(), COND.cuda(), uncond=NULL.cuda(), **arguments)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)
