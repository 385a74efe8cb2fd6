"""Condition dropout: per sample, out of place, resumable, for any model."""

import math
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from unicfg import ConditionDropout, Guidance, drop_condition, guide


class Recorder(nn.Module):
    """Remembers the condition that it was called with."""

    def forward(self, x, cond, *args, **kwargs):
        self.cond, self.args, self.kwargs = cond, args, kwargs
        return x


def test_drop_condition_replaces_the_chosen_samples_out_of_place():
    cond, null = torch.tensor([[5, 6], [7, 8], [9, 1]]), torch.tensor([0, 2])
    before = cond.clone()
    out = drop_condition(cond, null, torch.tensor([True, False, True]))
    assert out.tolist() == [[0, 2], [7, 8], [0, 2]]
    assert torch.equal(cond, before)  # the batch is not mutated (a trap seen in k-diffusion)


def test_the_batch_stays_as_it_was_through_the_wrapper():
    cond = torch.arange(40).view(20, 2) + 1
    before = cond.clone()
    wrapped = ConditionDropout(Recorder(), torch.zeros(2, dtype=torch.long), p=0.5).train()
    wrapped(torch.zeros(20), cond)
    assert torch.equal(cond, before)
    assert not torch.equal(wrapped.model.cond, cond)


def test_draws_are_per_sample_not_per_batch_at_the_stated_rate():
    n, p = 20_000, 0.1
    wrapped = ConditionDropout(Recorder(), torch.tensor([0]), p=p).train()
    wrapped(torch.zeros(n), torch.ones(n, 1, dtype=torch.long))
    dropped = wrapped.model.cond.squeeze(1) == 0
    spread = math.sqrt(p * (1 - p) / n)
    assert abs(dropped.float().mean().item() - p) < 4 * spread
    # neighbours are independent: the rate of two in a row is p squared
    pairs = (dropped[1:] & dropped[:-1]).float().mean().item()
    assert abs(pairs - p**2) < 4 * math.sqrt(p**2 / n)


def test_a_condition_is_dropped_whole():
    wrapped = ConditionDropout(Recorder(), torch.zeros(8, dtype=torch.long), p=0.5).train()
    wrapped(torch.zeros(200), torch.ones(200, 8, dtype=torch.long))
    per_sample = wrapped.model.cond.sum(1)
    assert set(per_sample.tolist()) == {0, 8}


def test_transparent_in_eval_mode_and_at_p_zero():
    cond = torch.ones(50, 1, dtype=torch.long)
    always = ConditionDropout(Recorder(), torch.tensor([0]), p=1.0)
    always.eval()(torch.zeros(50), cond)
    assert always.model.cond is cond
    always.train()(torch.zeros(50), cond)
    assert (always.model.cond == 0).all()
    never = ConditionDropout(Recorder(), torch.tensor([0]), p=0.0).train()
    never(torch.zeros(50), cond)
    assert never.model.cond is cond


def test_other_arguments_pass_through():
    wrapped = ConditionDropout(Recorder(), torch.tensor([0]), p=0.0)
    wrapped(torch.zeros(2), torch.ones(2, 1, dtype=torch.long), 7, t=3)
    assert wrapped.model.args == (7,) and wrapped.model.kwargs == {"t": 3}


def test_draws_do_not_touch_or_depend_on_global_randomness():
    cond = torch.ones(100, 1, dtype=torch.long)

    def run():
        wrapped = ConditionDropout(Recorder(), torch.tensor([0]), p=0.5, seed=3).train()
        wrapped(torch.zeros(100), cond)
        return wrapped.model.cond

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(), first)


