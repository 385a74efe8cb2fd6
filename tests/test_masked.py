"""Masked sampling: schedules by hand, exact distributions, the same tokens as diffusers, inpainting, bad input."""

import itertools
import math

import pytest
import torch
from diffusers import AmusedScheduler
from diffusers.schedulers import scheduling_amused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import wrapped

from models.perturb import perturb_attention, skip_layers
from unicfg import Branch, ConditionDropout, Guidance, guide, sample_masked
from unicfg.guidance import branches as b
from unicfg.guidance.schedules import interval, linear
from unicfg.sampling.masked import REVEALS, halton_order, masked_share, reveal_counts
from unicfg.sampling.randomness import generators, uniform
from unicfg.sampling.tokens import draw

L, V = 16, 6


class Independent(torch.nn.Module):
    """Logits of a token depend on its place and on the class, not on the other tokens."""

    num_tokens, mask_token = L, V

    def __init__(self, length=L):
        super().__init__()
        self.num_tokens = length
        self.table = 1.5 * torch.randn(3, length, V, generator=torch.Generator().manual_seed(1))
        self.seen = []
        self.eval()

    def forward(self, ids, cond):
        self.seen.append(ids)
        return self.table[cond[:, 0]]


class Agreement(torch.nn.Module):
    """Two tokens that are always equal: the second is certain once the first is known."""

    num_tokens, mask_token = 2, 2

    def forward(self, ids, cond):
        logits = torch.zeros(*ids.shape, 2)
        other = ids.flip(1)
        known = other < 2
        return logits + known[..., None] * torch.nn.functional.one_hot(other.clamp(max=1), 2) * 60.0


def sample(model, n=1, **options):
    null = torch.tensor([0])
    cond = torch.ones(n, 1, dtype=torch.long)
    return sample_masked(model, cond, uncond=null, seeds=range(n), **options)


# how many, and where


@pytest.mark.parametrize(
    ("reveal", "expected"),
    [
        # 16 tokens, 4 steps: floor(16 cos(pi/8 (1, 2, 3))) = 14, 11, 6 stay masked
        ("cosine", [2, 3, 5, 6]),
        ("linear", [4, 4, 4, 4]),
        # floor(16 * 2 / pi * arccos(1/4, 1/2, 3/4)) = 13, 10, 7
        ("arccos", [3, 3, 3, 7]),
        ("halton", [3, 3, 3, 7]),
    ],
)
def test_counts_by_hand(reveal, expected):
    counts = reveal_counts(torch.tensor([16]), 4, reveal)
    assert [int(c) for c in counts] == expected
    steps = []
    sample(Independent(), steps=4, reveal=reveal, callback=steps.append)
    left = [int((step.ids == V).sum()) for step in steps]
    assert left == [16 - sum(expected[: i + 1]) for i in range(4)]


@settings(max_examples=60, deadline=None)
@given(
    masked=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    steps=st.integers(1, 50),
    reveal=st.sampled_from(REVEALS),
)
def test_counts_add_up_start_at_once_and_depend_on_their_own_sample_alone(masked, steps, reveal):
    counts = torch.stack(reveal_counts(torch.tensor(masked), steps, reveal), dim=1)
    assert counts.shape == (len(masked), steps)
    assert counts.sum(1).tolist() == masked and int(counts.min()) >= 0
    for tokens, own in zip(masked, counts, strict=True):
        assert int(own[0]) >= 1 or tokens == 0
        assert int(own.min()) >= 1 or tokens < steps  # enough tokens for every step: none is idle
        assert torch.equal(own, torch.cat(reveal_counts(torch.tensor([tokens]), steps, reveal)))


def test_few_tokens_are_spread_over_the_schedule_by_hand():
    # floor(4 (1 - i / 6)) for i = 1 to 6 leaves 3, 2, 2, 1, 0, 0 of four tokens
    counts = reveal_counts(torch.tensor([4]), 6, "linear")
    assert [int(c) for c in counts] == [1, 1, 0, 1, 1, 0]


