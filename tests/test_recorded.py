"""On a GPU the step is recorded and its blocks are fused: both compute what the step in eager mode does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import transformer, wrapped_transformer

from models import HybridTransformer, HybridTransformerConfig, recorded
from models.compiled import compiled_method
from models.recorded import RecordedMethod
from unicfg import ConditionDropout, Guidance, sample_autoregressive, sample_hybrid
from unicfg.guidance import schedules

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(model, cond, guidance, compile):
    return sample_autoregressive(
        model, cond, guidance=guidance, seeds=range(len(cond)), compile=compile
    )


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 3.0, schedules.interval(3.0, 0.4, 0.8)])
def test_a_recorded_step_draws_what_eager_mode_does(rows, scale):
    model = wrapped_transformer(condition_length=3, grid=6).cuda()
    cond = torch.randint(1, 12, (rows, 3), device="cuda")
    wanted = draw(model, cond, Guidance(scale), False)
    for _ in range(2):
        drawn = draw(model, cond, Guidance(scale), True)
        assert (drawn == wanted).float().mean() > 0.9  # rounding may flip a rare tie


@pytest.mark.gpu
@on_gpu
def test_a_hybrid_is_recorded_with_its_head():
    torch.manual_seed(0)
    config = HybridTransformerConfig(
        grid=4, condition_vocabulary=12, condition_length=3, width=32, depth=2, heads=2
    )
    network = HybridTransformer(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = ConditionDropout(network, torch.zeros(3, dtype=torch.long)).eval().cuda()
    cond = torch.randint(1, 12, (3, 3), device="cuda")
    options = {"guidance": Guidance(2.0), "seeds": range(3), "solver": "ddim"}
    wanted = sample_hybrid(model, cond, **options)
    drawn = sample_hybrid(model, cond, compile=True, **options)
    torch.testing.assert_close(drawn, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@on_gpu
def test_samplings_of_one_size_share_a_recording_and_see_weights_that_change_in_place():
    model = wrapped_transformer().cuda()
    cond = torch.randint(1, 12, (2, 3), device="cuda")
    first = draw(model, cond, Guidance(3.0), True)
    step = compiled_method(model.model, "step")
    assert isinstance(step, RecordedMethod) and len(step._held) == 1
    assert torch.equal(draw(model, cond, Guidance(3.0), True), first)
    assert compiled_method(model.model, "step") is step and len(step._held) == 1
    with torch.no_grad():
        model.model.head.weight.neg_()
    after = draw(model, cond, Guidance(3.0), True)
    assert compiled_method(model.model, "step") is step
    assert not torch.equal(after, first)
    assert (after == draw(model, cond, Guidance(3.0), False)).float().mean() > 0.9
    model.model.double()  # other memory: what was recorded reads what is no longer there
    draw(model, cond, Guidance(3.0), True)
    assert compiled_method(model.model, "step") is not step


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
def test_fused_blocks_are_the_blocks(rows, dtype):
    worst = compare_blocks(rows, "cuda", dtype, grid=12, width=96, heads=3)
    assert worst < (1e-4 if dtype == torch.float32 else 0.05)


def test_fused_blocks_are_the_blocks_by_interpretation():
    """The kernels run on a CPU, line by line, where Triton is installed."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = [sys.executable, str(Path(__file__)), "interpret"]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 3
    assert max(map(float, ran.stdout.split())) < 1e-4


def test_memory_is_lent_to_one_at_a_time_and_comes_back_empty(monkeypatch):
    method = RecordedMethod(torch.nn.Linear(2, 2), "forward")
    like = torch.ones(1)
    first, lease = method.take(2, (3, 4), like)
    second, _other = method.take(2, (3, 4), like)
    assert len(first) == 2 and first[0].shape == (3, 4) and first[0] is not second[0]
    first[1].fill_(torch.nan)
    second[0].fill_(7.0)
    del lease
    again, _lease = method.take(2, (3, 4), like)
    assert again is first and not again[1].any()
    assert method.take(2, (3, 4), like)[0] is not second and second[0].eq(7).all()
    assert method.take(2, (3, 5), like)[0][0].shape == (3, 5)
    assert method.take(2, (3, 4), like.double())[0][0].dtype == torch.float64
    monkeypatch.setattr(recorded, "_MOST_BYTES", 3 * 96)
    large, kept = method.take(2, (300, 4), like)
    del kept
    assert method.take(2, (300, 4), like)[0] is not large  # too large to be kept
    assert sum(part.nbytes for own, _ in method._memories for part in own) <= 3 * 96


def compare_blocks(rows, device, dtype=torch.float32, steps=None, **sizes):
    """The largest relative error of the states of each token, where the cache holds NaN in places that are not filled."""
    from models import fused

    model = transformer(**sizes).to(device, dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    prefix, heads = model.config.condition_length, model.config.heads
    cond = torch.randint(0, 12, (rows, prefix), device=device)
    ids = torch.randint(0, 24, (rows, model.num_tokens), device=device)
    worst = 0.0
    with torch.no_grad():
        caches = [model.make_cache(rows) for _ in range(2)]
        for cache in caches:
            model.prefill(cond, cache)
        for part in (*caches[1].keys, *caches[1].values):
            part[:, :, prefix:] = torch.nan
        for n in range(steps or model.num_tokens - 1):
            wanted = model.decode(ids[:, :n], caches[0])
            embedded = model.embedding(ids[:, n - 1]) if n else model.start.expand(rows, -1)
            x = (embedded + model.body.positions()[n]).contiguous()
            place = torch.tensor(n, device=device)
            keys, values = caches[1].keys, caches[1].values
            out = fused.run_blocks(model.body.blocks, x, place, keys, values, prefix)
            error = (model.head(model.body.norm(out)) - wanted).abs().max() / wanted.abs().max()
            worst = max(worst, float(error))
            assert worst == worst, f"NaN at token {n} of {heads} heads"
    return worst


if __name__ == "__main__":
    print(compare_blocks(2, "cpu", grid=3))
    print(compare_blocks(3, "cpu", grid=3, width=24, heads=2, depth=1))
    print(compare_blocks(1, "cpu", grid=12, steps=4, width=16, heads=2, depth=1))
