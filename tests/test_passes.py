"""What a pass over the whole grid need not compute: shared conditions, times, branches that are near the last ones."""

import math

import pytest
import torch
from test_families import COND, draw
from tiny import network, wrapped

from unicfg import Branch, Guidance, guide, sample_diffusion, sample_masked
from unicfg.guidance import branches as b
from unicfg.guidance.schedules import interval
from unicfg.sampling import cosine

DENOISERS = ["diffusion", "flow"]


class Linear:
    """A denoiser whose condition moves its output by a constant: the direction never changes."""

    latent_shape, space = (2, 2, 2), "x0"

    def __init__(self):
        self.path, self.rows = cosine(), []

    def __call__(self, x, cond, t):
        self.rows.append(len(x))
        return 0.5 * torch.tanh(x) + cond.view(-1, 1, 1, 1)


def run(model, s=3.0, **options):
    cond = torch.tensor([[0.3], [0.7]])
    guidance = s if isinstance(s, Guidance) else Guidance(s)
    arguments = {"uncond": torch.zeros(1), "seeds": [0, 1], "steps": 7} | options
    return sample_diffusion(model, cond, guidance=guidance, **arguments)


def test_the_direction_is_refreshed_every_so_many_steps():
    for refresh, rows in ((1, [4] * 7), (3, [4, 2, 2, 4, 2, 2, 4]), (9, [4] + [2] * 6)):
        model = Linear()
        out = run(model, refresh=refresh)
        assert model.rows == rows
        # nothing is lost where the direction stays as it is
        torch.testing.assert_close(out, run(Linear()), atol=1e-5, rtol=1e-5)


def test_the_held_direction_is_that_of_the_last_time():
    """By hand, for a model whose direction changes: the third step is guided by the direction of the second."""

    class Turning(Linear):
        def __call__(self, x, cond, t):
            super().__call__(x, cond, t)
            return cond.view(-1, 1, 1, 1) * torch.cos(3 * x) + 0.1 * x

    steps = []
    run(Turning(), steps=4, refresh=2, callback=steps.append)
    fresh = [steps[0], steps[2]]
    for step, last in zip(steps, [steps[0], steps[0], steps[2], steps[2]], strict=True):
        held = last.outputs["cond"] - last.outputs["uncond"]
        torch.testing.assert_close(step.outputs["cond"] - step.outputs["uncond"], held)
        expected = guide(step.outputs["cond"], step.outputs["uncond"], 3.0)
        torch.testing.assert_close(step.guided, expected)
    assert not torch.allclose(*(step.outputs["uncond"] for step in fresh))


def test_a_pause_of_guidance_forgets_the_direction():
    model = Linear()
    # guided at steps 0, 1 and, after a pause, at 5 and 6
    scale = lambda progress: 1.0 if 0.3 < progress < 0.7 else 3.0  # noqa: E731
    run(model, Guidance(scale), refresh=4)
    assert model.rows == [4, 2, 2, 2, 2, 4, 2]


def test_three_branches_are_held_as_two_are():
    model = Linear()
    guidance = Guidance(b.negative(3.0, 1.0))
    options = {"branches": {"negative": Branch(cond=torch.tensor([0.1]))}}
    out = run(model, guidance, refresh=2, steps=4, **options)
    assert model.rows == [6, 2, 6, 2]
    same = run(Linear(), guidance, steps=4, **options)
    torch.testing.assert_close(out, same, atol=1e-5, rtol=1e-5)


def test_a_branch_that_joins_between_two_refreshes_is_run_at_once():
    model = Linear()
    guidance = Guidance(b.negative(3.0, interval(1.0, 0.5, 1.0, outside=0.0)))
    options = {"branches": {"negative": Branch(cond=torch.tensor([0.1]))}}
    out = run(model, guidance, refresh=4, **options)
    assert model.rows == [4, 2, 2, 6, 6, 2, 2]
    torch.testing.assert_close(out, run(Linear(), guidance, **options), atol=1e-5, rtol=1e-5)


