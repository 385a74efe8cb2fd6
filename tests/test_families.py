"""What holds for every family: guidance, seeds, rows, saving; and each network against itself by another road."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, FAMILIES, network, pipeline, wrapped

from models import DiffusionHead, TextToImage
from models.blocks import TimeEmbedding, inner_width
from models.folders import held_families
from models.pipeline import OPTIONS
from unicfg import Guidance, sample_autoregressive, sample_diffusion, sample_hybrid, sample_masked
from unicfg.cli import main
from unicfg.guidance.schedules import interval
from unicfg.guidance.spaces import SPACES, join
from unicfg.sampling import cosine, straight
from unicfg.training.losses import (
    Noising,
    denoising_loss,
    hybrid_loss,
    masked_loss,
    random_mask,
    stratified,
)

COND = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 1, 2]])
SEEDS = [5, 6, 7]


def draw(kind, model, cond=COND, seeds=SEEDS, **options):
    """The family's sampler, in few steps."""
    if kind == "ar":
        return sample_autoregressive(model, cond, seeds=seeds, **options)
    if kind == "masked":
        return sample_masked(model, cond, seeds=seeds, steps=5, **options)
    if kind == "hybrid masked":
        return sample_hybrid(model, cond, seeds=seeds, steps=4, passes=5, **options)
    if kind == "hybrid":
        return sample_hybrid(model, cond, seeds=seeds, steps=4, **options)
    return sample_diffusion(model, cond, seeds=seeds, steps=6, **options)


def close(a, b):
    """Equal tokens, or latents within rounding."""
    return torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, atol=2e-4)


@pytest.fixture(params=[*FAMILIES, "hybrid masked"])
def kind(request):
    """A family, or the hybrid in its other order."""
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_scale_1_is_the_unguided_sampler_bit_for_bit(kind):
    model = wrapped(kind)
    bare = draw(kind, model.model)  # knows of no null condition
    assert torch.equal(draw(kind, model, guidance=Guidance(1.0)), bare)
    assert torch.equal(draw(kind, model, guidance=Guidance(torch.ones(3))), bare)


def test_scale_0_is_sampling_under_the_null_condition(kind):
    model = wrapped(kind)
    null = model.null_condition.expand(3, -1)
    # the ar cache is filled by one row for all, which rounds differently from three
    assert close(draw(kind, model, guidance=Guidance(0.0)), draw(kind, model.model, null))


def test_guidance_changes_what_is_drawn(kind):
    model = wrapped(kind)
    assert not close(draw(kind, model), draw(kind, model, guidance=Guidance(4.0)))


def test_a_batched_pass_equals_two_passes(kind, monkeypatch):
    """The network is made to run each half of its rows alone."""
    model = wrapped(kind)
    batched = draw(kind, model, guidance=Guidance(3.0))
    body = model.model.body
    whole, extend = body.forward, body.extend

    def halves(x, cond, mask=None, modulations=None, places=None):
        b, encoded = len(x) // 2, body.encode_condition(cond)
        rows = [(0, b), (b, 2 * b)]
        parts = []
        for start, stop in rows:
            own = encoded.take(torch.arange(start, stop))
            # the modulations are of one row, which serves all
            there = None if places is None else places[start:stop]
            parts.append(whole(x[start:stop], own, mask, modulations, there))
        return torch.cat(parts)

    def cached_halves(x, cache):
        b, length = len(x) // 2, cache.length
        parts = []
        for start, stop in ((0, b), (b, 2 * b)):
            view = cache.rows(start, stop)
            view.length = length
            parts.append(extend(x[start:stop], view))
        cache.length = length + x.shape[1]
        return torch.cat(parts)

    monkeypatch.setattr(body, "forward", halves)
    if kind in ("ar", "hybrid"):
        monkeypatch.setattr(
            "models.body.Body.extend", lambda self, x, cache: cached_halves(x, cache)
        )
        monkeypatch.setattr("models.body.pack", lambda network: network)
    assert close(draw(kind, model, guidance=Guidance(3.0)), batched)


