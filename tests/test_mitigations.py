"""Mitigations: the papers' formulas written out, parity with diffusers, spaces, masks, and what they share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import wrapped

from unicfg import (
    Guidance,
    guide,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)
from unicfg.guidance import branches
from unicfg.guidance import mitigations as m
from unicfg.guidance.spaces import SPACES, Level, convert
from unicfg.sampling.paths import straight

S = 5.0
DENOISING = [
    m.static_threshold(0.8),
    m.dynamic_threshold(0.9, 0.8),
    m.rescale(0.7),
    m.norm_clamp(0.9),
    m.apg(0.0),
    m.apg(0.3, threshold=2.0),
    m.cfg_zero_star(),
    m.tcfg(),
    m.frequency_decoupled((1.0, 0.5)),
    m.magnitude_aware(2.0),
    m.mimic_scale(2.0),
]
LOGITS = [
    m.temperature_matching(),
    m.kl_trust_region(0.05),
    m.project_logits(0.2, threshold=3.0),
    m.kl_scale(1.0),
    m.plausibility(0.1),
    m.top_k_of_cond(5),
]
# what leaves the conditional output alone, so that s -> 1 is continuous
IDENTITY_AT_1 = [
    x
    for x in DENOISING + LOGITS
    if not isinstance(x, (m.static_threshold, m.dynamic_threshold, m.plausibility, m.top_k_of_cond))
    and x != m.norm_clamp(0.9)
]


def fields(seed=0, shape=(3, 2, 4, 4), dtype=torch.float64):
    """Conditional and unconditional outputs that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    c, d = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return c.to(dtype), (0.8 * c + 0.5 * d).to(dtype)


def rows(seed=0, shape=(3, 6, 11), dtype=torch.float64):
    c, u = fields(seed, shape, dtype)
    return 2 * c, 2 * u


def outputs_for(mitigation):
    return rows() if getattr(mitigation, "space", None) == "logits" else fields()


def apply(mitigation, s=S, outputs=None):
    c, u = outputs or outputs_for(mitigation)
    return mitigation(guide(c, u, s), c, u)


def names(mitigation):
    return str(mitigation)


# the formulas


def test_thresholds_by_hand():
    x0 = torch.tensor([[0.5, -3.0, 1.0, -0.2], [0.1, 0.2, -0.3, 0.4]])
    assert torch.equal(m.static_threshold()(x0, x0, x0), x0.clamp(-1, 1))
    # the quantile 1 is the largest: the first sample is divided by 3, the second lies within the limit
    expected = torch.stack([x0[0] / 3, x0[1]])
    torch.testing.assert_close(m.dynamic_threshold(1.0)(x0, x0, x0), expected)
    torch.testing.assert_close(m.dynamic_threshold(1.0, 2.0)(x0, x0, x0)[0], x0[0] * 2 / 3)


def test_rescale_has_the_deviation_of_the_conditional_output():
    c, u = fields()
    full = apply(m.rescale(1.0))
    torch.testing.assert_close(full.flatten(1).std(1), c.flatten(1).std(1))
    torch.testing.assert_close(apply(m.rescale(0.7)), 0.7 * full + 0.3 * guide(c, u, S))


def test_norm_clamp_limits_the_norm_and_lets_smaller_ones_be():
    c, _ = fields()
    size = c.flatten(1).norm(dim=1)
    torch.testing.assert_close(apply(m.norm_clamp()).flatten(1).norm(dim=1), size)
    assert torch.equal(m.norm_clamp()(c / 2, c, c), c / 2)


def test_apg_is_algorithm_1_of_the_paper():
    """c + (s - 1) * (D_perpendicular + eta * D_parallel), not u + s * that, nor c + s * that."""
    c, u = fields()
    direction = c - u
    unit = c / c.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for eta, r in ((0.0, math.inf), (0.4, 1.5), (1.0, math.inf)):
        size = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        short = direction * torch.minimum(torch.ones_like(size), r / size)
        parallel = (short * unit).sum((1, 2, 3), keepdim=True) * unit
        expected = c + (S - 1) * (short - parallel + eta * parallel)
        torch.testing.assert_close(apply(m.apg(eta, r)), expected)
    torch.testing.assert_close(apply(m.apg(1.0)), guide(c, u, S))