def test_halton_places_by_hand():
    # 1, 2, 3, 4 in base 2: 1/2, 1/4, 3/4, 1/8; in base 3: 1/3, 2/3, 1/9, 4/9; on a grid of 4 x 4
    first = [(2, 1), (1, 2), (3, 0), (0, 1)]
    order = halton_order(16)
    assert [int(order[4 * row + column]) for row, column in first] == [0, 1, 2, 3]
    assert sorted(order.tolist()) == list(range(16))
    quarters = order.view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    assert all(int((quarter < 8).sum()) == 2 for quarter in quarters)  # spread, not in raster order
    with pytest.raises(ValueError, match="15 tokens, expected a square"):
        halton_order(15)
    steps = []
    sample(Independent(), steps=16, reveal="halton", callback=steps.append)
    for i, step in enumerate(steps):
        assert torch.equal((step.ids[0] != V).nonzero()[:, 0], (order <= i).nonzero()[:, 0])


# what is drawn


@pytest.mark.parametrize("s", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 4, "reveal": "halton"}])
def test_tokens_follow_the_guided_distribution(s, options):
    """Without a choice by confidence each token is one draw from the guided softmax."""
    n, model = 4000, Independent()
    ids = sample(model, n, guidance=Guidance(s), **options)
    expected = guide(model.table[1:2], model.table[0:1], s)[0].softmax(-1)
    counts = torch.nn.functional.one_hot(ids, V).sum(0)
    chi_square = ((counts - n * expected).square() / (n * expected)).sum(-1)
    assert float(chi_square.mean()) == pytest.approx(V - 1, abs=2.5)


def test_later_steps_see_what_was_drawn_before():
    ids = sample(Agreement().eval(), 400, steps=2)
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert float(ids[:, 0].float().mean()) == pytest.approx(0.5, abs=0.08)
    at_once = sample(Agreement().eval(), 400, steps=1)
    assert 100 < int((at_once[:, 0] == at_once[:, 1]).sum()) < 300


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 1}])
def test_the_most_confident_tokens_are_kept_and_the_guided_softmax_judges(options):
    """Before temperature and filters, after which every token may be certain."""
    model, steps = Independent(), []
    guided = guide(model.table[1], model.table[0], 3.0)
    sample(
        model, steps=4, callback=steps.append, guidance=Guidance(3.0), choice_noise=0.0, **options
    )
    kept = steps[0].ids[0] != V
    confidence = guided.log_softmax(-1).gather(-1, steps[-1].ids[0][:, None])[:, 0]
    assert 0 < int(kept.sum()) < len(kept)
    if options != {"temperature": 0.5}:  # all draws are then the likeliest tokens
        assert torch.equal(steps[-1].ids[0], guided.argmax(-1))
        assert float(confidence[kept].min()) >= float(confidence[~kept].max())
        assert kept.nonzero()[:, 0].tolist() != list(range(int(kept.sum())))


