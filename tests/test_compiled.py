"""The compiled step draws what the eager one draws, is compiled once, sees new weights, and is optional."""

import gc
import shutil
import warnings
import weakref

import pytest
import torch
from tiny import wrapped_transformer as wrapped

from models import HybridTransformer, HybridTransformerConfig, compiled
from unicfg import ConditionDropout, Guidance, sample_autoregressive, sample_hybrid
from unicfg.guidance import mitigations, schedules
from unicfg.sampling.autoregressive import Uncached
from unicfg.sampling.soundness import Watch

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(autouse=True)
def _quiet():
    """What the compiler of torch warns of is not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield


@pytest.fixture
def quick(monkeypatch):
    """Without the search for the fastest kernels, which takes most of the compiler's time."""
    monkeypatch.setitem(compiled._OPTIONS, "max_autotune", False)


@pytest.fixture
def graphs(monkeypatch):
    """How often the compiler was called."""
    import torch._inductor

    made, own = [], torch._inductor.compile
    monkeypatch.setattr(
        torch._inductor, "compile", lambda *args, **options: made.append(1) or own(*args, **options)
    )
    return lambda: len(made)


def draw(model, cond, compile, s=3.0, **options):
    return sample_autoregressive(
        model,
        cond,
        guidance=s if isinstance(s, Guidance) else Guidance(s),
        seeds=range(len(cond)),
        compile=compile,
        **options,
    )


@needs_compiler
def test_the_same_tokens_and_compiled_once(quick, graphs):
    model = wrapped()
    length = model.model.config.condition_length
    prompts = torch.randint(0, 8, (3, 2, length), generator=torch.Generator().manual_seed(0))
    first = draw(model, prompts[0], True)
    assert torch.equal(first, draw(model, prompts[0], False))
    made = graphs()
    for cond in prompts[1:]:  # other prompts, other numbers of samples seen so far
        assert torch.equal(draw(model, cond, True), draw(model, cond, False))
    assert graphs() == made
    # an interval that opens late: a chunk is caught up as it is, and only the steps of the cond rows are new
    late = Guidance(schedules.interval(3.0, 0.4, 0.8))
    assert torch.equal(draw(model, prompts[0], True, late), draw(model, prompts[0], False, late))
    assert graphs() == made + 1
    with torch.no_grad():
        model.model.head.weight.data.neg_()  # past the version counters of autograd
    assert torch.equal(draw(model, prompts[0], True), draw(model, prompts[0], False))
    assert not torch.equal(draw(model, prompts[0], True), first)
    # the same numbers in another order, whose sums are exact
    rounded = (8 * model.model.head.weight.data).round() / 8
    for weight in (rounded, rounded.flip(0)):
        model.model.head.weight.data = weight
        assert torch.equal(draw(model, prompts[0], True), draw(model, prompts[0], False))


@needs_compiler
def test_two_networks_keep_apart(quick):
    models = [wrapped(), wrapped()]
    with torch.no_grad():
        models[1].model.head.weight.neg_()
    cond = torch.zeros(1, models[0].model.config.condition_length, dtype=torch.long)
    for _ in range(2):
        for model in models:
            assert torch.equal(draw(model, cond, True, 1.0), draw(model, cond, False, 1.0))


def hybrid():
    torch.manual_seed(0)
    network = HybridTransformer(HybridTransformerConfig(2, 8, 3, 32, 2, 2, latent_channels=3))
    for parameter in network.head.parameters():  # some of which are 0 before training
        torch.nn.init.normal_(parameter, std=0.2)
    return ConditionDropout(network, torch.zeros(3, dtype=torch.long)).eval()


@needs_compiler
def test_a_hybrid_decodes_and_draws_with_it(quick, graphs, monkeypatch):
    monkeypatch.setattr("models.hybrid._STRETCH", 2)
    model, cond = hybrid(), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def check(new, **options):
        """Close to eager, with so many compilations more."""
        made = graphs()
        drawn = [
            sample_hybrid(model, cond, seeds=[0, 1], compile=compile, **{"steps": 4, **options})
            for compile in (False, True)
        ]
        torch.testing.assert_close(drawn[1], drawn[0], atol=1e-3, rtol=1e-3)
        assert graphs() - made == new
        return drawn[1]

    first = check(2, guidance=Guidance(3.0))  # the decode step and the walk of the head
    each = check(0, guidance=Guidance(torch.tensor([3.0, 1.5])))
    assert torch.equal(each[0], first[0]) and not torch.allclose(each[1], first[1])
    check(0, guidance=Guidance(2.0), guide_at="both", temperature=0.5)
    check(2, guidance=Guidance(schedules.interval(3.0, 0.4, 1.0)))  # rows of cond alone
    check(0, guidance=Guidance(3.0), guide_at="states")
    check(1, guidance=Guidance(3.0), steps=3)  # one step in a call, not two
    # more than the walk does
    check(0, guidance=Guidance(3.0, (mitigations.rescale(0.7),)))
    check(0, guidance=Guidance(3.0), solver="heun")
    with torch.no_grad():
        model.model.head.outputs.weight.data.neg_()
    changed = check(2, guidance=Guidance(3.0))
    assert not torch.allclose(changed, first)


