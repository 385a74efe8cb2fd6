"""What guidance did at each step: exact KL in every family, and pictures of what is there so far."""

import pytest
import torch
from tiny import CAPTIONS, FAMILIES, pipeline, wrapped

from unicfg import (
    Guidance,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)
from unicfg.guidance.mitigations import kl_trust_region
from unicfg.guidance.schedules import interval
from unicfg.sampling import Recorder, cosine, straight
from unicfg.sampling.masked import halton_order, reveal_counts
from unicfg.testing import MarkovChain, MaskedTable


def tables(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


def assert_mean(values: torch.Tensor, expected: float) -> None:
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean()) - expected) < 4 * error, (values.mean(), expected, error)


@pytest.mark.parametrize(
    "guidance", [Guidance(3.0), Guidance(interval(5.0, 0.5, 1.0)), Guidance(0.5)], ids=str
)
def test_strength_of_tokens_is_the_divergence_of_whole_sequences(guidance):
    transition = 4 * tables(2, 3, 3, seed=1)
    transition = transition.pow(6)
    transition[0, 1, 2] = 0.0  # cannot follow: -inf in the conditional logits alone
    transition = transition / transition.sum(-1, keepdim=True)
    chain = MarkovChain(torch.tensor([0.4, 0.6]), tables(2, 3), transition, length=3)
    recorder, batch = Recorder(), 3000
    sample_autoregressive(
        chain,
        torch.zeros(batch, 1, dtype=torch.long),
        uncond=chain.null_condition,
        guidance=guidance,
        seeds=range(batch),
        callback=recorder,
    )
    trace = recorder.trace()
    expected = divergence(chain.guided(0, guidance), chain.distribution(0))
    assert expected > 1e-3
    assert_mean(trace.strength, expected)
    assert torch.allclose(trace.strength, trace.kl.sum(0))
    assert trace.places.shape == (batch, 3) and trace.kl.shape == (3, batch)


def test_strength_of_masked_tokens_is_the_divergence_of_whole_images():
    table = MaskedTable(
        torch.tensor([0.5, 0.5]), (60 * tables(2, 16)).softmax(-1).view(2, 2, 2, 2, 2)
    )
    guidance, recorder, batch = Guidance(3.0), Recorder(), 3000
    sample_masked(
        table,
        torch.zeros(batch, 1, dtype=torch.long),
        uncond=table.null_condition,
        guidance=guidance,
        seeds=range(batch),
        steps=2,
        reveal="halton",
        callback=recorder,
    )
    trace, order = recorder.trace(), halton_order(4).argsort().tolist()
    shown = [int((trace.places[0] != 0).sum()), len(trace.progress)]
    assert shown == [4, 2]
    first = int(reveal_counts(torch.tensor([4]), 2, "halton")[0])
    groups = [order[:first], order[first:]]
    # tokens of one step are drawn independently by the conditional sampling, too
    unguided = table.guided(0, Guidance(1.0), groups)
    expected = divergence(table.guided(0, guidance, groups), unguided)
    assert expected > 1e-2
    assert_mean(trace.strength, expected)


