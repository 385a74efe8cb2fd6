"""Guidance by a classifier is classifier-free guidance where the classifier is exact."""

import pytest
import torch
from tiny import network, wrapped

from unicfg import Guidance, sample_autoregressive, sample_diffusion
from unicfg.guidance import mitigations, schedules
from unicfg.sampling import cosine, straight
from unicfg.sampling.classifier import ClassifierDenoiser, ClassifierTokens
from unicfg.testing import GaussianMixture, MarkovChain

SEEDS = list(range(32))


def mixture(path, space):
    return GaussianMixture(
        weights=torch.tensor([0.3, 0.3, 0.4]),
        means=torch.tensor([[-1.5, 0.0], [0.5, 1.0], [1.0, -1.0]]),
        variances=torch.tensor([0.1, 0.2, 0.1]),
        labels=torch.tensor([0, 1, 1]),
        path=path,
        space=space,
    )


def exact(toy):
    """log p(y | x_t) up to the prior, which has no gradient."""

    def log_prob(x, cond, t):
        alpha, sigma = toy.path.coefficients(t.double())
        of_class = toy.log_prob(x, cond[:, 0], alpha, sigma)
        return of_class - toy.log_prob(x, None, alpha, sigma)

    return log_prob


@pytest.mark.parametrize(
    ("path", "space"),
    [(cosine(), s) for s in ("eps", "x0", "v", "flow", "score")] + [(straight(), "flow")],
)
@pytest.mark.parametrize("s", [0.0, 1.0, 3.0])
def test_an_exact_classifier_gives_the_conditional_model(path, space, s):
    toy, cond = mixture(path, space), torch.ones(32, 1, dtype=torch.long)
    options = {
        "uncond": toy.null_condition,
        "seeds": SEEDS,
        "guidance": Guidance(s),
        "times": torch.linspace(0.98, 0.0, 13),
        "solver": "heun",
    }
    free = sample_diffusion(toy, cond, **options)
    model = ClassifierDenoiser(toy, exact(toy), toy.null_condition)
    torch.testing.assert_close(sample_diffusion(model, cond, **options), free, atol=2e-3, rtol=1e-3)


def test_a_gradient_is_taken_inside_of_an_inference_mode():
    toy, cond = mixture(straight(), "flow"), torch.ones(4, 1, dtype=torch.long)
    model = ClassifierDenoiser(toy, exact(toy), toy.null_condition)
    options = {"seeds": SEEDS[:4], "guidance": Guidance(3.0), "steps": 4}
    outside = sample_diffusion(model, cond, **options)
    with torch.inference_mode():
        assert torch.equal(sample_diffusion(model, cond, **options), outside)


def test_schedules_and_mitigations_apply_as_ever():
    toy, cond = mixture(straight(), "flow"), torch.ones(32, 1, dtype=torch.long)
    guidance = Guidance(schedules.linear(1, 5), (mitigations.rescale(0.5),))
    times = torch.linspace(0.98, 0.0, 9)
    options = {"uncond": toy.null_condition, "seeds": SEEDS, "guidance": guidance, "times": times}
    model = ClassifierDenoiser(toy, exact(toy), toy.null_condition)
    torch.testing.assert_close(
        sample_diffusion(model, cond, **options),
        sample_diffusion(toy, cond, **options),
        atol=2e-3,
        rtol=1e-3,
    )


def test_a_model_brings_its_null_condition():
    toy, cond = mixture(straight(), "flow"), torch.ones(2, dtype=torch.long)[:, None]
    model = ClassifierDenoiser(toy, exact(toy), toy.null_condition)
    options = {"seeds": [0, 1], "steps": 3, "guidance": Guidance(2.0)}
    told = sample_diffusion(model, cond, uncond=toy.null_condition, **options)
    assert torch.equal(sample_diffusion(model, cond, **options), told)


def test_only_rows_with_a_condition_cost_a_gradient():
    toy, rows = mixture(straight(), "flow"), []

    def log_prob(x, cond, t):
        rows.append(len(x))
        return exact(toy)(x, cond, t)

    cond = torch.tensor([[0], [2], [1]])  # 2 is the null label
    model = ClassifierDenoiser(toy, log_prob, toy.null_condition)
    sample_diffusion(
        model, cond, uncond=toy.null_condition, seeds=[0, 1, 2], steps=3, guidance=Guidance(2.0)
    )
    assert rows == [2, 2, 2]


@pytest.mark.parametrize("s", [1.0, 2.0])
def test_the_model_runs_once_for_the_rows_of_both_branches(s):
    toy, rows = mixture(straight(), "flow"), []

    def model(x, cond, t):
        rows.append(len(x))
        return toy(x, cond, t)

    classified = ClassifierDenoiser(
        model, exact(toy), toy.null_condition, path=toy.path, space=toy.space
    )
    sample_diffusion(
        classified,
        torch.ones(3, 1, dtype=torch.long),
        uncond=toy.null_condition,
        shape=(2,),
        path=toy.path,
        space=toy.space,
        seeds=[0, 1, 2],
        steps=2,
        guidance=Guidance(s),
    )
    assert rows == [3, 3]