def test_a_broken_head_is_found_in_the_end_where_looking_would_wait(monkeypatch):
    """As on a GPU: the same latents, and an error that names the first token that is broken."""
    model, cond = hybrid(), torch.ones(1, 3, dtype=torch.long)
    options = {"seeds": [0], "guidance": Guidance(2.0), "steps": 2}
    own = sample_hybrid(model, cond, **options)
    monkeypatch.setattr(
        "unicfg.sampling.hybrid.Watch", lambda _, *rule: Watch(torch.device("cuda"), *rule)
    )
    assert torch.equal(sample_hybrid(model, cond, **options), own)
    model.model.start.data[0] = float("nan")  # which the first token sees, and so all others
    with pytest.raises(
        FloatingPointError, match="the latents are not finite after the last step of token 0"
    ):
        sample_hybrid(model, cond, **options)


@needs_compiler
def test_a_broken_head_is_named_as_without_it(quick):
    model, cond = hybrid(), torch.ones(1, 3, dtype=torch.long)
    model.model.head.outputs.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 0 of token 0.*'cond', 'uncond'"):
        sample_hybrid(model, cond, seeds=[0], compile=True, guidance=Guidance(2.0), steps=1)


@needs_compiler
def test_another_dtype_and_many_rows_are_compiled_for_themselves(quick, graphs):
    model = wrapped()
    model.half().float()  # so that the numbers stay the same in half precision
    cond = torch.zeros(9, model.model.config.condition_length, dtype=torch.long)
    for dtype in (torch.float32, torch.float16):
        model.to(dtype)
        made = graphs()
        ids = draw(model, cond, True, 1.0)
        assert graphs() == made + 1 and ids.shape == (9, 16)
        if dtype == torch.float32:
            assert torch.equal(ids, draw(model, cond, False, 1.0))


@needs_compiler
def test_what_is_kept_keeps_neither_the_network_nor_its_weights_alive(quick):
    from torch._inductor.codecache import PyCodeCache

    model = wrapped()
    cond = torch.zeros(1, model.model.config.condition_length, dtype=torch.long)
    known = len(PyCodeCache.modules)
    draw(model, cond, True, 1.0)
    assert len(PyCodeCache.modules) == known + 1
    with torch.no_grad():
        model.model.head.weight.neg_()
    draw(model, cond, True, 1.0)
    gc.collect()
    assert len(PyCodeCache.modules) == known + 1  # that of the old weights is gone
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None and len(PyCodeCache.modules) == known


@needs_compiler
def test_kinds_that_were_not_called_for_long_are_forgotten(quick, graphs, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_KINDS", 2)
    model = wrapped()

    def run(rows):
        cond = torch.zeros(rows, model.model.config.condition_length, dtype=torch.long)
        made = graphs()
        assert torch.equal(draw(model, cond, True, 1.0), draw(model, cond, False, 1.0))
        return graphs() - made

    from torch._inductor.codecache import PyCodeCache

    made, held = [], []
    gc.collect()
    for rows in (1, 2, 1, 3, 1, 2):
        made.append(run(rows))
        held.append(len(PyCodeCache.modules))  # which hold the weights
    assert made == [1, 1, 0, 1, 0, 1]
    assert held[0] < held[1] == held[2] == held[3] == held[4] == held[5]


@needs_compiler
def test_a_kind_that_cannot_be_compiled_leaves_the_others(quick, monkeypatch):
    model = wrapped()
    one, two = (
        torch.zeros(rows, model.model.config.condition_length, dtype=torch.long) for rows in (1, 2)
    )
    draw(model, one, True, 1.0)

    def broken(*args, **options):
        raise RuntimeError("not this one")

    monkeypatch.setattr("torch._inductor.compile", broken)
    with pytest.warns(UserWarning, match="not this one"):
        draw(model, two, True, 1.0)
    draw(model, two, True, 1.0)  # no second warning
    step = compiled.compiled_method(model.model, "step")
    assert not step.failed and torch.equal(
        draw(model, one, True, 1.0), draw(model, one, False, 1.0)
    )


def test_a_full_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("torch._inductor.compile", full)
    model = wrapped()
    cond = torch.zeros(1, model.model.config.condition_length, dtype=torch.long)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            draw(model, cond, True)


def test_without_a_compiler_it_runs_as_it_is_and_says_so_once(monkeypatch):
    def missing(*args, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile", missing)
    model = wrapped()
    cond = torch.zeros(1, model.model.config.condition_length, dtype=torch.long)
    with pytest.warns(
        UserWarning, match="compile=True, but step of TokenTransformer .* no compiler here"
    ) as told:
        ids = draw(model, cond, True)
        again = draw(model, cond, True)
    assert len(told) == 1
    assert torch.equal(ids, draw(model, cond, False)) and torch.equal(again, ids)


def test_a_model_without_a_compiled_step_is_named():
    model = Uncached(lambda ids, cond: torch.zeros(len(ids), 5), 4)
    cond = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(TypeError, match="compile is True, and make_cache of Uncached"):
        draw(model, cond, True, uncond=cond[0])


def test_there_is_no_step_to_compile_in_the_masked_order():
    config = HybridTransformerConfig(2, 8, 3, 32, 2, 2, latent_channels=3, order="masked")
    model = ConditionDropout(HybridTransformer(config), torch.zeros(3, dtype=torch.long)).eval()
    with pytest.raises(ValueError, match="compile is True with a model of the order 'masked'"):
        sample_hybrid(model, torch.ones(1, 3, dtype=torch.long), seeds=[0], compile=True)
