"""One guided call of any model: any condition, any output, against separate passes and by hand."""

import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unicfg import Branch, ConditionDropout, Guidance, guide, guided_call
from unicfg.guidance import branches, mitigations, schedules
from unicfg.guidance.spaces import Level

ROOT = Path(__file__).parent.parent
B, T, D, C = 3, 4, 5, 6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many calls on tiny tensors: a second thread takes longer to join than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Embedded(NamedTuple):
    embeddings: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    text: Embedded
    size: torch.Tensor


def draw(seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, 9, (batch, T), generator=generator)
    mask = torch.rand(batch, T, generator=generator) < 0.6
    mask[:, 0] = True
    return normal, ids, mask


def conditions(seed=0, batch=B):
    """Of every kind, each with a null condition of its structure."""
    normal, ids, mask = draw(seed, batch)
    embedded, null_mask = normal(batch, T, D), torch.tensor([True, False, False, False])
    null = draw(99)[0](T, D)
    tuples = (embedded, mask), (null, null_mask)
    named = Embedded(*tuples[0]), Embedded(*tuples[1])
    size = (normal(batch, 2), torch.zeros(2, dtype=torch.float64))
    return {
        "token ids": (ids, torch.zeros(T, dtype=torch.long)),
        "class": (ids[:, 0], torch.tensor(8)),
        "embeddings with a mask": tuples,
        "list": (list(tuples[0]), list(tuples[1])),
        "dict": ({"ids": ids, "mask": mask}, {"mask": null_mask, "ids": torch.zeros_like(ids[0])}),
        "named tuple": named,
        "named tuple, null a tuple": (named[0], tuples[1]),
        "nested": (
            {"text": tuples[0], "more": [{"size": size[0]}, ids]},
            {"text": tuples[1], "more": [{"size": size[1]}, ids[0] * 0]},
        ),
        "dataclass": (Prompt(named[0], size[0]), Prompt(named[1], size[1])),
    }


KINDS = list(conditions())


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Prompt):
        return tensors([tree.text, tree.size])
    values = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree
    return [leaf for value in values for leaf in tensors(value)]