@pytest.mark.parametrize("family", ["masked", "diffusion", "flow", "hybrid masked"])
def test_rows_that_go_through_a_few_at_a_time_are_as_all_at_once(family, monkeypatch):
    """On a CPU, without gradients: 10 rows of which at most 4 fit. Times of each row, places of each row."""
    model, rows, seen = network(family), 10, []
    cond = torch.arange(3 * rows).view(rows, 3) % 12
    x = torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, rows)
    places = x.flatten(1)[:, :16].argsort(dim=1)[:, :5]

    def run():
        if family == "masked":
            ids = x.flatten(1)[:, :16].abs().mul(10).long().clamp(max=24)
            return torch.cat([model(ids, cond), model(ids, cond, places)], 1)
        if family == "hybrid masked":
            latents = x.flatten(2).transpose(1, 2)
            return model.states(latents, cond, latents[..., 0] > 0)
        one_time = model(x, cond, model.encode_times(t[:1])[0])
        return torch.stack([model(x, cond, t), one_time])

    block = model.body.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        whole = run()
        assert set(seen) == {rows}
        tokens = model.body.num_tokens
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr("models.body.IN_CACHE", 2 * tokens * 2 * inner_width(32) * 4 + 5)
        seen.clear()
        split = run()
        assert set(seen) == {4, 2} and sum(seen) % rows == 0  # 3 turns
        torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)
        monkeypatch.setattr("models.body.IN_CACHE", 1)  # not one fits
        seen.clear()
        torch.testing.assert_close(run(), whole, atol=1e-4, rtol=1e-4)
        assert set(seen) == {1}
        # not cut off at the rows that are wanted
        with pytest.raises(ValueError, match="cond has 20 rows, expected 10"):
            model.body(torch.zeros(rows, tokens, 32), torch.cat([cond, cond]))
    seen.clear()
    run().sum().backward()
    assert set(seen) == {rows}  # gradients need all of it anyway


def test_a_hybrid_in_sets_is_asked_for_the_states_of_the_set():
    """One that cannot be told draws the same; so does the last block, which computes no others."""
    model, seen = wrapped("hybrid masked"), []

    class Plain:
        head, order, num_tokens = model.model.head, "masked", 16
        encode_condition = staticmethod(model.model.encode_condition)

        def states(self, latents, cond, known):
            return model.model.states(latents, cond, known)

    class Told(Plain):
        def states(self, latents, cond, known, places=None):
            seen.append(tuple(places.shape))
            return model.model.states(latents, cond, known, places)

    options = {
        "seeds": SEEDS,
        "uncond": model.null_condition,
        "guidance": Guidance(3.0),
        "steps": 4,
    }
    drawn = [sample_hybrid(own, COND, passes=4, **options) for own in (Plain(), Told(), model)]
    assert close(drawn[1], drawn[0]) and close(drawn[2], drawn[0])
    assert [rows for rows, _ in seen] == [6] * 4 and sum(k for _, k in seen) == 16
    latents, known = drawn[0], torch.ones(3, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="places holds 16 to 16, expected 0 to 15"):
        model.model.states(latents, COND, known, torch.full((3, 1), 16))
    with pytest.raises(ValueError, match="places is given, expected it with the masked order"):
        network("hybrid").states(latents, COND, None, torch.zeros(3, 1, dtype=torch.long))


def test_each_token_of_a_hybrid_in_sets_starts_from_its_own_noise():
    """And from that of its place, whichever set it is drawn in: other numbers of sets only change the order."""
    model, starts = wrapped("hybrid masked"), []
    for passes in (4, 7):
        turns, firsts = [], []
        sample_hybrid(
            model, COND, seeds=SEEDS, passes=passes, steps=2,
            callback=turns.append, head_callback=lambda s, firsts=firsts: firsts.append(s),
        )  # fmt: skip
        noise = torch.zeros(3, 16, 2)
        for turn, first in zip(turns, [s for s in firsts if s.index == 0], strict=True):
            noise.scatter_(1, turn.places[..., None].expand(-1, -1, 2), first.x)
        assert len(noise.flatten().unique()) == noise.numel()
        starts.append(noise)
    assert torch.equal(*starts)