def test_apg_momentum_by_hand_and_once_a_noise_level():
    running = m.apg(0.0, momentum=-0.5).begin()
    steps = [fields(seed) for seed in range(3)]
    average, progresses = 0.0, (0.0, 0.5, 1.0)
    for progress, (c, u) in zip(progresses, steps, strict=True):
        average = (c - u) - 0.5 * average
        expected = m.apg().project(c + (S - 1) * average, c, average)
        first = running.at(progress)(guide(c, u, S), c, u)
        again = running.at(progress)(guide(c, u, S), c, u)  # the second evaluation of a Heun step
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(again, expected)


def test_apg_momentum_without_steps_is_refused():
    c, u = fields()
    with pytest.raises(ValueError, match=r"momentum is -0\.5, which needs the steps"):
        m.apg(momentum=-0.5)(c, c, u)
    with pytest.raises(ValueError, match="needs the steps"):
        Guidance(S, (m.apg(momentum=-0.5),)).combine(0.0, c, u, level("x0"))


def test_cfg_zero_star_is_the_formula_of_the_paper():
    c, u = fields()
    a = (c * u).sum((1, 2, 3), keepdim=True) / u.square().sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(apply(m.cfg_zero_star()), guide(c, a * u, S))


def test_tcfg_is_the_projection_on_the_first_singular_vector():
    c, u = fields()
    stacked = torch.stack([c.flatten(1), u.flatten(1)], dim=1)
    axis = torch.linalg.svd(stacked, full_matrices=False).Vh[:, 0]
    damped = ((u.flatten(1) * axis).sum(1, keepdim=True) * axis).view_as(u)
    torch.testing.assert_close(apply(m.tcfg()), guide(c, damped, S))


def test_frequency_decoupled_bands_have_scales_of_their_own():
    """With the scales 9 and 3: a constant direction is coarse, an alternating one is fine."""
    c = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = torch.ones_like(c)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(4, 4)
    rule = m.frequency_decoupled((1.0, 0.25))
    for direction, share in ((flat, 0.25), (checks.expand_as(c), 1.0)):
        out = rule(c + 8 * direction, c, c - direction)
        torch.testing.assert_close(out, c + 8 * share * direction)
    c, u = fields(shape=(2, 3, 5, 7))
    for bands in (1, 2, 3):
        same = m.frequency_decoupled((0.5,) * bands)
        torch.testing.assert_close(apply(same, S, (c, u)), guide(c, u, 1 + (S - 1) * 0.5))