def test_choice_noise_is_annealed_to_nothing():
    """The token that is revealed is rarely the most confident one at first, and nearly always at the end."""
    model = Independent()
    best = guide(model.table[1], model.table[0], 1.0).log_softmax(-1).amax(-1)
    hits = {"early": 0, "late": 0}
    for seed in range(20):
        steps = []
        cond = torch.ones(1, 1, dtype=torch.long)
        options = {"steps": L, "reveal": "linear", "temperature": 0.0, "choice_noise": 2.0}
        sample_masked(model, cond, seeds=[seed], callback=steps.append, **options)
        before = torch.full((L,), V)
        for index, step in enumerate(steps):
            revealed = (step.ids[0] != before).nonzero()[:, 0]
            hidden = before == V
            right = float(best[revealed].max()) >= float(best[hidden].max()) - 1e-6
            for name, part in (("early", range(1, 5)), ("late", range(L - 5, L - 1))):
                hits[name] += right and index in part
            before = step.ids[0]
    assert hits["early"] < 40 and hits["late"] > hits["early"] + 15  # of 80 each


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("s", [1.0, 3.0])
def test_the_same_tokens_as_diffusers(schedule, s, monkeypatch):
    """AmusedScheduler on the same guided logits, uniforms and Gumbel noise, at every step.

    It keeps at least one token masked until the last step, as we do; its counts are the floor of the same share.
    """
    steps, n, choice_noise = (
        7,
        3,
        4.5,
    )  # not 6: 16 cos(pi / 3) is 8 for us and 7.9999995 in their float32
    model = wrapped("masked")
    cond = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 1, 2]])
    ours = []
    sample_masked(
        model, cond, seeds=range(n), guidance=Guidance(s), steps=steps, reveal=schedule,
        choice_noise=choice_noise, callback=ours.append,
    )  # fmt: skip

    scheduler = AmusedScheduler(mask_token_id=model.model.mask_token, masking_schedule=schedule)
    scheduler.set_timesteps(steps)
    scheduler.temperatures = torch.tensor(
        [choice_noise * (1 - (i + 1) / steps) for i in range(steps)]
    )
    noise = [uniform(sources, (2, 16)) for sources in [generators(range(n))] for _ in range(steps)]
    ids = torch.full((n, 16), model.model.mask_token)
    null = model.null_condition.expand(n, -1)
    for i, timestep in enumerate(scheduler.timesteps):
        u = noise[i]
        monkeypatch.setattr(
            torch,
            "multinomial",
            lambda p, k, generator=None, u=u: draw(p, u[:, 0].flatten())[:, None],
        )
        gumbel = -(-u[:, 1].log()).log()
        monkeypatch.setattr(
            scheduling_amused, "gumbel_noise", lambda t, generator=None, gumbel=gumbel: gumbel
        )
        with torch.no_grad():
            # their pipeline: uncond + guidance_scale * (cond - uncond)
            logits = torch.lerp(model.model(ids, null), model.model(ids, cond), s)
        ids = scheduler.step(logits, timestep, ids).prev_sample
        assert torch.equal(ids, ours[i].ids)


def test_progress_is_the_revealed_share():
    steps = []
    scales = Guidance(linear(1.0, 5.0))
    sample(Independent(), steps=4, reveal="linear", guidance=scales, callback=steps.append)
    assert [step.progress for step in steps] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [step.scale for step in steps] == pytest.approx([1, 7 / 3, 11 / 3, 5])
    steps.clear()
    sample(Independent(), steps=4, reveal="cosine", callback=steps.append)
    share = [1 - math.cos(math.pi / 8 * i) for i in range(4)]
    assert [step.progress for step in steps] == pytest.approx([x / share[-1] for x in share])
    assert masked_share("arccos", 0.0) == 1.0 and masked_share("arccos", 1.0) == 0.0


def test_the_ends_of_an_interval_are_met_in_spite_of_rounding():
    for steps, start, end, guided in ((6, 0.4, 0.8, [2, 3, 4]), (11, 0.3, 0.7, [3, 4, 5, 6, 7])):
        seen = []
        guidance = Guidance(interval(3.0, start, end))
        sample(
            Independent(12), steps=steps, reveal="linear", guidance=guidance, callback=seen.append
        )
        assert [step.index for step in seen if step.scale != 1.0] == guided


def test_more_steps_than_tokens_are_not_run():
    model = Independent(4)
    many, few = [], []
    sample(model, steps=50, callback=many.append)
    assert len(model.seen) == 4
    sample(model, steps=4, callback=few.append)
    assert [step.progress for step in many] == [step.progress for step in few]
    assert torch.equal(many[-1].ids, few[-1].ids)


def test_a_step_with_nothing_to_reveal_runs_no_pass():
    model, steps = Independent(), []
    anew = torch.arange(L) < 4
    options = {"init": torch.zeros(L).long(), "mask": anew, "reveal": "linear", "steps": 6}
    sample(model, callback=steps.append, **options)
    assert len(model.seen) == 4
    assert [step.index for step in steps] == [0, 1, 3, 4]
    assert [step.progress for step in steps] == pytest.approx([0, 0.2, 0.6, 0.8])


# what the model is asked for


class Asked(torch.nn.Module):
    """A network that notes which tokens it is asked for; without them, the same network as others write it."""

    def __init__(self, network, takes_places=True):
        super().__init__()
        self.network, self.seen = network, []
        self.num_tokens, self.mask_token = network.num_tokens, network.mask_token
        if not takes_places:
            self.forward = lambda ids, cond: self.network(ids, cond)

    def forward(self, ids, cond, places=None):
        self.seen.append(places)
        return self.network(ids, cond, places)


