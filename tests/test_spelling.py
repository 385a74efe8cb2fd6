"""Guidance written as text: it means what Python means by it, and nothing else can be written."""

import inspect
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicfg import Guidance
from unicfg.guidance import branches, mitigations, schedules
from unicfg.guidance.schedules import constant, interval, linear, noise_interval, table
from unicfg.guidance.spelling import (
    COMBINATIONS,
    MITIGATIONS,
    SCHEDULES,
    as_python,
    read_guidance,
    read_mitigations,
    read_scale,
)

SCALES = {
    "constant": "constant(s)",
    "cosine": "cosine(1, end=s)",
    "decay": "decay(s, rate=2.5)",
    "interval": "interval(s, 0.2, 0.8, outside=linear(1, 2))",
    "linear": "linear(1, 2 * s - 1)",
    "log_snr_interval": "log_snr_interval(s, -1, 2)",
    "noise_interval": "noise_interval(s, 0.3, inf)",
    "power_cosine": "power_cosine(s, 2.75)",
    "table": "table([1, s, linear(s, -s), (s + 2) / 4])",
}
REINS = dict.fromkeys(MITIGATIONS, "") | {
    "apg": "eta=0.5, threshold=10, momentum=-0.5",
    "frequency_decoupled": "(1, 4 / 9)",
    "mimic_scale": "3",
    "rescale": "0.7",
    "top_k_of_cond": "k=50",
}
WEIGHTS = {
    "cfg_pp": "cfg_pp(0.6)",
    "composed": "composed(cond=s, style=linear(1, s))",
    "context_aware": "context_aware(alpha=0.5)",
    "dexperts": "dexperts(s)",
    "instruct_pix2pix": "instruct_pix2pix(s, 1.5)",
    "negative": "negative(interval(s, 0.2, 0.8), 2 * s)",
    "nested": "nested(s, s_inner=2)",
    "perp_neg": "perp_neg(s, 1)",
    "weak": "weak(linear(1, s), cfg=2)",
    "weights": "weights(cond=s, uncond=1 - s)",
}


def python(text: str, s: float) -> object:
    """What Python makes of the text."""
    names = {name: getattr(schedules, name) for name in schedules.__all__}
    names |= {name: getattr(branches, name) for name in branches.__all__}
    names |= {name: getattr(mitigations, name) for name in mitigations.__all__}
    return eval(text, {"s": s, "inf": math.inf, **names})


def test_everything_public_can_be_spelled():
    assert set(SCALES) == set(SCHEDULES) == set(schedules.__all__) - {"at_levels"}
    assert set(REINS) == set(MITIGATIONS) == set(mitigations.__all__)
    made = {name for name in branches.__all__ if not isinstance(getattr(branches, name), type)}
    assert set(WEIGHTS) == set(COMBINATIONS) == made


@pytest.mark.parametrize("text", [*SCALES.values(), "s", "4.0", "-s", " (2 + s) / 4 ", "-1 - -s"])
def test_a_scale_is_what_python_makes_of_it(text):
    expected = python(text.strip(), 4.5)
    assert read_scale(text, 4.5) == expected
    assert repr(read_scale(text, 4.5)) == repr(expected)


@pytest.mark.parametrize("name", MITIGATIONS)
def test_a_mitigation_is_what_python_makes_of_it(name):
    text = f"{name}({REINS[name]})"
    assert read_mitigations(text) == (python(text, 0),)
    assert repr(read_mitigations(text)) == repr((python(text, 0),))