CHAIN = MarkovChain(
    torch.tensor([0.4, 0.6]),
    torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]),
    torch.tensor([[[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.5, 0.5, 0.0]], [[0.1, 0.3, 0.6]] * 3]),
    length=6,
)


def of_prefix(ids, cond):
    """log p(y | ids) up to the prior."""
    return CHAIN.log_prob(ids, cond[:, 0]) - CHAIN.log_prob(ids)


@pytest.mark.parametrize("s", [0.0, 1.0, 3.0, schedules.interval(3.0, 0.4, 1.0)])
def test_an_exact_classifier_of_prefixes_gives_the_conditional_chain(s):
    cond = torch.tensor([[0], [1]] * 100)
    options = {"uncond": CHAIN.null_condition, "seeds": range(200), "guidance": Guidance(s)}
    free = sample_autoregressive(CHAIN, cond, **options)
    model = ClassifierTokens(CHAIN, of_prefix, CHAIN.null_condition)
    assert torch.equal(sample_autoregressive(model, cond, **options), free)


def test_pure_noise_moves_as_noise_that_is_nearly_pure():
    toy, cond = mixture(straight(), "flow"), torch.ones(32, 1, dtype=torch.long)
    model, x = ClassifierDenoiser(toy, exact(toy), toy.null_condition), torch.randn(32, 2)
    made, true = model(x, cond, torch.ones(32)), toy(x, cond, torch.ones(32))
    null = toy(x, toy.null_condition.expand(32, 1), torch.ones(32))
    assert (made - true).norm() < 0.05 * (true - null).norm()


def test_few_candidates_leave_out_the_unlikely():
    cond = torch.zeros(200, 1, dtype=torch.long)
    judged = []

    def counted(ids, cond):
        judged.append(len(ids))
        return of_prefix(ids, cond)

    model = ClassifierTokens(CHAIN, counted, CHAIN.null_condition, candidates=2)
    ids = sample_autoregressive(
        model, cond, uncond=CHAIN.null_condition, seeds=range(200), guidance=Guidance(2.0)
    )
    assert judged == [400] * 6
    for n in range(6):
        likely = CHAIN.next_log_prob(ids[:, :n]).topk(2).indices
        assert (likely == ids[:, n : n + 1]).any(1).all()


def test_our_own_transformers_take_a_classifier():
    """With their caches and a dropout wrapper; a classifier that says nothing changes nothing."""
    cond = torch.tensor([[3, 4, 5], [6, 7, 8]])
    tokens = wrapped("ar")

    def no_opinion(ids, cond):
        return torch.zeros(len(ids))

    def likes_even(ids, cond):
        return 8.0 * (ids[:, -1] % 2 == 0)

    options = {"uncond": tokens.null_condition, "seeds": [0, 1], "guidance": Guidance(2.0)}
    plain = sample_autoregressive(
        tokens.model, tokens.null_condition.expand(2, -1), seeds=options["seeds"]
    )
    model = ClassifierTokens(tokens, no_opinion)
    assert torch.equal(sample_autoregressive(model, cond, **options), plain)
    ids = sample_autoregressive(ClassifierTokens(tokens, likes_even), cond, **options)
    assert (ids % 2 == 0).double().mean() > 0.9 > (plain % 2 == 0).double().mean()

    denoiser = wrapped("flow")

    def likes_large(x, cond, t):
        return x.flatten(1).mean(1) * 50

    options |= {"uncond": denoiser.null_condition, "steps": 4}
    null = denoiser.null_condition.expand(2, -1)
    unguided = sample_diffusion(denoiser.model, null, seeds=[0, 1], steps=4)
    guided = sample_diffusion(ClassifierDenoiser(denoiser, likes_large), cond, **options)
    assert (guided.mean((1, 2, 3)) > unguided.mean((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierDenoiser(network("flow"), None), "null_condition is None, expected"),
        (lambda: ClassifierTokens(network("ar"), None), "null_condition is None, expected"),
        (
            lambda: ClassifierDenoiser(lambda x, c, t: x, None, torch.zeros(1)),
            "path is None and the model has none",
        ),
        (lambda: ClassifierTokens(wrapped("ar"), None, candidates=0), "candidates is 0"),
        (
            lambda: ClassifierDenoiser(wrapped("flow"), lambda x, c, t: x.mean())(
                torch.zeros(2, 2, 4, 4), torch.ones(2, 3, dtype=torch.long), torch.ones(2) / 2
            ),
            r"log_prob returned \(\) for 2 rows",
        ),
    ],
)
def test_what_is_missing_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