OF_THREE = {"cond": torch.tensor([[3, 4, 5], [6, 7, 8], [9, 1, 2]]), "seeds": range(3)}


@pytest.mark.parametrize("reveal", REVEALS)
@pytest.mark.parametrize(
    "options", [{}, {"refresh": 2}, {"masked": [16, 6, 1]}, {"refresh": 3, "masked": [2, 1, 1]}]
)
def test_a_model_that_is_told_the_places_draws_the_same(reveal, options):
    """As it is, and in the last block and the head of our transformer, where other tokens are not computed."""
    model = wrapped("masked")
    given = dict(OF_THREE, reveal=reveal, steps=5, guidance=Guidance(linear(1.0, 4.0))) | options
    if "masked" in given:  # also with steps that reveal nothing, and are run for the direction
        anew = torch.arange(16) < torch.tensor(given.pop("masked"))[:, None]
        given |= {"init": torch.arange(48).view(3, 16) % 24, "mask": anew}
    seen = {True: [], False: []}
    drawn = [
        sample_masked(
            Asked(model.model, told).eval(), uncond=model.null_condition, callback=seen[told].append, **given
        )
        for told in seen
    ]  # fmt: skip
    assert torch.equal(*drawn)
    for ours, plain in zip(*seen.values(), strict=True):
        assert torch.equal(ours.places, plain.places)
        assert ours.guided.shape == (3, ours.places.shape[1], 24)
        torch.testing.assert_close(ours.guided, plain.guided, atol=1e-4, rtol=1e-4)
        for name, out in ours.outputs.items():
            torch.testing.assert_close(out, plain.outputs[name], atol=1e-4, rtol=1e-4)
        there = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, ours.places, True)
        assert not bool((ours.revealed & ~there).any())
        assert all(len(row.unique()) == len(row) for row in ours.places)


def test_only_what_can_be_drawn_is_asked_for():
    """In a fixed order the tokens that are revealed; by confidence, those that are masked still."""
    model = wrapped("masked")
    for reveal, expected in (("halton", [3, 3, 3, 7]), ("linear", [16, 12, 8, 4])):
        asked = Asked(model.model).eval()
        sample_masked(
            asked, **OF_THREE, uncond=model.null_condition, guidance=Guidance(3.0), steps=4, reveal=reveal
        )  # fmt: skip
        assert [tuple(places.shape) for places in asked.seen] == [(6, k) for k in expected]
        for places in asked.seen:
            assert torch.equal(places[:3], places[3:])  # both branches


def test_no_step_asks_for_nothing():
    """Steps that reveal nothing are run for the direction alone, and everywhere; none after the last token."""
    # "linear" has drawn all four of the first sample before its last step, see above
    init, anew = torch.zeros(3, 16).long(), torch.arange(16) < torch.tensor([[4], [1], [1]])
    for reveal, s, refresh in itertools.product(("halton", "linear"), (1.0, 3.0), (1, 2, 3, 5)):
        model, steps = wrapped("masked"), []
        asked = Asked(model.model).eval()
        sample_masked(
            asked, **OF_THREE, uncond=model.null_condition, init=init, mask=anew, refresh=refresh, steps=6,
            reveal=reveal, guidance=Guidance(s), callback=steps.append,
        )  # fmt: skip
        assert all(places is None or places.shape[1] for places in asked.seen)
        assert (steps[-1].ids < 24).all() and steps[-1].revealed.any()


@pytest.mark.parametrize("scale", [3.0, lambda p: 1.0 if 0.3 < p < 0.7 else 3.0])
@pytest.mark.parametrize("refresh", [2, 3, 4])
@pytest.mark.parametrize("reveal", ["halton", "linear"])
def test_what_is_refreshed_does_not_depend_on_the_masks_of_others(reveal, refresh, scale):
    """Nor on pauses of guidance in steps that one sample needs and another does not."""
    model = wrapped("masked")
    anew = torch.arange(16) < torch.tensor([[16], [3], [2]])
    init = torch.arange(48).view(3, 16) % 24

    def drawn(rows):
        return sample_masked(
            model, OF_THREE["cond"][rows], seeds=rows, init=init[rows], mask=anew[rows], steps=8,
            refresh=refresh, reveal=reveal, guidance=Guidance(scale),
        )  # fmt: skip

    together = drawn([0, 1, 2])
    for row in (0, 1, 2):
        assert torch.equal(drawn([row])[0], together[row])