def count_rows(model, kind, monkeypatch, guidance):
    """Rows of every pass through the body, condition prefixes apart."""
    rows = []
    body = type(model.model.body)
    forward, extend = body.forward, body.extend

    def counted(self, x, *args):
        rows.append(len(x))
        return forward(self, x, *args)

    def counted_extend(self, x, cache):
        rows.append(len(x))
        return extend(self, x, cache)

    with monkeypatch.context() as patch:
        patch.setattr(body, "forward", counted)
        patch.setattr(body, "extend", counted_extend)
        draw(kind, model, guidance=guidance)
    return rows


def test_guidance_costs_rows_not_passes_and_only_where_it_is_used(kind, monkeypatch):
    model = wrapped(kind)
    plain = count_rows(model, kind, monkeypatch, Guidance(1.0))
    assert set(plain) == {3}
    assert count_rows(model, kind, monkeypatch, Guidance(0.0)) == plain
    guided = count_rows(model, kind, monkeypatch, Guidance(3.0))
    assert len(guided) == len(plain) and set(guided) == {6}
    late = count_rows(model, kind, monkeypatch, Guidance(interval(3.0, 0.5, 1.0)))
    assert 3 in late and 6 in late and sum(plain) < sum(late) < sum(guided)
    if kind in (
        "ar",
        "hybrid",
    ):  # 8 of 16 tokens; the late branch catches up in one chunk by itself
        assert late == [3] * 8 + [3, 3] + [6] * 7
    else:
        assert late == sorted(late) and len(late) == len(plain)


def test_the_seed_alone_decides_in_any_batch(kind):
    model, guidance = wrapped(kind), Guidance(3.0)
    together = draw(kind, model, guidance=guidance)
    for i, seed in enumerate(SEEDS):
        alone = draw(kind, model, COND[i : i + 1], [seed], guidance=guidance)
        assert close(alone, together[i : i + 1])
    assert torch.equal(draw(kind, model, guidance=guidance), together)
    assert not close(draw(kind, model, seeds=[1, 2, 3], guidance=guidance), together)


def test_a_scale_for_each_sample(kind):
    model = wrapped(kind)
    mixed = draw(kind, model, guidance=Guidance(torch.tensor([1.0, 3.0, 0.0])))
    for i, s in enumerate((1.0, 3.0, 0.0)):
        assert close(draw(kind, model, guidance=Guidance(s))[i : i + 1], mixed[i : i + 1])


def test_conditions_are_encoded_once_per_sampling(kind, monkeypatch):
    model, calls = wrapped(kind), []
    prefix = type(model.model.body.prefix)
    forward = prefix.forward
    monkeypatch.setattr(
        prefix, "forward", lambda self, cond: (calls.append(len(cond)), forward(self, cond))[1]
    )
    draw(kind, model, guidance=Guidance(3.0))
    assert sum(calls) <= 6 and len(calls) <= 2


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_nan_stops_with_the_step_and_the_branch(kind, branch):
    model = wrapped(kind)
    token = 9 if branch == "cond" else 0
    model.model.body.prefix.embedding.weight.data[token] = math.nan
    with pytest.raises(FloatingPointError, match=rf"(step|token) 0.*'{branch}'"):
        draw(kind, model, guidance=Guidance(3.0))


def test_a_callback_sees_progress_from_0_to_1(kind):
    steps = []
    draw(kind, wrapped(kind), guidance=Guidance(2.0), callback=steps.append)
    progress = [step.progress for step in steps]
    assert progress[0] == 0 and progress[-1] == pytest.approx(1)
    assert progress == sorted(progress) and [step.index for step in steps] == list(
        range(len(steps))
    )
    assert all(step.scale == 2.0 for step in steps)


# pipelines


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_one_folder_holds_all_families_and_each_draws_the_same_again(tmp_path):
    images = {}
    for family in FAMILIES:
        pipe = pipeline(family=family)
        pipe.save_pretrained(tmp_path)
        images[family] = pipe(CAPTIONS, seeds=[0, 1, 2, 3], guidance=Guidance(2.0))
    assert held_families(tmp_path) == FAMILIES
    for family in FAMILIES:
        loaded = TextToImage.from_pretrained(tmp_path, family)
        drawn = loaded(CAPTIONS, seeds=[0, 1, 2, 3], guidance=Guidance(2.0))
        assert same(drawn, images[family])
        alone = loaded(CAPTIONS[1:2], seeds=[1], guidance=Guidance(2.0))
        assert np.abs(np.subtract(alone[0], images[family][1], dtype=float)).max() <= 1