def test_draws_resume_from_the_state_dict():
    cond = torch.ones(64, 1, dtype=torch.long)
    wrapped = ConditionDropout(Recorder(), torch.tensor([0]), p=0.5).train()
    wrapped(torch.zeros(64), cond)
    saved = {k: v.clone() for k, v in wrapped.state_dict().items()}
    wrapped(torch.zeros(64), cond)
    uninterrupted = wrapped.model.cond
    other = ConditionDropout(Recorder(), torch.tensor([0]), p=0.5, seed=99).train()
    other.load_state_dict(saved)
    other(torch.zeros(64), cond)
    assert torch.equal(other.model.cond, uninterrupted)


def test_an_embedding_as_null_is_trained_and_saved():
    wrapped = ConditionDropout(nn.Linear(4, 4), torch.zeros(3, 4), p=1.0).train()
    wrapped.model.forward = lambda x, cond: cond.sum(dim=(1, 2))
    assert isinstance(wrapped.null_condition, nn.Parameter)
    wrapped(torch.zeros(5), torch.ones(5, 3, 4)).sum().backward()
    assert (wrapped.null_condition.grad == 5).all()
    assert any(p is wrapped.null_condition for p in wrapped.parameters())
    assert "null_0" in wrapped.state_dict()


def test_ids_as_null_select_a_row_that_the_optimizer_trains():
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, x, cond):
            return self.table(cond).sum()

    wrapped = ConditionDropout(Embedder(), torch.tensor([9]), p=1.0).train()
    wrapped(None, torch.tensor([[1], [2]])).backward()
    touched = wrapped.model.table.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False] * 9 + [True]


def test_nested_conditions():
    cond = {"text": torch.ones(4, 3), "extra": (torch.ones(4, 2), torch.ones(4, dtype=torch.long))}
    null = {"text": torch.zeros(3), "extra": (torch.zeros(2), torch.tensor(7))}
    wrapped = ConditionDropout(Recorder(), null, p=0.5, seed=1).train()
    wrapped(torch.zeros(4), cond)
    seen = wrapped.model.cond
    dropped = seen["text"].sum(1) == 0
    assert 0 < dropped.sum() < 4
    assert torch.equal(seen["extra"][0].sum(1) == 0, dropped)
    assert torch.equal(seen["extra"][1] == 7, dropped)
    assert {name for name, _ in wrapped.named_parameters()} == {"null_0", "null_1"}


def test_embeddings_with_a_mask():
    """The null embedding is trained and its mask is saved; both are dropped for the same samples, at the stated rate."""
    n, p = 4000, 0.25
    null = (torch.full((3, 2), 7.0), torch.tensor([True, False, False]))
    wrapped = ConditionDropout(Recorder(), null, p=p).train()
    embeddings, mask = torch.zeros(n, 3, 2), torch.ones(n, 3, dtype=torch.bool)
    wrapped(torch.zeros(n), (embeddings, mask))
    seen, seen_mask = wrapped.model.cond
    dropped = ~seen_mask[:, 1]
    assert torch.equal((seen == 7).all((1, 2)), dropped) and torch.equal(seen_mask.all(1), ~dropped)
    assert abs(dropped.float().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)
    seen.sum().backward()
    own, own_mask = wrapped.null_condition
    assert isinstance(own, nn.Parameter) and (own.grad == dropped.sum()).all()
    assert own_mask.dtype == torch.bool and not isinstance(own_mask, nn.Parameter)
    assert {name for name, _ in wrapped.named_parameters()} == {"null_0"}
    assert {name for name, _ in wrapped.named_buffers()} == {"null_1"}
    other = ConditionDropout(Recorder(), (torch.zeros(3, 2), torch.ones(3, dtype=torch.bool)))
    other.load_state_dict(wrapped.state_dict())
    for ours, theirs in zip(wrapped.null_condition, other.null_condition, strict=True):
        assert torch.equal(ours, theirs)


