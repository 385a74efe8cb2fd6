"""Any number of branches: weights that add up to 1, in every family, in as few passes as there are networks."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_families import COND, close, draw
from tiny import CAPTIONS, network, pipeline, wrapped

from models.perturb import perturb_attention, skip_layers
from unicfg import (
    Branch,
    ConditionDropout,
    Guidance,
    guide,
    sample_autoregressive,
    sample_diffusion,
)
from unicfg.guidance import branches as b
from unicfg.guidance import mitigations, schedules
from unicfg.guidance.core import mix
from unicfg.guidance.spaces import Level, convert
from unicfg.sampling import cosine
from unicfg.sampling.branches import Group
from unicfg.testing import MarkovChain
from unicfg.training.recipe import FAMILIES

KINDS = [*FAMILIES, "hybrid masked"]
OTHER = torch.tensor([[2, 2, 7], [1, 8, 1], [5, 5, 5]])


def outs(count, shape=(3, 5), seed=0):
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


# --- the formula ---


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4))
def test_mix_is_the_weighted_sum(rest):
    outputs = outs(len(rest) + 1)
    weights = [1 - sum(rest), *rest]
    expected = sum(w * out.double() for w, out in zip(weights, outputs, strict=True))
    torch.testing.assert_close(mix(outputs, weights), expected.float(), atol=2e-5, rtol=1e-5)


def test_mix_of_two_is_guide_and_of_one_is_the_output():
    c, u = outs(2)
    assert torch.equal(mix([c, u], [3.0, -2.0]), guide(c, u, 3.0))
    assert mix([c], [1.0]) is c
    with pytest.raises(ValueError, match="2 outputs and 1 weights"):
        mix([c, u], [1.0])


def test_mix_takes_a_weight_for_each_sample():
    c, u, n = outs(3)
    w = torch.tensor([1.0, 2.0, 0.5])
    mixed = mix([c, u, n], [w, 0.5 - w, torch.full((3,), 0.5)])
    for i in range(3):
        alone = mix(
            [c[i : i + 1], u[i : i + 1], n[i : i + 1]], [float(w[i]), 0.5 - float(w[i]), 0.5]
        )
        torch.testing.assert_close(mixed[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mix_keeps_masks_and_is_never_nan(dtype):
    c, u, n = (out.to(dtype) for out in outs(3))
    c[0, 0] = u[0, 0] = n[0, 0] = c[1, 1] = -math.inf  # masked everywhere, and in the first alone
    u[2, 2] = -math.inf  # in another alone: no difference there
    mixed = mix([c, u, n], [1e4, -1e4, 1.0])
    assert mixed.dtype == dtype
    assert mixed[0, 0] == mixed[1, 1] == -math.inf and mixed.isneginf().sum() == 2
    assert not mixed.isnan().any() and not mixed.isposinf().any()
    expected = c[2, 2] + 1.0 * (n[2, 2] - c[2, 2])
    torch.testing.assert_close(mixed[2, 2], expected)
    big = torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype)
    assert mix([big, -big, big], [50.0, -50.0, 1.0]).isfinite().all()


def test_weights_commute_with_a_change_of_space():
    x, *predictions = outs(5, (2, 3, 4))
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    weights = [2.5, -1.0, -1.5, 1.0]
    in_eps = mix(predictions, weights)
    in_x0 = mix([convert(p, x, alpha, sigma, "eps", "x0") for p in predictions], weights)
    torch.testing.assert_close(
        convert(in_eps, x, alpha, sigma, "eps", "x0"), in_x0, atol=1e-5, rtol=1e-5
    )


def test_a_sample_without_weight_on_the_first_output_has_the_mask_of_the_next():
    c, u, n = (
        torch.tensor([row] * 2) for row in ([1.0, -math.inf, 2], [-math.inf, 5, 0], [0.0] * 3)
    )
    mixed = mix(
        [c, u, n], [torch.tensor([0.0, 3.0]), torch.tensor([1.0, -1.0]), torch.zeros(2) - 1]
    )
    alone = mix([c[:1], u[:1], n[:1]], [torch.zeros(1), torch.ones(1), torch.zeros(1) - 1])
    assert torch.equal(mixed[:1], alone)
    assert mixed[0].isneginf().tolist() == [True, False, False]
    assert mixed[1].isneginf().tolist() == [False, True, False]


def test_masks_of_the_lowest_number_make_no_nan():
    lowest = torch.finfo(torch.float32).min
    c, e, a = (torch.tensor([[x, 0.0, 1.0]]) for x in (0.0, lowest, lowest))
    out = Guidance(b.dexperts(3.2)).combine_branches(0.0, {"cond": c, "expert": e, "antiexpert": a})
    assert out.isfinite().all()


# --- the methods ---

C, U, N = (out.double() for out in outs(3, seed=1))
FORMULAS = {  # written as in the papers
    "negative": (b.negative(3.0, 1.5), U + 3 * (C - U) - 1.5 * (N - U), {"negative": N}),
    "composed": (
        b.composed(cond=3.0, second=2.0),
        U + 3 * (C - U) + 2 * (N - U),
        {"second": N},
    ),
    "instruct_pix2pix": (
        b.instruct_pix2pix(7.5, 1.5),
        U + 1.5 * (N - U) + 7.5 * (C - N),
        {"image": N},
    ),
    "nested": (b.nested(3.0, 1.5), U + 3 * ((N + 1.5 * (C - N)) - U), {"image": N}),
    "weak": (b.weak(2.0), C + (C - N), {"weak": N}),
    "weak and null": (b.weak(2.0, cfg=3.0), U + 3 * (C - U) + (C - N), {"weak": N}),
    "context_aware": (b.context_aware(0.5), 1.5 * C - 0.5 * U, {}),
    "dexperts": (b.dexperts(2.0), C + 2 * (N - U), {"expert": N, "antiexpert": U}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_method_is_its_papers_formula(name):
    combination, expected, more = FORMULAS[name]
    outputs = {"cond": C, "uncond": U, **more}
    torch.testing.assert_close(Guidance(combination).combine_branches(0.5, outputs), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_schedule_in_a_method_has_its_value_at_each_step(name):
    method = {"weak and null": "weak", "composed": "negative", "nested": "negative"}.get(name, name)
    count = {"negative": 2, "instruct_pix2pix": 2}.get(method, 1)
    ramp = schedules.linear(1.5, 4.0)
    scheduled = getattr(b, method)(*[ramp] * count)
    for progress in (0.0, 0.3, 1.0):
        fixed = getattr(b, method)(*[ramp(progress)] * count)
        assert scheduled.at(progress) == pytest.approx(fixed.at(0.0))
        assert scheduled.fixed_at(progress).at(0.9) == pytest.approx(fixed.at(0.0))


def test_a_branch_without_weight_is_not_run():
    assert Guidance(b.negative(3.0, 0.0)).branches_at(0.0) == ("cond", "uncond")
    assert Guidance(b.negative(1.0, 0.0)).branches_at(0.0) == ("cond",)
    assert Guidance(b.weak(1.0, cfg=2.0)).branches_at(0.0) == ("cond", "uncond")
    assert Guidance(b.weak(2.0)).branches_at(0.0) == ("cond", "weak")
    late = b.negative(3.0, schedules.interval(1.0, 0.5, 1.0, outside=0.0))
    assert Guidance(late).branches_at(0.2) == ("cond", "uncond")
    assert Guidance(late).branches_at(0.7) == ("cond", "uncond", "negative")


def test_perp_neg_takes_away_only_what_is_across():
    c, u, n = outs(3, (4, 2, 3), seed=3)
    combine = Guidance(b.perp_neg(3.0, 1.5)).combine_branches
    got = combine(0.0, {"cond": c, "uncond": u, "negative": n})
    for i in range(4):  # per sample, unlike others
        toward, aside = (c[i] - u[i]).flatten(), (n[i] - u[i]).flatten()
        perpendicular = aside - (aside @ toward) / (toward @ toward) * toward
        expected = u[i].flatten() + 3 * toward - 1.5 * perpendicular
        torch.testing.assert_close(got[i].flatten(), expected, atol=1e-5, rtol=1e-5)
    same = combine(0.0, {"cond": c, "uncond": u, "negative": c})  # the prompt itself as negative
    torch.testing.assert_close(same, guide(c, u, 3.0), atol=1e-5, rtol=1e-5)
    flat = combine(0.0, {"cond": u, "uncond": u, "negative": n})  # a prompt that says nothing
    torch.testing.assert_close(flat, u - 1.5 * (n - u), atol=1e-5, rtol=1e-5)


def test_rounding_leaves_no_branch_behind():
    for s in (1.1, 1.2, 1.3, 1.4):
        assert Guidance(b.negative(s, s - 1)).branches_at(0.0) == ("cond", "negative")
    half = torch.tensor([7.3, 3.1], dtype=torch.bfloat16)
    assert b.negative(half, 0.1).branches_at(0.0) == ("cond", "uncond", "negative")
    ramp = b.nested(schedules.linear(1, 3), schedules.linear(2, 1))
    assert ramp.at(0.5) == pytest.approx({"cond": 3.0, "image": -1.0, "uncond": -1.0})


def test_a_mitigation_sees_the_guided_output_on_a_line_with_more_branches_too():
    """A spy that would need g = r + w (c - r) to read the strength back, as some of them do."""
    seen = []

    def spy(guided, cond_out, other):
        seen.append((guided, cond_out, other))
        return guided

    for combination, w in ((b.negative(3.0, 1.5), 3.0), (b.dexperts(2.0), 2.0)):
        outputs = dict(zip(combination.names, outs(3), strict=True))
        Guidance(combination, (spy,)).combine_branches(0.0, outputs)
        guided, cond_out, other = seen.pop()
        assert torch.equal(cond_out, outputs["cond"])
        torch.testing.assert_close(guide(cond_out, other, w), guided, atol=1e-5, rtol=1e-5)
    # where the condition weighs nothing it is still what is reined in against
    outputs = dict(zip(("cond", "uncond", "negative"), outs(3), strict=True))
    guidance = Guidance(b.negative(0.0, 1.0), (spy,))
    assert guidance.branches_at(0.0) == ("cond", "uncond", "negative")
    guidance.combine_branches(0.0, outputs)
    assert torch.equal(seen.pop()[1], outputs["cond"])


def test_momentum_of_almost_0_is_none_with_three_branches():
    space = {"cond": 0, "uncond": 1, "negative": 2}
    outputs = dict(zip(space, outs(3, (2, 3, 4)), strict=True))
    plain = Guidance(b.negative(3.0, 1.5)).combine_branches(0.0, outputs)
    for momentum in (0.0, -1e-6):
        apg = mitigations.apg(eta=1.0, momentum=momentum)
        begun = Guidance(b.negative(3.0, 1.5), (apg,)).begin("x0")
        level = Level(outputs["cond"], torch.tensor(0.6), torch.tensor(0.8), "x0")
        got = begun.combine_branches(0.0, outputs, level)
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.negative("3", 1.0), "the strength is '3', expected a number"),
        (lambda: b.weights(cond="a", uncond=0.0), "the weight of 'cond' is 'a', expected a number"),
        (lambda: b.perp_neg(3.0, None), "away is None, expected a number"),
        (lambda: Guidance(Guidance(3.0)), "expected a number, a schedule or weights of branches"),
    ],
)
def test_what_is_no_strength_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.perp_neg(3.0, math.nan), "away is nan, expected a finite number"),
        (lambda: b.negative(torch.ones(2), torch.ones(3)), r"strengths have \[2, 3\] values"),
        (lambda: b.Weights(("cond", "cond"), (1.0, 0.0)), "none twice"),
        (lambda: b.Weights(("cond", "uncond"), (1.0,)), "2 branches and 1 weights"),
        (lambda: b.cfg_pp(7.5), "s of cfg_pp is 7.5, expected lambda between 0 and 1"),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(
                    b.negative(2.0, schedules.interval(torch.ones(2), 0.5, 1.0, outside=0.0))
                ),
                branches={"negative": Branch(cond=OTHER)},
                callback=lambda step: pytest.fail("a step was run first"),
            ),
            "2 values for a batch of 3, expected one each",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(b.weak(schedules.interval(2.0, 0.5, 1.0))),
                branches={"weak": Branch(model=network("ar", codebook_size=5))},
            ),
            "has codebook_size 5 and the guided one 24",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(b.weak(2.0)),
                branches={"weak": Branch(model=network("ar").double())},
            ),
            "the branch 'weak' gives torch.float64 and 'cond' torch.float32",
        ),
        (lambda: b.weights(cond=1.0, uncond=0.5), "add up to 1.5 at progress 0.0, expected 1"),
        (lambda: b.weights(first=1.0), "expected 'cond' among them"),
        (lambda: b.weights(cond=math.nan, uncond=0.0), "the weight of 'cond' is nan"),
        (
            lambda: Guidance(b.weights(cond=schedules.linear(1, 2), uncond=0.0)).branches_at(1.0),
            "add up to 2.0 at progress 1.0",
        ),
        (
            lambda: draw("ar", wrapped("ar"), guidance=Guidance(b.perp_neg(3.0, 1.0))),
            "PerpNeg works on eps, and the model predicts logits",
        ),
        (
            lambda: draw("ar", wrapped("ar"), guidance=Guidance(b.negative(3.0, 1.0))),
            "guidance needs the branch 'negative': expected branches=",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(3.0),
                branches={"negative": Branch(cond=OTHER)},
            ),
            r"branches has \['negative'\], and guidance knows \('cond', 'uncond'\)",
        ),
        (
            lambda: draw("ar", wrapped("ar"), branches={"cond": Branch(cond=OTHER)}),
            "branches has 'cond', expected other names",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(b.weak(2.0)),
                branches={"weak": Branch(cond=OTHER[:2])},
            ),
            r"cond of the branch 'weak' has shape \(2, 3\)",
        ),
        (
            lambda: draw(
                "ar", wrapped("ar"), guidance=Guidance(b.weak(2.0)), branches={"weak": Branch()}
            ),
            "has neither cond nor model",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(b.weak(2.0)),
                branches={"weak": Branch(model=network("ar").train())},
            ),
            "training mode",
        ),
        (
            lambda: draw(
                "ar",
                wrapped("ar"),
                guidance=Guidance(b.weak(2.0)),
                branches={"weak": Branch(model=network("ar", codebook_size=30))},
            ),
            "the model of the branch 'weak' has codebook_size 30 and the guided one 24",
        ),
        (
            lambda: draw(
                "diffusion",
                wrapped("diffusion"),
                guidance=Guidance(b.weak(2.0)),
                branches={"weak": Branch(model=network("flow"))},
            ),
            "the model of the branch 'weak' has space 'flow' and the guided one",
        ),
        (
            lambda: draw(
                "hybrid",
                wrapped("hybrid"),
                guidance=Guidance(b.weak(2.0)),
                guide_at="states",
                branches={"weak": Branch(model=network("hybrid", seed=1))},
            ),
            "guide_at is 'states' with branches of another model",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- in the samplers ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_prompt_as_weights_equals_the_one_in_place_of_the_null_condition(kind):
    model = wrapped(kind)
    expected = draw(kind, model, uncond=OTHER, guidance=Guidance(3.0))
    combination = b.weights(cond=3.0, negative=-2.0)
    got = draw(
        kind, model, guidance=Guidance(combination), branches={"negative": Branch(cond=OTHER)}
    )
    assert close(got, expected)
    assert not close(got, draw(kind, model, guidance=Guidance(3.0)))


def test_a_sweep_may_pass_the_scale_at_which_a_branch_has_no_weight():
    model, more = wrapped("ar"), {"branches": {"weak": Branch(model=network("ar", seed=5))}}
    assert close(draw("ar", model, guidance=Guidance(b.weak(1.0)), **more), draw("ar", model))


def test_a_plain_callable_may_be_weak_or_guided():
    declared, shape = wrapped("flow"), (2, 4, 4)
    options = {"shape": shape, "path": declared.model.path, "space": "flow"}
    for model, weak in (
        (declared, lambda x, cond, t: 0.5 * x),
        (lambda x, cond, t: 0.5 * x, declared.model),
    ):
        own = {} if model is declared else options
        out = sample_diffusion(
            model,
            COND,
            seeds=[0, 1, 2],
            steps=3,
            guidance=Guidance(b.weak(2.0)),
            branches={"weak": Branch(model=weak)},
            **own,
        )
        assert out.shape == (3, *shape) and out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weak_model_with_the_same_weights_changes_nothing(kind):
    model = wrapped(kind)
    twin = network(kind)
    got = draw(kind, model, guidance=Guidance(b.weak(4.0)), branches={"weak": Branch(model=twin)})
    assert close(got, draw(kind, model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weak_model_is_guidance_by_another_network(kind):
    """Against a model that runs both networks itself, on rows of which the second half is the weak one's."""
    strong, weak = wrapped(kind), network(kind, seed=5)
    options = {"guidance": Guidance(b.weak(3.0)), "branches": {"weak": Branch(model=weak)}}
    got = draw(kind, strong, **options)
    assert not close(got, draw(kind, strong))
    dropout = ConditionDropout(weak, torch.zeros(3, dtype=torch.long)).eval()
    wrapped_too = draw(kind, strong, **options | {"branches": {"weak": Branch(model=dropout)}})
    assert torch.equal(got, wrapped_too)
    alone = draw(kind, strong, COND[1:2], [6], **options)
    assert close(got[1:2], alone)  # and in a batch of any size