def test_an_option_of_another_family_is_refused(family):
    pipe = pipeline(family=family)
    values = {"steps": 3, "solver": "heun", "reveal": "linear", "temperature": 0.5, "top_k": 3}
    for name, value in values.items():
        if name in OPTIONS[family]:
            pipe(CAPTIONS[:1], seeds=[0], **{name: value})
        else:
            with pytest.raises(ValueError, match=f"{name} is .*, which the family {family} does"):
                pipe(CAPTIONS[:1], seeds=[0], **{name: value})


@pytest.mark.parametrize("family", ["masked", "diffusion", "flow"])
def test_inpainting_redraws_the_masked_part_alone(family):
    pipe = pipeline(family=family)
    (image,) = pipe(CAPTIONS[:1], seeds=[3])
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 8:] = True
    options = {"init_image": image, "mask": mask, "guidance": Guidance(3.0)}
    steps = []
    drawn = pipe(CAPTIONS[:2], seeds=[0, 1], callback=steps.append, **options)
    assert not same(drawn[:1], drawn[1:])
    known, _ = pipe._known_region(image, mask, 2)
    for picture in drawn:
        pixels = np.asarray(picture)
        assert np.array_equal(pixels[:, :8], np.asarray(image)[:, :8])  # the very same
        assert not np.array_equal(pixels[:, 8:], np.asarray(image)[:, 8:])
    if family == "masked":
        ids = steps[-1].ids.view(2, 4, 4)
        assert torch.equal(ids[:, :, :2], known["init"][:, :, :2])
        assert not torch.equal(ids[0, :, 2:], ids[1, :, 2:])
    # a picture for a mask, white where to draw anew
    picture = Image.fromarray((mask.numpy() * 255).astype("uint8"))
    again = pipe(CAPTIONS[:2], seeds=[0, 1], **(options | {"mask": picture}))
    assert same(drawn, again)


def test_a_part_of_a_picture_is_drawn_anew_from_the_command_line(tmp_path):
    pipeline(family="masked").save_pretrained(tmp_path / "w")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    command = ["generate", CAPTIONS[0], "--weights", str(tmp_path / "w"), "--family", "masked"]
    command += [
        "-n",
        "2",
        "--init-image",
        str(tmp_path / "red.png"),
        "--out",
        str(tmp_path / "o.png"),
    ]
    with pytest.raises(SystemExit) as done:
        main([*command, "--mask", str(tmp_path / "mask.png"), "--steps", "3", "--reveal", "halton"])
    assert done.value.code == 0 and (tmp_path / "o.png").exists()
    with pytest.raises(SystemExit) as failed:
        main([*command, "--mask", str(tmp_path / "nowhere.png")])
    assert failed.value.code == 2