def gaussian(space: str):
    """Data N(cond, 1), and its exact prediction on the straight or the cosine path."""
    path = straight() if space == "flow" else cosine()

    def model(x, cond, t):
        alpha, sigma = (level.view(-1, 1).to(x) for level in path.coefficients(t.double()))
        x0 = cond + alpha / (alpha**2 + sigma**2) * (x - alpha * cond)
        eps = sigma * (x - alpha * cond) / (alpha**2 + sigma**2)
        return {"flow": eps - x0, "eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[space]

    return model, path


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("space", ["flow", "v", "x0"])
def test_strength_of_latents_is_that_of_the_ancestral_steps(space, solver):
    model, path = gaussian(space)
    mean, s, recorder = torch.tensor([[0.8, -0.3]]), 3.0, Recorder(least_noise=1e-2)
    sample_diffusion(
        model,
        mean.expand(2, 2).double(),
        uncond=torch.zeros(2).double(),
        shape=(2,),
        path=path,
        space=space,
        guidance=Guidance(s),
        seeds=[0, 1],
        steps=6,
        solver=solver,
        callback=recorder,
    )
    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    alpha, sigma = path.coefficients(times)
    expected = []
    for i in range(5):
        # the means of x' given x in both samplings, and the noise that the step adds (Ho et al., 2006.11239, 6 and 7)
        apart = (s - 1) * mean.double() * sigma[i] ** 2 / (alpha[i] ** 2 + sigma[i] ** 2)
        kept = (sigma[i + 1] * alpha[i] / (alpha[i + 1] * sigma[i])) ** 2
        fresh = sigma[i + 1] ** 2 * (1 - kept)
        of_x0 = alpha[i + 1] - (sigma[i + 1] ** 2 - fresh).sqrt() * alpha[i] / sigma[i]
        expected.append(float(((of_x0 * apart) ** 2).sum() / (2 * fresh)))
    trace = recorder.trace()
    assert torch.allclose(trace.kl[:5, 0], torch.tensor(expected).double(), rtol=1e-5)
    # the last step goes on to the least noise
    apart = (s - 1) * mean.double() * sigma[5] ** 2 / (alpha[5] ** 2 + sigma[5] ** 2)
    last = (1e4 - float(alpha[5] / sigma[5]) ** 2) / 2 * float((apart**2).sum())
    assert float(trace.kl[5, 0]) == pytest.approx(last, rel=1e-4)
    assert torch.allclose(trace.strength, torch.tensor(sum(expected) + last).double(), rtol=1e-4)


def strength_of(model, path, space, recorder=None, batch=1, **options) -> torch.Tensor:
    recorder = recorder or Recorder()
    sample_diffusion(
        model,
        torch.ones(batch, 1),
        uncond=torch.zeros(1),
        shape=(1,),
        path=path,
        space=space,
        seeds=range(batch),
        callback=recorder,
        **options,
    )
    return recorder.trace().strength


def test_finer_steps_come_to_one_strength():
    model, path = gaussian("v")
    strengths = [
        float(strength_of(model, path, "v", guidance=Guidance(2.0), steps=steps))
        for steps in (100, 200)
    ]
    # sigma^4 integrated over the SNR u, where alpha^2 + sigma^2 = 1: of 1 / (1 + u)^2 up to 100, times (s - 1)^2 / 2
    limit = 0.5 * 100 / 101
    assert strengths == pytest.approx([limit] * 2, rel=0.06)
    assert abs(strengths[1] - limit) < 0.6 * abs(strengths[0] - limit)


def test_strength_of_ancestral_sampling_is_the_divergence_of_the_two_samplings():
    """Where variances differ, the distance of the predictions depends on x, and on the way that it takes."""
    path, variance = cosine(), {1.0: 0.05, 0.0: 1.0}

    def model(x, cond, t):
        alpha, sigma = (level.view(-1, 1).to(x) for level in path.coefficients(t.double()))
        own = torch.where(cond == 1, variance[1.0], variance[0.0])
        return cond + alpha * own / (alpha**2 * own + sigma**2) * (x - alpha * cond)

    s, steps, batch = 3.0, 10, 4000
    strength = strength_of(
        model, path, "x0", batch=batch, guidance=Guidance(s), steps=steps, eta=1.0
    )
    # the chain: both samplings are Gaussian and linear in x, so the moments of x can be carried along exactly
    alpha, sigma = path.coefficients(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    mean, spread, expected = 0.0, float(sigma[0]) ** 2, 0.0
    for i in range(steps):
        gains = {c: alpha[i] * v / (alpha[i] ** 2 * v + sigma[i] ** 2) for c, v in variance.items()}
        # x0 = offset + gain * x of each branch; guided minus cond is (s - 1) times their difference
        offsets = {c: c - gains[c] * alpha[i] * c for c in variance}
        gain, offset = (float(d[1.0] - d[0.0]) * (s - 1) for d in (gains, offsets))
        then = min(float((alpha[i + 1] / sigma[i + 1]) ** 2) if sigma[i + 1] > 0 else 100.0, 100.0)
        now = min(float((alpha[i] / sigma[i]) ** 2), 100.0)
        expected += (then - now) / 2 * ((offset + gain * mean) ** 2 + gain**2 * spread)
        kept = float((sigma[i + 1] * alpha[i] / (alpha[i + 1] * sigma[i])) ** 2)
        left = float(sigma[i + 1]) * kept**0.5 / float(sigma[i])
        of_x0 = float(alpha[i + 1]) - left * float(alpha[i])
        g, o = (s * float(d[1.0]) + (1 - s) * float(d[0.0]) for d in (gains, offsets))
        fresh = float(sigma[i + 1]) ** 2 * (1 - kept)
        mean = of_x0 * (o + g * mean) + left * mean
        spread = (of_x0 * g + left) ** 2 * spread + fresh
    assert_mean(strength, expected)
    # another way through the same field has another sum
    other = strength_of(model, path, "x0", batch=200, guidance=Guidance(s), steps=steps)
    assert abs(float(other.mean()) - expected) > 0.1 * expected


@pytest.mark.parametrize("order", ["causal", "masked"])
def test_strength_of_a_hybrid_is_that_of_its_heads(order):
    model = wrapped("hybrid" if order == "causal" else "hybrid masked")
    cond, recorder, seen, places = torch.randint(0, 12, (3, 3)), Recorder(), [], []
    sample_hybrid(
        model,
        cond,
        guidance=Guidance(4.0),
        seeds=[0, 1, 2],
        steps=4,
        callback=lambda step: (places.append(step.places), recorder(step)),
        head_callback=lambda step: (seen.append(step), recorder.head(step)),
    )
    trace = recorder.trace()
    assert (
        len(seen) == 4 * len(places)
        and torch.cat(places, 1).sort(1).values.tolist() == [list(range(16))] * 3
    )
    # the first token by hand: x0 of both predictions, and the noise levels of the head
    first, levels = (
        seen[:4],
        model.model.head.path.coefficients(torch.linspace(1, 0, 5, dtype=torch.float64)),
    )
    snr = (levels[0] / levels[1])[:4] ** 2
    nats = torch.zeros(3, places[0].shape[1], dtype=torch.float64)
    snr = torch.cat([snr, torch.tensor([100.0]).double()]).clamp(max=100.0)
    for i, step in enumerate(first):
        cond_x0 = step.level.to_space(step.cond_out, "x0")
        nats += (snr[i + 1] - snr[i]) / 2 * (step.x0 - cond_x0).double().square().sum(2)
    assert torch.allclose(trace.places.gather(1, places[0]), nats) and bool((nats > 0).all())
    assert torch.allclose(trace.kl[0], nats.sum(1))
    assert torch.equal(trace.branches, torch.full((len(places),), 2))


def test_a_hybrid_without_its_head_has_no_strength():
    recorder = Recorder()
    sample_hybrid(wrapped("hybrid"), torch.ones(1, 3).long(), seeds=[0], steps=2, callback=recorder)
    assert recorder.trace().strength.isnan().all()


def test_extrapolated_states_are_not_shown_as_conditional_predictions():
    with pytest.raises(ValueError, match="guide_at is 'states' with head_callback"):
        sample_hybrid(
            wrapped("hybrid"),
            torch.ones(1, 3).long(),
            seeds=[0],
            guide_at="states",
            head_callback=Recorder().head,
        )


def record(family: str, guidance: Guidance, batch_size: int = 4) -> Recorder:
    recorder = Recorder()
    pipe = pipeline(family=family)
    options = {"head_callback": recorder.head} if family == "hybrid" else {}
    pipe.sample(
        CAPTIONS,
        seeds=[0, 1, 2, 3],
        guidance=guidance,
        callback=recorder,
        batch_size=batch_size,
        **options,
    )
    return recorder


@pytest.mark.parametrize("family", FAMILIES)
def test_no_guidance_has_no_strength_and_no_condition_no_number(family):
    at_one = record(family, Guidance(1.0)).trace()
    assert float(at_one.strength.abs().max()) < 1e-9 and at_one.cosine.isnan().all()
    at_zero = record(family, Guidance(0.0)).trace()
    assert at_zero.strength.isnan().all()
    guided, more = (record(family, Guidance(s)).trace() for s in (2.0, 4.0))
    assert bool((guided.strength > 0).all()) and more.strength.mean() > guided.strength.mean()
    assert bool((guided.cosine.abs() <= 1 + 1e-6).all())
    assert float(guided.scale.min()) == float(guided.scale.max()) == 2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_does_not_depend_on_the_batch(family):
    whole = record(family, Guidance(3.0)).trace()
    parts = record(family, Guidance(3.0), batch_size=2).trace()
    for name, value in vars(whole).items():
        assert torch.allclose(value, getattr(parts, name), rtol=1e-3, atol=1e-4, equal_nan=True), (
            name
        )


def test_chance_of_another_token_and_a_trust_region():
    trace = record("ar", Guidance(8.0, (kl_trust_region(0.1),))).trace()
    assert float(trace.kl.max()) < 0.1 + 1e-4 and float(trace.kl.mean()) > 0.01
    # Pinsker: half the L1 distance is at most the root of half the divergence
    assert bool((trace.changed <= (trace.kl / 2).sqrt() + 1e-6).all())


def test_a_recorder_says_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"samplings of \[\] steps"):
        Recorder().trace()
    with pytest.raises(ValueError, match="least_noise is 0"):
        Recorder(0)
    with pytest.raises(TypeError, match="step is a float"):
        Recorder()(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preview_shows_what_is_there_and_ends_in_the_image(family):
    pipe, seen = pipeline(family=family), []
    images = pipe.sample(
        CAPTIONS[:2],
        seeds=[0, 1],
        guidance=Guidance(2.0),
        callback=lambda step: seen.append(pipe.preview(step)),
    )
    assert seen[0].shape == images.shape
    assert torch.allclose(seen[-1], images, atol=1e-5)
    grey = [float((picture == 0).all(1).float().mean()) for picture in seen]
    if family in ("diffusion", "flow"):
        assert grey[0] < 0.1
    else:
        assert grey[0] > 0.5 and grey == sorted(grey, reverse=True) and grey[-1] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_from_a_gpu_is_that_of_the_cpu(family):
    traces = []
    for device in ("cpu", "cuda"):
        recorder, pipe = Recorder(), pipeline(family=family).to(device)
        pipe.sample(
            CAPTIONS,
            seeds=[0, 1, 2, 3],
            guidance=Guidance(2.0),
            callback=recorder,
            head_callback=recorder.head if family == "hybrid" else None,
        )
        traces.append(recorder.trace())
    # a token may differ by rounding, and all that follow it with it: the first step does not
    assert torch.allclose(traces[0].kl[0], traces[1].kl[0], rtol=1e-2)


def test_what_is_held_of_a_token_that_was_not_finished_is_forgotten():
    whole, cut = Recorder(), Recorder()
    options = {"seeds": [0], "steps": 3, "guidance": Guidance(2.0)}
    cond = torch.ones(1, 3).long()

    def stops(step):
        cut.head(step)
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_hybrid(wrapped("hybrid"), cond, head_callback=stops, callback=cut, **options)
    for recorder in (whole, cut):
        sample_hybrid(
            wrapped("hybrid"), cond, head_callback=recorder.head, callback=recorder, **options
        )
    assert torch.equal(whole.trace().strength, cut.trace().strength)
