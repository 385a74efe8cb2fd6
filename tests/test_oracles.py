"""The oracles themselves, and the samplers against them: exact where exact is possible, chi-square where drawn."""

import math

import pytest
import torch

from unicfg import Guidance, sample_autoregressive, sample_diffusion, sample_masked
from unicfg.guidance.schedules import interval
from unicfg.guidance.spaces import SPACES, convert
from unicfg.sampling import cosine, straight
from unicfg.sampling.masked import halton_order
from unicfg.testing import (
    GaussianMixture,
    MarkovChain,
    MaskedTable,
    all_sequences,
    sequence_index,
    sharpen,
)

LEVEL = 1e-3  # a right sampler fails a chi-square test with this probability; the seeds are fixed


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of calls on tiny tensors: a second thread takes longer to join than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixture(**options):
    return GaussianMixture(
        weights=torch.tensor([0.3, 0.2, 0.25, 0.25]),
        means=torch.tensor([[1.5, 0.0], [0.5, 1.5], [-1.0, -1.0], [-1.5, 0.5]]),
        variances=torch.tensor([[0.2, 0.1], [0.1, 0.3], [0.15, 0.15], [0.3, 0.05]]),
        labels=torch.tensor([0, 0, 1, 1]),
        **options,
    )


def tables(*shape, seed=0, sharpness=1.0):
    logits = sharpness * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1)


def chain():
    transition = tables(2, 3, 3, seed=1)
    transition[0, 1] = torch.tensor([0.7, 0.3, 0.0])  # a token that cannot follow, in one class
    return MarkovChain(torch.tensor([0.4, 0.6]), tables(2, 3), transition, length=3)


def masked_table():
    return MaskedTable(torch.tensor([0.5, 0.5]), tables(2, 16, seed=3).view(2, 2, 2, 2, 2))


def chi_square_p(counts, probabilities):
    """Probability of a statistic at least this large; cells that expect fewer than five are one cell."""
    expected = probabilities * counts.sum()
    assert int(counts[expected == 0].sum()) == 0  # what is impossible was never drawn
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]]).double()
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    kept = expected > 1e-6
    statistic = ((observed - expected).square() / expected)[kept].sum()
    degrees = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def test_the_chi_square_test_by_table():
    # 16.266 is the 99.9 % point of three degrees of freedom
    counts, probabilities = torch.tensor([25, 25, 25, 25]), torch.tensor([0.25] * 4).double()
    assert chi_square_p(counts, probabilities) == 1.0
    counts = torch.tensor([1000 + 64, 1000 - 64, 1000, 1000])  # statistic 8.192
    assert chi_square_p(counts, probabilities) == pytest.approx(0.0422, abs=1e-4)
    half = torch.tensor(1.5, dtype=torch.float64)
    assert float(torch.special.gammaincc(half, half.new_tensor(16.266 / 2))) == pytest.approx(
        1e-3, rel=1e-3
    )


def rows_of(cond, n):
    return torch.full((n, 1), cond)


# the mixture by itself


@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.8, 0.6), (0.3, 0.9), (0.0, 1.0)])
def test_score_is_the_gradient_of_the_log_density(label, alpha, sigma):
    x = 2 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture().log_prob(x, label, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture().score(x.detach(), label, alpha, sigma), gradient)


@pytest.mark.parametrize("label", [None, 0, 1])
def test_log_density_equals_that_of_torch_distributions_and_integrates_to_1(label):
    toy = mixture()
    own = toy.labels == label if label is not None else torch.ones(4, dtype=torch.bool)
    parts = torch.distributions.Independent(
        torch.distributions.Normal(0.6 * toy.means[own], (0.36 * toy.variances[own] + 0.64).sqrt()),
        1,
    )
    weights = torch.distributions.Categorical(toy.weights[own])
    theirs = torch.distributions.MixtureSameFamily(weights, parts)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(toy.log_prob(x, label, 0.6, 0.8), theirs.log_prob(x))
    line = torch.linspace(-5, 5, 201, dtype=torch.float64)
    total = toy.log_prob(torch.cartesian_prod(line, line), label).exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("source", SPACES)
@pytest.mark.parametrize("target", SPACES)
def test_predictions_agree_in_every_space(source, target):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    a, b = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    told = convert(mixture().predict(x, label, a, b, source), x, a, b, source, target)
    torch.testing.assert_close(mixture().predict(x, label, a, b, target), told)
    torch.testing.assert_close(
        mixture().predict(x, label, a, b, "score"), mixture().score(x, label, a, b)
    )