def test_bad_regions_are_refused():
    pipe = pipeline(family="flow")
    image, mask = torch.zeros(3, 16, 16), torch.ones(16, 16, dtype=torch.bool)
    for options, message in (
        ({"mask": mask}, "init_image is None"),
        ({"init_image": image}, "mask is None"),
        ({"init_image": image, "mask": mask[:8]}, r"mask has shape \(8, 16\)"),
        ({"init_image": image, "mask": mask.float()}, "expected bool"),
        ({"init_image": image[:, :8], "mask": mask}, "init_image has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(CAPTIONS[:1], seeds=[0], **options)


# networks


def test_a_new_denoiser_predicts_nothing_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    cls, config = type(network("diffusion")), type(network("diffusion").config)
    model = cls(config(4, 12, 3, 32, 2, 4, latent_channels=2))
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(model(x, COND, torch.rand(3)), torch.zeros_like(x))
    for modulation in model.modulations:
        for by in modulation(torch.randn(3, 1, 32)):
            assert not by.shift.any() and not by.gate.any() and bool((by.factor == 1).all())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_cover_the_grid_and_keep_its_order(patch):
    model = network("diffusion", patch=patch)
    assert model.body.num_tokens == (4 // patch) ** 2
    x, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    out = model(x, COND, t)
    assert out.shape == x.shape
    # what comes out at a place follows what goes in there most of all
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, COND, t)[0, :, 0, 0].sum(), x)
    assert gradient[0].abs().sum() > 0 and not gradient[1:].any()


def test_the_encoded_condition_stands_for_the_ids_at_every_time():
    for family in ("diffusion", "masked"):
        model = network(family)
        x = torch.randn(3, 2, 4, 4) if family == "diffusion" else torch.randint(0, 24, (3, 16))
        for t in (torch.tensor([0.1, 0.5, 0.9]), torch.ones(3)):
            rest = (t,) if family == "diffusion" else ()
            a, b = model(x, COND, *rest), model(x, model.encode_condition(COND), *rest)
            assert torch.equal(a, b)


def test_the_denoiser_is_told_the_time():
    model, x = network("flow"), torch.randn(3, 2, 4, 4)
    early, late = (model(x, COND, torch.full((3,), t)) for t in (0.2, 0.21))
    assert not torch.allclose(early, late)
    embedding = TimeEmbedding(8)
    assert embedding(torch.rand(5)).shape == (5, 8)


def test_a_hybrid_state_has_seen_what_is_before_it_only():
    model = network("hybrid")
    latents = torch.randn(3, 16, 2)
    states = model.states(latents, COND)
    latents[:, 7] += 1
    changed = (model.states(latents, COND) != states).any(-1).any(0)
    assert changed.tolist() == [False] * 8 + [True] * 8


def test_cached_states_equal_uncached_ones():
    model = network("hybrid")
    latents = torch.randn(3, 16, 2)
    states = model.states(latents, COND)
    cache = model.make_cache(3)
    model.prefill(COND, cache)
    for n in (0, 1, 2, 9, 15):  # the jumps are chunks of several tokens
        torch.testing.assert_close(
            model.decode(latents[:, :n], cache), states[:, n], atol=1e-4, rtol=1e-4
        )


def test_a_masked_hybrid_sees_known_latents_only():
    model = network("hybrid", order="masked")
    latents, known = torch.randn(3, 16, 2), torch.rand(3, 16) < 0.5
    states = model.states(latents, COND, known)
    hidden = torch.where(known[..., None], latents, torch.randn(3, 16, 2))
    assert torch.equal(model.states(hidden, COND, known), states)
    with pytest.raises(ValueError, match="known is missing"):
        model.states(latents, COND)
    drawn = sample_hybrid(model, COND, seeds=SEEDS, steps=3, passes=4)
    assert drawn.shape == (3, 16, 2) and bool(drawn.isfinite().all())


def test_a_masked_hybrid_reveals_random_places_by_the_cosine_law():
    model, seen = network("hybrid masked"), []
    sample_hybrid(model, COND, seeds=SEEDS, steps=2, passes=4, callback=seen.append)
    counts = [int(step.known[0].sum()) for step in seen]
    # 16 tokens: floor(16 cos(pi / 8 (1, 2, 3))) = 14, 11, 6 are left
    assert counts == [2, 5, 10, 16]
    first = [tuple(row.nonzero()[:, 0].tolist()) for row in seen[1].known]
    assert len(set(first)) == 3 and tuple(range(5)) not in first


def test_the_temperature_of_a_hybrid_scales_the_first_noise():
    model = network("hybrid")
    draw = {t: sample_hybrid(model, COND, seeds=SEEDS, steps=3, temperature=t) for t in (0.0, 1.0)}
    other = sample_hybrid(model, COND, seeds=[8, 9, 10], steps=3, temperature=0.0)
    torch.testing.assert_close(other, draw[0.0])  # without noise the seed says nothing
    assert not torch.allclose(draw[0.0], draw[1.0])


def test_progress_in_masked_order_is_the_revealed_share():
    """As in sample_masked, and as MAR's linear schedule has it: not the share of the passes."""
    seen = []
    sample_hybrid(
        network("hybrid masked"),
        COND,
        seeds=SEEDS,
        steps=2,
        passes=5,
        guidance=Guidance(1.0),
        callback=seen.append,
    )
    known = [0, *(int(step.known[0].sum()) for step in seen[:-1])]
    assert [step.progress for step in seen] == [share / known[-1] for share in known]
    assert [step.progress for step in seen] != [i / 4 for i in range(5)]


@pytest.mark.parametrize("order", ["hybrid", "hybrid masked"])
def test_the_schedule_of_a_hybrid_runs_over_its_tokens(order):
    """A scale that is 1 until the last turn changes nothing but that turn."""
    seen = {}
    for name, scale in (("plain", 1.0), ("late", interval(9.0, 1.0, 1.0))):
        steps = []
        guidance = Guidance(scale)
        options = {"steps": 2, "guidance": guidance, "callback": steps.append}
        sample_hybrid(wrapped(order), COND, seeds=SEEDS, **options)
        seen[name] = steps
    before, last = ((seen["plain"][i].latents, seen["late"][i].latents) for i in (-2, -1))
    torch.testing.assert_close(*before)
    assert not torch.allclose(*last, atol=1e-2)


def test_guiding_head_and_states_is_more_than_the_head_and_runs_one_branch_at_0():
    model = wrapped("hybrid")
    options = {"seeds": SEEDS, "steps": 3}
    drawn = {
        place: sample_hybrid(model, COND, guidance=Guidance(3.0), guide_at=place, **options)
        for place in ("head", "both")
    }
    assert not torch.allclose(drawn["head"], drawn["both"], atol=1e-2)
    rows = []
    prepare = model.model.head.prepare

    def counted(times):
        prepared = prepare(times)
        return lambda hidden: (rows.append(len(hidden)), prepared(hidden))[1]

    model.model.head.prepare = counted
    for place in ("head", "both"):
        sample_hybrid(model, COND, guidance=Guidance(0.0), guide_at=place, **options)
    assert set(rows) == {3}
    model.model.body.prefix.embedding.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"token 0.*'uncond'"):
        sample_hybrid(model, COND, guidance=Guidance(0.0), **options)