@pytest.mark.parametrize(
    "s",
    [3.0, schedules.interval(3.0, 0.0, 0.5, outside=0.0)],
    ids=["constant", "then without cond"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_three_branches_in_one_pass_equal_three_passes(kind, s, monkeypatch):
    model = wrapped(kind)
    options = {
        "guidance": Guidance(b.negative(s, 1.0)),
        "branches": {"negative": Branch(cond=OTHER)},
    }
    together = draw(kind, model, **options)
    monkeypatch.setattr(
        Group, "runs", lambda self, needed: [(name,) for name in self.conditions if name in needed]
    )
    assert close(draw(kind, model, **options), together)


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_that_joins_late_costs_nothing_before(kind, monkeypatch):
    model = wrapped(kind)
    body = type(model.model.body)
    rows = []
    name = "extend" if kind in ("ar", "hybrid") else "forward"
    method = getattr(body, name)

    def counted(self, x, *rest):
        rows.append(len(x))
        return method(self, x, *rest)

    monkeypatch.setattr(body, name, counted)
    late = b.negative(3.0, schedules.interval(1.0, 0.5, 1.0, outside=0.0))
    draw(kind, model, guidance=Guidance(late), branches={"negative": Branch(cond=OTHER)})
    assert rows[0] == 6 and rows[-1] == 9
    first = next(i for i, count in enumerate(rows) if count != 6)
    assert first >= len(rows) // 2 - 2
    if name == "extend":  # two branches as ever, then the late one catches up, by itself
        assert rows[first:][:4] in ([3, 3, 3, 9], [9, 9, 9, 9])


@pytest.mark.parametrize("kind", KINDS)
def test_mitigations_work_with_other_branches(kind):
    logits = kind in ("ar", "masked")
    mitigation = mitigations.temperature_matching() if logits else mitigations.rescale()
    model = wrapped(kind)
    plain = Guidance(b.negative(3.0, 1.0))
    more = {"branches": {"negative": Branch(cond=OTHER)}}
    got = draw(kind, model, guidance=Guidance(plain.scale, (mitigation,)), **more)
    assert not close(got, draw(kind, model, guidance=plain, **more))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("ar", "masked")])