def test_magnitude_aware_is_the_formula_of_the_paper():
    c, u = fields()
    size = (c - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    s = 1 + (S - 1) * (-2.0 * size).exp()
    torch.testing.assert_close(apply(m.magnitude_aware(2.0)), guide(c, u, s))


def test_mimic_scale_has_the_range_of_the_smaller_scale():
    c, u = fields()

    def reach(x):
        return (x - x.mean((2, 3), keepdim=True)).abs().amax((2, 3))

    limit = torch.minimum(reach(guide(c, u, 2.0)), reach(guide(c, u, S)))
    torch.testing.assert_close(reach(apply(m.mimic_scale(2.0))), limit)


def test_temperature_matching_turns_the_logits_and_keeps_their_spread():
    c, u = rows()
    g = guide(c, u, S)
    out = apply(m.temperature_matching())
    torch.testing.assert_close(out.std(-1), c.std(-1))
    assert torch.equal(out.argsort(-1), g.argsort(-1))


def divergence(p, q):
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def test_kl_trust_region_goes_exactly_as_far_as_it_may():
    c, u = rows()
    before, limit = divergence(guide(c, u, S), c), 0.5
    after = divergence(apply(m.kl_trust_region(limit)), c)
    assert bool((before > limit).any()) and bool((before < limit).any())
    torch.testing.assert_close(after, before.clamp(max=limit), atol=1e-5, rtol=1e-5)
    assert torch.equal(apply(m.kl_trust_region(0.0)), c)


def test_project_logits_leaves_nothing_along_the_conditional_row():
    c, _ = rows()
    update = apply(m.project_logits()) - c
    centred = c - c.mean(-1, keepdim=True)
    assert float((update * centred).sum(-1).abs().max()) < 1e-9
    assert float((apply(m.project_logits(1.0)) - guide(*rows(), S)).log_softmax(-1).std()) < 1e-9


def test_kl_scale_by_hand():
    c, u = rows()
    share = (-divergence(c, u)).exp()[..., None]
    torch.testing.assert_close(apply(m.kl_scale(1.0)), c + share * (guide(c, u, S) - c))


def test_plausibility_and_top_k_mask_by_the_conditional_model():
    c = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    g = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert m.plausibility(0.1)(g, c, c).tolist() == [[0.0, 1.0, 2.0, -math.inf]]
    assert m.top_k_of_cond(2)(g, c, c).tolist() == [[0.0, 1.0, -math.inf, -math.inf]]
    assert torch.equal(m.top_k_of_cond(9)(g, c, c), g)


# parity with diffusers, where that is right


def test_parity_with_diffusers():
    from diffusers.guiders.classifier_free_guidance import rescale_noise_cfg
    from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance
    from diffusers.schedulers import DDPMScheduler

    c, u = fields(dtype=torch.float32)
    g = guide(c, u, S)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(m.rescale(0.7)(g, c, u), rescale_noise_cfg(g, c, 0.7), **close)
    torch.testing.assert_close(m.tcfg()(g, c, u), normalized_guidance(c, u, S), **close)
    imagen = DDPMScheduler(thresholding=True, sample_max_value=100.0)._threshold_sample(g)
    torch.testing.assert_close(m.dynamic_threshold()(g, c, u), imagen, **close)


def test_parity_with_the_zero_star_guider_of_diffusers():
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    c, u = fields(dtype=torch.float32)
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=S, zero_init_steps=1)
    zero = Guidance(S, (m.cfg_zero_star(), m.zero_init())).begin("flow")
    for step in range(3):
        guider.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(1.0))
        theirs = guider.forward(c, u).pred
        ours = zero.combine(step / 2, c, u, level("flow", torch.float32))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_parity_with_the_frequency_decoupled_guider_of_diffusers():
    from diffusers.guiders import FrequencyDecoupledGuidance

    for scales in ([10.0, 5.0], [10.0, 4.0, 2.5]):
        guider = FrequencyDecoupledGuidance(guidance_scales=scales)
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(0))
        c, u = fields(shape=(2, 4, 16, 16))
        rule = m.frequency_decoupled(tuple((own - 1) / (S - 1) for own in scales))
        torch.testing.assert_close(
            apply(rule, S, (c, u)), guider.forward(c, u).pred, rtol=1e-5, atol=1e-5
        )


def test_where_the_apg_of_diffusers_differs_from_the_paper():
    """Its default is u + s * update, so at s -> 1 it does not become the conditional output; ours does."""
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    c, u = fields(dtype=torch.float32)
    s = 1.0001
    theirs = normalized_guidance(c, u, s, momentum_buffer=None, eta=0.0, norm_threshold=0.0)
    assert float((theirs - c).abs().max()) > 0.1
    assert float((m.apg(0.0)(guide(c, u, s), c, u) - c).abs().max()) < 1e-3


# what all of them share