def test_masked_logits_stay_masked_where_the_direction_is_held():
    class Masking:
        num_tokens, mask_token = 16, 5

        def __call__(self, ids, cond):
            logits = torch.randn(
                len(ids), 16, 5, generator=torch.Generator().manual_seed(int(ids.sum()))
            )
            logits[..., 0] = -math.inf  # in both
            logits[cond[:, 0] == 0, :, 1] = -math.inf  # in the unconditional rows only
            logits[cond[:, 0] == 1, :, 2] = -math.inf  # in the conditional rows only
            return logits

    ids = sample_masked(
        Masking(),
        torch.ones(3, 1, dtype=torch.long),
        uncond=torch.zeros(1, dtype=torch.long),
        seeds=[0, 1, 2],
        guidance=Guidance(2.0),
        steps=6,
        refresh=3,
    )
    assert not bool(((ids == 0) | (ids == 2)).any()) and bool((ids == 1).any())


@pytest.mark.parametrize("refresh", [2, 3])
def test_what_is_refreshed_does_not_depend_on_the_batch(refresh):
    """Beside a sample with few tokens to draw, which idles in most steps, stands one with many."""
    model, ids = wrapped("masked"), torch.zeros(2, 16, dtype=torch.long)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 4:] = False
    options = {"guidance": Guidance(3.0), "steps": 12, "refresh": refresh}
    for seed in range(10):
        both = sample_masked(
            model, COND[:2], seeds=[seed, seed + 1], init=ids, mask=mask, **options
        )
        alone = sample_masked(model, COND[:1], seeds=[seed], init=ids[:1], mask=mask[:1], **options)
        assert torch.equal(both[:1], alone)


@pytest.mark.parametrize("family", ["masked", "diffusion"])
def test_sampling_under_autocast(family):
    with torch.autocast("cpu", torch.bfloat16):
        out = draw(family, wrapped(family), guidance=Guidance(2.0))
    assert bool(out.double().isfinite().all())


@pytest.mark.parametrize("refresh", [0, -1, 2.0, True])
def test_a_refresh_that_means_nothing_is_refused(refresh):
    with pytest.raises(ValueError, match=f"refresh is {refresh!r}, expected an int >= 1"):
        run(Linear(), refresh=refresh)


@pytest.mark.parametrize("family", ["masked", *DENOISERS, "hybrid masked"])
def test_a_condition_that_all_share_is_encoded_once(family, monkeypatch):
    model, rows = wrapped(family), []
    body = type(model.model.body)
    whole = body.encode_condition

    def counted(self, cond):
        if torch.is_tensor(cond):
            rows.append(len(cond))
        return whole(self, cond)

    expected = draw(family, model, guidance=Guidance(2.0))
    monkeypatch.setattr(body, "encode_condition", counted)
    assert torch.equal(draw(family, model, guidance=Guidance(2.0)), expected)
    assert rows == [len(COND) + 1]


@pytest.mark.parametrize("family", DENOISERS)
def test_times_are_encoded_once_and_mean_the_same(family, monkeypatch):
    model = network(family)
    times = torch.tensor([0.9, 0.2, 0.9])
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for t, encoded in zip(times, model.encode_times(times), strict=True):
        expected = model(x, COND[:2], t.expand(2))
        torch.testing.assert_close(model(x, COND[:2], encoded), expected, atol=1e-5, rtol=1e-5)
    calls, embed = [], type(model.time).forward
    monkeypatch.setattr(
        type(model.time), "forward", lambda self, t: calls.append(len(t)) or embed(self, t)
    )
    draw(family, wrapped(family), guidance=Guidance(interval(2.0, 0.2, 0.6)))
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["masked", *DENOISERS])
def test_the_form_for_sampling_computes_the_same(family):
    model = network(family)
    x = torch.randint(0, 24, (2, 16)) if family == "masked" else torch.randn(2, *model.latent_shape)
    rest = () if family == "masked" else (torch.tensor([0.3, 0.8]),)
    out = model.for_sampling()(x, COND[:2], *rest)
    torch.testing.assert_close(out, model(x, COND[:2], *rest), atol=1e-4, rtol=1e-4)