def test_a_weak_model_of_another_kind_is_asked_in_its_own_way():
    """One of the two takes places."""
    model, weak = wrapped("masked"), wrapped("masked", seed=3)
    drawn = []
    for kinds in itertools.product((True, False), repeat=2):
        ours, theirs = (
            Asked(m.model, told).eval() for m, told in zip((model, weak), kinds, strict=True)
        )
        drawn.append(
            sample_masked(
                ours, **OF_THREE, guidance=Guidance(b.weak(2.0)), branches={"weak": Branch(model=theirs)}, steps=4
            )
        )  # fmt: skip
    assert all(torch.equal(one, drawn[0]) for one in drawn)


@pytest.mark.parametrize("space", [None, "logits"])
def test_a_mitigation_sees_the_whole_sample_unless_it_is_one_of_logits(space):
    shapes = []

    class Own:
        def __call__(self, guided, cond_out, uncond_out):
            shapes.append(guided.shape[1])
            return guided

    own = Own()
    if space is not None:
        own.space = space
    steps = []
    guidance = Guidance(3.0, (own,))
    sample(Independent(), guidance=guidance, steps=4, reveal="halton", callback=steps.append)
    assert shapes == ([16] * 4 if space is None else [3, 3, 3, 7])
    assert [step.guided.shape[1] for step in steps] == [3, 3, 3, 7]
    plain = sample(Independent(), guidance=Guidance(3.0), steps=4, reveal="halton")
    assert torch.equal(steps[-1].ids, plain)


@pytest.mark.parametrize("refresh", [2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_held_direction_that_is_no_number_is_not_passed_over(refresh, bad):
    """At a place that the step does not draw in which it was computed, and the next one does."""
    (fourth,) = (halton_order(L) == 3).nonzero().flatten().tolist()

    class Breaks(Independent):
        def forward(self, ids, cond):
            logits = super().forward(ids, cond).clone()
            if len(self.seen) == 1:
                logits[cond[:, 0] == 0, fourth] = bad
            return logits

    with pytest.raises(FloatingPointError, match=r"NaN or \+inf at step 1, .*\['uncond'\]"):
        sample(Breaks(), reveal="halton", steps=4, guidance=Guidance(3.0), refresh=refresh)


@pytest.mark.parametrize("made", [None, perturb_attention, skip_layers])
def test_logits_of_some_places_are_those_of_all(made):
    network = wrapped("masked").model
    network = network if made is None else made(network, [-1])
    ids = torch.randint(0, 25, (3, 16), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 5], [15, 2], [7, 7]])
    with torch.no_grad():
        some, whole = network(ids, OF_THREE["cond"], places), network(ids, OF_THREE["cond"])
    for row, own, everywhere in zip(places, some, whole, strict=True):
        torch.testing.assert_close(own, everywhere[row], atol=1e-5, rtol=1e-5)
    for beyond in (-1, 16):
        with pytest.raises(ValueError, match=rf"places holds .*{beyond}.*expected 0 to 15"):
            network(ids, OF_THREE["cond"], torch.full((3, 1), beyond))
    for wrong in (places[:2], places.int(), places[0]):
        with pytest.raises(ValueError, match=r"places is .*, expected \(3, K\) of torch.int64"):
            network(ids, OF_THREE["cond"], wrong)
    mask = torch.ones(16, 19, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask and places"):
        network.body(torch.zeros(3, 16, 32), OF_THREE["cond"], mask, None, places)


# given tokens


def own_masks():
    """Tokens (3, L), and a mask a sample: all, six and one of the tokens drawn anew."""
    init = torch.arange(3 * L).view(3, L) % V
    return init, torch.arange(L) < torch.tensor([[L], [6], [1]])


@pytest.mark.parametrize("reveal", REVEALS)
def test_the_seed_alone_decides_whatever_the_masks_of_others(reveal):
    """The schedule, its guidance, and the random numbers of a sample do not depend on longer masks beside it."""
    init, anew = own_masks()
    cond = torch.ones(3, 1, dtype=torch.long)

    def drawn(rows, seed):
        return sample_masked(
            Independent(), cond[rows], uncond=torch.tensor([0]), init=init[rows], mask=anew[rows],
            seeds=[seed + row for row in rows], reveal=reveal, guidance=Guidance(linear(1.0, 8.0)),
        )  # fmt: skip

    for seed in (0, 10, 20):
        together = drawn([0, 1, 2], seed)
        assert torch.equal(drawn([1], seed)[0], together[1])
        assert torch.equal(drawn([2, 1], seed), together[[2, 1]])


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (16, 1), (2, 2, 8), (1, 1, 16), (3, 16), (15,)])
def test_a_mask_of_the_wrong_size_is_refused(shape):
    cond = torch.ones(2, 1, dtype=torch.long)
    good = torch.zeros(16, dtype=torch.long)
    with pytest.raises(ValueError, match=r"mask has shape .* expected \(16,\)"):
        sample_masked(
            Independent(), cond, seeds=[0, 1], init=good, mask=torch.ones(shape, dtype=torch.bool)
        )