def test_perp_neg_is_drawn_from(kind):
    model, more = wrapped(kind), {"branches": {"negative": Branch(cond=OTHER)}}
    got = draw(kind, model, guidance=Guidance(b.perp_neg(3.0, 1.0)), **more)
    assert not close(got, draw(kind, model, guidance=Guidance(b.negative(3.0, 1.0)), **more))


# --- on a toy whose distribution is known ---


def test_guidance_by_a_weak_chain_draws_its_analytic_conditionals():
    strong = MarkovChain(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]),
        torch.tensor([[[0.7, 0.2, 0.1]] * 3, [[0.1, 0.3, 0.6]] * 3]),
        length=2,
    )
    weak = MarkovChain(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]]),
        torch.tensor([[[0.4, 0.3, 0.3]] * 3, [[0.3, 0.3, 0.4]] * 3]),
        length=2,
    )
    n, s = 20_000, 2.0
    cond = torch.zeros(n, 1, dtype=torch.long)
    ids = sample_autoregressive(
        strong,
        cond,
        seeds=range(n),
        guidance=Guidance(b.weak(s)),
        branches={"weak": Branch(model=weak)},
    )
    first = (strong.initial[0].log() * s - weak.initial[0].log() * (s - 1)).softmax(0)
    step = strong.transition[0, 0].log() * s - weak.transition[0, 0].log() * (s - 1)
    expected = n * (first[:, None] * step.softmax(0)).flatten()
    counts = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9).double()
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 26.1  # 8 degrees of freedom, 0.1 %