def test_predictions_are_the_means_of_what_a_denoiser_is_trained_on():
    """Without a formula: the average x0 of noisy samples that fall close to a point."""
    toy, source = mixture(), torch.Generator().manual_seed(3)
    n = 400_000
    x0 = toy.sample(n, source, label=0)
    noisy = 0.8 * x0 + 0.6 * torch.randn(n, 2, generator=source, dtype=torch.float64)
    point = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    near = (noisy - point).norm(dim=1) < 0.15
    assert int(near.sum()) > 1500
    told = toy.predict(point, 0, 0.8, 0.6, "x0")[0]
    # the deviation of x0 given x is below 0.6, so a mean of 1500 is off by less than 5 * 0.6 / sqrt(1500)
    assert (x0[near].mean(0) - told).abs().max() < 0.08
    assert (told - toy.predict(point, None, 0.8, 0.6, "x0")[0]).abs().max() > 0.1


def test_limits_of_the_noise_level():
    """No noise: x is x0. Nothing but noise: the prediction is the mean of the class, or of all."""
    toy = mixture()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(toy.predict(x, 0, 1.0, 0.0, "x0"), x)
    for label, own in ((0, [0, 1]), (None, [0, 1, 2, 3])):
        shares = toy.weights[own] / toy.weights[own].sum()
        mean = (shares[:, None] * toy.means[own]).sum(0)
        torch.testing.assert_close(toy.predict(x, label, 0.0, 1.0, "x0"), mean.expand(5, 2))
        torch.testing.assert_close(toy.predict(x, label, 0.0, 1.0, "eps"), x)
    far = torch.tensor([[300.0, -300.0]])  # densities underflow, their logarithms do not
    assert bool(toy.log_prob(far).isfinite().all()) and bool(toy.score(far).isfinite().all())


def test_a_class_that_is_all_there_is_has_no_direction():
    alone = GaussianMixture(
        torch.ones(1), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.long)
    )
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(alone.score(x, 0, 0.5, 0.5), alone.score(x, None, 0.5, 0.5))