def test_a_model_that_could_draw_the_mask_token_is_refused():
    class Wide(Independent):
        mask_token = V - 1

    with pytest.raises(ValueError, match=rf"expected \(B, tokens, V\) with V at most {V - 1}"):
        sample(Wide())


@pytest.mark.parametrize("refresh", [1, 2])
def test_a_model_that_is_told_the_places_and_gives_all_is_refused(refresh):
    class Deaf(Independent):
        def forward(self, ids, cond, places=None):
            return super().forward(ids, cond)

    with pytest.raises(ValueError, match=r"the model returned \(\d, 16, 6\), expected \(\d, 3, "):
        sample(Deaf(), reveal="halton", steps=4, guidance=Guidance(3.0), refresh=refresh)


@pytest.mark.parametrize("length", [1, L - 1, L + 3])
@pytest.mark.parametrize("reveal", ["cosine", "halton"])
@pytest.mark.parametrize("own", [{}, {"refresh": 2}, {"mitigation": True}])
def test_a_model_with_logits_of_other_tokens_is_refused(length, reveal, own):
    """One that returns those of its prefix as well, say; places beyond the end would be taken from the front."""

    class Other(Independent):
        def forward(self, ids, cond):
            return torch.zeros(len(ids), length, V)

    guidance = Guidance(3.0, (lambda guided, c, u: guided,) if own.get("mitigation") else ())
    with pytest.raises(ValueError, match=rf"the model returned .*{length}, 6\)"):
        sample(Other(), reveal=reveal, guidance=guidance, refresh=own.get("refresh", 1))


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("s", [3.0, -1.0])
def test_infinite_logits_are_refused_and_not_saturated(branch, s):
    model = Independent()
    model.table[branch, 0, 0] = torch.inf
    name = ("uncond", "cond")[branch]
    with pytest.raises(
        FloatingPointError, match=rf"NaN or \+inf at step 0, in the branches \['{name}'"
    ):
        sample(model, guidance=Guidance(s))


def test_samples_with_fewer_masked_tokens_follow_the_same_schedule():
    init, anew = own_masks()
    steps = []
    sample(Independent(), 3, init=init, mask=anew, steps=4, reveal="linear", callback=steps.append)
    left = [(step.ids == V).sum(1).tolist() for step in steps]
    # 16, 6 and 1 tokens: floor of 3/4, 1/2 and 1/4 of them, then none
    assert left == [[12, 4, 0], [8, 3, 0], [4, 1, 0], [0, 0, 0]]
    for before, after in itertools.pairwise(steps):
        known = before.ids != V
        assert torch.equal(after.ids[known], before.ids[known])  # what is revealed stays


@settings(max_examples=30, deadline=None)
@given(pattern=st.lists(st.booleans(), min_size=2 * L, max_size=2 * L), steps=st.integers(1, 20))
def test_given_tokens_are_shown_and_come_back(pattern, steps):
    model = Independent()
    anew = torch.tensor(pattern).view(2, L)
    init = torch.arange(2 * L).view(2, L) % V
    ids = sample(model, 2, init=init, mask=anew, steps=steps)
    assert torch.equal(ids[~anew], init[~anew]) and int(ids.max()) < V
    for seen in model.seen:
        assert torch.equal(seen[~anew], init[~anew])
    assert not model.seen or torch.equal(model.seen[0] == V, anew)