def test_named_tuples_and_awkward_keys():
    Pair = namedtuple("Pair", "text size")
    cond = {"a": {"b.c": Pair(torch.ones(3, 2), torch.ones(3, 1))}, "a_b": torch.ones(3, 4)}
    null = {"a": {"b.c": Pair(torch.zeros(2), torch.tensor([5.0]))}, "a_b": torch.full((4,), 7.0)}
    wrapped = ConditionDropout(Recorder(), null, p=1.0).train()
    wrapped(torch.zeros(3), cond)
    seen = wrapped.model.cond
    assert isinstance(seen["a"]["b.c"], Pair)
    assert (seen["a"]["b.c"].size == 5).all() and (seen["a_b"] == 7).all()


def test_bad_arguments_are_refused_by_name():
    cond = torch.ones(4, 3, dtype=torch.long)
    keep = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"p is 1\.5"):
        ConditionDropout(Recorder(), cond[0], p=1.5)
    with pytest.raises(TypeError, match=r"int64.*float32"):
        drop_condition(cond, torch.zeros(3), keep)
    with pytest.raises(ValueError, match=r"null_condition has shape \(2,\).*\(3,\)"):
        drop_condition(cond, cond[0, :2], keep)
    with pytest.raises(ValueError, match=r"drop has shape \(2,\), expected \(4,\)"):
        drop_condition(cond, cond[0], keep[:2])
    with pytest.raises(TypeError, match="expected bool"):
        drop_condition(cond, cond[0], torch.zeros(4))
    with pytest.raises(TypeError, match="text"):
        drop_condition({"text": cond}, {"image": cond[0]}, keep)


class ForeignDenoiser(nn.Module):
    """A model that is not ours: mixes two Gaussians by class, knows nothing of guidance."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(3, 16)
        self.net = nn.Sequential(nn.Linear(1 + 16, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, label):
        return self.net(torch.cat([x, self.label(label).squeeze(1)], dim=1))


def test_a_foreign_model_learns_both_branches_and_can_be_guided():
    """Regress the mean of a class: +2 or -2 with the condition, their average 0 without."""
    torch.manual_seed(0)
    wrapped = ConditionDropout(ForeignDenoiser(), torch.tensor([2]), p=0.3)
    optimizer = torch.optim.Adam(wrapped.parameters(), 1e-2)
    for _ in range(300):
        label = torch.randint(0, 2, (128, 1))
        loss = (wrapped(torch.zeros(128, 1), label) - (4.0 * label - 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrapped.eval()
    x, label = torch.zeros(2, 1), torch.tensor([[0], [1]])
    cond = wrapped(x, label)
    uncond = wrapped(x, wrapped.null_condition.expand(2, 1))
    assert cond.flatten().tolist() == pytest.approx([-2, 2], abs=0.3)
    assert uncond.flatten().tolist() == pytest.approx([0, 0], abs=0.5)
    guided = Guidance(3.0).combine(0.0, cond, uncond)
    assert torch.equal(guided, guide(cond, uncond, 3.0))
    assert guided.flatten().tolist() == pytest.approx([-6, 6], abs=1.5)


@pytest.mark.parametrize("condition", [["a cat", "a dog"], "a cat", [], None, {"ids": None}])
def test_a_condition_that_holds_no_tensors_is_refused_and_not_searched_for_ever(condition):
    wrapped = ConditionDropout(torch.nn.Identity(), torch.zeros(4), p=0.5).train()
    with pytest.raises(TypeError, match=r"cond is or holds .*expected a tensor"):
        wrapped(torch.zeros(2), condition)
    if condition:
        with pytest.raises(TypeError, match="null_condition is or holds"):
            ConditionDropout(torch.nn.Identity(), condition)


def test_any_mapping_is_a_condition():
    class Echo(torch.nn.Module):
        def forward(self, x, cond):
            return cond["ids"]

    ids, null = (
        UserDict(ids=torch.full(shape, value)) for shape, value in (((3, 2), 5), ((2,), 0))
    )
    wrapped = ConditionDropout(Echo(), null, p=1.0).train()
    assert torch.equal(wrapped(None, ids), torch.zeros(3, 2))
    assert torch.equal(wrapped.eval()(None, ids), ids["ids"])