def test_as_a_model_it_keeps_the_dtype_and_batches_rows():
    toy = mixture(path=cosine(), space="v")
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(6))
    cond, t = torch.tensor([[0], [1], [2]] * 2), torch.linspace(0.1, 0.9, 6)
    out = toy(x, cond, t)
    assert out.dtype == torch.float32
    single = torch.cat([toy(x[i : i + 1], cond[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(out, single)


# guided flow


def fine_reference(toy, noise, label, s, steps):
    """Runge-Kutta of fourth order along dx/dt = guided velocity of the straight path, in float64."""

    def velocity(x, t):
        cond, uncond = (toy.predict(x, y, 1 - t, t, "flow") for y in (label, None))
        return cond * s - uncond * (s - 1)

    x, h = noise.double(), -1.0 / steps
    for i in range(steps):
        t = 1 + i * h
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, max(t + h, 0.0))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_guided_flow_follows_a_fine_reference(s):
    """Heun comes close, at its second order, on three paths and from three spaces: they are one flow."""
    toy, seeds = mixture(), list(range(16))
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in seeds])
    reference = fine_reference(toy, noise, 0, s, 160)
    coarser = fine_reference(toy, noise, 0, s, 80)
    assert (reference - coarser).abs().max() < 2e-5  # the reference is fine enough

    def error(steps, **options):
        own = mixture(**options)
        x = sample_diffusion(
            own,
            rows_of(0, 16),
            uncond=own.null_condition,
            seeds=seeds,
            guidance=Guidance(s),
            solver="heun",
            steps=steps,
        )
        return float((x - reference).abs().max())

    errors = [error(steps) for steps in (25, 50, 100)]
    assert errors[2] < 4e-3
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    zero = cosine(zero_terminal_snr=True)
    for options in ({"path": zero, "space": "v"}, {"path": zero, "space": "flow"}):
        assert error(100, **options) < 8e-3


def cell_probabilities(toy, label, edges):
    """Exact probability of every cell of a grid: the variances are diagonal, so cells are products."""
    normal = torch.distributions.Normal(toy.means[:, :, None], toy.variances.sqrt()[:, :, None])
    along = normal.cdf(edges.expand(len(toy.means), 2, -1)).diff(dim=-1)  # (K, 2, cells)
    cells = along[:, 0, :, None] * along[:, 1, None, :]
    own = toy.labels == label if label is not None else torch.ones(4, dtype=torch.bool)
    shares = torch.where(own, toy.weights, 0.0) / toy.weights[own].sum()
    return torch.einsum("k,kxy->xy", shares, cells).flatten()


def count_cells(x, edges):
    index = torch.bucketize(x.double(), edges[1:-1])
    return torch.bincount(index[:, 0] * (len(edges) - 1) + index[:, 1], minlength=64)


EDGES = torch.tensor([-math.inf, -1.8, -1.2, -0.6, 0, 0.6, 1.2, 1.8, math.inf]).double()


def draw_mixture(toy, label, s, n, **options):
    return sample_diffusion(
        toy,
        rows_of(label, n),
        uncond=toy.null_condition,
        seeds=list(range(n)),
        guidance=Guidance(s),
        **{"solver": "heun", "steps": 40} | options,
    )


@pytest.mark.parametrize(("s", "label"), [(1.0, 0), (1.0, 1), (0.0, None)])
def test_diffusion_at_1_draws_the_class_and_at_0_everything(s, label):
    """Also exact samples pass, and the other distribution does not."""
    toy, n = mixture(), 4000
    expected = cell_probabilities(toy, label, EDGES)
    assert float(expected.sum()) == pytest.approx(1)
    drawn = draw_mixture(toy, 1 if label is None else label, s, n)
    assert chi_square_p(count_cells(drawn, EDGES), expected) > LEVEL
    exact = toy.sample(n, torch.Generator().manual_seed(0), label)
    assert chi_square_p(count_cells(exact, EDGES), expected) > LEVEL
    other = cell_probabilities(toy, 0 if label is None else None, EDGES)
    assert chi_square_p(count_cells(drawn, EDGES), other) < 1e-12


def test_ancestral_sampling_draws_the_class_too():
    toy = mixture(path=cosine(), space="eps")
    drawn = draw_mixture(toy, 0, 1.0, 1200, solver="ddim", eta=1.0, steps=80, spacing="karras")
    assert chi_square_p(count_cells(drawn, EDGES), cell_probabilities(toy, 0, EDGES)) > LEVEL


def test_labels_of_each_row_are_sampled():
    label = torch.tensor([0, 1, 2]).repeat(500)
    x = mixture().sample(1500, torch.Generator().manual_seed(1), label)
    of_class = [
        mixture().log_prob(x[label == y], 0) - mixture().log_prob(x[label == y], 1) for y in (0, 1)
    ]
    assert float((of_class[0] > 0).double().mean()) > 0.95
    assert float((of_class[1] < 0).double().mean()) > 0.95


def sharpened_cells(toy, label, s):
    """The sharpened target in the cells, from a grid of points that is 12 times finer."""
    line = torch.arange(-6, 6, 0.05, dtype=torch.float64) + 0.025
    points = torch.cartesian_prod(line, line)
    index = torch.bucketize(points, EDGES[1:-1])
    cells = torch.zeros(64, dtype=torch.float64)
    return cells.index_add(0, index[:, 0] * 8 + index[:, 1], toy.sharpened(points, label, s))


@pytest.mark.parametrize(("s", "label"), [(0.0, None), (1.0, 0)])
def test_the_sharpened_mixture_is_what_it_should_be_at_both_ends(s, label):
    own = sharpened_cells(mixture(), 0, s)
    assert (own - cell_probabilities(mixture(), label, EDGES)).abs().max() < 1e-3


def test_guided_diffusion_does_not_draw_the_sharpened_target():
    """At s = 3 the distance in total variation is far above what a finite sample would show."""
    toy, n = mixture(), 4000
    distances = {}
    for s in (0.0, 1.0, 3.0):
        counts = count_cells(draw_mixture(toy, 0, s, n), EDGES)
        distances[s] = float((counts / n - sharpened_cells(toy, 0, s)).abs().sum() / 2)
    # 64 cells of 4000 samples: at most sqrt(64 / (2 pi 4000)) = 0.05 is expected by chance
    assert max(distances[0.0], distances[1.0]) < 0.05
    assert distances[3.0] > 0.15


# chains


def test_sequences_in_order():
    assert all_sequences(2, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert all_sequences(3, 0).shape == (1, 0)
    ids = all_sequences(3, 4)
    assert torch.equal(sequence_index(ids, 3), torch.arange(81))


def test_chain_by_hand():
    """Two classes, one certain and one fair: each token makes the certain one likelier."""
    toy = MarkovChain(
        prior=torch.tensor([0.5, 0.5]),
        initial=torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
        transition=torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]),
        length=2,
    )
    assert toy.distribution(0).tolist() == [1, 0, 0, 0]
    assert toy.distribution(1).tolist() == [0.25] * 4
    assert toy.distribution().tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125])
    torch.testing.assert_close(
        toy.next_log_prob(torch.tensor([[0], [1]])).exp(),
        torch.tensor([[0.625 / 0.75, 0.125 / 0.75], [0.5, 0.5]], dtype=torch.float64),
    )
    # s = 2 of class 1: p(x | y)^2 / p(x) = 0.1, 0.5, 0.5, 0.5 of whole sequences
    torch.testing.assert_close(
        toy.sharpened(1, 2.0), torch.tensor([1, 5, 5, 5], dtype=torch.float64) / 16
    )
    # one by one: 1/3 : 1 for the first token, then 0.3 : 1.5 after a 0 and even after a 1
    torch.testing.assert_close(
        toy.guided(1, Guidance(2.0)),
        torch.tensor([0.25 / 6, 1.25 / 6, 0.375, 0.375], dtype=torch.float64),
    )