@pytest.mark.parametrize("text", WEIGHTS.values())
def test_weights_of_branches_are_what_python_makes_of_them(text):
    expected, found = python(text, 2.0), read_guidance(text, 2.0, "tcfg")
    again = run(as_python(text, 2.0, "tcfg"))
    for guidance in (found, again):
        assert repr(guidance.scale) == repr(expected)
        assert guidance.mitigations == (mitigations.tcfg(),)
        for progress in (0.0, 0.5, 1.0):
            assert guidance.strengths_at(progress) == expected.strengths_at(progress)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("weak", r"weak has no brackets, expected weak\(s, cfg=1.0\)"),
        ("weak(s) + 1", r"'weak\(s\)' is no number"),
        ("linear(weak(s), 1)", "linear: start is Weights"),
        ("weak(weak(s))", "weak: s is Weights"),
        ("weak(s, cfg=[1])", r"weak: cfg is \(1,\), expected a finite number or a schedule"),
        ("composed(cond=[1])", r"composed: cond is \(1,\), expected a finite number or a schedule"),
        ("composed(style=1)", "expected 'cond' among them"),
        ("composed(cond=s, uncond=1)", "composed: uncond is 1, expected other branches"),
        ("composed(1)", r"expected composed\(\*\*scales\)"),
        ("weights(cond=s, uncond=1)", "add up to 3.0 at progress 0.0, expected 1"),
        ("negative(s)", r"missing a required argument: 'away', expected negative\(s, away\)"),
        ("weaker(s)", "unknown function 'weaker', expected weak"),
    ],
)
def test_other_texts_are_refused_as_weights_of_branches(text, what):
    with pytest.raises(ValueError, match=f"^scale ['\"].*{what}"):
        read_guidance(text, 2.0)


def test_a_scale_alone_is_no_weights_of_branches():
    with pytest.raises(ValueError, match=r"scale 'weak\(s\)': unknown function 'weak'"):
        read_scale("weak(s)", 2.0)


def test_values_by_hand():
    assert read_scale("interval(s, 0.2, 0.8)", 4) == interval(4.0, 0.2, 0.8)
    assert read_scale("interval(linear(1, 2 * s), 0.3, 1.0)", 3) == interval(
        linear(1, 6.0), 0.3, 1.0
    )
    assert read_scale("s - 1 - 1", 7) == 5.0
    assert read_scale("s / 2 * 3", 4) == 6.0
    assert read_mitigations("") == read_mitigations(" \n") == ()
    assert read_mitigations("tcfg + mimic_scale(3) + tcfg()") == (
        mitigations.tcfg(),
        mitigations.mimic_scale(3),
        mitigations.tcfg(),
    )
    assert read_mitigations("rescale + (tcfg + mimic_scale)") == (
        mitigations.rescale(),
        mitigations.tcfg(),
        mitigations.mimic_scale(),
    )


def test_lists_cannot_be_changed_afterwards():
    assert read_mitigations("frequency_decoupled([1, 0.5])") == (
        mitigations.frequency_decoupled((1, 0.5)),
    )


def test_what_is_printed_can_be_read_back():
    for text in SCALES.values():
        scale = read_scale(text, 3.5)
        assert read_scale(repr(scale), 100.0) == scale
    for name in MITIGATIONS:
        (rein,) = read_mitigations(f"{name}({REINS[name]})")
        assert read_mitigations(repr(rein)) == (rein,)


numbers = st.one_of(
    st.integers(0, 20).map(str), st.floats(0, 9).map(repr), st.just("s"), st.just("(-s)")
)
sums = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds("{} {} {}".format, inner, st.sampled_from("+-*"), inner),
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner),
        st.builds("{} / {}".format, inner, st.sampled_from(["2", "0.3", "(s + 9)"])),
        inner.map("-{}".format),
    ),
    max_leaves=4,
)
ends = st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)
nested = st.recursive(
    sums,
    lambda inner: st.one_of(
        st.builds("linear({}, {})".format, inner, inner),
        st.builds("cosine(end={}, start={})".format, inner, inner),
        st.builds("interval({}, *, {})".format, inner, inner).flatmap(
            lambda text: ends.map(lambda pair: text.replace("*,", f"{pair[0]!r}, {pair[1]!r},"))
        ),
        st.builds("decay({}, {})".format, inner, st.floats(0, 9)),
        st.builds(
            "power_cosine({}, power={})".format, inner, st.sampled_from(["1", "2.75", "9 / 4"])
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda own: f"table([{', '.join(own)}])"),
        inner.map("constant({})".format),
    ),
    max_leaves=5,
)


