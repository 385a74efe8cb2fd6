"""Spaces and paths: round trips, published values, ends."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from unicfg.guidance.spaces import SPACES, Level, check_level, check_space, convert, join, split
from unicfg.sampling.paths import PATHS, cosine, linear, shift_time, straight

LEVELS = st.floats(0.01, 0.99)


def level(path, t):
    alpha, sigma = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return alpha, sigma


def sample(seed):
    """x0 and eps (B, C, h, w), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)


@settings(max_examples=15)
@given(t=LEVELS, seed=st.integers(0, 1000))
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("space", SPACES)
def test_split_undoes_join(path, space, t, seed):
    x0, eps = sample(seed)
    alpha, sigma = level(path, t)
    x = alpha * x0 + sigma * eps
    out = join(x0, eps, alpha, sigma, space)
    found = split(out, x, alpha, sigma, space)
    torch.testing.assert_close(found[0], x0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found[1], eps, atol=1e-8, rtol=1e-8)


@settings(max_examples=15)
@given(t=LEVELS, seed=st.integers(0, 1000))
@pytest.mark.parametrize("source", SPACES)
@pytest.mark.parametrize("target", SPACES)
def test_convert_goes_there_and_back(source, target, t, seed):
    """For any output, not only for one that is consistent with x."""
    out, x = sample(seed)
    alpha, sigma = level(straight(), t)
    there = convert(out, x, alpha, sigma, source, target)
    back = convert(there, x, alpha, sigma, target, source)
    torch.testing.assert_close(back, out, atol=1e-8, rtol=1e-8)


def test_conversions_have_their_published_values():
    """alpha = 0.8, sigma = 0.6, x0 = 2, eps = -1, by hand."""
    x0, eps = torch.tensor([2.0]), torch.tensor([-1.0])
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    expected = {"eps": -1.0, "x0": 2.0, "v": -0.8 - 1.2, "flow": -3.0, "score": 1 / 0.6}
    for space in SPACES:
        out = join(x0, eps, alpha, sigma, space)
        torch.testing.assert_close(out, torch.tensor([expected[space]]))


def test_score_is_the_gradient_of_the_log_density():
    """For data at one point, x_t is Gaussian around alpha * x0."""
    x0, eps = sample(0)
    alpha, sigma = level(cosine(), 0.4)
    x = (alpha * x0 + sigma * eps).requires_grad_()
    log_density = torch.distributions.Normal(alpha * x0, sigma).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(join(x0, eps, alpha, sigma, "score"), gradient)


def test_flow_is_the_derivative_along_the_straight_path():
    x0, eps = sample(1)
    t = torch.tensor(0.3, dtype=torch.float64)

    def x_at(time):
        alpha, sigma = straight().coefficients(time)
        return alpha * x0 + sigma * eps

    _, derivative = torch.autograd.functional.jvp(x_at, t, torch.ones_like(t))
    torch.testing.assert_close(join(x0, eps, *straight().coefficients(t), "flow"), derivative)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("space", SPACES)
def test_the_ends_are_refused_where_a_space_says_nothing(path, space):
    x0, eps = sample(2)
    noise, data = level(path, 1.0), level(path, 0.0)
    terminal = bool(noise[0] == 0)
    assert terminal == (path not in (cosine(), linear()))
    if terminal and space in ("eps", "score"):
        with pytest.raises(ValueError, match=f"alpha is 0, where the space '{space}'"):
            split(eps, eps, *noise, space)
    else:
        x = noise[0] * x0 + noise[1] * eps
        found = split(join(x0, eps, *noise, space), x, *noise, space)
        torch.testing.assert_close(found[0], x0, atol=1e-6, rtol=1e-6)
    if space == "x0":
        with pytest.raises(ValueError, match="sigma is 0, where the space 'x0'"):
            split(x0, x0, *data, space)
    elif space == "score":
        with pytest.raises(ValueError, match="sigma is 0"):
            join(x0, eps, *data, space)
    else:
        found = split(join(x0, eps, *data, space), x0, *data, space)
        torch.testing.assert_close(found[1], eps)