@pytest.mark.parametrize("label", [None, 0, 1])
def test_next_tokens_multiply_to_the_whole_sequence(label):
    toy = chain()
    ids = all_sequences(3, 3)
    steps = [
        toy.next_log_prob(ids[:, :i], label).gather(1, ids[:, i : i + 1])[:, 0] for i in range(3)
    ]
    torch.testing.assert_close(sum(steps).exp(), toy.distribution(label))
    assert float(toy.distribution(label).sum()) == pytest.approx(1)


def test_the_average_over_classes_is_no_chain_of_order_1():
    """What came before the last token tells of the class: the unconditional model has to remember."""
    after = chain().next_log_prob(torch.tensor([[0, 2], [1, 2]])).exp()
    assert (after[0] - after[1]).abs().max() > 0.05


@pytest.mark.parametrize("toy", [chain(), masked_table()], ids=["chain", "masked"])
def test_what_guidance_draws_and_the_sharpened_target_meet_at_0_and_1_only(toy):
    def guided(s):
        more = () if isinstance(toy, MarkovChain) else ([[0], [1], [2], [3]],)
        return toy.guided(0, Guidance(s), *more)

    for s, label in ((0.0, None), (1.0, 0)):
        torch.testing.assert_close(guided(s), toy.distribution(label))
        torch.testing.assert_close(toy.sharpened(0, s), toy.distribution(label))
    for s in (0.5, 2.0, 4.0):
        assert float(guided(s).sum()) == pytest.approx(1)
        assert float(toy.sharpened(0, s).sum()) == pytest.approx(1)
    distances = [float((guided(s) - toy.sharpened(0, s)).abs().sum() / 2) for s in (2.0, 4.0)]
    assert distances[1] > distances[0] > 0.02


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
def test_autoregressive_sampling_draws_the_guided_distribution(s):
    toy, n = chain(), 8000
    ids = sample_autoregressive(
        toy, rows_of(0, n), uncond=toy.null_condition, seeds=list(range(n)), guidance=Guidance(s)
    )
    counts = torch.bincount(sequence_index(ids, 3), minlength=27)
    assert chi_square_p(counts, toy.guided(0, Guidance(s))) > LEVEL
    if s == 3.0:  # the test tells one distribution from the other, and one scale from the next
        assert chi_square_p(counts, toy.sharpened(0, s)) < 1e-12
        assert chi_square_p(counts, toy.guided(0, Guidance(2.0))) < 1e-12


def test_a_schedule_draws_what_the_oracle_says():
    """The branch joins at the second token, alone until then."""
    toy, n, late = chain(), 8000, Guidance(interval(4.0, 0.4, 1.0))
    ids = sample_autoregressive(
        toy, rows_of(0, n), uncond=toy.null_condition, seeds=list(range(n)), guidance=late
    )
    counts = torch.bincount(sequence_index(ids, 3), minlength=27)
    assert chi_square_p(counts, toy.guided(0, late)) > LEVEL
    assert chi_square_p(counts, toy.guided(0, Guidance(4.0))) < 1e-12


