"""``Guidance`` and schedules: values, nesting, branches, errors."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicfg import Guidance, guide, sample_diffusion
from unicfg.guidance import mitigations, presets
from unicfg.guidance.schedules import (
    at_levels,
    constant,
    cosine,
    decay,
    interval,
    linear,
    log_snr_interval,
    noise_interval,
    power_cosine,
    table,
)
from unicfg.sampling import cosine as cosine_path
from unicfg.sampling import straight

progresses = st.floats(0, 1)


def test_values_of_every_schedule():
    assert constant(3.0)(0.7) == 3.0
    assert [linear(1, 4)(p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0]
    assert linear(10, 1)(0.25) == pytest.approx(7.75)
    assert [cosine(1, 5)(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 3.0, 5.0])
    assert cosine(1, 5)(0.25) == pytest.approx(1 + 4 * (1 - math.cos(math.pi / 4)) / 2)
    assert power_cosine(8, 2.0)(0.5) == pytest.approx(1 + 7 * (1 - math.cos(math.pi / 4)) / 2)
    assert [power_cosine(8, 2.0)(p) for p in (0.0, 1.0)] == pytest.approx([1.0, 8.0])


def test_decay_by_hand():
    assert decay(5.0, 2.0)(0.0) == 5.0
    assert decay(5.0, 2.0)(0.5) == pytest.approx(1 + 4 * math.exp(-1))
    assert decay(5.0, 0.0)(1.0) == 5.0


@pytest.mark.parametrize("path", [straight(), cosine_path()])
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_a_noise_interval_means_the_same_noise_on_every_path_and_grid(path, spacing):
    seen = []

    def model(x, cond, t):
        return x * 0 + cond

    inner = noise_interval(3.0, 0.5, 2.0)
    schedule = interval(table([inner, inner]), 0.0, 1.0)  # nested twice
    cond, null = torch.ones(2, 1), torch.zeros(1)
    settings = {"shape": (1,), "path": path, "space": "v", "seeds": [0, 1], "steps": 12}
    sample_diffusion(
        model,
        cond,
        uncond=null,
        guidance=Guidance(schedule),
        spacing=spacing,
        callback=lambda step: seen.append((step.t, step.scale)),
        **settings,
    )
    inside = 0
    for t, scale in seen:
        alpha, sigma = path.coefficients(torch.tensor(t, dtype=torch.float64))
        within = bool(0.5 * alpha <= sigma) and bool(sigma <= 2 * alpha)
        inside += within
        assert scale == (3.0 if within else 1.0)
    assert len(seen) == 12 and 0 < inside < 12


def test_noise_intervals_include_both_ends_and_speak_log_snr():
    levels = [math.inf, 4.0, 2.0, 1.0, 0.5]
    bound = at_levels(noise_interval(3.0, 1.0, 4.0, outside=linear(0.0, 0.5)), levels)
    assert [bound(i / 4) for i in range(5)] == [0.0, 3.0, 3.0, 3.0, 0.5]
    by_snr = log_snr_interval(3.0, -2 * math.log(4.0), 0.0)
    assert (by_snr.low, by_snr.high) == (1.0, pytest.approx(4.0))
    with pytest.raises(ValueError, match="only sample_diffusion has"):
        Guidance(noise_interval(3.0, 0.5, 2.0)).scale_at(0.5)


@pytest.mark.parametrize("name", presets.__all__)
def test_presets_say_their_source_and_give_a_guidance(name):
    preset = getattr(presets, name)
    assert "arXiv" in preset.__doc__
    for progress in (0.0, 0.4, 1.0):
        assert math.isfinite(preset().scale_at(progress))


def test_presets_by_hand():
    assert [presets.mar_base().scale_at(p) for p in (0.0, 1.0)] == [1.0, 2.9]
    assert presets.var().scale_at(1.0) == 2.5
    assert presets.magnet().scale_at(0.0) == 10.0 and presets.magnet().scale_at(1.0) == 1.0
    guided = [i for i in range(32) if presets.edm2_interval().scale_at(i / 31) != 1.0]
    assert guided == list(range(17, 23))


def test_power_cosine_equals_the_published_formula_of_rar():
    s, power, steps = 16.0, 2.75, 256
    for k in (0, 1, 100, 255):
        published = 1 + (s - 1) * (1 - math.cos((k / (steps - 1)) ** power * math.pi)) * 0.5
        assert power_cosine(s, power)(k / (steps - 1)) == pytest.approx(published)


def test_interval_includes_both_ends():
    schedule = interval(4.0, 0.25, 0.75)
    values = [
        schedule(p) for p in (0.0, math.nextafter(0.25, 0), 0.25, 0.75, math.nextafter(0.75, 1))
    ]
    assert values == [1.0, 1.0, 4.0, 4.0, 1.0]
    assert interval(4.0, 0.0, 0.5, outside=0.0)(0.6) == 0.0


@given(steps=st.integers(1, 300))
def test_a_table_gives_each_step_its_own_value(steps):
    schedule = table(list(range(steps)))
    assert [schedule(i / max(steps - 1, 1)) for i in range(steps)] == list(range(steps))


def test_schedules_nest_and_see_the_same_progress():
    schedule = interval(linear(1, 4), 0.2, 0.8)
    assert [schedule(p) for p in (0.1, 0.5, 0.9)] == [1.0, 2.5, 1.0]
    deep = linear(constant(2.0), interval(6.0, 0.5, 1.0, outside=cosine(0, 2)))
    assert deep(1.0) == 6.0 and deep(0.5) == 4.0
    assert table([linear(0, 1), 5])(0.0) == 0.0


@given(p=progresses)
def test_schedules_stay_between_their_ends(p):
    for schedule in (linear(1, 6), cosine(1, 6), power_cosine(6, 3.0), table([1, 6, 2])):
        assert 1 - 1e-9 <= schedule(p) <= 6 + 1e-9


def test_per_sample_scales_go_through_schedules():
    s = Guidance(linear(1.0, torch.tensor([1.0, 3.0]))).scale_at(0.5)
    assert torch.equal(s, torch.tensor([1.0, 2.0]))


def test_schedules_print_and_compare_by_their_settings():
    assert repr(interval(linear(1, 4), 0.2, 0.8)) == (
        "interval(scale=linear(start=1, end=4), start=0.2, end=0.8, outside=1.0)"
    )
    assert linear(1, 4) == linear(1, 4) != linear(1, 5)


@pytest.mark.parametrize(
    ("scale", "branches"),
    [
        (1.0, ("cond",)),
        (0.0, ("uncond",)),
        (0.5, ("cond", "uncond")),
        (3.0, ("cond", "uncond")),
        (-1.0, ("cond", "uncond")),
        (torch.tensor([1.0, 1.0]), ("cond",)),
        (torch.tensor([1.0, 2.0]), ("cond", "uncond")),
        (torch.tensor([0.0, 0.0]), ("uncond",)),
        (torch.tensor([1.0, 0.0]), ("cond", "uncond")),
    ],
)
def test_branches_that_a_step_needs(scale, branches):
    assert Guidance(scale).branches_at(0.5) == branches


def test_an_interval_needs_one_branch_outside():
    guidance = Guidance(interval(4.0, 0.25, 0.75))
    needed = [len(guidance.branches_at(i / 4)) for i in range(5)]
    assert needed == [1, 2, 2, 2, 1]


def test_combine_guides_and_applies_mitigations_in_order():
    cond, uncond = torch.randn(2, 3, 5)
    seen = []

    def clip(guided, c, u):
        seen.append((c, u))
        return guided.clamp(-1, 1)

    def double(guided, c, u):
        return guided * 2

    out = Guidance(4.0, mitigations=(clip, double)).combine(0.5, cond, uncond)
    torch.testing.assert_close(out, guide(cond, uncond, 4.0).clamp(-1, 1) * 2)
    assert torch.equal(seen[0][0], cond) and torch.equal(seen[0][1], uncond)


def test_combine_without_guidance_returns_the_branch_itself():
    cond = torch.randn(2, 5)
    assert Guidance(1.0).combine(0.0, cond, None) is cond
    assert Guidance(0.0).combine(0.0, None, cond) is cond
    with pytest.raises(ValueError, match=r"needs .*'uncond'.* got .*'cond'"):
        Guidance(2.0).combine(0.0, cond, None)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(TypeError, match="scale is 'big'"):
        Guidance("big")
    with pytest.raises(TypeError, match="scale is None"):
        Guidance(None)
    with pytest.raises(ValueError, match=r"shape \(\) or \(B,\)"):
        Guidance(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"mitigation is 0\.7"):
        Guidance(2.0, mitigations=(0.7,))
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        Guidance(2.0).scale_at(1.5)
    with pytest.raises(ValueError, match=r"schedule at progress 0\.5 is nan"):
        Guidance(lambda p: math.nan).scale_at(0.5)
    with pytest.raises(TypeError, match=r"schedule at progress 0\.5 is 'x'"):
        Guidance(lambda p: "x").scale_at(0.5)
    with pytest.raises(ValueError, match="start <= end"):
        interval(2.0, 0.8, 0.2)
    with pytest.raises(ValueError, match="power is 0"):
        power_cosine(2.0, 0)
    with pytest.raises(ValueError, match="values is empty"):
        table([])


def test_guidance_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Guidance(2.0).scale = 3.0


def test_import_unicfg_pulls_in_no_other_library():
    code = (
        "import sys, unicfg; "
        "heavy = {'transformers', 'diffusers', 'models', 'tokenizers_vq', 'accelerate', 'PIL', "
        "'huggingface_hub', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", [np.float32(3.0), np.float64(3.0), np.int64(3)])
def test_a_scale_may_be_a_number_of_numpy(number):
    assert Guidance(number).scale_at(0.5) == 3.0 == Guidance(lambda progress: number).scale_at(0.5)
    out = guide(torch.tensor([[2.0]]), torch.tensor([[1.0]]), number)
    assert out.item() == 4.0


def test_a_lone_mitigation_and_a_scale_that_is_none_are_named():
    with pytest.raises(TypeError, match=r"mitigations is rescale\(phi=0\.7\), expected a tuple"):
        Guidance(3.0, mitigations.rescale(0.7))
    for wrong in ("3", None, [3.0], np.ones(2)):
        with pytest.raises(TypeError, match=r"s is .*, expected a number or a tensor"):
            guide(torch.ones(2, 1), torch.zeros(2, 1), wrong)
