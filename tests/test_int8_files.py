"""Weights on disk as 8-bit integers: how far they are off, what is read back, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import pipeline

from models import TextToImage
from tokenizers_vq import VQTokenizer
from tokenizers_vq.files import load_tensors, read_tensors, write_atomically
from tokenizers_vq.int8 import SCALE, SMALLEST, from_int8, to_int8
from unicfg import Guidance


@given(
    st.integers(0, 2**31),
    st.sampled_from([(64, 64), (2, 2048), (4096, 1), (32, 16, 3, 3)]),
    st.floats(1e-6, 1e6),
)
def test_each_weight_is_off_by_half_a_step_of_its_row_at_most(seed, shape, size):
    generator = torch.Generator().manual_seed(seed)
    weights = size * torch.randn(shape, generator=generator)
    weights[0] = 0.0
    packed = to_int8({"w": weights})
    assert packed["w"].dtype == torch.int8
    again = from_int8(packed, {"w"})["w"]
    assert torch.equal(again[0], weights[0])
    most = weights.abs().flatten(1).amax(1) / 254
    off = (again - weights).abs().flatten(1).amax(1)
    assert (off <= most * (1 + 1e-4)).all()
    assert packed["w"].abs().max() <= 127
    # what has been rounded once stays: loading and saving again changes nothing
    assert torch.equal(from_int8(to_int8({"w": again}), {"w"})["w"], again)


def test_small_tensors_and_single_rows_are_halves_and_integers_stay():
    state = {
        "bias": torch.randn(2 * SMALLEST),
        "small": torch.randn(8, 8),
        "codebook": torch.randn(1, 512, 16),
        "count": torch.arange(5),
    }
    packed = to_int8(state)
    assert packed.keys() == state.keys()
    assert [packed[k].dtype for k in state] == [torch.float16] * 3 + [torch.int64]


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        to_int8({"w": torch.full((64, 64), torch.inf)})
    with pytest.raises(ValueError, match="bias holds NaN or infinity"):
        to_int8({"bias": torch.tensor([0.0, torch.nan])})
    with pytest.raises(ValueError, match="bias reaches 70000, expected at most 65504"):
        to_int8({"bias": torch.tensor([0.0, 70000.0])})
    with pytest.raises(
        ValueError, match=r"dtype is torch\.uint8, expected None, torch\.int8 or one"
    ):
        pipeline().save_pretrained("nowhere", dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"w\.scale is a weight"):
        to_int8({"w": torch.randn(64, 64), "w" + SCALE: torch.ones(1)})


def test_a_pipeline_is_a_quarter_of_its_size_and_draws_nearly_the_same(tmp_path):
    pipe = TextToImage.from_pretrained("shapes", "flow")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # shipped weights are such integers already
        for p in (*pipe.network.parameters(), *pipe.tokenizer.parameters()):
            p *= 1 + 0.01 * torch.randn(p.shape, generator=generator)
    for dtype in (torch.float32, torch.int8):
        pipe.save_pretrained(tmp_path / str(dtype), dtype=dtype)
    whole, small = (
        sum(f.stat().st_size for f in (tmp_path / str(d)).rglob("*.safetensors"))
        for d in (torch.float32, torch.int8)
    )
    assert small < whole / 3.7
    again = TextToImage.from_pretrained(tmp_path / "torch.int8", "flow")
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    options = {"guidance": Guidance(2.0), "seeds": [0, 1]}
    a, b = (own.sample(["a red circle", "a blue square"], **options) for own in (pipe, again))
    assert 0 < (a - b).square().mean() < 0.02
    # read and written once more it is the same file
    again.save_pretrained(tmp_path / "again", dtype=torch.int8)
    for file in ("flow/model.safetensors", "tokenizer/model.safetensors"):
        first, second = (
            read_tensors(tmp_path / folder / file)[0] for folder in ("torch.int8", "again")
        )
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


def test_a_tokenizer_alone_reads_them(tmp_path):
    pipeline().save_pretrained(tmp_path, dtype=torch.int8)
    assert VQTokenizer.from_pretrained(tmp_path / "tokenizer").latent_mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w" + SCALE: torch.ones(64)}, r"w\.scale is F32 of shape \(64,\), expected F32"),
        ({"w" + SCALE: torch.ones(64, 1).half()}, r"w\.scale is F16 of shape \(64, 1\)"),
        ({"w": torch.ones(32, 64, dtype=torch.int8)}, r"w\.scale is F32 .* expected .*\(32, 1\)"),
        ({"w": torch.tensor(1, dtype=torch.int8)}, r"unexpected keys \['w\.scale'\]"),
        ({"w": torch.ones(64, 64)}, r"unexpected keys \['w\.scale'\]"),
        ({"other" + SCALE: torch.ones(64, 1)}, r"unexpected keys \['other\.scale'\]"),
    ],
)
def test_scales_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, change, match):
    file = tmp_path / "x.safetensors"
    expected = {"w": torch.zeros(64, 64)}
    packed = to_int8({"w": torch.randn(64, 64)})
    write_atomically(packed, file, {})
    assert load_tensors(file, expected, "x").keys() == {"w"}
    write_atomically(packed | change, file, {})
    with pytest.raises(ValueError, match=match):
        load_tensors(file, expected, "x")


def test_a_weight_that_is_called_scale_is_itself(tmp_path):
    file = tmp_path / "x.safetensors"
    state = {"w": torch.randn(2, 2), "w" + SCALE: torch.randn(2, 1)}
    write_atomically(state, file, {})
    again = load_tensors(file, state, "x")
    assert all(torch.equal(again[name], state[name]) for name in state)
    write_atomically(state | {"w": torch.ones(2, 2, dtype=torch.int8)}, file, {})
    with pytest.raises(ValueError, match="w is I8, x expects"):
        load_tensors(file, state, "x")