# --- CFG++ ---


@pytest.mark.parametrize("space", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("s", [0.0, 0.6, 1.0])
def test_cfg_pp_is_its_papers_loop_in_every_space(space, s):
    """Algorithm 2 of arXiv 2406.08070 for an eps model, whose outputs are given to the sampler in ``space``."""
    path, times = cosine(), torch.linspace(0.9, 0.0, 6, dtype=torch.float64)

    def eps_model(x, cond):
        return torch.tanh(x + cond) - 0.3 * x

    def model(x, cond, t):
        alpha, sigma = path.coefficients(t.double()[:, None])
        out = eps_model(x.double(), cond)
        return convert(out, x.double(), alpha, sigma, "eps", space).float()

    cond, null = torch.ones(2, 1), torch.zeros(1)
    got = sample_diffusion(
        model,
        cond,
        uncond=null,
        seeds=[0, 1],
        shape=(3,),
        path=path,
        space=space,
        guidance=Guidance(b.cfg_pp(s)),
        solver="cfg_pp",
        times=times,
    )
    start = []
    sample_diffusion(
        model,
        cond,
        seeds=[0, 1],
        shape=(3,),
        path=path,
        space=space,
        times=times,
        callback=lambda step: start.append(step.x),
    )
    x = start[0].double()
    alpha, sigma = path.coefficients(times)
    for i in range(5):
        c, u = eps_model(x, cond), eps_model(x, 0 * cond)
        x0 = (x - sigma[i] * (u + s * (c - u))) / alpha[i]
        x = alpha[i + 1] * x0 + sigma[i + 1] * u
    torch.testing.assert_close(got.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["diffusion", "flow", "hybrid", "hybrid masked"])
def test_cfg_pp_in_the_samplers(kind):
    model = wrapped(kind)
    got = draw(kind, model, guidance=Guidance(b.cfg_pp(1.0)), solver="cfg_pp")
    assert not close(got, draw(kind, model, solver="ddim"))
    for options in ({"guidance": Guidance(b.cfg_pp(0.6))}, {"solver": "cfg_pp"}):
        with pytest.raises(ValueError, match="expected solver 'cfg_pp' together with"):
            draw(kind, model, **options)
    if kind.startswith("hybrid"):
        with pytest.raises(ValueError, match="guide_at is 'states' with CfgPlusPlus"):
            options = {"guidance": Guidance(b.cfg_pp(0.6)), "solver": "cfg_pp"}
            draw(kind, model, guide_at="states", **options)


@pytest.mark.parametrize("kind", ["ar", "masked"])
def test_cfg_pp_is_refused_for_logits(kind):
    with pytest.raises(ValueError, match="CfgPlusPlus works on eps, and the model predicts logits"):
        draw(kind, wrapped(kind), guidance=Guidance(b.cfg_pp(0.6)))


# --- networks made worse ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [perturb_attention, skip_layers])
def test_a_perturbed_network_guides_in_every_family(kind, make):
    model = wrapped(kind)
    before = draw(kind, model)
    worse = make(model.model, [1])
    options = {"guidance": Guidance(b.weak(3.0)), "branches": {"weak": Branch(model=worse)}}
    got = draw(kind, model, **options)
    assert not close(got, before)
    assert close(draw(kind, model), before)  # the model itself is as it was
    assert worse.body.blocks[0] is model.model.body.blocks[0]
    assert close(draw(kind, worse), draw(kind, make(model.model, [-1])))


def test_a_perturbed_layer_sees_its_own_token_alone_and_a_skipped_one_nothing():
    model = network("masked")
    ids = torch.randint(0, 24, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 24
    every = range(2)
    worse = perturb_attention(model, every)
    moved = (worse(ids, COND[:1]) - worse(changed, COND[:1])).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [3]
    assert close(worse(ids, COND[:1]), worse(ids, COND[1:2]))  # nor does it see the condition
    body, without = model.body, skip_layers(model, every).body
    x = torch.randn(1, 16, 32)
    assert torch.equal(without(x, COND[:1]), body.norm(x))


def test_a_hook_on_a_network_is_not_on_the_one_that_was_made_worse():
    model = network("masked")
    worse, seen = skip_layers(model, [0]), []
    ids = torch.zeros(1, 16, dtype=torch.long)
    with (
        model.register_forward_pre_hook(lambda *_: seen.append("model")),
        worse.register_forward_pre_hook(lambda *_: seen.append("worse")),
    ):
        model(ids, COND[:1])
        worse(ids, COND[:1])
    assert seen == ["model", "worse"]
    with model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True):
        worse = skip_layers(model, [0])
    assert worse(ids, COND[:1]).shape == (
        1,
        16,
        24,
    )  # what is no longer on one is still on the other


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"layers is \[2\], expected a list of some of 0 to 1"):
        skip_layers(network("ar"), [2])
    with pytest.raises(ValueError, match=r"layers is \[\]"):
        skip_layers(network("ar"), [])
    with pytest.raises(ValueError, match="layers is 1, expected a list"):
        skip_layers(network("ar"), 1)
    with pytest.raises(TypeError, match="network is a Linear"):
        perturb_attention(torch.nn.Linear(2, 2), [0])