def test_one_scale_a_sample_and_one_class_a_sample():
    toy, n = chain(), 6000
    cond = torch.tensor([[0], [1]]).repeat(n // 2, 1)
    scales = torch.tensor([3.0, 1.0]).repeat(n // 2)
    ids = sample_autoregressive(
        toy, cond, uncond=toy.null_condition, seeds=list(range(n)), guidance=Guidance(scales)
    )
    for label, s in ((0, 3.0), (1, 1.0)):
        counts = torch.bincount(sequence_index(ids[cond[:, 0] == label], 3), minlength=27)
        assert chi_square_p(counts, toy.guided(label, Guidance(s))) > LEVEL


# masked tables


@pytest.mark.parametrize("label", [None, 0, 1])
def test_conditionals_of_a_table_by_summing_it(label):
    toy = masked_table()
    joint = toy.distribution(label).view(2, 2, 2, 2)
    ids = torch.tensor([[2, 2, 2, 2], [2, 1, 2, 0], [0, 1, 1, 0]])
    told = toy.conditionals(ids, label).exp()
    torch.testing.assert_close(told[0, 1], joint.sum((0, 2, 3)))
    torch.testing.assert_close(told[1, 2], joint[:, 1, :, 0].sum(0) / joint[:, 1, :, 0].sum())
    # to the last bits of an exponential, which differ from processor to processor; and nothing for what cannot be
    assert told[1, 3, 0].item() == pytest.approx(1, abs=1e-15) and told[1, 3, 1] == 0
    torch.testing.assert_close(told[2].argmax(-1), ids[2])
    torch.testing.assert_close(told.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_known_tokens_that_cannot_be_together():
    equal = MaskedTable(torch.ones(1), torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))
    assert bool(
        equal.conditionals(torch.tensor([[0, 2]]), 0)[0, 1]
        .exp()
        .allclose(torch.tensor([1.0, 0.0], dtype=torch.float64))
    )
    assert bool(equal.conditionals(torch.tensor([[0, 1]]), 0).isneginf().all())
    assert equal.guided(0, Guidance(3.0), [[0], [1]]).tolist() == pytest.approx([0.5, 0, 0, 0.5])
    assert equal.guided(0, Guidance(3.0), [[0, 1]]).tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_masked_sampling_draws_the_guided_distribution(s, steps):
    """At once, where tokens are independent, and one by one in the fixed order of Halton's points."""
    toy, n = masked_table(), 6000
    order = halton_order(4)
    groups = [order.argsort()[i : i + 4 // steps].tolist() for i in range(0, 4, 4 // steps)]
    ids = sample_masked(
        toy,
        rows_of(0, n),
        uncond=toy.null_condition,
        seeds=list(range(n)),
        guidance=Guidance(s),
        steps=steps,
        reveal="halton",
    )
    counts = torch.bincount(sequence_index(ids, 2), minlength=16)
    assert chi_square_p(counts, toy.guided(0, Guidance(s), groups)) > LEVEL
    if steps == 1:
        assert chi_square_p(counts, toy.guided(0, Guidance(s), [[0], [1], [2], [3]])) < 1e-9
    if s == 3.0:
        assert chi_square_p(counts, toy.sharpened(0, s)) < 1e-12
    if s in (0.0, 1.0) and steps == 4:
        assert chi_square_p(counts, toy.distribution(0 if s else None)) > LEVEL


def test_inpainting_draws_the_conditional_given_what_is_known():
    toy, n = masked_table(), 4000
    ids = sample_masked(
        toy,
        rows_of(0, n),
        uncond=toy.null_condition,
        seeds=list(range(n)),
        steps=4,
        reveal="halton",
        init=torch.tensor([1, 0, 0, 1]),
        mask=torch.tensor([False, True, True, True]),
    )
    assert bool((ids[:, 0] == 1).all())
    given_first = toy.distribution(0)[8:] / toy.distribution(0)[8:].sum()
    counts = torch.bincount(sequence_index(ids[:, 1:], 2), minlength=8)
    assert chi_square_p(counts, given_first) > LEVEL


# sharpening, and bad input


def test_sharpening_keeps_what_is_impossible_and_ignores_constants():
    cond = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    uncond = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    torch.testing.assert_close(
        sharpen(cond, uncond, 3.0), torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(sharpen(cond + 7, uncond - 2, 3.0), sharpen(cond, uncond, 3.0))


def test_bad_input_says_what_was_expected():
    toy, x = mixture(), torch.zeros(3, 2)
    one, two = torch.ones(1), torch.tensor([0.5, 0.5])
    zero = torch.zeros(1, dtype=torch.long)
    for message, wrong in {
        r"weights sums to 0\.5": lambda: GaussianMixture(one / 2, torch.zeros(1, 2), one, zero),
        r"weights has shape \(2,\), expected \(1,\)": lambda: GaussianMixture(
            two, torch.zeros(1, 2), one, zero
        ),
        r"weights is \[1\.0, 0\.0\], expected numbers > 0": lambda: GaussianMixture(
            torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.ones(2), torch.arange(2)
        ),
        r"means has shape \(2,\), expected finite": lambda: GaussianMixture(two, two, two, zero),
        r"variances has shape \(2,\)": lambda: GaussianMixture(one, torch.zeros(1, 2), two, zero),
        r"variances is \[0\.0\]": lambda: GaussianMixture(one, torch.zeros(1, 2), 0 * one, zero),
        r"labels is torch\.float32": lambda: GaussianMixture(one, torch.zeros(1, 2), one, one),
        r"labels holds \[1\], expected every class": lambda: GaussianMixture(
            one, torch.zeros(1, 2), one, zero + 1
        ),
        r"space is 'noise'": lambda: mixture(space="noise"),
        r"x has shape \(3, 5\), expected \(B, 2\)": lambda: toy.score(torch.zeros(3, 5)),
        r"label is \[3\], expected 0 to 1, or 2": lambda: toy.log_prob(x, 3),
        r"label is torch\.float32": lambda: toy.log_prob(x, torch.zeros(3)),
        r"label has shape \(2,\), expected a number or \(3,\)": lambda: toy.log_prob(
            x, torch.zeros(2, dtype=torch.long)
        ),
        r"alpha has shape \(2,\), expected a number or \(3,\)": lambda: toy.log_prob(x, 0, two),
        r"sigma is 0": lambda: toy.predict(x, 0, 1.0, 0.0, "score"),
        r"count is 0": lambda: toy.sample(0, torch.Generator()),
        r"s is inf": lambda: toy.sharpened(x, 0, math.inf),
        r"initial has shape \(2,\)": lambda: MarkovChain(one, two, two, 2),
        r"transition has shape": lambda: MarkovChain(one, two[None], two[None], 2),
        r"prior sums to 2": lambda: MarkovChain(2 * one, two[None], two.expand(1, 2, 2), 2),
        r"prior is \[-0\.5, 1\.5\], expected numbers >= 0": lambda: MarkovChain(
            torch.tensor([-0.5, 1.5]), two.expand(2, 2), two.expand(2, 2, 2), 2
        ),
        r"length is 0, expected an int": lambda: MarkovChain(
            one, two[None], two.expand(1, 2, 2), 0
        ),
        r"length is 21: expected at most": lambda: MarkovChain(
            one, two[None], two.expand(1, 2, 2), 21
        ),
        r"ids has shape \(1, 3\), expected \(R, n\) with n < 3": lambda: chain().next_log_prob(
            torch.zeros(1, 3, dtype=torch.long)
        ),
        r"label is \[5\]": lambda: chain().guided(5, Guidance(1.0)),
        r"table has shape \(1, 2, 3\)": lambda: MaskedTable(one, torch.ones(1, 2, 3) / 6),
        r"table sums to": lambda: MaskedTable(one, torch.ones(1, 2, 2)),
        r"ids has shape \(1, 2\), expected \(R, 4\)": lambda: masked_table().conditionals(
            torch.zeros(1, 2, dtype=torch.long)
        ),
        r"groups is \[\[0\], \[0\]\], expected every place": lambda: masked_table().guided(
            0, Guidance(1.0), [[0], [0]]
        ),
        r"vocabulary\^length is 2\^21": lambda: all_sequences(2, 21),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


def test_times_of_a_straight_path_are_the_default():
    assert mixture().path == straight() and mixture().space == "flow"