def test_regions_of_all_shapes():
    init, anew = torch.arange(L) % V, torch.zeros(L, dtype=torch.bool)
    anew[5:9] = True
    expected = sample(Independent(), 2, init=init, mask=anew, steps=3)
    for shape in ((4, 4), (2, L), (2, 4, 4)):
        a, b = (
            x.expand(2, L).reshape(shape) if shape[0] == 2 else x.view(shape) for x in (init, anew)
        )
        assert torch.equal(sample(Independent(), 2, init=a, mask=b, steps=3), expected)
    nothing = sample(Independent(), 2, init=init, mask=torch.zeros(L, dtype=torch.bool))
    assert torch.equal(nothing, init.expand(2, -1))


# bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, expected an int of at least 1"),
        ({"steps": 2.5}, ValueError, r"steps is 2\.5"),
        (
            {"reveal": "sine"},
            ValueError,
            "reveal is 'sine', expected one of cosine, linear, arccos",
        ),
        ({"choice_noise": -1}, ValueError, "choice_noise is -1"),
        ({"choice_noise": math.inf}, ValueError, "choice_noise is inf"),
        ({"init": torch.zeros(1, L).long()}, ValueError, "mask is None"),
        ({"mask": torch.ones(1, L).bool()}, ValueError, "init is None"),
        (
            {"init": torch.zeros(1, L), "mask": torch.ones(1, L).bool()},
            TypeError,
            "init is torch.float32",
        ),
        (
            {"init": torch.zeros(1, L).long(), "mask": torch.ones(1, L)},
            TypeError,
            "mask is torch.float32",
        ),
        (
            {"init": torch.zeros(1, 9).long(), "mask": torch.ones(1, L).bool()},
            ValueError,
            r"init has shape \\(1, 9\\)",
        ),
        (
            {"init": torch.full((1, L), V), "mask": torch.zeros(1, L).bool()},
            ValueError,
            "init holds ids from 6 to 6, expected 0 to 5",
        ),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"guidance": 3.0}, TypeError, "expected a Guidance"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message.replace("\\\\", "\\")):
        sample(Independent(), **options)


def test_a_row_without_any_token_stops_with_the_step():
    model = Independent()
    model.table[1, 3] = -math.inf
    with pytest.raises(FloatingPointError, match="no token can be drawn at step 0"):
        sample(model, steps=3)


@pytest.mark.parametrize("reveal", ["cosine", "halton"])
def test_a_row_without_any_token_is_of_no_matter_where_none_is_drawn(reveal):
    """The second sample keeps all tokens but the first; the other has six to draw."""
    model = Independent()
    model.table[2, 1:] = -math.inf
    anew = torch.arange(L) < torch.tensor([[6], [1]])
    cond, init = torch.tensor([[1], [2]]), torch.zeros(2, L, dtype=torch.long)
    steps = []
    sample_masked(
        model, cond, seeds=[0, 1], init=init, mask=anew, steps=2, reveal=reveal, callback=steps.append
    )  # fmt: skip
    assert all(step.places.shape[1] > 1 for step in steps)
    assert not bool(steps[-1].ids[1, 1:].any()) and int(steps[-1].ids.max()) < V


@pytest.mark.parametrize(("branch", "row"), [("cond", 1), ("uncond", 0)])
def test_nan_in_a_later_step_is_named_with_its_branch(branch, row):
    class Breaks(Independent):
        def forward(self, ids, cond):
            logits = super().forward(ids, cond).clone()
            logits[(cond[:, 0] == row) & (len(self.seen) == 3)] = math.nan
            return logits

    with pytest.raises(FloatingPointError, match=rf"NaN or \+inf at step 2, .*\['{branch}'\]"):
        sample(Breaks(), steps=4, guidance=Guidance(3.0))


def test_training_mode_is_refused():
    model = ConditionDropout(Independent(), torch.tensor([0]))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        sample_masked(model, torch.ones(1, 1, dtype=torch.long), seeds=[0])