@pytest.mark.parametrize("family", ["ar", "masked", "diffusion", "hybrid"])
def test_a_model_of_another_family_is_refused_by_name(family):
    other = {"ar": "masked", "masked": "ar", "diffusion": "ar", "hybrid": "diffusion"}[family]
    with pytest.raises((TypeError, ValueError), match=r"got a \w+, which has no|is None"):
        draw(family, wrapped(other))


def test_the_time_embedding_keeps_its_frequencies_in_bfloat16():
    torch.manual_seed(0)
    time, t = TimeEmbedding(32), torch.linspace(0, 1, 50)
    exact = time(t).detach()
    rounded = time.bfloat16()(t).detach().float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


def test_prepared_denoisers_equal_the_head():
    torch.manual_seed(0)
    head = network("hybrid").head
    hidden, x, times = torch.randn(2, 5, 32), torch.randn(2, 5, 2), torch.rand(3)
    denoisers = head.prepare(times)(hidden)
    for denoise, t in zip(denoisers, times, strict=True):
        torch.testing.assert_close(denoise(x), head(x, hidden, t.expand(2, 5)))


def test_a_head_on_its_own_is_a_diffusion_model():
    head = DiffusionHead(2, 32, 16, 2, path="straight", space="flow").eval()
    hidden = torch.randn(4, 32)
    drawn = sample_diffusion(
        head, hidden, uncond=torch.zeros(32), seeds=[0, 1, 2, 3], guidance=Guidance(2.0), steps=4
    )
    assert drawn.shape == (4, 2)


@pytest.mark.parametrize("guide_at", ["head", "states", "both"])
def test_where_a_hybrid_is_guided(guide_at):
    model = wrapped("hybrid")
    options = {"seeds": SEEDS, "steps": 3, "guide_at": guide_at}
    plain = sample_hybrid(model, COND, **options)
    assert torch.equal(plain, sample_hybrid(model.model, COND, seeds=SEEDS, steps=3))
    guided = sample_hybrid(model, COND, guidance=Guidance(3.0), **options)
    assert not torch.allclose(plain, guided)
    heads = []
    prepare = model.model.head.prepare

    def counted(times):
        prepared = prepare(times)
        return lambda hidden: (heads.append(len(hidden)), prepared(hidden))[1]

    model.model.head.prepare = counted
    sample_hybrid(model, COND, guidance=Guidance(3.0), **options)
    assert set(heads) == {3 if guide_at == "states" else 6}