# --- in the pipeline ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_takes_texts_and_a_weaker_pipeline(family):
    pipe, prompts = pipeline(family=family), CAPTIONS[:2]
    away = {"guidance": Guidance(b.negative(3.0, 20.0)), "seeds": [0, 1]}
    one = pipe.sample(prompts, branches={"negative": CAPTIONS[2]}, **away)
    each = pipe.sample(prompts, branches={"negative": [CAPTIONS[2]] * 2}, **away)
    ids = pipe.encode_prompts([CAPTIONS[2]])[0]
    same = pipe.sample(prompts, branches={"negative": Branch(cond=ids)}, **away)
    assert torch.equal(one, same)
    torch.testing.assert_close(one, each, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(one, pipe.sample(prompts, guidance=Guidance(3.0), seeds=[0, 1]))
    weak = pipeline(family=family)  # of the same tokenizer
    weak.model = ConditionDropout(
        network(
            family,
            7,
            condition_vocabulary=pipe.text.vocabulary,
            condition_length=12,
            **({"codebook_size": 25} if family in ("ar", "masked") else {}),
        ),
        pipe.text.null_condition,
    ).eval()
    guided = pipe.sample(
        prompts, branches={"weak": weak}, guidance=Guidance(b.weak(3.0)), seeds=[0, 1]
    )
    assert not torch.allclose(guided, pipe.sample(prompts, seeds=[0, 1]))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (["only one"], "expected a text, 2 texts, a pipeline or a Branch"),
        (lambda: pipeline(family="masked"), "a pipeline with the family masked, expected"),
        (lambda: pipeline(seed=1), "a pipeline with another tokenizer, expected"),
        (lambda: pipeline().network, "expected a text, 2 texts, a pipeline or a Branch"),
    ],
)
def test_a_branch_of_the_pipeline_that_does_not_fit_is_refused(branch, message):
    pipe = pipeline()
    branch = branch() if not isinstance(branch, list) else branch
    with pytest.raises(ValueError, match=message):
        pipe(CAPTIONS[:2], seeds=[0, 1], guidance=Guidance(b.weak(2.0)), branches={"weak": branch})


@pytest.mark.parametrize("module", [b, mitigations, schedules])
def test_the_catalogue_lists_all_there_is(module):
    text = (Path(__file__).parents[1] / "docs/catalogue.md").read_text()
    not_methods = {"Weights", "PerpNeg", "CfgPlusPlus", "weights", "at_levels"}
    missing = [name for name in module.__all__ if f"`{name}" not in text]
    assert set(missing) <= not_methods
