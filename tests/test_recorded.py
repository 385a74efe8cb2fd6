"""On a GPU the step is recorded and its blocks are fused: both compute what the step in eager mode does."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import transformer, wrapped_transformer

from models import HybridTransformer, HybridTransformerConfig, compiled, fused, recorded
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
    assert fused.can_fuse(transformer().cuda().body.blocks)
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


class Double:
    """A recording that calls what it has recorded: it runs on a CPU, and shares all that decides which one is taken."""

    made = 0

    def __init__(self, method, arguments, stream):
        Double.made += 1
        own = [part.clone() if isinstance(part, torch.Tensor) else part for part in arguments]
        self.method, self.own = method, own
        self.addresses = {p.data_ptr() for part in own if isinstance(part, tuple) for p in part}
        self.out = method(*own)

    def __call__(self, arguments):
        for held, given in zip(self.own, arguments, strict=True):
            if isinstance(given, torch.Tensor):
                held.copy_(given)
        self.out.copy_(self.method(*self.own))
        return self.out.clone()


@pytest.fixture
def on_a_double(monkeypatch):
    """As if the CPU were a GPU whose recordings are doubles; counts them."""
    monkeypatch.setattr(recorded, "_Recording", Double)
    monkeypatch.setattr(recorded, "_most_bytes", lambda device: 1 << 28)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(compiled, "CompiledMethod", RecordedMethod)
    monkeypatch.setattr(compiled, "_checksum", compiled._addresses)
    monkeypatch.setattr(Double, "made", 0)
    monkeypatch.setattr(fused, "_given_up", False)
    return lambda: Double.made


SCHEDULED = schedules.interval(3.0, 0.4, 0.8)


@pytest.mark.parametrize(("scale", "recordings"), [(1.0, 1), (3.0, 1), (SCHEDULED, 2)])
def test_a_sampling_finds_the_recordings_of_the_one_before(on_a_double, scale, recordings):
    model, cond = wrapped_transformer(grid=6), torch.randint(1, 12, (2, 3))
    wanted = draw(model, cond, Guidance(scale), False)
    for _ in range(3):
        assert torch.equal(draw(model, cond, Guidance(scale), True), wanted)
        assert on_a_double() == recordings


def test_a_sampling_within_another_has_memory_of_its_own(on_a_double):
    model, cond = wrapped_transformer(grid=6), torch.randint(1, 12, (2, 3))
    wanted, inner = draw(model, cond, Guidance(3.0), False), []

    def callback(step):
        if step.index == 5:
            inner.append(draw(model, cond, Guidance(3.0), True))

    options = {"guidance": Guidance(3.0), "seeds": range(2), "compile": True}
    assert torch.equal(sample_autoregressive(model, cond, callback=callback, **options), wanted)
    assert torch.equal(inner[0], wanted)
    assert on_a_double() == 2


def test_the_mode_of_a_sampling_does_not_stick_to_its_memory(on_a_double):
    model, cond = wrapped_transformer(), torch.randint(1, 12, (2, 3))
    wanted = draw(model, cond, Guidance(3.0), False)
    with torch.inference_mode():
        draw(model, cond, Guidance(3.0), True)
    step = compiled.compiled_method(model.model, "step")
    cache = model.model.make_cache(2, compile=True)
    with torch.enable_grad():
        model.model.prefill(cond, cache)
        assert not model.model.decode(cond[:, :0], cache).requires_grad
    del cache
    gc.collect()
    assert torch.equal(draw(model, cond, Guidance(3.0), True), wanted)
    for memory in list(step._memories):
        parts, _lease = step.take(len(memory.parts), memory.parts[0].shape, memory.parts[0])
        assert parts is memory.parts
        assert not any(part.requires_grad or part.is_inference() for part in parts)


def test_what_cannot_be_recorded_runs_as_it_is_with_a_warning(on_a_double, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded, "_Recording", fail)
    model, cond = wrapped_transformer(), torch.randint(1, 12, (2, 3))
    wanted = draw(model, cond, Guidance(3.0), False)
    monkeypatch.setattr(fused, "_given_up", True)
    with pytest.warns(UserWarning, match="cannot be recorded here.*not permitted"):
        assert torch.equal(draw(model, cond, Guidance(3.0), True), wanted)
    assert torch.equal(draw(model, cond, Guidance(3.0), True), wanted)  # and says it once


def test_where_triton_does_not_work_the_step_is_recorded_without_it(on_a_double, monkeypatch):
    def broken(*arguments):
        if not fused._given_up:
            raise RuntimeError("Failed to find C compiler")
        return Double(*arguments)

    monkeypatch.setattr(recorded, "_Recording", broken)
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    model, cond = wrapped_transformer(), torch.randint(1, 12, (2, 3))
    wanted = draw(model, cond, Guidance(3.0), False)
    with pytest.warns(UserWarning, match="recorded without fused kernels: Failed to find C"):
        assert torch.equal(draw(model, cond, Guidance(3.0), True), wanted)
    assert on_a_double() == 1 and not fused.can_fuse(model.model.body.blocks)


def test_a_full_device_is_cleared_once(on_a_double, monkeypatch):
    cleared, tries = [], []

    def full(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError
        return Double(*arguments)

    monkeypatch.setattr(recorded, "_Recording", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(1))
    model, cond = wrapped_transformer(), torch.randint(1, 12, (2, 3))
    draw(model, cond, Guidance(3.0), True)
    assert cleared == [1] and len(tries) == 2


def test_memory_is_lent_to_one_at_a_time_and_comes_back_empty(on_a_double, monkeypatch):
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


def test_memory_that_is_not_kept_takes_its_recordings_along(on_a_double, monkeypatch):
    monkeypatch.setattr(recorded, "_most_bytes", lambda device: 3 * 2 * 48)
    method = RecordedMethod(torch.nn.Linear(2, 2), "forward")
    like = torch.ones(1)
    small, lease = method.take(2, (3, 4), like)
    method._held["of small"] = SimpleNamespace(addresses={small[0].data_ptr()})
    method._held["of nothing"] = SimpleNamespace(addresses=set())
    del lease
    large, kept = method.take(2, (300, 4), like)
    del kept
    assert list(method._held) == ["of nothing"]
    assert method.take(2, (300, 4), like)[0] is not large  # too large to be kept
    assert not method._memories


@pytest.mark.parametrize("change", ["bias", "norm", "forward", "hook", "double", "int8"])
def test_blocks_that_the_kernels_do_not_compute_are_not_fused(change, monkeypatch):
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    network = transformer()
    assert fused.can_fuse(network.body.blocks)
    block = network.body.blocks[1]
    if change == "bias":
        block.qkv = torch.nn.Linear(32, 96)
    elif change == "norm":
        block.norm1 = torch.nn.LayerNorm(32)
    elif change == "forward":
        block.forward = lambda *arguments: arguments[0]
    elif change == "hook":
        block.down.register_forward_hook(lambda *arguments: None)
    elif change == "double":
        network.double()
    else:
        pytest.importorskip("torchao")
        from models.quantized import quantize

        network = quantize(network)
    assert not fused.can_fuse(network.body.blocks)


def compare_blocks(rows, device, dtype=torch.float32, steps=None, **sizes):
    """The largest relative error of the states of each token, where the cache holds NaN in places that are not filled."""
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