@given(nested, st.floats(-3, 12))
def test_any_expression_is_what_python_makes_of_it(text, s):
    found, expected = read_scale(text, s), python(text, s)
    assert repr(found) == repr(expected)
    guidances = Guidance(found), Guidance(expected)
    for progress in (0.0, 0.37, 1.0):
        first, second = (own.scale_at(progress) for own in guidances)
        assert first == second


PIECES = "s inf 1 0.5 1e400 + - * / ** ( ) [ ] , = . : { } ' linear( interval( table( start= rescale tcfg( and if \n lambda _ \\ #"


@given(st.lists(st.sampled_from([*PIECES.split(" "), " "]), max_size=12).map("".join))
def test_any_text_is_read_or_refused(text):
    try:
        scale = read_scale(text, 2.0)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        Guidance(scale)
    try:
        read = read_mitigations(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        Guidance(1.0, read)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("intervall(s, 0, 1)", "unknown function 'intervall', expected interval or"),
        ("lineal(1, s)", "expected linear"),
        ("w", "unknown name 'w'"),
        ("S", "unknown name 'S', expected"),
        ("s(3)", "unknown function 's'"),
        ("at_levels(s, [1])", "unknown function 'at_levels'"),
        ("interval", r"no brackets, expected interval\(scale, start, end, outside=1.0\)"),
        ("interval(s, 0.2)", "missing a required argument: 'end', expected interval"),
        ("interval(s, 0, 1, until=3)", "unexpected keyword argument 'until'"),
        ("interval(s, 0, 1, 2, 3)", "too many positional arguments"),
        ("interval(s, 0.9, 0.2)", r"interval is \[0.9, 0.2\], expected 0 <= start <= end <= 1"),
        ("power_cosine(s, 0)", "power is 0, expected a number > 0"),
        ("table([])", "values is empty"),
        ("table(s)", "table: values is 3.0, expected a list"),
        ("table([1, [2]])", "expected a list of finite numbers or schedules"),
        ("linear((1, 2), s)", "linear: start is .1, 2., expected a finite number or a schedule"),
        ("linear(1, inf)", "linear: end is inf, expected a finite number or a schedule"),
        ("decay(s, linear(1, 2))", "decay: rate is linear.*, expected a number"),
        ("linear(1, s) * 2", "is no number"),
        ("-[1]", "is no number"),
        ("linear(start=1, start=2, end=3)", "start is given twice"),
        ("linear(**s)", "found '.*s', expected linear"),
        ("linear(1, *s)", "found '.s'"),
        ("s,", "expected a finite number or a schedule"),
        ("inf", "expected a finite number or a schedule"),
        ("inf - inf", "is nan, expected a finite number"),
        ("1e308 * 10", r"'1e\+308 . 10' is inf, expected a finite number"),
        ("noise_interval(s, 0, 2 * inf)", "'2 . inf' is inf, expected a finite number"),
        ("1 / 0", "division by zero"),
        ("9" * 400, "too large"),
        ("9" * 999_999, "expected at most 1000"),
        ("decay(s, " + "9" * 400 + ")", "too large"),
        ("9**9**9", r"found '9 \*\* 9 \*\* 9'"),
        ("2 << 99999999", "found"),
        ("'a' * 999999999", "found"),
        ("[1] * 999999999", "is no number"),
        ("True", "found 'True'"),
        ("None", "found 'None'"),
        ("2j", "found '2j'"),
        ("...", "found"),
        ("s.real", "found 's.real'"),
        ("().__class__", "found"),
        ("table.__init__", "found"),
        ("__import__('os').system('true')", "found"),
        ("open('x')", "unknown function 'open'"),
        ("s[0]", "found 's.0.'"),
        ("lambda: 1", "found 'lambda: 1'"),
        ("(lambda: 1)()", "found"),
        ("[x for x in s]", "found"),
        ("table(x for x in s)", "found"),
        ("s if s else 1", "found"),
        ("s < 1", "found"),
        ("f'{s}'", "found"),
        ("(x := 1)", "found"),
        ("{1: s}", "found"),
        ("s; s", "invalid syntax"),
        ("s = 1", "invalid syntax"),
        ("import os", "invalid syntax"),
        ("interval(s, 0.2", "was never closed"),
        ("s\x00", "null bytes"),
        ("\ud800", "surrogates"),
        ("-" * 900 + "1", "nested more than 50 deep"),
        ("(" * 190 + "1" + ")" * 190 + "+" * 200 + "1", "deep"),
        ("(" * 400 + "1" + ")" * 400, "too many nested parentheses"),
        ("constant(" * 90 + "1" + ")" * 90, "nested more than 50 deep"),
    ],
)
def test_other_texts_are_refused_as_scales(text, what):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"(?s)^scale ['\"].*{what}"):
        read_scale(text, 3.0)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("tcgf", "unknown function 'tcgf', expected tcfg"),
        ("rescale(2)", "rescale: phi is 2, expected a number >= 0 and <= 1"),
        ("rescale(share=0.7)", "unexpected keyword argument 'share', expected rescale"),
        ("rescale('0.7')", "found"),
        ("rescale(tcfg)", "tcfg has no brackets"),
        ("rescale(tcfg())", r"phi is tcfg\(\), expected a number"),
        ("top_k_of_cond", "missing a required argument: 'k'"),
        ("top_k_of_cond(5.0)", "k is 5.0, expected an int"),
        ("frequency_decoupled(0.5)", "shares is 0.5, expected a list of numbers"),
        ("frequency_decoupled([])", "at least one"),
        ("mimic_scale(s)", "unknown name 's'"),
        ("linear(1, 2)", "unknown function 'linear'"),
        ("tcfg * 2", "found 'tcfg . 2', expected mitigations, joined by"),
        ("tcfg - rescale", "joined by"),
        ("rescale, tcfg", "joined by"),
        ("0.7", "joined by"),
        ("tcfg + 1", "joined by"),
        ("mitigations.tcfg", "found 'mitigations.tcfg'"),
        ("mitigations.tcfg()", "found 'mitigations.tcfg"),
        ("tcfg()()", "found"),
        ("tcfg +", "invalid syntax"),
        ("+".join(["tcfg"] * 100), "deep"),
    ],
)
def test_other_texts_are_refused_as_mitigations(text, what):
    with pytest.raises(ValueError, match=f"(?s)^mitigations ['\"].*{what}"):
        read_mitigations(text)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, maker in {**SCHEDULES, **MITIGATIONS}.items()
        for argument in inspect.signature(maker).parameters
    ],
)
def test_every_argument_refuses_what_is_no_value_of_its_kind(name, argument):
    """Constructors leave types to the type checker, which a text never meets."""
    read = read_mitigations if name in MITIGATIONS else lambda text: read_scale(text, 3.0)
    own = inspect.signature({**SCHEDULES, **MITIGATIONS}[name]).parameters
    wrong = {**{other: "[1]" for other in own if other == "values"}, argument: "[[1]]"}
    needed = {other: "1" for other, about in own.items() if about.default is about.empty}
    text = ", ".join(f"{key}={value}" for key, value in (needed | wrong).items())
    with pytest.raises(ValueError, match=rf"{name}: {argument} is \(\(1,\),\), expected a"):
        read(f"{name}({text})")