class Model(nn.Module):
    """Not ours: x (R, C) plus a number for each condition, not linear in it; notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.rows, self.conds, self.rest = [], [], []
        self.eval()

    def forward(self, x, cond, *rest):
        leaves = tensors(cond)
        self.rows.append(len(leaves[0]))
        self.conds.append(cond)
        self.rest.append(rest)
        own = sum(
            (i + 2.0) * leaf.double().flatten(1).sum(1)
            for i, leaf in enumerate(leaves)
            if leaf.ndim > 1
        )
        own = own + sum(leaf.double() for leaf in leaves if leaf.ndim == 1)
        assert all(len(leaf) == len(x) for leaf in leaves)
        shift = sum(
            value.double().flatten(1).sum(1)
            for value in rest
            if isinstance(value, torch.Tensor) and value.ndim > 1
        )
        return (x * (0.1 * own + shift)[:, None]).tanh() + own[:, None].cos()


def repeated(null, batch=B):
    """A null condition as a batch, by hand."""
    if isinstance(null, torch.Tensor):
        return torch.stack([null] * batch)
    if isinstance(null, Prompt):
        return Prompt(repeated(null.text, batch), repeated(null.size, batch))
    if isinstance(null, dict):
        return {key: repeated(value, batch) for key, value in null.items()}
    items = [repeated(value, batch) for value in null]
    return type(null)(*items) if isinstance(null, Embedded) else type(null)(items)


X = draw(5)[0](B, C)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [-1.0, 0.0, 0.5, 1.0, 3.0, "each its own", "ramp"])
def test_it_is_the_formula_on_two_separate_passes(kind, s):
    cond, null = conditions()[kind]
    guidance = {
        "each its own": Guidance(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
        "ramp": Guidance(schedules.linear(1, 5)),
    }.get(s) or Guidance(s)
    model = Model()
    out = guided_call(model, cond, null, guidance, 0.75, inputs=(X,))
    cond_out, uncond_out = Model()(X, cond), Model()(X, repeated(null))
    torch.testing.assert_close(out, guide(cond_out, uncond_out, guidance.scale_at(0.75)))
    assert not torch.allclose(cond_out, uncond_out)
    assert model.rows == [B if s in (0.0, 1.0) else 2 * B]
    assert type(model.conds[0]) is type(cond)
    # the condition first
    for leaf, own in zip(
        tensors(model.conds[0]), tensors(repeated(null) if s == 0 else cond), strict=True
    ):
        assert torch.equal(leaf[:B], own) and leaf.dtype == own.dtype


@given(st.integers(1, 6), st.integers(0, 1000), st.sampled_from(KINDS), st.floats(-5, 9))
@settings(max_examples=40)
def test_a_sample_does_not_depend_on_its_batch(batch, seed, kind, s):
    cond, null = conditions(seed, batch)[kind]
    x, guidance = draw(seed + 1, batch)[0](batch, C), Guidance(s)
    together = guided_call(Model(), cond, null, guidance, 0.5, inputs=(x,))
    assert together.shape == x.shape
    for i in range(batch):

        def own(tree, i=i):
            if isinstance(tree, torch.Tensor):
                return tree[i : i + 1]
            if isinstance(tree, Prompt):
                return Prompt(own(tree.text), own(tree.size))
            if isinstance(tree, dict):
                return {key: own(value) for key, value in tree.items()}
            items = [own(value) for value in tree]
            return type(tree)(*items) if isinstance(tree, Embedded) else type(tree)(items)

        alone = guided_call(Model(), own(cond), null, guidance, 0.5, inputs=(x[i : i + 1],))
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_condition_for_each_sample_takes_the_place_of_null(kind):
    (cond, _), (other, _) = conditions()[kind], conditions(7)[kind]
    out = guided_call(Model(), cond, other, Guidance(3.0), 0.0, inputs=(X,))
    torch.testing.assert_close(out, guide(Model()(X, cond), Model()(X, other), 3.0))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dataclass"])
def test_what_training_drops_to_is_what_is_sampled(kind):
    """The same network on the same null condition: dropped whole in training, the branch "uncond" afterwards."""
    cond, null = conditions()[kind]
    wrapped = ConditionDropout(Model(), null, p=1.0).train()
    trained = wrapped(X, cond, 0.25)
    wrapped.eval()
    for given_null in (wrapped.null_condition, None):
        out = guided_call(wrapped, cond, given_null, Guidance(0.0), 0.0, inputs=(X, 0.25))
        assert torch.equal(out, trained)
    assert wrapped.model.rest == [(0.25,)] * 3
    # and in one pass with the condition
    both = guided_call(wrapped, cond, None, Guidance(3.0), 0.0, inputs=(X, 0.25))
    torch.testing.assert_close(both, guide(wrapped(X, cond, 0.25), trained, 3.0))


def test_inputs_are_repeated_where_they_have_rows_and_pass_where_not():
    cond, null = conditions()["token ids"]
    model, marker = Model(), object()
    mask = torch.ones(B, 2)
    inputs = (
        X,
        mask,
        0.5,
        torch.tensor(0.25),
        {"t": torch.arange(B), "more": (None, marker)},
        "word",
    )
    guided_call(model, cond, null, Guidance(3.0), 0.0, inputs=inputs)
    (rest,) = model.rest
    assert torch.equal(rest[0], torch.cat([mask, mask]))
    assert rest[1] == 0.5 and rest[2].shape == () and rest[4] == "word"
    assert rest[3]["t"].tolist() == [0, 1, 2] * 2 and rest[3]["more"][1] is marker
    guided_call(model, cond, null, Guidance(1.0), 0.0, inputs=inputs)
    assert model.rest[1][0] is mask and model.conds[1] is cond  # nothing is copied for one branch


def test_a_model_may_take_the_condition_alone_or_by_name():
    table = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    cond, null = conditions()["token ids"]
    out = guided_call(lambda ids: table[ids].sum(1), cond, null, Guidance(2.0), 0.0)
    torch.testing.assert_close(out, guide(table[cond].sum(1), table[repeated(null)].sum(1), 2.0))

    def by_name(*, x, context, t):
        return x * context.sum(1, keepdim=True) + t

    named = guided_call(
        lambda x, c, t: by_name(x=x, context=c, t=t),
        cond,
        null,
        Guidance(2.0),
        0.0,
        inputs=(X, 0.5),
    )
    torch.testing.assert_close(named, guide(X * cond.sum(1, keepdim=True), X * 0, 2.0) + 0.5)


class Hybrid(NamedTuple):
    logits: torch.Tensor
    image: dict
    ids: torch.Tensor
    loss: torch.Tensor


def hybrid(x, cond):
    """Logits (R, T, 2), noise (R, C), features (R,), ids (R,) and a number."""
    own = cond.double()
    return Hybrid(
        torch.stack([own, own.sin()], 2),
        {"noise": x * own.sum(1, keepdim=True), "features": own.sum(1)},
        cond[:, 0],
        torch.tensor(4.0),
    )


def test_one_guidance_guides_every_part_that_is_a_tensor_of_floats():
    cond, null = conditions()["token ids"]
    out = guided_call(hybrid, cond, null, Guidance(3.0), 0.0, inputs=(X,))
    c, u = hybrid(X, cond), hybrid(X, repeated(null))
    assert isinstance(out, Hybrid)
    torch.testing.assert_close(out.logits, guide(c.logits, u.logits, 3.0))
    for name in ("noise", "features"):
        torch.testing.assert_close(out.image[name], guide(c.image[name], u.image[name], 3.0))
    assert torch.equal(out.ids, c.ids) and out.loss == 4.0


def test_parts_have_their_own_guidance_and_others_are_left_alone():
    cond, null = conditions()["token ids"]
    c, u = hybrid(X, cond), hybrid(X, repeated(null))
    sigma = torch.tensor(0.6, dtype=torch.float64)
    level = Level(X, (1 - sigma.square()).sqrt(), sigma, "eps")
    tamed = Guidance(4.0, (mitigations.rescale(0.7),))
    clipped = Guidance(schedules.linear(1, 3), (mitigations.kl_trust_region(0.1),))
    parts = {"logits": clipped, "image": {"noise": tamed}}
    out = guided_call(hybrid, cond, null, parts, 0.5, inputs=(X,), level=level)
    torch.testing.assert_close(out.logits, clipped.combine(0.5, c.logits, u.logits))
    expected = tamed.combine(0.5, c.image["noise"], u.image["noise"], level)
    torch.testing.assert_close(out.image["noise"], expected)
    assert torch.equal(out.image["features"], c.image["features"])
    # a level for each part, too
    levels = {"image": {"noise": level}}
    again = guided_call(hybrid, cond, null, parts, 0.5, inputs=(X,), level=levels)
    assert torch.equal(again.image["noise"], out.image["noise"])


@pytest.mark.parametrize(
    ("of_logits", "of_image", "rows"),
    [(1.0, 1.0, B), (1.0, 2.0, 2 * B), (0.0, 0.0, B), (0.0, 1.0, 2 * B)],
)
def test_rows_are_those_that_some_part_needs(of_logits, of_image, rows):
    cond, null = conditions()["token ids"]
    seen = []

    def noting(x, cond):
        seen.append(len(x))
        return hybrid(x, cond)

    parts = {"logits": Guidance(of_logits), "image": Guidance(of_image)}
    out = guided_call(noting, cond, null, parts, 0.0, inputs=(X,))
    c, u = hybrid(X, cond), hybrid(X, repeated(null))
    assert seen == [rows]
    torch.testing.assert_close(out.logits, guide(c.logits, u.logits, of_logits))
    torch.testing.assert_close(
        out.image["noise"], guide(c.image["noise"], u.image["noise"], of_image)
    )


def test_a_part_is_not_looked_at_in_a_branch_that_it_does_not_need():
    """Logits at s = 1 take nothing of the unconditional rows, which run for the image and may be anything."""
    cond, null = conditions()["token ids"]

    def broken(x, cond):
        out = hybrid(x, cond)
        return out._replace(logits=out.logits.index_fill(0, torch.arange(B, 2 * B), torch.nan))

    parts = {"logits": Guidance(1.0), "image": Guidance(2.0)}
    out = guided_call(broken, cond, null, parts, 0.0, inputs=(X,))
    assert torch.equal(out.logits, hybrid(X, cond).logits)
    with pytest.raises(
        FloatingPointError, match=r"output\['logits'\], in the branches \['uncond'\]"
    ):
        guided_call(broken, cond, null, Guidance(2.0), 0.0, inputs=(X,))


@dataclass
class Answer:
    logits: torch.Tensor
    cache: object = None


@pytest.mark.parametrize("make", [lambda out: (out, None), lambda out: [out, 3], Answer])
def test_outputs_come_back_in_their_own_kind(make):
    cond, null = conditions()["token ids"]
    model = Model()
    out = guided_call(lambda x, c: make(model(x, c)), cond, null, Guidance(3.0), 0.0, inputs=(X,))
    plain = guided_call(model, cond, null, Guidance(3.0), 0.0, inputs=(X,))
    assert type(out) is type(make(plain))
    assert torch.equal(out.logits if isinstance(out, Answer) else out[0], plain)


def test_other_branches_share_the_pass_or_have_a_model_of_their_own():
    (cond, null), (other, _) = (
        conditions()["embeddings with a mask"],
        conditions(7)["embeddings with a mask"],
    )
    model, small = Model(), nn.Sequential()
    c, u, n = Model()(X, cond), Model()(X, repeated(null)), Model()(X, other)
    away = Guidance(branches.negative(3.0, 1.5))
    for negative in (other, Branch(other)):
        out = guided_call(
            model, cond, null, away, 0.0, inputs=(X,), branches={"negative": negative}
        )
        torch.testing.assert_close(out, u + 3 * (c - u) - 1.5 * (n - u))
    assert model.rows == [3 * B] * 2
    model.rows.clear()
    calls = []

    def weaker(x, cond):
        calls.append(len(x))
        return 0.5 * Model()(x, cond)

    auto = Guidance(branches.weak(2.0))
    for null_of_none in (null, None):  # which no branch needs here
        out = guided_call(
            model,
            cond,
            null_of_none,
            auto,
            0.0,
            inputs=(X,),
            branches={"weak": Branch(model=weaker)},
        )
        torch.testing.assert_close(out, c + (c - 0.5 * c))
    assert model.rows == [B] * 2 and calls == [B] * 2
    # a weaker model with a condition of its own, in a structure
    elsewhere = Branch(null, weaker)
    out = guided_call(model, cond, None, auto, 0.0, inputs=(X,), branches={"weak": elsewhere})
    torch.testing.assert_close(out, c + (c - 0.5 * u))
    with pytest.raises(ValueError, match="training mode"):
        guided_call(
            model, cond, None, auto, 0.0, inputs=(X,), branches={"weak": Branch(model=small)}
        )


def test_momentum_runs_from_begin_to_begin():
    cond, null = conditions()["token ids"]
    guidance = Guidance(5.0, (mitigations.apg(0.0, momentum=-0.5),))
    one = torch.tensor(1.0, dtype=torch.float64)

    def sample(running):
        x, seen = X, []
        for i in range(4):
            level = Level(x, one, one * (4 - i), "x0")
            seen.append(guided_call(Model(), cond, null, running, i / 3, inputs=(x,), level=level))
            x = x + 0.1 * seen[-1]
        return torch.stack(seen)

    first = sample(guidance.begin("x0"))
    assert torch.equal(first, sample(guidance.begin("x0")))
    without = sample(Guidance(5.0, (mitigations.apg(0.0),)))
    assert torch.equal(first[0], without[0]) and not torch.allclose(first[1], without[1])
    with pytest.raises(ValueError, match=r"momentum is -0\.5, which needs the steps"):
        sample(guidance)


def test_gradients_flow_to_the_network_and_the_null_condition():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(D, C, dtype=torch.float64)

        def forward(self, x, cond):
            embeddings, mask = cond
            return x * self.net((embeddings * mask[..., None]).sum(1))

    cond, null = conditions()["embeddings with a mask"]
    wrapped = ConditionDropout(Linear(), null).eval()
    guided_call(wrapped, cond, None, Guidance(3.0), 0.0, inputs=(X,)).sum().backward()
    embedding, mask = wrapped.null_condition
    assert (
        embedding.grad[0].abs().sum() > 0
        and (embedding.grad[1:] == 0).all()
        and mask.dtype == torch.bool
    )
    # u has the weight 1 - s of each sample, and what is masked none
    weight = wrapped.model.net.weight
    torch.testing.assert_close(embedding.grad[0], -2.0 * (X.sum(0) @ weight))


def call(cond=None, null="kind", guidance=None, progress=0.0, model=None, **options):
    own, of_null = conditions()["embeddings with a mask"]
    cond, null = own if cond is None else cond, of_null if isinstance(null, str) else null
    guidance = Guidance(3.0) if guidance is None else guidance
    return guided_call(
        model or Model(), cond, null, guidance, progress, **({"inputs": (X,)} | options)
    )


EMBEDDED, NULLED = conditions()["embeddings with a mask"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"null": None}, ValueError, "null is None and guidance needs the unconditional branch"),
        (
            {"null": NULLED[0]},
            TypeError,
            r"null is torch.float64 \(4, 5\), expected a tuple with \[0, 1\]",
        ),
        (
            {"null": NULLED[:1]},
            TypeError,
            r"null is a tuple with \[0\], expected a tuple with \[0, 1\]",
        ),
        ({"null": {0: NULLED[0], 2: NULLED[1]}}, TypeError, r"null is a dict with \[0, 2\]"),
        (
            {"null": (NULLED[0], NULLED[1].long())},
            TypeError,
            r"null\[1\] is torch.int64 .*expected torch.bool",
        ),
        (
            {"null": (NULLED[0][:2], NULLED[1])},
            ValueError,
            r"null\[0\] has shape \(2, 5\), expected \(4, 5\).*\(3, 4, 5\)",
        ),
        (
            {"null": (NULLED[0].expand(2, 4, 5), NULLED[1])},
            ValueError,
            r"null\[0\] has shape \(2, 4, 5\)",
        ),
        (
            {"cond": (EMBEDDED[0], EMBEDDED[1][:2])},
            ValueError,
            r"cond\[0\] has 3, cond\[1\] has 2: expected tensors of one",
        ),
        ({"cond": (EMBEDDED[0], None)}, TypeError, r"cond\[1\] is a NoneType, expected a tensor"),
        ({"cond": ["a cat", "a dog"]}, TypeError, r"cond\[0\] is a str"),
        ({"cond": torch.tensor(3)}, TypeError, r"cond is a tensor \(\)"),
        ({"cond": {}}, ValueError, "cond is empty"),
        ({"inputs": X}, TypeError, "inputs is a Tensor, expected a tuple"),
        ({"inputs": (X[:2],)}, ValueError, r"inputs\[0\] has shape \(2, 6\) and cond a batch of 3"),
        (
            {"inputs": (X, {"mask": X.T}), "guidance": Guidance(1.0)},
            ValueError,
            r"inputs\[1\]\['mask'\] has shape \(6, 3\)",
        ),
        ({"guidance": 3.0}, TypeError, "guidance is 3.0, expected a Guidance"),
        ({"guidance": {}}, ValueError, "guidance names no part"),
        (
            {"guidance": {"logits": Guidance(3.0)}},
            ValueError,
            r"names the parts \['logits'\] and output is torch.float64",
        ),
        ({"guidance": Guidance(torch.ones(2))}, ValueError, "2 values for a batch of 3"),
        ({"guidance": Guidance(branches.cfg_pp())}, ValueError, "cfg_pp"),
        (
            {"guidance": Guidance(branches.negative(3.0, 1.0))},
            ValueError,
            "needs the branch 'negative'",
        ),
        ({"branches": {"negative": EMBEDDED}}, ValueError, r"branches has \['negative'\]"),
        ({"branches": {"uncond": EMBEDDED}}, ValueError, r"branches has \['uncond'\]"),
        ({"progress": 1.5}, ValueError, "progress is 1.5"),
        ({"model": Model().train()}, ValueError, "training mode"),
        (
            {"model": lambda x, c: x[:3]},
            ValueError,
            r"output is torch.float64 \(3, 6\) for 6 rows \(cond, uncond\)",
        ),
        (
            {"model": lambda x, c: x.sum()[None]},
            ValueError,
            r"output is torch.float64 \(1,\) for 6 rows",
        ),
        (
            {"model": lambda x, c: x.index_fill(0, torch.tensor([4]), torch.nan)},
            FloatingPointError,
            r"output, in the branches \['uncond'\]",
        ),
        ({"guidance": Guidance(3.0, (mitigations.rescale(),))}, ValueError, "level is None"),
        (
            {
                "guidance": Guidance(3.0, (mitigations.rescale(),)),
                "level": Level(X[:, :2], torch.tensor(1.0), torch.tensor(2.0), "x0"),
            },
            ValueError,
            r"level.x has shape \(3, 2\) and output \(3, 6\)",
        ),
        (
            {"guidance": Guidance(3.0, (mitigations.apg(),)), "model": lambda x, c: (x, x)},
            ValueError,
            r"mitigations, which belong to one kind of output, and the model returns \['output\[0\]', 'output\[1\]'\]",
        ),
        (
            {"guidance": {2: Guidance(3.0)}, "model": lambda x, c: (x, x)},
            ValueError,
            r"names the parts \[2\] and output has \[0, 1\]",
        ),
        (
            {"guidance": {1: Guidance(3.0)}, "model": lambda x, c: (x, x[:3])},
            ValueError,
            r"output\[1\] is torch.float64 \(3, 6\) for 6 rows",
        ),
        (
            {
                "guidance": Guidance(branches.weak(2.0)),
                "branches": {"weak": Branch(model=lambda x, c: [x])},
                "model": lambda x, c: {"out": x},
            },
            TypeError,
            r"output is a dict with \['out'\] and a list with \[0\] in different models",
        ),
        (
            {"guidance": Guidance(branches.weak(2.0)), "branches": {"weak": Branch()}},
            ValueError,
            "neither cond nor model",
        ),
        (
            {
                "guidance": Guidance(branches.weak(2.0)),
                "branches": {"weak": Branch(model=lambda x, c: (x,))},
            },
            ValueError,
            r"output is a tuple with \[0\] for 3 rows",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


def test_the_page_runs():
    page = ROOT / "docs" / "integrations" / "own-models.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})


def test_the_example_follows_its_prompts_more_at_a_larger_scale(tmp_path):
    """At s = 0 by chance, at 1 weakly, at 4 mostly: words and pictures, from one call a step."""
    file = ROOT / "examples" / "8_text_and_image.py"
    example = runpy.run_path(str(file))
    assert "from models" not in file.read_text()
    model = example["train"](150, seed=0)
    right = {s: example["adherence"](model, Guidance(s), 160, seed=1)[0] for s in (0.0, 1.0, 4.0)}
    for half in (0, 1):
        assert right[0.0][half] < 0.3 < right[1.0][half]
        assert right[1.0][half] + 0.05 < right[4.0][half]
    example["draw"](model, (1.0, 4.0), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