def test_one_bad_level_among_many_is_refused():
    alpha, sigma = straight().coefficients(torch.tensor([1.0, 0.5, 0.0]))
    for space in ("eps", "score", "x0"):
        with pytest.raises(ValueError, match="is 0"):
            check_level(alpha, sigma, space)
    check_level(alpha, sigma, "v")
    check_level(alpha, sigma, "flow")


def test_unknown_spaces_are_refused():
    x0, eps = sample(3)
    alpha, sigma = level(straight(), 0.5)
    for call in (
        lambda: check_space("noise"),
        lambda: split(eps, x0, alpha, sigma, "noise"),
        lambda: join(x0, eps, alpha, sigma, "noise"),
        lambda: convert(x0, eps, alpha, sigma, "eps", "noise"),
        lambda: convert(x0, eps, alpha, sigma, "noise", "eps"),
    ):
        with pytest.raises(ValueError, match="space is 'noise', expected one of eps, x0, v"):
            call()


@settings(max_examples=15)
@given(t=st.floats(0, 1))
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_inverts_the_ratio(path, t):
    alpha, sigma = level(path, t)
    found = path.time(sigma / alpha)
    # near the data alpha^2 = 1 - sigma^2 rounds: what counts is the noise level
    torch.testing.assert_close(path.coefficients(found)[1], sigma, atol=1e-8, rtol=1e-7)
    if t > 1e-3:
        assert abs(float(found) - t) < 1e-6


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_fall_from_data_to_noise(path):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    alpha, sigma = path.coefficients(t)
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()
    torch.testing.assert_close(path.time(sigma / alpha), t, atol=1e-6, rtol=0)
    single = path.coefficients(t.float())
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[0].double(), alpha, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", [p for p in PATHS.values() if p != straight()], ids=str)
def test_variance_is_preserved(path):
    alpha, sigma = path.coefficients(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


@pytest.mark.parametrize("path", [straight(), cosine(True), linear(True)], ids=str)
def test_zero_terminal_paths_end_in_pure_noise(path):
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = path.coefficients(torch.ones(1, dtype=dtype))
        assert alpha == 0 and sigma == 1
    assert path.time(torch.tensor(math.inf)) == 1


@pytest.mark.parametrize("path", [cosine(), linear()], ids=str)
def test_other_paths_end_at_one_level_and_stop_there(path):
    alpha, _ = level(path, 1.0)
    assert abs(float(alpha) - 0.0063528) < 1e-6
    assert path.time(torch.tensor([1e6, math.inf])).tolist() == [1.0, 1.0]


def test_the_linear_path_is_that_of_diffusers():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, _ = linear().coefficients(t)
    theirs = DDPMScheduler().alphas_cumprod
    torch.testing.assert_close(alpha.square().float(), theirs, atol=1e-6, rtol=2e-5)
    alpha, _ = linear(zero_terminal_snr=True).coefficients(t)
    theirs = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(alpha.square().float(), theirs, atol=1e-6, rtol=1e-4)
    assert theirs[-1] == 0


def test_shift_moves_times_towards_the_noise():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.75, 1.0]).double())
    assert torch.equal(shift_time(t, 1.0), t)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift is"):
            shift_time(t, shift)


def test_a_share_may_be_a_number_or_one_a_sample():
    x, out = torch.randn(2, 3, 4, 4, 4).unbind()
    alpha, sigma = torch.tensor([0.6, 0.8, 1.0]), torch.tensor([0.8, 0.6, 0.1])
    whole = convert(out, x, alpha, sigma, "eps", "x0")
    for i in range(3):  # as many samples as columns: (B,) must not fall on these
        one = convert(out[i : i + 1], x[i : i + 1], float(alpha[i]), float(sigma[i]), "eps", "x0")
        torch.testing.assert_close(one[0], whole[i], atol=1e-6, rtol=1e-6)
    assert Level(x, 0.6, alpha, "eps").sigma.shape == (3, 1, 1, 1)
    for wrong in (torch.ones(4), torch.ones(4, 4)):
        with pytest.raises(ValueError, match=r"alpha has shape .* for samples \(3, 4, 4, 4\)"):
            split(out, x, wrong, 0.5, "eps")