def test_both_halves_of_a_head_share_their_noise():
    """With equal conditions the two branches are equal, so no scale changes anything."""
    model = wrapped("hybrid")
    same_as_null = model.null_condition.expand(3, -1)
    a, b = (
        sample_hybrid(model, same_as_null, seeds=SEEDS, steps=3, guidance=Guidance(s))
        for s in (1.0, 7.0)
    )
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide_at": "tail"}, "guide_at is 'tail', expected one of head, states, both"),
        ({"steps": 0}, "steps is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"solver": "euler"}, "solver is 'euler', expected one of ddim"),
        ({"passes": 3}, "passes is 3, expected None: a model of the order 'causal'"),
    ],
)
def test_bad_options_of_a_hybrid(options, message):
    with pytest.raises(ValueError, match=message):
        sample_hybrid(wrapped("hybrid"), COND, seeds=SEEDS, **options)


# losses


def generator():
    return torch.Generator().manual_seed(0)


def test_masked_loss_counts_hidden_tokens_alone_and_hides_them():
    ids = torch.randint(0, 24, (64, 16), generator=generator())
    seen = []

    def model(x, cond):
        seen.append(x)
        right = torch.nn.functional.one_hot(ids, 24) * 50.0
        return torch.where((x == 24)[..., None], right, -right)  # wrong wherever it was shown

    assert float(masked_loss(model, ids, None, 24, generator())) < 1e-3
    hidden = seen[0] == 24
    assert torch.equal(seen[0][~hidden], ids[~hidden])
    assert int(hidden.sum(1).min()) >= 1


def test_the_share_of_hidden_tokens_follows_the_cosine():
    hidden = random_mask(4000, 50, generator()).float()
    # the mean of cos(pi u / 2) is 2 / pi; the ceiling adds half a token
    assert float(hidden.mean()) == pytest.approx(2 / math.pi + 0.01, abs=0.01)
    assert float(hidden.mean(0).std()) < 0.02  # no place is preferred


def test_stratified_numbers_cover_the_range():
    u = stratified(1000, generator())
    assert torch.equal((u * 1000).floor().sort().values, torch.arange(1000.0))
    assert not torch.equal(u, u.sort().values)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_a_perfect_denoiser_has_no_loss_and_an_error_in_x0_weighs_the_same_in_all_spaces(
    space, min_snr
):
    """With min-SNR the loss is min(SNR, gamma) times the squared error of x0, whatever the space."""
    latents = torch.randn(256, 2, 4, 4, generator=generator())
    noising = Noising(cosine(), space, min_snr=min_snr)

    def off_by(error):
        def model(x, cond, t):
            alpha, sigma = cosine().coefficients(t.view(-1, 1, 1, 1))
            x0 = latents + error
            return join(x0, (x - alpha * x0) / sigma, alpha, sigma, space)

        return float(denoising_loss(model, latents, None, noising, generator()))

    assert off_by(0.0) < 1e-3  # rounding, where sigma is small
    if min_snr is not None:
        t = noising.draw_times(256, generator())
        alpha, sigma = cosine().coefficients(t)
        expected = float((alpha / sigma).square().clamp(max=5.0).mean()) * 0.01
        assert off_by(0.1) == pytest.approx(expected, rel=1e-2)


