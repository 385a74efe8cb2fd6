"""Autoregressive sampling: oracles, seeds, batches, branches, filters, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import transformer, wrapped_transformer

from unicfg import ConditionDropout, Guidance, guide, sample_autoregressive
from unicfg.guidance.schedules import interval, linear, table
from unicfg.sampling import TokenFilter, Uncached
from unicfg.sampling.randomness import generators, uniform
from unicfg.sampling.soundness import Watch
from unicfg.sampling.tokens import draw

COND = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 1]])


class ChainCache:
    def __init__(self, rows):
        self.length = 0
        self.classes = torch.zeros(rows, dtype=torch.long)

    def rows(self, start, stop):
        view = ChainCache(0)
        view.classes = self.classes[start:stop]
        return view


class MarkovChain(torch.nn.Module):
    """Three tokens from a known chain: logits depend on the class and on the token before."""

    num_tokens = 3

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(2, 4, generator=generator)
        self.next = torch.randn(2, 4, 4, generator=generator)
        self.rows_run = []
        self.eval()

    def make_cache(self, rows):
        return ChainCache(rows)

    def prefill(self, cond, cache):
        cache.classes[:] = cond[:, 0]

    def decode(self, ids, cache):
        self.rows_run.append((len(ids), ids.shape[1] + 1 - cache.length))
        cache.length = ids.shape[1] + 1
        if ids.shape[1] == 0:
            return self.first[cache.classes]
        return self.next[cache.classes, ids[:, -1]]

    def guided_distribution(self, s):
        """Probability of every sequence when each step samples softmax(uncond + s (cond - uncond))."""
        first = guide(self.first[1:], self.first[:1], s)[0].softmax(-1).double()
        step = guide(self.next[1], self.next[0], s).softmax(-1).double()
        return {
            (a, b, c): float(first[a] * step[a, b] * step[b, c])
            for a, b, c in itertools.product(range(4), repeat=3)
        }


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
def test_sequences_follow_the_analytic_guided_chain(s):
    """Chi-square over all 64 sequences of a chain with known conditionals."""
    n = 40_000
    chain = MarkovChain()
    cond = torch.ones(n, 1, dtype=torch.long)
    ids = sample_autoregressive(
        chain, cond, uncond=torch.tensor([0]), guidance=Guidance(s), seeds=list(range(n))
    )
    index = ids[:, 0] * 16 + ids[:, 1] * 4 + ids[:, 2]
    counts = torch.bincount(index, minlength=64).double()
    expected = torch.tensor(list(chain.guided_distribution(s).values())) * n
    big = expected >= 5  # the statistic needs five expected counts a cell; the rest is one cell
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum())
    degrees = int((expected > 0).sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations


def test_guided_sampling_is_not_unguided_sampling():
    """The chi-square test above can fail: the wrong scale is far outside its bound."""
    chain = MarkovChain()
    right, wrong = chain.guided_distribution(3.0), chain.guided_distribution(1.0)
    assert sum(abs(right[k] - wrong[k]) for k in right) > 0.2


@pytest.mark.parametrize("s", [1.0, 3.0, 0.0, -1.0])
def test_batched_pass_equals_two_passes(s):
    model = wrapped_transformer()
    seen = []
    ids = sample_autoregressive(
        model, COND, guidance=Guidance(s), seeds=[0, 1, 2, 3], callback=seen.append
    )
    null = model.null_condition.expand_as(COND)
    cond_out, uncond_out = model.model(ids, COND), model.model(ids, null)
    for step in seen:
        expected = guide(cond_out[:, step.index], uncond_out[:, step.index], s)
        torch.testing.assert_close(step.guided, expected, atol=1e-3, rtol=1e-3)


def test_the_halves_are_not_swapped():
    model = wrapped_transformer()
    seen = []
    ids = sample_autoregressive(
        model, COND, guidance=Guidance(3.0), seeds=range(4), callback=seen.append
    )
    cond_out = model.model(ids, COND)
    torch.testing.assert_close(seen[0].cond_out, cond_out[:, 0], atol=1e-4, rtol=1e-4)
    assert (seen[0].uncond_out - cond_out[:, 0]).abs().max() > 0.1


def test_the_same_seed_gives_the_same_image_in_any_batch():
    model = wrapped_transformer()
    together = sample_autoregressive(model, COND, guidance=Guidance(2.5), seeds=[5, 6, 7, 8])
    for i in range(4):
        alone = sample_autoregressive(model, COND[i : i + 1], guidance=Guidance(2.5), seeds=[5 + i])
        assert torch.equal(alone[0], together[i])
    reordered = sample_autoregressive(
        model, COND.flip(0), guidance=Guidance(2.5), seeds=[8, 7, 6, 5]
    )
    assert torch.equal(reordered.flip(0), together)


def test_other_seeds_give_other_images_and_global_randomness_plays_no_part():
    model = wrapped_transformer()
    torch.manual_seed(0)
    first = sample_autoregressive(model, COND, seeds=[0, 1, 2, 3])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(sample_autoregressive(model, COND, seeds=[0, 1, 2, 3]), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sample_autoregressive(model, COND, seeds=[4, 5, 6, 7]), first)


def test_scale_one_equals_the_unguided_sampler_and_zero_the_null_condition():
    model = wrapped_transformer()
    null = model.null_condition.expand_as(COND)
    seeds = [0, 1, 2, 3]
    plain = sample_autoregressive(model.model, COND, seeds=seeds)
    assert torch.equal(
        sample_autoregressive(model, COND, guidance=Guidance(1.0), seeds=seeds), plain
    )
    unconditional = sample_autoregressive(model.model, null, seeds=seeds)
    zero = sample_autoregressive(model, COND, guidance=Guidance(0.0), seeds=seeds)
    assert torch.equal(zero, unconditional)


def test_forward_rows_are_counted():
    """(rows, tokens) of every pass: B rows at s = 1, 2B when guided, never a pass that is not used."""
    cond, null = torch.ones(5, 1, dtype=torch.long), torch.tensor([0])

    def passes(guidance):
        chain = MarkovChain()
        sample_autoregressive(chain, cond, uncond=null, guidance=guidance, seeds=range(5))
        return chain.rows_run

    assert passes(Guidance(1.0)) == [(5, 1)] * 3
    assert passes(Guidance(0.0)) == [(5, 1)] * 3
    assert passes(Guidance(3.0)) == [(10, 1)] * 3
    assert passes(Guidance(0.5)) == [(10, 1)] * 3  # no gate hides 0 < s < 1
    early = Guidance(interval(3.0, 0.0, 0.5))
    assert passes(early) == [(10, 1), (10, 1), (5, 1)]
    late = Guidance(interval(3.0, 1.0, 1.0))
    assert passes(late) == [(5, 1), (5, 1), (5, 1), (5, 3)]  # the late branch joins by one chunk


def test_an_interval_gives_the_same_tokens_as_running_both_branches_always():
    model = wrapped_transformer()
    schedule = interval(4.0, 0.3, 0.6)
    always = table([schedule(i / 15) + 1e-9 for i in range(16)])  # never exactly 1
    lazy = sample_autoregressive(model, COND, guidance=Guidance(schedule), seeds=range(4))
    eager = sample_autoregressive(model, COND, guidance=Guidance(always), seeds=range(4))
    assert torch.equal(lazy, eager)
    reopened = table([3, 1, 1, 3, 3, 0, 0, 1, 2, 1, 1, 1, 1, 3, 1, 2])
    nearly = table([v + 1e-9 for v in reopened.values])
    lazy = sample_autoregressive(model, COND, guidance=Guidance(reopened), seeds=range(4))
    eager = sample_autoregressive(model, COND, guidance=Guidance(nearly), seeds=range(4))
    assert torch.equal(lazy, eager)


def test_one_scale_a_sample():
    model = wrapped_transformer()
    s = torch.tensor([0.0, 1.0, 2.0, 5.0])
    mixed = sample_autoregressive(model, COND, guidance=Guidance(s), seeds=range(4))
    for i in range(4):
        alone = sample_autoregressive(
            model, COND[i : i + 1], guidance=Guidance(float(s[i])), seeds=[i]
        )
        assert torch.equal(alone[0], mixed[i])


def test_a_negative_condition_a_sample():
    model = wrapped_transformer()
    negative = COND.flip(0)
    ids = sample_autoregressive(
        model, COND, uncond=negative, guidance=Guidance(2.0), seeds=range(4)
    )
    seen = []
    sample_autoregressive(
        model, COND, uncond=negative, guidance=Guidance(2.0), seeds=range(4), callback=seen.append
    )
    torch.testing.assert_close(
        seen[-1].uncond_out, model.model(ids, negative)[:, -1], atol=1e-4, rtol=1e-4
    )


def test_no_state_is_left_between_samplings():
    model = wrapped_transformer()
    before = sample_autoregressive(model, COND, guidance=Guidance(3.0), seeds=range(4))

    def stop(step):
        if step.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_autoregressive(model, COND[:2], guidance=Guidance(2.0), seeds=[0, 1], callback=stop)
    after = sample_autoregressive(model, COND, guidance=Guidance(3.0), seeds=range(4))
    assert torch.equal(before, after)


def test_the_null_that_was_trained_is_the_null_that_is_sampled():
    model = transformer()
    wrapped = ConditionDropout(model, torch.tensor([3, 3, 3]), p=1.0).train()
    ids = torch.randint(0, 24, (4, 16))
    trained = wrapped(ids, COND)[:, 0]
    seen = []
    sample_autoregressive(
        wrapped.eval(), COND, guidance=Guidance(0.0), seeds=range(4), callback=seen.append
    )
    torch.testing.assert_close(seen[0].guided, trained, atol=1e-4, rtol=1e-4)


def test_the_callback_sees_every_step():
    seen = []
    ids = sample_autoregressive(
        wrapped_transformer(),
        COND,
        guidance=Guidance(linear(1, 4)),
        seeds=range(4),
        callback=seen.append,
    )
    assert [step.index for step in seen] == list(range(16))
    assert seen[0].progress == 0.0 and seen[-1].progress == 1.0
    assert seen[0].scale == 1.0 and seen[-1].scale == 4.0
    assert seen[0].uncond_out is None and seen[1].uncond_out is not None
    assert torch.equal(seen[-1].ids, ids)


def test_temperature_zero_is_greedy_and_follows_guidance():
    model = wrapped_transformer()
    seen = []
    sample_autoregressive(
        model, COND, guidance=Guidance(3.0), seeds=range(4), temperature=0.0, callback=seen.append
    )
    for step in seen:
        assert torch.equal(step.ids[:, -1], step.guided.argmax(-1))


@given(seed=st.integers(0, 10_000), k=st.integers(1, 30), t=st.floats(0.01, 50))
def test_top_k_keeps_the_k_likeliest(seed, k, t):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    p = TokenFilter(temperature=t, top_k=k)(logits)
    torch.testing.assert_close(p.sum(-1), torch.ones(3))
    kept = min(k, 20)
    likeliest = logits.topk(kept).indices
    assert p.gather(1, likeliest).sum(-1).min() > 1 - 1e-5
    assert ((p > 0).sum(-1) <= kept).all()


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        p = TokenFilter(top_p=top_p)(logits)
        assert int((p > 0).sum()) == kept
        torch.testing.assert_close(p.sum(-1), torch.ones(1))
    p = TokenFilter(top_p=0.6)(logits.flip(-1))
    torch.testing.assert_close(p, torch.tensor([[0.0, 0.0, 0.375, 0.625]]))


def test_filters_act_on_guided_logits():
    """top_k = 1 on guided logits picks the guided winner, which neither branch alone would."""
    cond, uncond = torch.tensor([[1.0, 0.9, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    guided = guide(cond, uncond, 3.0)
    assert int(TokenFilter(top_k=1)(guided).argmax()) == 1
    assert int(cond.argmax()) == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 100.0])
def test_extreme_scales_and_temperatures_stay_finite(temperature):
    for s in (-50.0, 0.0, 15.0, 1000.0):
        ids = sample_autoregressive(
            wrapped_transformer(),
            COND,
            guidance=Guidance(s),
            seeds=range(4),
            temperature=temperature,
        )
        assert ids.min() >= 0 and ids.max() < 24


def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    u = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert draw(p.expand(5, 5), u).tolist() == [1, 1, 1, 3, 3]


def test_noise_depends_on_its_own_seed_alone():
    a, b = uniform(generators([3, 4]), (6,)), uniform(generators([4]), (6,))
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])


def test_a_broken_model_stops_with_the_token_and_the_branch():
    chain = MarkovChain()
    chain.next[0, :, 1] = math.nan  # the class of the null condition, from the second token on
    cond, null = torch.ones(3, 1, dtype=torch.long), torch.tensor([0])
    with pytest.raises(FloatingPointError, match=r"NaN or \+inf at token 1, .*\['uncond'\]"):
        sample_autoregressive(chain, cond, uncond=null, guidance=Guidance(2.0), seeds=range(3))
    chain = MarkovChain()
    chain.first[:] = -math.inf
    with pytest.raises(FloatingPointError, match="no token 0"):
        sample_autoregressive(chain, cond, seeds=range(3))


def test_bad_arguments_are_refused_by_name():
    model = wrapped_transformer()
    seeds = [0, 1, 2, 3]
    with pytest.raises(ValueError, match="seeds has 2 entries for a batch of 4"):
        sample_autoregressive(model, COND, seeds=[0, 1])
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        sample_autoregressive(model, COND, seeds=[0, 1.5, 2, 3])
    with pytest.raises(ValueError, match="top_k is 0"):
        sample_autoregressive(model, COND, seeds=seeds, top_k=0)
    with pytest.raises(ValueError, match="top_p is 0"):
        sample_autoregressive(model, COND, seeds=seeds, top_p=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        sample_autoregressive(model, COND, seeds=seeds, temperature=-1)
    with pytest.raises(ValueError, match="temperature is nan"):
        sample_autoregressive(model, COND, seeds=seeds, temperature=math.nan)
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        sample_autoregressive(model.model, COND, seeds=seeds, guidance=Guidance(2.0))
    with pytest.raises(ValueError, match=r"uncond has shape \(2,\), expected \(3,\) or \(4, 3\)"):
        sample_autoregressive(
            model, COND, seeds=seeds, guidance=Guidance(2.0), uncond=torch.tensor([0, 0])
        )
    with pytest.raises(ValueError, match="training mode"):
        sample_autoregressive(wrapped_transformer().train(), COND, seeds=seeds)
    for scale in (torch.ones(3), torch.ones(3) * 2):
        with pytest.raises(ValueError, match="3 values for a batch of 4"):
            sample_autoregressive(model, COND, seeds=seeds, guidance=Guidance(scale))
    with pytest.raises(TypeError, match=r"guidance is 3\.0, expected a Guidance"):
        sample_autoregressive(model, COND, seeds=seeds, guidance=3.0)
    with pytest.raises(ValueError, match="64 bits"):
        sample_autoregressive(model, COND, seeds=[2**70, 1, 2, 3])
    with pytest.raises(ValueError, match="0 samples"):
        sample_autoregressive(model, COND[:0], seeds=[])
    with pytest.raises(ValueError, match=r"top_k is 1\.5"):
        sample_autoregressive(model, COND, seeds=seeds, top_k=1.5)
    with pytest.raises(ValueError, match="3 values for a batch of 4"):
        sample_autoregressive(model, COND, seeds=seeds, guidance=Guidance(torch.ones(3) * 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws():
    model = wrapped_transformer()
    for s in (1.0, 3.0):
        on_cpu = sample_autoregressive(model.cpu(), COND, guidance=Guidance(s), seeds=range(4))
        on_gpu = sample_autoregressive(
            model.cuda(), COND.cuda(), guidance=Guidance(s), seeds=range(4)
        )
        assert (on_gpu.cpu() == on_cpu).float().mean() > 0.9  # rounding may flip a rare tie


def test_where_looking_would_wait_it_is_looked_at_in_the_end(monkeypatch):
    """As on a GPU: the same tokens, and an error that names the first token that is broken."""
    seen = []

    def watch(device):
        made = Watch(torch.device("cuda"))
        seen.append(made)
        return made

    def logits(ids, cond):
        out = torch.cos(torch.arange(5.0) * (cond[:, :1] + ids.sum(1, keepdim=True)))
        if ids.shape[1] >= broken_from:
            out[cond[:, 0] == 0] = torch.nan  # of the unconditional rows
        return out

    cond, options = torch.tensor([[1], [2]]), {"uncond": torch.tensor([0]), "seeds": [0, 1]}
    options["guidance"] = Guidance(3.0)
    broken_from = 9
    own = sample_autoregressive(Uncached(logits, 6), cond, **options)
    monkeypatch.setattr("unicfg.sampling.autoregressive.Watch", watch)
    assert torch.equal(sample_autoregressive(Uncached(logits, 6), cond, **options), own)
    assert len(seen) == 1 and not seen[0].at_once
    broken_from, steps = 2, []
    with pytest.raises(FloatingPointError, match=r"at token 2, in the branches \['uncond'\]"):
        sample_autoregressive(Uncached(logits, 6), cond, **options)
    # a callback is told of no broken step
    with pytest.raises(FloatingPointError, match=r"at token 2, in the branches \['uncond'\]"):
        sample_autoregressive(Uncached(logits, 6), cond, callback=steps.append, **options)
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cond": [[1]]}, r"cond is \[\[1\]\], expected a tensor"),
        ({"uncond": [0]}, r"uncond is \[0\], expected a tensor"),
        ({"seeds": 0}, "seeds is 0, expected a sequence of ints"),
    ],
)
def test_arguments_of_another_kind_are_named(changes, message):
    options = {"cond": COND, "seeds": range(len(COND)), "guidance": Guidance(2.0)} | changes
    with pytest.raises(TypeError, match=message):
        sample_autoregressive(wrapped_transformer(), options.pop("cond"), **options)


def test_counts_may_be_numpys_and_are_no_truth_values():
    assert TokenFilter(top_k=np.int64(3)).top_k == 3
    for wrong in (True, 2.0, 0):
        with pytest.raises(ValueError, match=f"top_k is {wrong}, expected an int >= 1"):
            TokenFilter(top_k=wrong)