@pytest.mark.parametrize("text", [4.0, None, ["s"]])
def test_only_text_is_read(text):
    with pytest.raises(TypeError, match=r"scale is .*, expected a str"):
        read_scale(text, 1.0)
    with pytest.raises(TypeError, match=r"mitigations is .*, expected a str"):
        read_mitigations(text)


def test_s_is_a_finite_number():
    with pytest.raises(ValueError, match="s is nan, expected a finite number"):
        read_scale("2.0", math.nan)
    with pytest.raises(TypeError, match="s is '3', expected a number"):
        read_scale("s", "3")


def test_guidance_of_two_texts():
    guidance = read_guidance("interval(s, 0.2, 0.8)", 5.0, "rescale(0.7) + tcfg")
    assert guidance.scale == interval(5.0, 0.2, 0.8)
    assert guidance.mitigations == (mitigations.rescale(0.7), mitigations.tcfg())
    assert [guidance.scale_at(p) for p in (0.1, 0.5)] == [1.0, 5.0]
    assert read_guidance("s", 2.0).mitigations == ()


def run(code: str) -> Guidance:
    names: dict[str, object] = {}
    exec(code, names)
    return names["guidance"]


def test_python_is_as_a_person_would_write_it():
    assert as_python("interval(linear(1, 2*s), 0.2, 0.8)", 4, "rescale(0.7)") == (
        "from unicfg import Guidance\n"
        "from unicfg.guidance import mitigations\n"
        "from unicfg.guidance.schedules import interval, linear\n"
        "\n"
        "guidance = Guidance(interval(linear(1, 2 * 4.0), 0.2, 0.8), (mitigations.rescale(0.7),))\n"
    )
    assert as_python("s", 4) == "from unicfg import Guidance\n\nguidance = Guidance(4.0)\n"
    assert as_python("noise_interval(s, 1, inf)", 2, "tcfg + apg(0.0, inf)").splitlines() == [
        "from math import inf",
        "",
        "from unicfg import Guidance",
        "from unicfg.guidance import mitigations",
        "from unicfg.guidance.schedules import noise_interval",
        "",
        "guidance = Guidance(noise_interval(2.0, 1, inf), (mitigations.tcfg(), mitigations.apg(0.0, inf)))",
    ]