@pytest.mark.parametrize("mitigation", DENOISING + LOGITS, ids=names)
def test_samples_of_a_batch_do_not_touch_each_other(mitigation):
    c, u = outputs_for(mitigation)
    together = apply(mitigation, S, (c, u))
    alone = torch.cat([apply(mitigation, S, (c[i : i + 1], u[i : i + 1])) for i in range(len(c))])
    torch.testing.assert_close(together, alone)
    per_sample = torch.tensor([S, 1.0, -2.0], dtype=torch.float64)
    mixed = apply(mitigation, per_sample, (c, u))
    torch.testing.assert_close(mixed[0], together[0])
    torch.testing.assert_close(mixed[2:], apply(mitigation, -2.0, (c[2:], u[2:])))


@pytest.mark.parametrize("mitigation", IDENTITY_AT_1, ids=names)
def test_continuous_where_the_scale_becomes_1(mitigation):
    c, _ = outputs_for(mitigation)
    assert float((apply(mitigation, 1 + 1e-9) - c).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mitigation", DENOISING + LOGITS, ids=names)
def test_dtype_is_kept_and_half_precision_is_rounded_once(mitigation, dtype):
    c, u = (x.to(dtype) for x in outputs_for(mitigation))
    guidance = Guidance(S, (mitigation,))
    where = None
    if getattr(mitigation, "space", None) != "logits":
        where = level(getattr(mitigation, "space", "eps"), torch.float32)
    out = guidance.combine(0.5, c, u, where)
    assert out.dtype == dtype
    exact = guidance.combine(0.5, c.float(), u.float(), where)
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 6e4])
@pytest.mark.parametrize("mitigation", DENOISING + LOGITS, ids=names)
def test_constant_zero_and_overflowing_outputs_give_numbers(mitigation, value):
    shape = outputs_for(mitigation)[0].shape
    constant = torch.full(shape, value, dtype=torch.float16)
    for c, u in ((constant, constant), (constant, torch.zeros_like(constant))):
        out = mitigation(guide(c, u, 15.0), c, u)
        assert not bool(out.isnan().any()) and not bool(out.isposinf().any())


@pytest.mark.parametrize("mitigation", LOGITS, ids=names)
def test_masked_tokens_take_no_part_and_stay_masked(mitigation):
    c, u = rows()
    wide = torch.full((*c.shape[:-1], 2), -math.inf, dtype=c.dtype)
    masked = [torch.cat([x, wide], dim=-1) for x in (c, u)]
    out = apply(mitigation, S, masked)
    torch.testing.assert_close(out[..., :-2], apply(mitigation, S, (c, u)))
    assert bool(out[..., -2:].isneginf().all())
    # a token that is masked in the unconditional branch alone keeps what guide() made of it, or is masked
    half = [masked[0].clone(), masked[1]]
    half[0][..., -1] = 0.5
    kept = apply(mitigation, S, half)[..., -1]
    assert bool(((kept == 0.5) | kept.isneginf()).all())
    nothing = torch.full_like(c, -math.inf)
    assert torch.equal(mitigation(nothing, nothing, nothing), nothing)


@pytest.mark.parametrize("mitigation", LOGITS, ids=names)
def test_a_constant_added_to_a_row_of_logits_changes_no_probability(mitigation):
    c, u = rows()
    plain = apply(mitigation, S, (c, u)).softmax(-1)
    shifted = apply(mitigation, S, (c + 7.0, u - 3.0)).softmax(-1)
    torch.testing.assert_close(shifted, plain, atol=1e-6, rtol=1e-5)


def level(space, dtype=torch.float64, t=0.6, shape=(3, 2, 4, 4)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=dtype)
    angle = torch.tensor(t, dtype=torch.float64)
    return Level(x, angle.cos(), angle.sin(), space)


@settings(max_examples=40, deadline=None)
@given(
    s=st.floats(-3, 20),
    t=st.floats(0.1, 1.4),
    space=st.sampled_from(SPACES),
    index=st.integers(0, len(DENOISING) - 1),
)
def test_the_space_that_a_model_predicts_in_does_not_matter(s, t, space, index):
    """A mitigation declares its own; so what is drawn is the same x0, whatever the model speaks."""
    c, u = fields()
    reference, other = level("flow", t=t), level(space, t=t)
    guidance = Guidance(s, (DENOISING[index],))
    expected = guidance.combine(0.5, c, u, reference)

    def translated(x):
        return convert(x, other.x, other.alpha, other.sigma, "flow", space)

    out = guidance.combine(0.5, translated(c), translated(u), other)
    back = convert(out, other.x, other.alpha, other.sigma, space, "flow")
    torch.testing.assert_close(back, expected, atol=1e-7, rtol=1e-6)


