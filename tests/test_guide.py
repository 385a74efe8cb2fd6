"""The formula: exact ends, algebra, masks, errors."""

import io
import math
import re
import tokenize
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicfg import Guidance, guide, scale_from_beta, scale_from_w

INF = math.inf
scales = st.floats(-20, 100, allow_nan=False)
seeds = st.integers(0, 2**20)


def outputs(
    seed: int, shape: tuple[int, ...] = (3, 7), dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return cond, uncond


def test_hand_computed_values():
    cond, uncond = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert guide(cond, uncond, 3.0).tolist() == [[4.0, 0.0, -5.0]]
    assert guide(cond, uncond, 0.5).tolist() == [[1.5, 0.0, 0.0]]
    assert guide(cond, uncond, -1.0).tolist() == [[0.0, 0.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
@given(seed=seeds)
def test_bit_exact_at_one_and_zero(dtype, as_tensor, seed):
    cond, uncond = outputs(seed, (2, 50), dtype)
    one, zero = (torch.ones(2), torch.zeros(2)) if as_tensor else (1.0, 0.0)
    assert torch.equal(guide(cond, uncond, one), cond)
    assert torch.equal(guide(cond, uncond, zero), uncond)


def test_the_naive_spelling_is_not_exact_so_lerp_is_needed():
    cond, uncond = outputs(0, (2, 1000))
    assert not torch.equal(uncond + 1.0 * (cond - uncond), cond)


@given(seed=seeds, s=scales)
def test_equals_the_formula_in_float64(seed, s):
    cond, uncond = outputs(seed, dtype=torch.float64)
    torch.testing.assert_close(guide(cond, uncond, s), uncond + s * (cond - uncond))


@given(seed=seeds, s=scales, scale=st.floats(-3, 3), shift=st.floats(-5, 5))
def test_commutes_with_affine_maps(seed, s, scale, shift):
    cond, uncond = outputs(seed, dtype=torch.float64)
    mapped = guide(scale * cond + shift, scale * uncond + shift, s)
    torch.testing.assert_close(mapped, scale * guide(cond, uncond, s) + shift, rtol=1e-9, atol=1e-9)


@given(seed=seeds, s=st.floats(-5, 15))
def test_logits_and_log_probabilities_give_one_distribution(seed, s):
    cond, uncond = outputs(seed, dtype=torch.float64)
    from_logits = guide(cond, uncond, s).softmax(-1)
    from_log_probs = guide(cond.log_softmax(-1), uncond.log_softmax(-1), s).softmax(-1)
    torch.testing.assert_close(from_logits, from_log_probs)


@given(seed=seeds)
def test_one_scale_a_sample(seed):
    cond, uncond = outputs(seed, (3, 4, 2, 2))
    s = torch.tensor([0.0, 1.0, 3.5])
    out = guide(cond, uncond, s)
    for i in range(3):
        torch.testing.assert_close(out[i], guide(cond[i], uncond[i], float(s[i])))


def test_documented_shapes_of_the_scale_all_work():
    cond, uncond = outputs(0, (3, 5, 7))
    expected = guide(cond, uncond, 2.0)
    for s in (2, torch.tensor(2.0), torch.full((3,), 2.0), torch.full((1,), 2.0)):
        torch.testing.assert_close(guide(cond, uncond, s), expected)
    for shape in ((3, 1, 1), (1, 5, 1), (3, 5, 7)):
        torch.testing.assert_close(guide(cond, uncond, torch.full(shape, 2.0)), expected)
    torch.testing.assert_close(
        guide(cond, uncond, torch.full((3,), 2.0, dtype=torch.float16)), expected
    )


def test_one_unconditional_row_serves_a_batch():
    cond, uncond = outputs(0, (3, 5))
    expected = torch.stack([guide(cond[i], uncond[0], 4.0) for i in range(3)])
    torch.testing.assert_close(guide(cond, uncond[:1], 4.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_combined_in_float32(dtype):
    cond, uncond = outputs(0, (2, 1000), dtype)
    out = guide(cond, uncond, 7.5)
    assert out.dtype == dtype
    assert torch.equal(out, guide(cond.float(), uncond.float(), 7.5).to(dtype))


def test_gradients_flow_to_both_outputs_and_the_scale():
    cond, uncond = (t.requires_grad_() for t in outputs(0, (2, 3), torch.float64))
    s = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(guide, (cond, uncond, s))


def test_gradients_are_finite_where_logits_are_masked():
    cond = torch.tensor([[1.0, -INF, 2.0, -INF]], requires_grad=True)
    uncond = torch.tensor([[0.5, 1.0, -INF, -INF]], requires_grad=True)
    guide(cond, uncond, 3.0)[0, [0, 2]].sum().backward()
    assert cond.grad is not None and uncond.grad is not None
    assert torch.isfinite(cond.grad).all() and torch.isfinite(uncond.grad).all()
    assert cond.grad.tolist() == [[3.0, 0.0, 1.0, 0.0]]


def test_masked_logits_follow_the_contract():
    cond = torch.tensor([[1.0, -INF, 2.0, -INF]])
    uncond = torch.tensor([[0.5, 1.0, -INF, -INF]])
    for s in (0.5, 1.0, 3.0, -2.0, torch.tensor([3.0])):
        out = guide(cond, uncond, s)[0]
        assert out[1] == -INF and out[3] == -INF  # masked in cond stays masked
        assert out[2] == 2.0  # masked only in uncond falls back to cond
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    assert torch.equal(guide(cond, uncond, torch.zeros(1)), uncond)


@given(
    seed=seeds,
    s=st.floats(allow_nan=False, allow_infinity=False),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_never_nan_or_plus_infinity(seed, s, dtype):
    cond, uncond = outputs(seed, (2, 20), dtype)
    generator = torch.Generator().manual_seed(seed)
    cond = cond.masked_fill(torch.rand(2, 20, generator=generator) < 0.3, -INF)
    uncond = uncond.masked_fill(torch.rand(2, 20, generator=generator) < 0.3, -INF)
    out = guide(cond, uncond, s)
    assert not out.isnan().any() and not out.isposinf().any()


def test_a_nan_in_an_output_is_not_hidden():
    cond, uncond = outputs(0)
    cond[0, 0] = math.nan
    assert guide(cond, uncond, 3.0)[0, 0].isnan()


@pytest.mark.parametrize("s", [math.nan, INF, -INF])
def test_a_scale_that_is_not_finite_is_refused(s):
    cond, uncond = outputs(0)
    with pytest.raises(ValueError, match=r"s is .*(nan|inf).*finite"):
        guide(cond, uncond, s)
    with pytest.raises(ValueError, match="finite"):
        guide(cond, uncond, torch.tensor([1.0, s, 2.0]))
    with pytest.raises(ValueError, match="finite"):
        Guidance(s)


def test_wrong_shapes_and_dtypes_are_refused_with_both_values():
    cond, uncond = outputs(0)
    with pytest.raises(ValueError, match=r"\(3, 7\).*\(3, 6\)"):
        guide(cond, uncond[:, :6], 2.0)
    with pytest.raises(ValueError, match=r"\(6, 7\).*\(3, 7\)"):
        guide(torch.cat([cond, uncond]), uncond, 2.0)  # a doubled batch is no output
    with pytest.raises(TypeError, match=r"float32.*float64"):
        guide(cond, uncond.double(), 2.0)
    with pytest.raises(TypeError, match="int64"):
        guide(cond.long(), uncond, 2.0)
    with pytest.raises(ValueError, match=r"2 values for a batch of 3"):
        guide(cond, uncond, torch.ones(2))
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        guide(cond, uncond, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"meta.*cpu|cpu.*meta"):
        guide(cond, uncond.to("meta"), 2.0)


def test_inputs_are_left_alone():
    cond, uncond = outputs(0)
    before = cond.clone(), uncond.clone()
    guide(cond, uncond, 5.0).add_(1)
    assert torch.equal(cond, before[0]) and torch.equal(uncond, before[1])


def test_conversions_from_other_conventions():
    assert scale_from_w(0.0) == 1.0 and scale_from_w(2.5) == 3.5
    assert scale_from_beta(0.25) == 4.0
    assert scale_from_w(torch.tensor([1.0, 2.0])).tolist() == [2.0, 3.0]
    cond, uncond = outputs(0, dtype=torch.float64)
    torch.testing.assert_close(
        guide(cond, uncond, scale_from_w(2.0)), (1 + 2.0) * cond - 2.0 * uncond
    )
    with pytest.raises(ValueError, match="beta is 0"):
        scale_from_beta(0)


OUTPUT = r"[\w.]*(?:cond|uncond|null|_c|_u|\bc|\bu)\w*"
FORMULAS = re.compile(
    r"lerp\s*\("  # any lerp at all
    rf"|\(\s*{OUTPUT}\s*-\s*{OUTPUT}\s*\)\s*\*"  # (c - u) * s
    rf"|\*\s*\(\s*{OUTPUT}\s*-\s*{OUTPUT}\s*\)"  # s * (c - u)
    rf"|\(\s*1(?:\.0)?\s*[-+]\s*\w+\s*\)\s*\*\s*{OUTPUT}"  # (1 - s) * u, (1 + w) * c
    rf"|{OUTPUT}\s*\*\s*\(\s*1(?:\.0)?\s*[-+]\s*\w+\s*\)"
)


def code_of(source: str) -> str:
    """Source without comments and strings, one logical line a line."""
    ignored = (tokenize.COMMENT, tokenize.STRING, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(t.string for t in tokens if t.type not in ignored)


@pytest.mark.parametrize(
    "line",
    [
        "out = u + s * (c - u)",
        "out = uncond_out + (cond_out - uncond_out) * s",
        "x = logits_u + s * (logits_c - logits_u)",
        "x = s * cond + (1 - s) * uncond",
        "x = (1 + w) * c - w * u",
        "x = torch.lerp(a, b, s)",
        "x = null.lerp(cond, s)",
    ],
)
def test_the_search_for_the_formula_finds_its_spellings(line):
    assert FORMULAS.search(code_of(line + "\n"))


def test_the_formula_stands_once():
    """No second spelling of the formula anywhere in the library."""
    root = Path(__file__).parent.parent
    found = []
    for package in ("unicfg", "tokenizers_vq", "models"):
        for file in (root / package).rglob("*.py"):
            found += [file.name] * len(FORMULAS.findall(code_of(file.read_text())))
    assert found == ["core.py"]


@given(
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=8, max_size=8),
    s=st.floats(allow_nan=False, allow_infinity=False),
)
def test_extreme_values_and_scales_stay_finite_and_exact_at_the_ends(values, s):
    cond, uncond = torch.tensor(values).view(2, 1, 4)
    assert torch.equal(guide(cond, uncond, 1.0), cond)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    if s not in (0.0, 1.0):
        out = guide(cond, uncond, s)
        assert not out.isnan().any() and not out.isposinf().any()