@pytest.mark.parametrize("scale", [*SCALES.values(), "s", "-s / 3 - -s", "1 - (s - 2)"])
@pytest.mark.parametrize("s", [3, -2.5, 1e-30])
@pytest.mark.parametrize("reins", ["", "tcfg", "rescale(7 / 10) + frequency_decoupled([1, 0.5])"])
def test_python_makes_the_same_guidance(scale, s, reins):
    found, expected = run(as_python(scale, s, reins)), read_guidance(scale, s, reins)
    assert repr(found) == repr(expected)
    assert found.scale == expected.scale
    assert found.mitigations == expected.mitigations


@given(nested, st.floats(-3, 12))
def test_python_of_any_expression_makes_the_same_guidance(text, s):
    assert repr(run(as_python(text, s))) == repr(read_guidance(text, s))


def test_python_guides_alike():
    pair = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    texts = ("interval(s, 0, 0.5)", 3.0, "frequency_decoupled([1, 0.5])")
    for progress in (0.25, 0.75):
        found = run(as_python(*texts)).combine(progress, *pair)
        assert torch.equal(found, read_guidance(*texts).combine(progress, *pair))


def test_python_is_made_of_texts_that_can_be_read_only():
    with pytest.raises(ValueError, match="scale"):
        as_python("s.x", 3.0)
    with pytest.raises(ValueError, match="mitigations"):
        as_python("s", 3.0, "tcfg.x")
    with pytest.raises(ValueError, match="s is inf"):
        as_python("s", math.inf)


def test_a_scale_of_text_serves_samplers_as_any_other():
    scale = read_scale("table([noise_interval(s, 0.5, inf), constant(1)])", 3.0)
    assert scale == table((noise_interval(3.0, 0.5, math.inf), constant(1)))
    fitted = schedules.at_levels(scale, [2.0, 0.1])
    assert [fitted(p) for p in (0.0, 1.0)] == [3.0, 1]