def test_without_a_level_a_mitigation_with_a_space_is_refused():
    c, u = fields()
    with pytest.raises(ValueError, match=r"level is None.*rescale works on v predictions"):
        Guidance(S, (m.rescale(),)).combine(0.5, c, u)


# in the samplers


COND = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("mitigation", [m.apg(0.0, momentum=-0.5), m.rescale(), m.zero_init(0.3)])
@pytest.mark.parametrize("family", ["diffusion", "flow", "hybrid"])
def test_a_sampling_leaves_no_state_behind(family, mitigation):
    model = wrapped(family)
    sampler = sample_hybrid if family == "hybrid" else sample_diffusion
    guidance = Guidance(S, (mitigation,))
    first, second = (
        sampler(model, COND, seeds=[3, 4], guidance=guidance, steps=4, solver="heun")
        for _ in range(2)
    )
    plain = sampler(model, COND, seeds=[3, 4], guidance=Guidance(S), steps=4, solver="heun")
    alone = sampler(model, COND[1:], seeds=[4], guidance=guidance, steps=4, solver="heun")
    assert torch.equal(first, second) and bool(first.isfinite().all())
    assert float((first - plain).abs().max()) > 1e-3
    torch.testing.assert_close(
        alone[0], first[1], atol=2e-2, rtol=2e-2
    )  # rounding grows over steps


@pytest.mark.parametrize("mitigation", LOGITS, ids=names)
def test_logit_mitigations_act_in_both_token_samplers(mitigation):
    for family, sampler in (("ar", sample_autoregressive), ("masked", sample_masked)):
        changed = set()

        def watch(step, changed=changed):
            outputs = (step.guided, step.cond_out, step.uncond_out)
            expected = mitigation(guide(*outputs[1:], S), *outputs[1:])
            torch.testing.assert_close(outputs[0], expected)
            changed.add(not torch.equal(outputs[0], guide(*outputs[1:], S)))

        model = wrapped(family)
        sampler(model, COND, seeds=[0, 1], guidance=Guidance(S, (mitigation,)), callback=watch)
        assert True in changed


@pytest.mark.parametrize("family", ["ar", "masked", "diffusion", "hybrid"])
def test_a_mitigation_that_means_nothing_in_a_family_is_refused(family):
    samplers = {"ar": sample_autoregressive, "masked": sample_masked, "hybrid": sample_hybrid}
    sampler = samplers.get(family, sample_diffusion)
    tokens = family in ("ar", "masked")
    wrong = m.rescale() if tokens else m.plausibility()
    with pytest.raises(ValueError, match=f"the guidance method {type(wrong).__name__} works on"):
        sampler(wrapped(family), COND, seeds=[0, 1], guidance=Guidance(S, (wrong,)))


