"""Scales, temperatures and models far out: finite images, or an error that says what, where, and what to do."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from tiny import FAMILIES, network, pipeline, wrapped

from models import TextToImage
from unicfg import (
    Branch,
    Guidance,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)
from unicfg.guidance import branches, mitigations, schedules
from unicfg.guidance.spaces import Level
from unicfg.sampling import Uncached, paths
from unicfg.sampling.masked import REVEALS
from unicfg.sampling.soundness import Watch
from unicfg.sampling.tokens import TokenFilter

COND, SEEDS, CODES = torch.tensor([[1, 2, 3], [4, 5, 6]]), [0, 1], 24
NUMBERS = [-50.0, -1.0, 0.0, 0.5, 1.0, 1.5, 8.0, 100.0, 1000.0]
SCALES = [
    *NUMBERS,
    torch.tensor([1000.0, -50.0]),
    torch.tensor([0.0, 1.0]),
    schedules.linear(-50, 1000),
    schedules.interval(1000.0, 0.3, 0.6, outside=0.0),
    lambda progress: torch.tensor([-50.0, 1000.0]) if progress > 0.5 else 1.0,
]
TEMPERATURES = [0, 1e-320, 1e-40, 1e-6, 0.5, 1, 10, 100, 1e38, 1e300]
FILTERS = [{"temperature": t} for t in TEMPERATURES]
FILTERS += [{"top_k": k} for k in (1, CODES, 10**9)]
FILTERS += [{"top_p": p} for p in (5e-324, 1e-45, 1e-6, 0.999, 1.0)]
FILTERS += [{"temperature": 100, "top_k": 2, "top_p": 1e-300}]
LOGITS = [
    mitigations.kl_scale(),
    mitigations.kl_trust_region(),
    mitigations.plausibility(),
    mitigations.project_logits(threshold=1.0),
    mitigations.temperature_matching(),
    mitigations.top_k_of_cond(3),
]
DENOISING = [
    mitigations.apg(),
    mitigations.apg(momentum=-0.75, threshold=2.5),
    mitigations.cfg_zero_star(),
    mitigations.dynamic_threshold(),
    mitigations.frequency_decoupled(),
    mitigations.magnitude_aware(),
    mitigations.mimic_scale(),
    mitigations.norm_clamp(),
    mitigations.rescale(),
    mitigations.static_threshold(),
    mitigations.tcfg(),
    mitigations.zero_init(),
]
SOLVERS = ["ddim", "heun", "dpmpp_2m"]


def sound(out: torch.Tensor) -> bool:
    """Finite latents, or ids of the codebook."""
    if out.is_floating_point():
        return bool(out.isfinite().all())
    return out.dtype == torch.int64 and int(out.min()) >= 0 and int(out.max()) < CODES


def test_every_mitigation_is_in_the_tables():
    assert {type(m).__name__ for m in LOGITS + DENOISING} == set(mitigations.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_one_after_another(dtype):
    model = wrapped("ar").to(dtype)
    options = [(Guidance(s), own) for s in SCALES for own in (FILTERS[0], FILTERS[5])]
    options += [(Guidance(s), own) for s in (1000.0, -50.0) for own in FILTERS]
    options += [(Guidance(s, (m,)), {}) for s in (1000.0, -50.0) for m in LOGITS]
    for guidance, own in options:
        assert sound(sample_autoregressive(model, COND, seeds=SEEDS, guidance=guidance, **own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_tokens(dtype):
    model = wrapped("masked").to(dtype)
    options = [(Guidance(s), {"reveal": r}) for s in SCALES for r in REVEALS]
    options += [(Guidance(s), own) for s in (1000.0, -50.0) for own in FILTERS]
    options += [(Guidance(s, (m,)), {}) for s in (1000.0, -50.0) for m in LOGITS]
    options += [(Guidance(s), {"refresh": 2, "choice_noise": 1e300}) for s in (1000.0, -50.0)]
    for guidance, own in options:
        ids = sample_masked(model, COND, seeds=SEEDS, guidance=guidance, steps=4, **own)
        assert sound(ids)


@pytest.mark.parametrize(
    ("path", "space"),
    [
        ("cosine", "eps"),
        ("cosine", "v"),
        ("straight", "flow"),
        ("straight", "x0"),
        ("linear", "score"),
    ],
)
def test_denoised_latents(path, space):
    model = wrapped("diffusion", path=path, space=space)
    options = [(Guidance(s), {"solver": own}) for s in SCALES for own in SOLVERS]
    options += [(Guidance(s, (m,)), {"solver": "heun"}) for s in (1000.0, -50.0) for m in DENOISING]
    options += [(Guidance(s), {"refresh": 2, "eta": 1.0}) for s in (1000.0, -50.0)]
    for guidance, own in options:
        assert sound(sample_diffusion(model, COND, seeds=SEEDS, guidance=guidance, steps=4, **own))


@pytest.mark.parametrize("family", ["hybrid", "hybrid masked"])
def test_hybrid_latents(family):
    model = wrapped(family, depth=1, grid=3)
    options = [(Guidance(s), {"guide_at": at}) for s in SCALES for at in ("head", "states", "both")]
    options += [(Guidance(s), {"solver": own}) for s in (1000.0, -50.0) for own in SOLVERS]
    # a token has no neighbours in its head
    reined = [m for m in DENOISING if not isinstance(m, mitigations.frequency_decoupled)]
    options += [(Guidance(s, (m,)), {}) for s in (1000.0, -50.0) for m in reined]
    options += [(Guidance(1000.0), {"temperature": t}) for t in (0, 1e-320, 1e-6, 100)]
    for guidance, own in options:
        assert sound(sample_hybrid(model, COND, seeds=SEEDS, guidance=guidance, steps=3, **own))


@pytest.mark.parametrize("family", ["hybrid", "hybrid masked"])
def test_states_without_the_condition_are_the_unconditional_ones(family):
    model, null = wrapped(family), torch.zeros(2, 3, dtype=torch.long)
    options = {"seeds": SEEDS, "steps": 3}
    own = sample_hybrid(model, null, **options)
    for at in ("head", "states", "both"):
        assert torch.equal(
            sample_hybrid(model, COND, uncond=null, guidance=Guidance(0.0), guide_at=at, **options),
            own,
        )


def test_momentum_begins_anew_with_each_token_of_a_hybrid():
    """For the head of a token begins the guidance of its sampling once more."""
    x, cond, uncond = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    level = Level(x, torch.tensor(0.6), torch.tensor(0.8), "x0")

    def steps(begun):
        return [begun.combine(progress, cond, uncond, level) for progress in (0.0, 0.5, 1.0)]

    sampling = Guidance(3.0, (mitigations.apg(momentum=-0.75),)).begin("x0")
    first = steps(sampling)
    assert not torch.equal(first[0], first[1])
    for _ in range(2):
        assert all(map(torch.equal, steps(sampling.begin("x0")), first))


@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_what_is_no_temperature_is_refused(value):
    options = {"seeds": SEEDS, "temperature": value}
    for family, sample in (
        ("ar", sample_autoregressive),
        ("masked", sample_masked),
        ("hybrid", sample_hybrid),
    ):
        with pytest.raises(ValueError, match=r"temperature is .* expected a finite number >= 0"):
            sample(wrapped(family), COND, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_scale_is_refused_before_the_first_step(value):
    for scale in (value, torch.tensor([1.0, value])):
        with pytest.raises(ValueError, match=r"scale is .*expected .*finite number"):
            Guidance(scale)
    guidance = Guidance(lambda progress: value if progress == 1 else 2.0)
    for family, sample in (
        ("ar", sample_autoregressive),
        ("masked", sample_masked),
        ("diffusion", sample_diffusion),
        ("hybrid", sample_hybrid),
    ):
        steps = []
        with pytest.raises(ValueError, match=r"progress 1.0 is .*expected a finite number"):
            sample(wrapped(family), COND, seeds=SEEDS, guidance=guidance, callback=steps.append)
        assert not steps


def test_extreme_filters_are_their_limits():
    logits = torch.tensor([[1.0, 3.0, 2.0, -math.inf]])
    coldest, any_of_three = torch.tensor([[0.0, 1, 0, 0]]), torch.tensor([[1.0, 1, 1, 0]]) / 3
    for temperature in (0, 5e-324, 1e-300, 1e-46, 1e-39, 1e-6):
        assert torch.equal(TokenFilter(temperature)(logits), coldest)
    for temperature in (1e30, 1e38, 1e39, 1e308):
        assert torch.allclose(TokenFilter(temperature)(logits), any_of_three)
    for top_p in (5e-324, 1e-46, 1e-45, 1e-6):
        assert torch.equal(TokenFilter(top_p=top_p)(logits), coldest)


# models of strangers: what they do to the numbers of the rows with a condition, or of those without
STRANGERS = {
    "nan": lambda out, named: out.masked_fill(named, math.nan),
    "inf": lambda out, named: out.masked_fill(named, math.inf),
    "all masked": lambda out, named: out.masked_fill(named, -math.inf),
    "uncond masked": lambda out, named: out.masked_fill(~named, -math.inf),
    "some masked": lambda out, named: out.masked_fill(named & (out < 0), -math.inf),
    "one nan": lambda out, named: out.masked_fill(named & (out == out.amax(-1, True)), math.nan),
    "huge": lambda out, named: 3e38 * out,
    "huge apart": lambda out, named: torch.where(named, 3e38, -3e38) * out,
    "low": lambda out, named: out - 3e38,
    "half": lambda out, named: (60000 * torch.where(named, 1.0, -1.0) * out).half(),
    "tiny": lambda out, named: 1e-45 * out,
}
MASKS = {"all masked", "uncond masked", "some masked"}
BROKEN = {"nan", "inf", "one nan"}


def strange(kind, out, cond):
    named = (cond[:, 0] != 0).view(-1, *[1] * (out.ndim - 1))
    return STRANGERS[kind](out, named)


class Masked:
    """A masked model of a stranger."""

    num_tokens, mask_token = 4, CODES

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, ids, cond):
        places = torch.arange(float(CODES)) * (cond[:, :1] + ids.sum(1, keepdim=True))
        return strange(self.kind, torch.cos(places)[:, None].repeat(1, 4, 1), cond)


def autoregressive(kind):
    def logits(ids, cond):
        places = torch.arange(float(CODES)) * (cond[:, :1] + ids.sum(1, keepdim=True))
        return strange(kind, torch.cos(places), cond)

    return Uncached(logits, 4)


def says(error):
    """Whether an error names what, where, in which samples, and what to do."""
    where = r"((token|step) [0-3]|after the last step)"
    return re.search(rf"{where}.*, of the samples \[(0|1|0, 1)\]: expected ", str(error))


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0, 1000.0, -50.0])
@pytest.mark.parametrize("kind", STRANGERS)
def test_tokens_of_strangers(kind, s):
    options = {"seeds": SEEDS, "uncond": torch.zeros(1, dtype=torch.long), "guidance": Guidance(s)}
    cond = torch.tensor([[1], [2]])
    # of the branches that are run, none may be broken, and the leading one must leave something
    refused = kind in BROKEN | {"all masked"} and s != 0
    refused = refused or (kind == "uncond masked" and s == 0)
    for sample, model, own in (
        (sample_autoregressive, autoregressive(kind), {}),
        (sample_masked, Masked(kind), {"steps": 3}),
        (sample_masked, Masked(kind), {"steps": 3, "reveal": "halton", "refresh": 2}),
    ):
        if refused:
            with pytest.raises(FloatingPointError) as caught:
                sample(model, cond, **options, **own)
            assert says(caught.value)
            continue
        try:
            ids = sample(model, cond, **options, **own)
        except FloatingPointError as error:
            # twice what a float holds is between the branches, which is what is kept between refreshes
            assert kind in ("huge", "huge apart") and "refresh" in own and says(error)
        else:
            assert sound(ids)


@pytest.mark.parametrize("kind", STRANGERS)
def test_latents_of_strangers(kind):
    cond, refused = torch.tensor([[1], [2]]), 0
    for s, solver, (space, path) in itertools.product(
        (0.0, 1.0, 3.0, 1000.0),
        SOLVERS,
        (("eps", "cosine"), ("x0", "straight"), ("v", "cosine"), ("flow", "straight")),
    ):

        def denoise(x, cond, t):
            return strange(kind, torch.cos(x * (cond[:, 0].view(-1, 1, 1, 1) + 1.0)), cond)

        try:
            latents = sample_diffusion(
                denoise,
                cond,
                seeds=SEEDS,
                shape=(2, 2, 2),
                path=paths.PATHS[path],
                space=space,
                uncond=torch.zeros(1, dtype=torch.long),
                guidance=Guidance(s),
                solver=solver,
                steps=3,
            )
        except FloatingPointError as error:
            assert says(error)
            refused += 1
        else:
            assert sound(latents)
            assert kind not in BROKEN | MASKS or s == (1.0 if kind == "uncond masked" else 0.0)
    assert (refused > 0) == (kind not in ("tiny", "half"))


def test_half_precision_is_guided_in_float32_between_refreshes_too():
    """60000 - (-60000) is more than float16 holds, and the step between two refreshes needs that distance."""
    cond, seen = torch.tensor([[1], [2]]), []
    options = {"seeds": SEEDS, "uncond": torch.zeros(1, dtype=torch.long), "steps": 4}

    class Steady(Masked):
        def __call__(self, ids, cond):
            return strange("half", torch.linspace(-1, 1, CODES).repeat(len(ids), 4, 1), cond)

    sample_masked(
        Steady("half"), cond, guidance=Guidance(0.5), refresh=2, callback=seen.append, **options
    )
    for step in seen:
        assert torch.equal(step.uncond_out, -step.cond_out) and not step.guided.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "hybrid masked"])
def test_networks_in_half_precision_draw_nearly_the_same(family, dtype):
    """The samplers keep latents in float32, whatever the weights are."""
    tokens = family in ("ar", "masked")
    sample = {"ar": sample_autoregressive, "masked": sample_masked}.get(family, sample_diffusion)
    sample = sample_hybrid if family.startswith("hybrid") else sample
    reined = (mitigations.kl_scale() if tokens else mitigations.norm_clamp(),)
    for own in ((), reined):
        options = {"seeds": SEEDS, "guidance": Guidance(3.0, own)}
        half, full = (
            sample(wrapped(family).to(kind), COND, **options) for kind in (dtype, torch.float32)
        )
        assert sound(half) and half.dtype == full.dtype
        if tokens:
            assert (half == full).float().mean() > 0.25  # by chance: 1 / 24
        else:
            assert (half - full).abs().mean() < 0.15 * full.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_whose_network_is_in_half_precision_gives_images(family):
    pipe, full = pipeline(family=family), pipeline(family=family)
    pipe.model.bfloat16()
    options = {"seeds": SEEDS, "guidance": Guidance(3.0)}
    images = pipe.sample(["a red circle"] * 2, **options)
    difference = images - full.sample(["a red circle"] * 2, **options)
    assert images.isfinite().all() and difference.abs().mean() < 0.1


@pytest.mark.parametrize("trouble", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", [0, 1])
def test_the_sample_is_named(broken, trouble):
    """One row of a batch is broken; the other is not to blame."""
    cond = torch.tensor([[1], [1]])
    cond[broken] = 2

    def logits(ids, cond):
        out = torch.cos(torch.arange(5.0) + cond + ids.sum(1, keepdim=True))
        if ids.shape[1] == 2:
            out[cond[:, 0] == 2] = trouble
        return out

    def denoise(x, cond, t):
        return torch.where((cond == 2).view(-1, 1, 1, 1) & (t < 0.5).view(-1, 1, 1, 1), trouble, x)

    named = rf"of the samples \[{broken}\]: expected"
    with pytest.raises(FloatingPointError, match=rf"token 2.* {named}"):
        sample_autoregressive(Uncached(logits, 4), cond, seeds=SEEDS)
    with pytest.raises(FloatingPointError, match=rf"step 2, in the branches.* {named}"):
        sample_diffusion(
            denoise,
            cond,
            seeds=SEEDS,
            shape=(1, 2, 2),
            path=paths.straight(),
            space="flow",
            steps=3,
        )


def spoiled(guided, cond_out, uncond_out):
    """A mitigation that makes NaN of what is finite, in the second sample."""
    guided = guided.clone()
    guided[1] = math.nan
    return guided


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mitigation_is_blamed_for_its_own_nan(device, monkeypatch):
    """Also where looking at once would hold up a GPU; no token is out of range until it is looked at."""
    for place in ("autoregressive", "masked", "diffusion", "hybrid"):
        monkeypatch.setattr(
            f"unicfg.sampling.{place}.Watch", lambda _, *rule: Watch(torch.device(device), *rule)
        )
    guidance = Guidance(3.0, (spoiled,))
    wanted = r"the guided output (holds NaN or \+inf|is not finite) at (token|step) 0.*samples \[1\].*mitigations"
    for family, sample in (
        ("ar", sample_autoregressive),
        ("masked", sample_masked),
        ("diffusion", sample_diffusion),
    ):
        with pytest.raises(FloatingPointError, match=wanted):
            sample(wrapped(family), COND, seeds=SEEDS, guidance=guidance)
    with pytest.raises(FloatingPointError, match=r"token 0.*samples \[1\]"):
        sample_hybrid(wrapped("hybrid"), COND, seeds=SEEDS, guidance=guidance, steps=2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_head_that_carries_latents_too_far_is_found(device, monkeypatch):
    """Its output is finite, and what the last step makes of it is not."""
    monkeypatch.setattr(
        "unicfg.sampling.hybrid.Watch", lambda _, *rule: Watch(torch.device(device), *rule)
    )
    model = wrapped("hybrid", path="cosine", space="v")
    with torch.no_grad():
        for linear in (model.model.head.inputs, model.model.head.outputs):
            linear.weight.zero_()
        model.model.head.outputs.bias.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(
        FloatingPointError,
        match=r"the latents are not finite after the last step of token 0.*samples",
    ):
        sample_hybrid(model, COND, seeds=SEEDS, steps=1, temperature=5e37)


def test_a_model_is_not_blamed_for_latents_that_its_steps_carried_too_far():
    def denoise(x, cond, t):
        return torch.where(x.isfinite(), -3e38 * (1 + t[:, None]).clamp(max=1.1), math.nan)

    with pytest.raises(FloatingPointError, match=r"the latents are not finite before step [1-9]"):
        sample_diffusion(
            denoise,
            COND,
            seeds=SEEDS,
            shape=(2,),
            path=paths.cosine(),
            space="eps",
            steps=9,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_that_are_not_finite_are_refused(family):
    pipe = pipeline(family=family)
    with torch.no_grad():
        next(pipe.tokenizer.decoder.parameters()).fill_(math.nan)
    steps = {} if family == "ar" else {"steps": 2}
    with pytest.raises(FloatingPointError, match=r"decoded images.*\[0\].*image tokenizer"):
        pipe(["a red circle"], seeds=[0], **steps)


def test_weights_that_overflow_are_named():
    """What a damaged file looks like from outside."""
    for family, sample in (
        ("ar", sample_autoregressive),
        ("masked", sample_masked),
        ("diffusion", sample_diffusion),
        ("hybrid", sample_hybrid),
    ):
        model = network(family)
        with torch.no_grad():
            model.body.norm.weight.fill_(math.nan)
        with pytest.raises(
            FloatingPointError, match=r"(token|step) 0.*look at the model's weights"
        ):
            sample(model, COND, seeds=SEEDS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_shipped_weights(record_property):
    """Every family, scale, temperature, solver and mitigation: finite images, or a FloatingPointError."""
    table = {}
    for family in FAMILIES:
        pipe, count = TextToImage.from_pretrained("shapes", family), Counter()
        for guidance, own in cases(family):
            try:
                images = pipe.sample(
                    ["a red circle", "a blue square"], seeds=SEEDS, guidance=guidance, **own
                )
            except FloatingPointError as error:
                assert "expected" in str(error)
                count["refused"] += 1
            else:
                assert images.isfinite().all() and images.abs().max() <= 1, (guidance, own)
                count["finite"] += 1
        table[family] = count
    for family, count in table.items():
        record_property("measured", f"{family} {count['finite']} of {count.total()} finite")


def cases(family):
    """Guidance and options of a family for the shipped weights."""
    plain, ends = [Guidance(s) for s in SCALES], (1000.0, -50.0)
    if family in ("ar", "masked"):
        own = [{"temperature": t} for t in (0, 1e-6, 0.5, 1, 10, 100)]
        own += [{"top_k": 1}, {"top_p": 1e-6}]
        if family == "masked":
            own += [{"reveal": reveal} for reveal in REVEALS] + [{"refresh": 2}]
            own = [{"steps": 8} | each for each in own]
        reined = [Guidance(s, (m,)) for s in ends for m in LOGITS]
        return [*itertools.product(plain, own), *itertools.product(reined, own[-1:])]
    if family == "hybrid":
        at = [{"guide_at": at, "solver": o} for at in ("head", "states", "both") for o in SOLVERS]
        own = [{"steps": 5} | each for each in at]
        reined = [Guidance(s, (m,)) for s in ends for m in DENOISING]
        reined = [
            g for g in reined if not isinstance(g.mitigations[0], mitigations.frequency_decoupled)
        ]
    else:
        own = [{"steps": 8, "solver": o} for o in SOLVERS]
        own += [{"steps": 8, "refresh": 2}, {"steps": 1}]
        reined = [Guidance(s, (m,)) for s in ends for m in DENOISING]
    return [*itertools.product(plain, own), *itertools.product(reined, own[:1])]


# on a device that is looked at later


SAMPLERS = {
    "ar": sample_autoregressive,
    "masked": sample_masked,
    "diffusion": sample_diffusion,
    "flow": sample_diffusion,
    "hybrid": sample_hybrid,
}


@pytest.fixture
def looking_later(monkeypatch):
    """As on a GPU, where numbers are looked at when it is told that they are needed."""
    for place in ("autoregressive", "masked", "diffusion", "hybrid"):
        monkeypatch.setattr(
            f"unicfg.sampling.{place}.Watch", lambda _, *rule: Watch(torch.device("cuda"), *rule)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_callback_is_told_nothing_unsound_on_a_device(family, looking_later):
    model, told = wrapped(family), []
    parameters = list(model.model.parameters())
    with torch.no_grad():
        parameters[-1].fill_(math.nan)
    sample = SAMPLERS[family]
    with pytest.raises(FloatingPointError, match=r"(token|step) 0"):
        sample(model, COND, seeds=SEEDS, guidance=Guidance(2.0), callback=told.append)
    assert not told


def test_the_callback_of_a_head_is_told_nothing_unsound_on_a_device(looking_later):
    model, told = wrapped("hybrid"), []
    with torch.no_grad():
        model.model.head.outputs.bias.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match=r"step 0 of token 0, in the branches \['cond', 'uncond'\]|'cond'"
    ):
        sample_hybrid(
            model, COND, seeds=SEEDS, guidance=Guidance(2.0), steps=2, head_callback=told.append
        )
    assert not told


def test_what_mitigations_hide_is_found_on_a_device(looking_later):
    """The threshold would make latents of any size fit again."""
    model = wrapped("hybrid", path="straight", space="flow")
    with torch.no_grad():
        model.model.head.outputs.bias.fill_(math.inf)
    guidance = Guidance(3.0, (mitigations.static_threshold(3.0),))
    with pytest.raises(
        FloatingPointError, match="the model's output is not finite at step 0 of token 0"
    ):
        sample_hybrid(model, COND, seeds=SEEDS, guidance=guidance, steps=2)


def test_guidance_is_blamed_for_what_it_made_on_a_device(looking_later):
    """The squares of perp_neg overflow where the outputs do not; the latents of the next step are not to blame."""

    def denoise(x, cond, t):
        return 1e25 * cond[:, :1].float() * torch.ones_like(x)

    with pytest.raises(FloatingPointError, match="the guided output is not finite at step 0"):
        sample_diffusion(
            denoise,
            COND,
            uncond=torch.tensor([2, 2, 2]),
            seeds=SEEDS,
            shape=(2,),
            path=paths.cosine(),
            space="eps",
            guidance=Guidance(branches.perp_neg(2.0, 1.0)),
            branches={"negative": Branch(cond=torch.tensor([9, 9, 9]))},
            steps=2,
        )


def test_a_model_that_refuses_nan_is_not_blamed_on_a_device(looking_later):
    def denoise(x, cond, t):
        if not bool(x.isfinite().all()):
            raise ValueError("x holds NaN")
        return torch.full_like(x, -3e38)

    with pytest.raises(FloatingPointError, match=r"the latents are not finite before step [1-9]"):
        sample_diffusion(
            denoise, COND, seeds=SEEDS, shape=(2,), path=paths.cosine(), space="eps", steps=4
        )


def test_a_token_that_cannot_be_drawn_is_found_on_a_device(looking_later):
    def masks_all(guided, cond_out, uncond_out):
        return torch.full_like(guided, -math.inf)

    guidance = Guidance(3.0, (masks_all,))
    for family, sample in (("ar", sample_autoregressive), ("masked", sample_masked)):
        with pytest.raises(FloatingPointError, match=r"no token.* can be drawn.*samples \[0, 1\]"):
            sample(wrapped(family), COND, seeds=SEEDS, guidance=guidance)