def test_flow_times_are_the_sigmoid_of_a_normal_and_shift_moves_them():
    t = Noising(straight(), "flow", "logit-normal").draw_times(4001, generator())
    assert float(t.median()) == pytest.approx(0.5, abs=0.01)
    # a quarter of a standard normal lies below -0.6745
    assert float(t.quantile(0.25)) == pytest.approx(1 / (1 + math.exp(0.6745)), abs=0.01)
    shifted = Noising(straight(), "flow", "logit-normal", shift=3.0).draw_times(4001, generator())
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("masked", [False, True])
def test_hybrid_loss_is_zero_for_a_perfect_head_and_draws_noise_for_every_token(masked):
    latents = torch.randn(8, 16, 2, generator=generator())
    noising, seen = Noising(cosine(), "eps"), []

    def model(x, cond, noisy, t, known):
        seen.append((noisy, t, known))
        alpha, sigma = cosine().coefficients(t[..., None])
        return (noisy - alpha * latents) / sigma

    assert float(hybrid_loss(model, latents, None, noising, 3, masked, generator())) < 1e-4
    noisy, t, known = seen[0]
    assert noisy.shape == (3, 8, 16, 2) and t.shape == (3, 8, 16)
    assert t.unique().numel() > 380 and (known is None) != masked
    eps = (noisy - cosine().coefficients(t[..., None])[0] * latents) / (
        cosine().coefficients(t[..., None])[1]
    )
    assert not torch.allclose(eps[0], eps[1], atol=1e-2)  # each draw has noise of its own


def test_hybrid_loss_in_the_masked_order_counts_hidden_tokens_alone():
    latents = torch.randn(8, 16, 2, generator=generator())

    def model(x, cond, noisy, t, known):
        alpha, sigma = cosine().coefficients(t[..., None])
        right = (noisy - alpha * latents) / sigma
        return torch.where(known[..., None], right + 100.0, right)  # wrong where it was shown

    assert (
        float(hybrid_loss(model, latents, None, Noising(cosine(), "eps"), 2, True, generator()))
        < 1e-4
    )
    with pytest.raises(ValueError, match="draws is 0"):
        hybrid_loss(model, latents, None, Noising(cosine(), "eps"), 0, True, generator())


def test_context_noise_disturbs_what_the_transformer_sees_and_nothing_else():
    latents, seen = torch.randn(64, 16, 2, generator=generator()), []

    def model(x, cond, noisy, t, known):
        seen.append((x, noisy, t))
        return torch.zeros_like(noisy)

    noising = Noising(cosine(), "eps")
    for noise in (0.0, 0.5):
        hybrid_loss(model, latents, None, noising, 2, False, generator(), noise)
    (clean, *plain), (disturbed, *same) = seen
    assert torch.equal(clean, latents)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    levels = (disturbed - latents).flatten(1).std(1)  # one level a sample, uniform up to 0.5
    assert 0.15 < levels.mean() < 0.35 and levels.max() < 0.75 and levels.min() < 0.1
    with pytest.raises(ValueError, match=r"context_noise is -1\.0, expected a finite number"):
        hybrid_loss(model, latents, None, noising, 2, False, generator(), -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_snr": -1.0}, r"min_snr is -1\.0, expected a finite number > 0"),
        ({"min_snr": 0.0}, "min_snr is 0"),
        ({"shift": 0.0}, "shift is 0"),
        ({"time": "lognormal"}, "time is 'lognormal', expected 'uniform' or 'logit-normal'"),
        ({"space": "noise"}, "space is 'noise'"),
    ],
)
def test_bad_noise_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Noising(**({"path": cosine(), "space": "eps"} | options))


def test_the_noise_settings_of_a_recipe_reach_the_loss():
    from unicfg.training.families import _noising
    from unicfg.training.recipe import ModelRecipe, NoiseRecipe

    recipe = ModelRecipe(family="flow", noise=NoiseRecipe(min_snr=3.0, shift=2.0, time="uniform"))
    noising = _noising(recipe, network("flow"))
    assert (noising.min_snr, noising.shift, noising.time) == (3.0, 2.0, "uniform")
    assert _noising(ModelRecipe(family="flow"), network("flow")).time == "logit-normal"


def test_a_null_condition_is_learned_by_every_family(family):
    """The row of the null token in the embedding gets a gradient under dropout."""
    from unicfg.training.dropout import WHOLE
    from unicfg.training.families import training_loss
    from unicfg.training.recipe import ModelRecipe

    model = wrapped(family)
    model.p = 1.0
    model.train()
    loss = training_loss(ModelRecipe(family=family), model.model)
    data = torch.randint(0, 24, (3, 16)) if family in ("ar", "masked") else torch.randn(3, 2, 4, 4)
    loss(model, data, COND, generator(), WHOLE).backward()
    gradient = model.model.body.prefix.embedding.weight.grad
    assert gradient[0].any() and not gradient[1:].any()