def test_zero_init_stands_still_for_the_first_steps_only():
    seen = []
    sample_diffusion(
        wrapped("flow"),
        COND,
        seeds=[0, 1],
        steps=5,
        guidance=Guidance(S, (m.zero_init(0.25),)),
        callback=lambda step: seen.append((step.progress, bool(step.guided.any()))),
    )
    assert seen == [(0.0, False), (0.25, False), (0.5, True), (0.75, True), (1.0, True)]


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_no_solver_takes_a_second_order_step_from_where_a_sample_stood_still(solver):
    goal = torch.tensor([[2.0, -1.0], [0.5, 3.0]])

    def exact(x, cond, t):  # the velocity towards one point: every solver is exact
        return (x - cond) / t[:, None].clamp(min=1e-6)

    seen = []
    sample_diffusion(
        exact,
        goal,
        uncond=torch.zeros(2),
        shape=(2,),
        path=straight(),
        space="flow",
        seeds=[0, 1],
        steps=10,
        solver=solver,
        # of the second sample nothing is skipped, whatever the first one does
        guidance=Guidance(torch.tensor([2.0, 1.0]), (m.zero_init(0.3),)),
        callback=seen.append,
    )
    x = torch.stack([step.x for step in seen]).double()
    torch.testing.assert_close(x[1:4, 0], x[:1, 0].expand(3, 2), atol=1e-6, rtol=1e-6)
    # at t = 1 - i / 10 each is on the line from where it set out to its goal, which guidance doubles
    line = x[3, 0] + (2.0 * goal[0] - x[3, 0]) * torch.arange(7)[:, None] / 7
    torch.testing.assert_close(x[3:, 0], line, atol=1e-4, rtol=1e-4)
    line = x[0, 1] + (goal[1] - x[0, 1]) * torch.arange(10)[:, None] / 10
    torch.testing.assert_close(x[:, 1], line, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "mitigation", [*DENOISING, m.zero_init(0.5), m.apg(momentum=-0.5), *LOGITS], ids=names
)
def test_a_sample_that_needs_no_guidance_is_the_same_beside_others(mitigation):
    logits = getattr(mitigation, "space", None) == "logits"
    sampler = sample_autoregressive if logits else sample_diffusion
    model = wrapped("ar" if logits else "flow")
    options = {} if logits else {"steps": 4}
    for s in (0.0, 1.0):
        guidance = Guidance(torch.tensor([s, S]), (mitigation,))
        together = sampler(model, COND, seeds=[3, 4], guidance=guidance, **options)
        alone = sampler(model, COND[:1], seeds=[3], guidance=Guidance(s), **options)
        torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


def test_one_branch_by_its_weights_is_the_same_beside_others():
    c, u = fields()
    weak = {"cond": c, "uncond": u, "negative": c - u}
    own, away = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.0])
    out = Guidance(branches.negative(own, away), (m.static_threshold(0.1),)).combine_branches(
        0.5, weak, Level(c, 0.6, 0.8, "x0")
    )
    assert torch.equal(out[1], c[1]) and torch.equal(out[2], u[2])
    assert float(out[0].abs().max()) <= 0.1


@pytest.mark.parametrize(
    "combination",
    [
        branches.cfg_pp(torch.tensor([0.6, 1.0])),
        branches.perp_neg(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])),
    ],
)
def test_a_sample_that_needs_several_branches_is_mitigated_beside_others(combination):
    c, u = fields(shape=(2, 2, 4, 4))
    outputs = {"cond": c, "uncond": u, "negative": c - u}
    guidance = Guidance(combination, (m.static_threshold(0.1),))
    out = guidance.combine_branches(0.5, outputs, Level(c, 0.6, 0.8, "x0"))
    assert float(out[0].abs().max()) <= 0.1 and float(out[1].abs().max()) <= 0.1


def test_a_token_that_only_the_unconditional_model_masks_is_judged_like_others():
    c, u = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.0, -math.inf]])
    for mitigation in (m.top_k_of_cond(1), m.plausibility(0.9)):
        assert mitigation(guide(c, u, 2.0), c, u).tolist() == [[6.0, -math.inf, -math.inf]]


def test_momentum_keeps_what_mitigations_before_it_did():
    c, u = fields()
    level = Level(c, 0.6, 0.8, "x0")
    for momentum in (0.0, 1e-12):
        chain = (m.static_threshold(1.0), m.apg(eta=1.0, momentum=momentum))
        running = Guidance(S, chain).begin("x0")
        for progress in (0.0, 1.0):  # the second step has a momentum
            out = running.combine(progress, c, u, level)
            torch.testing.assert_close(out, guide(c, u, S).clamp(-1, 1))


def test_a_level_that_leaves_a_space_open_in_one_sample_leaves_the_others_alone():
    c, u = fields(shape=(2, 2, 4, 4))
    x = 0.3 * c + u
    alpha, sigma = torch.tensor([[0.0, 0.6], [1.0, 0.8]], dtype=torch.float64)
    guidance = Guidance(S, (m.tcfg(),))
    both = guidance.combine(0.5, c, u, Level(x, alpha, sigma, "flow"))
    alone = guidance.combine(0.5, c[1:], u[1:], Level(x[1:], 0.6, 0.8, "flow"))
    torch.testing.assert_close(both[1:], alone)
    assert torch.equal(both[0], guide(c, u, S)[0])


def test_hidden_states_are_not_mitigated():
    with pytest.raises(ValueError, match="guide_at is 'states' with mitigations"):
        sample_hybrid(
            wrapped("hybrid"),
            COND,
            seeds=[0, 1],
            guidance=Guidance(S, (m.rescale(),)),
            guide_at="states",
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.rescale(1.5), r"rescale: phi is 1\.5, expected a number >= 0 and <= 1"),
        (lambda: m.dynamic_threshold(0.0), r"percentile is 0\.0, expected a number > 0 and <= 1"),
        (lambda: m.static_threshold(-1), "limit is -1, expected a number > 0"),
        (lambda: m.norm_clamp(-1), "limit is -1"),
        (lambda: m.apg(threshold=-1.0), "threshold is -1"),
        (lambda: m.apg(momentum=2.0), "momentum is 2"),
        (lambda: m.zero_init(1.2), "until is 1.2"),
        (lambda: m.frequency_decoupled(()), "shares is ()"),
        (lambda: m.magnitude_aware(-1.0), "alpha is -1"),
        (lambda: m.mimic_scale(math.nan), "s is nan"),
        (lambda: m.kl_trust_region(-1.0), "limit is -1"),
        (lambda: m.plausibility(0.0), "alpha is 0"),
        (lambda: m.top_k_of_cond(0), "k is 0"),
        (lambda: m.rescale(math.nan), "phi is nan"),
        (lambda: apply(m.frequency_decoupled(), S, rows()), "expected \\(B, C, h, w\\)"),
        (lambda: m.rescale()(*fields(), torch.zeros(2)), "expected equal shapes"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_flow():
    for mitigation in DENOISING + LOGITS:
        c, u = (x.clone().requires_grad_() for x in outputs_for(mitigation))
        out = mitigation(guide(c, u, S), c, u)
        out.masked_fill(out.isneginf(), 0.0).square().sum().backward()
        assert bool(c.grad.isfinite().all()) and bool(c.grad.any())


def test_the_pyramid_takes_odd_and_small_grids():
    """A grid whose last row has no partner, and one too small to be reflected, are put together without loss."""
    for side in (2, 3, 5):
        c, u = fields(shape=(1, 1, side, side))
        guided = guide(c, u, S)
        parts = [
            m.frequency_decoupled(shares)(guided, c, u) - c for shares in ((0.0, 1.0), (1.0, 0.0))
        ]
        torch.testing.assert_close(sum(parts), guided - c)
        assert all(float(part.abs().max()) > 0 for part in parts)


FOR_DENOISERS = [name for name in m.__all__ if getattr(getattr(m, name), "space", "") != "logits"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("diffusion", "flow", "hybrid")
        for name in FOR_DENOISERS
        if (family, name) != ("hybrid", "frequency_decoupled")  # one token has no frequencies
    ],
)
def test_every_mitigation_for_denoisers_works_from_pure_noise_on(family, name):
    """Also one that works on eps, which says nothing at the start of a straight path."""
    mitigation = getattr(m, name)()
    sampler = sample_hybrid if family == "hybrid" else sample_diffusion
    latents = sampler(
        wrapped(family),
        torch.tensor([[3, 4, 5]]),
        seeds=[0],
        guidance=Guidance(15.0, (mitigation,)),
        steps=4,
    )
    assert latents.isfinite().all()
