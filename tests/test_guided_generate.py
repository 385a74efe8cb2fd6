"""generate() of transformers with guidance: what it does where it is right, and more."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    logging,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteriaList

from unicfg import Branch, Guidance
from unicfg.guidance import branches, mitigations, schedules
from unicfg.integrations.transformers import GuidedLogitsProcessor, guided_generate
from unicfg.integrations.transformers.row_cache import cache_argument

logging.set_verbosity_error()
V, NEW = 40, 8
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=V, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=V, head_dim=8, num_key_value_heads=2, **SIZES)
    ),
    # one layer of two looks 6 tokens back
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=V,
            head_dim=8,
            num_key_value_heads=2,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            **SIZES,
        )
    ),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    model = MAKERS[name]().eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:  # large enough that the tokens depend on the prompt
            parameter.data.mul_(3 if "gpt2" in name or "embed" not in key else 1)
    return model


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 2, 8, 4]])
NULLS = torch.tensor([[7, 1, 1], [4, 2, 6]])


class Calls:
    """Shapes of the ids of every forward."""

    def __init__(self, model):
        self.shapes, self.model = [], model

    def __enter__(self):
        def note(module, args, kwargs):
            self.shapes.append(tuple(kwargs["input_ids"].shape))

        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.shapes

    def __exit__(self, *error):
        self.hook.remove()


def guided(model, ids=PROMPTS, s=2.5, **options):
    options = {"uncond_ids": NULLS, "max_new_tokens": NEW, "do_sample": False} | options
    if not isinstance(s, Guidance):
        s = Guidance(s)
    with torch.no_grad():
        return model.generate(ids, custom_generate=guided_generate, guidance=s, **options)


def by_hand(model, ids, null, scale, new=NEW, combine=None):
    """Two whole forwards a token, one sequence at a time."""
    ids, null = ids[None], null[None]
    for index in range(new):
        with torch.no_grad():
            cond, uncond = (model(input_ids=rows).logits[:, -1] for rows in (ids, null))
        s = scale(index / (new - 1)) if callable(scale) else scale
        token = (uncond + s * (cond - uncond)).argmax(-1)[:, None]
        ids, null = torch.cat([ids, token], 1), torch.cat([null, token], 1)
    return ids[0]


def test_the_tokens_of_transformers_own_guidance(model):
    for ids, null in zip(PROMPTS, NULLS, strict=True):
        theirs = model.generate(
            ids[None],
            guidance_scale=2.5,
            negative_prompt_ids=null[None],
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert torch.equal(guided(model, ids[None], uncond_ids=null[None]), theirs)
        assert not torch.equal(guided(model, ids[None], 1.0), theirs)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_every_cache_gives_what_two_whole_passes_give(model, cache):
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
    with Calls(model) as shapes:
        out = guided(model, **options.get(cache, {}))
    for row, ids, null in zip(out, PROMPTS, NULLS, strict=True):
        assert torch.equal(row, by_hand(model, ids, null, 2.5))
    # one call a token, of both rows of both prompts
    assert len(shapes) == NEW and {shape[0] for shape in shapes} == {4}
    if cache != "none":
        assert shapes[0] == (4, 5) and set(shapes[1:]) == {(4, 1)}


def test_a_longer_null_prompt_and_a_static_cache(model):
    null = torch.arange(1, 13)
    for options in ({}, {"cache_implementation": "static"}):
        out = guided(model, uncond_ids=null, **options)
        for row, ids in zip(out, PROMPTS, strict=True):
            assert torch.equal(row, by_hand(model, ids, null, 2.5))


def test_prompts_of_different_lengths(model):
    prompts = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([4, 3])]
    nulls = [[2], [7, 1, 1, 3, 2, 2, 1]]
    ids = torch.stack([prompts[0], torch.cat([torch.zeros(3, dtype=torch.long), prompts[1]])])
    out = guided(model, ids, uncond_ids=nulls, attention_mask=(ids > 0).long())
    for row, prompt, null in zip(out, prompts, nulls, strict=True):
        alone = by_hand(model, prompt, torch.tensor(null), 2.5)
        assert torch.equal(row[-NEW:], alone[-NEW:])
    # padded by hand, with a mask; without one nobody knows
    padded = torch.tensor([[0] * 6 + [2], nulls[1]])
    own = {"attention_mask": (ids > 0).long()}
    more = {"uncond_attention_mask": (padded > 0).long()}
    assert torch.equal(guided(model, ids, uncond_ids=padded, **own, **more), out)
    with pytest.raises(ValueError, match="begins with 0, the padding token, and there is no mask"):
        guided(model, ids, uncond_ids=padded, **own)
    more = {"uncond_attention_mask": torch.ones_like(padded)}  # it counts
    seen = guided(model, ids, uncond_ids=padded, **own, **more)
    expected = by_hand(model, prompts[0], padded[0], 2.5)
    assert torch.equal(seen[0, -NEW:], expected[-NEW:])
    ragged = {"input_ids": nulls, "attention_mask": [[1] * len(row) for row in nulls]}
    assert torch.equal(guided(model, ids, uncond_ids=ragged, **own), out)
    tokenized = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    assert torch.equal(
        guided(model, ids, uncond_ids=tokenized, attention_mask=(ids > 0).long()), out
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # progress i / 7: rows and tokens of each call
        (schedules.interval(3.0, 0.0, 0.3), [(4, 5)] + [(4, 1)] * 2 + [(2, 1)] * 5),
        (
            schedules.interval(3.0, 0.5, 1.0),
            [(2, 5)] + [(2, 1)] * 4 + [(2, 9)] + [(4, 1)] * 3,
        ),
        (
            schedules.interval(3.0, 0.3, 0.6),
            [(2, 5)] + [(2, 1)] * 3 + [(2, 8)] + [(4, 1)] + [(2, 1)] * 3,
        ),
        (1.0, [(2, 5)] + [(2, 1)] * 7),
        (0.0, [(2, 3)] + [(2, 1)] * 7),
    ],
)
def test_rows_are_run_where_they_are_needed(model, schedule, expected):
    with Calls(model) as shapes:
        out = guided(model, s=schedule)
    assert shapes == expected
    static = guided(model, s=schedule, cache_implementation="static")
    for row, more, ids, null in zip(out, static, PROMPTS, NULLS, strict=True):
        alone = by_hand(model, ids, null, schedule)
        assert torch.equal(row, alone) and torch.equal(more, alone)


def test_one_scale_a_sequence(model):
    out = guided(model, s=torch.tensor([1.0, 4.0]))
    assert torch.equal(out[0], by_hand(model, PROMPTS[0], NULLS[0], 1.0))
    assert torch.equal(out[1], by_hand(model, PROMPTS[1], NULLS[1], 4.0))


def test_guidance_scale_is_the_same_and_applied_once(model):
    out = guided(model)
    named = model.generate(
        PROMPTS,
        custom_generate=guided_generate,
        guidance_scale=2.5,
        uncond_ids=NULLS,
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(named, out)


def test_several_sequences_a_prompt_have_seeds_of_their_own(llama):
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7, "top_k": 20}
    out = guided(llama, seeds=[1, 2, 3, 4], **options)
    assert out.shape == (4, 5 + NEW) and len({tuple(row.tolist()) for row in out}) == 4
    # in a batch of another size, and whatever the global generator is at
    torch.manual_seed(9)
    for i, seed in enumerate([1, 2, 3, 4]):
        ids, null = PROMPTS[i // 2], NULLS[i // 2]
        options |= {"num_return_sequences": 1}
        alone = guided(llama, ids[None], uncond_ids=null, seeds=[seed], **options)
        assert torch.equal(alone[0], out[i])


def test_without_seeds_it_draws_as_transformers_does(llama):
    ids, null = PROMPTS[:1], NULLS[:1]
    torch.manual_seed(3)
    theirs = llama.generate(
        ids, guidance_scale=2.5, negative_prompt_ids=null, max_new_tokens=NEW, do_sample=True
    )
    torch.manual_seed(3)
    assert torch.equal(guided(llama, ids, uncond_ids=null, do_sample=True), theirs)


def test_ends_are_kept_and_padded(model):
    free = guided(model)
    end = int(free[0, 7])  # the third new token of the first row
    out = guided(model, eos_token_id=end)
    row = free[0].tolist()
    first = row.index(end, 5) + 1
    assert out[0, :first].tolist() == row[:first]
    assert set(out[0, first:].tolist()) <= {0}
    theirs = model.generate(
        PROMPTS[:1],
        guidance_scale=2.5,
        negative_prompt_ids=NULLS[:1],
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=end,
    )
    alone = guided(model, PROMPTS[:1], uncond_ids=NULLS[:1], eos_token_id=end)
    assert torch.equal(alone, theirs)

    def five(ids, scores, **options):
        return torch.full((len(ids),), ids.shape[1] >= 10)

    stopped = guided(model, stopping_criteria=StoppingCriteriaList([five]))
    assert torch.equal(stopped, free[:, :10])


def test_tokens_are_streamed_and_steps_are_told(llama):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.ended = True

    streamer, steps = Streamer(), []
    out = guided(
        llama, PROMPTS[:1], uncond_ids=NULLS[0], token_streamer=streamer, callback=steps.append
    )
    assert streamer.ended and streamer.got[0] == PROMPTS[:1].tolist()
    assert streamer.got[1:] == [[token] for token in out[0, 5:].tolist()]
    assert [step.index for step in steps] == list(range(NEW))
    assert torch.equal(steps[-1].ids, out[:, 5:]) and steps[-1].progress == 1.0
    assert set(steps[0].outputs) == {"cond", "uncond"} and steps[0].guided.shape == (1, V)


def test_what_generate_returns_with_a_dict(llama):
    out = guided(
        llama, return_dict_in_generate=True, output_scores=True, output_logits=True, top_k=3
    )
    assert torch.equal(out.sequences, guided(llama))
    assert len(out.scores) == len(out.logits) == NEW
    sampled = guided(
        llama,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=True,
        seeds=[0, 1],
        top_k=3,
    )
    assert (sampled.scores[0] > -torch.inf).sum(-1).tolist() == [3, 3]


def test_a_vocabulary_is_constrained_after_guidance(llama):
    """As image tokens are in models that mix them with text: each place has tokens of its own."""

    def allowed(batch, ids):
        return [10, 11, 12] if len(ids) % 2 else [20, 21, 22]

    out = guided(llama, prefix_allowed_tokens_fn=allowed)
    for row in out[:, 5:]:
        assert all(int(t) in allowed(0, [0] * (5 + i)) for i, t in enumerate(row))
    theirs = llama.generate(
        PROMPTS[:1],
        guidance_scale=2.5,
        negative_prompt_ids=NULLS[:1],
        max_new_tokens=NEW,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
    )
    assert torch.equal(out[:1], theirs)


def test_mitigations_and_other_branches(llama):
    def hand(combine, passes):
        """One sequence of the first prompt, from whole passes of (model, prompt)."""
        rows = [prompt[None] for _, prompt in passes]
        for _ in range(NEW):
            with torch.no_grad():
                outs = [
                    m(input_ids=r).logits[:, -1] for (m, _), r in zip(passes, rows, strict=True)
                ]
            token = combine(*outs).argmax(-1)[:, None]
            rows = [torch.cat([row, token], 1) for row in rows]
        return rows[0][0]

    cond, null, negative = PROMPTS[0], NULLS[0], torch.tensor([11, 12])
    trust = mitigations.kl_trust_region(0.05)
    out = guided(llama, s=Guidance(4.0, (trust,)))
    expected = hand(lambda c, u: trust(c + 3 * (c - u), c, u), [(llama, cond), (llama, null)])
    assert torch.equal(out[0], expected) and not torch.equal(out, guided(llama, s=4.0))

    weights = branches.negative(3.0, 1.5)
    out = guided(llama, s=Guidance(weights), branches={"negative": Branch(negative)})
    expected = hand(
        lambda c, u, n: u + 3.0 * (c - u) - 1.5 * (n - u),
        [(llama, cond), (llama, null), (llama, negative)],
    )
    assert torch.equal(out[0], expected)

    # contrastive decoding against a weaker model, which is of another kind
    weak = make("gpt2", seed=1)
    out = guided(
        llama,
        s=Guidance(branches.weak(2.0)),
        uncond_ids=None,
        branches={"weak": Branch(model=weak)},
    )
    assert torch.equal(out[0], hand(lambda c, w: 2 * c - w, [(llama, cond), (weak, cond)]))


def processor(model, **options):
    guidance = options.pop("guidance", Guidance(2.5))
    return LogitsProcessorList([GuidedLogitsProcessor(model, guidance, NULLS, **options)])


def test_the_processor_draws_what_the_batched_loop_draws(model):
    own = processor(model)
    for _ in range(2):  # one object, two samplings
        out = model.generate(PROMPTS, logits_processor=own, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, guided(model))
    late = Guidance(schedules.interval(3.0, 0.5, 0.8))
    with Calls(model) as shapes:
        out = model.generate(
            PROMPTS,
            logits_processor=processor(model, guidance=late, num_tokens=NEW),
            max_new_tokens=NEW,
            do_sample=False,
        )
    assert torch.equal(out, guided(model, s=late)) and len(shapes) == NEW + 2


def test_what_a_mitigation_remembers_is_forgotten_between_samplings(llama):
    class Counting:
        """Adds to token 0 what it has been called."""

        def begin(self):
            self.calls = 0
            return self.step

        def step(self, guided, cond_out, uncond_out):
            self.calls += 1
            return guided + 5.0 * self.calls * (torch.arange(V) == 0)

        def __call__(self, guided, cond_out, uncond_out):
            raise AssertionError("begin was not called")

    guidance = Guidance(2.5, (Counting(),))
    first, own = guided(llama, s=guidance), processor(llama, guidance=guidance)
    assert not torch.equal(first, guided(llama))
    for _ in range(2):
        assert torch.equal(guided(llama, s=guidance), first)
        out = llama.generate(PROMPTS, logits_processor=own, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, first)


def test_the_processor_follows_drafts_that_are_taken_back(model):
    """Assisted decoding asks for tokens ahead, and again where they were wrong."""
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = guided(model, PROMPTS[:1], uncond_ids=NULLS[0], **options)
    own = LogitsProcessorList([GuidedLogitsProcessor(model, Guidance(2.5), NULLS[0])])
    for more in ({"assistant_model": make("llama", seed=5)}, {"prompt_lookup_num_tokens": 3}):
        out = model.generate(PROMPTS[:1], logits_processor=own, **options, **more)
        assert torch.equal(out, plain)


def test_a_beam_goes_on_from_those_of_its_own_prompt(llama):
    """Two beams each of two prompts that are alike but for their null prompts, which hold the same tokens."""
    null = torch.tensor([[7, 1, 1], [4, 2, 6]])
    ids = PROMPTS[:1].expand(4, -1)

    def scores(processor, drawn):
        rows = torch.cat([ids, torch.tensor(drawn)], 1) if drawn[0] else ids
        return processor(rows, llama(input_ids=rows).logits[:, -1])

    own = GuidedLogitsProcessor(llama, Guidance(2.5), null)
    with torch.no_grad():
        for drawn in ([[]] * 4, [[5], [6], [7], [5]], [[5, 1], [6, 1], [5, 1], [5, 2]]):
            got = scores(own, drawn)
            for row in range(4):
                new = torch.tensor(drawn[row : row + 1], dtype=torch.long)
                cond, uncond = (
                    llama(input_ids=torch.cat([prompt, new], 1)).logits[:, -1]
                    for prompt in (ids[:1], null[row // 2 :][:1])
                )
                expected = (uncond + 2.5 * (cond - uncond)).log_softmax(-1)[0]
                torch.testing.assert_close(got[row], expected, atol=1e-4, rtol=1e-4)


def test_the_processor_takes_a_new_prompt_and_is_told_of_one_that_goes_on(llama):
    own = GuidedLogitsProcessor(llama, Guidance(2.5), NULLS[0])
    options = {"max_new_tokens": 4, "do_sample": False}
    for prompt in (PROMPTS[:1], PROMPTS[1:], PROMPTS[:1, 1:], PROMPTS):
        out = llama.generate(prompt, logits_processor=LogitsProcessorList([own]), **options)
        assert torch.equal(out, guided(llama, prompt, uncond_ids=NULLS[0], **options))
    chat = torch.cat([PROMPTS, torch.tensor([[3], [4]])], 1)
    own.begin()
    out = llama.generate(chat, logits_processor=LogitsProcessorList([own]), **options)
    assert torch.equal(out, guided(llama, chat, uncond_ids=NULLS[0], **options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beams_find_the_best_sequence_by_guided_log_probabilities(name):
    """As many beams as there are prefixes find what trying everything finds."""
    model = make(name)
    first, new = 30, 3  # ten tokens are allowed

    def allowed(batch, ids):
        return list(range(first, V))

    out = model.generate(
        PROMPTS,
        num_beams=100,
        logits_processor=processor(model),
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = torch.cartesian_prod(*[torch.arange(first, V)] * new)
    for row, (ids, null) in enumerate(zip(PROMPTS, NULLS, strict=True)):
        with torch.no_grad():
            c, u = (
                model(input_ids=torch.cat([p.expand(len(tokens), -1), tokens], 1)).logits
                for p in (ids, null)
            )
        c, u = c[:, len(ids) - 1 : -1], u[:, len(null) - 1 : -1]
        # transformers masks first and calls the processors of a caller last: what is left is normalised
        log_p = (u + 2.5 * (c - u))[..., first:].log_softmax(-1)
        log_p = log_p.gather(2, tokens[..., None] - first).sum((1, 2))
        best = int(log_p.argmax())
        assert out.sequences[row, 5:].tolist() == tokens[best].tolist()
        torch.testing.assert_close(
            out.sequences_scores[row] * new, log_p[best], atol=1e-3, rtol=1e-3
        )


@pytest.mark.skipif(
    __import__("transformers").__version__ != "5.23.0", reason="known of transformers 5.23.0"
)
def test_where_transformers_own_guidance_fails(llama):
    theirs = {"guidance_scale": 2.5, "max_new_tokens": NEW, "do_sample": True}
    for more in ({"num_return_sequences": 2}, {"num_beams": 2}):
        with pytest.raises(RuntimeError):
            llama.generate(PROMPTS, negative_prompt_ids=NULLS, **theirs, **more)
    # positions of a padded negative prompt are counted from its padding
    gpt2, ids = make("gpt2"), PROMPTS[:1]
    padded = torch.tensor([[0, 0, 0, 7, 1, 1]])
    scores = [
        gpt2.generate(
            ids,
            guidance_scale=2.5,
            negative_prompt_ids=null,
            negative_prompt_attention_mask=(null > 0).long(),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        ).scores[0]
        for null in (padded, padded[:, 3:])
    ]
    assert (scores[0] - scores[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncond_ids": None}, "expected uncond_ids="),
        ({"uncond_ids": NULLS.repeat(2, 1)[:3]}, "uncond_ids holds 3 prompts for 2 sequences"),
        ({"uncond_ids": NULLS[:, :0]}, r"uncond_ids has shape \(2, 0\)"),
        ({"uncond_attention_mask": torch.ones(2, 2)}, "attention mask of uncond_ids has shape"),
        (
            {"uncond_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
            "expected padding on the left",
        ),
        ({"guidance_scale": 3.0}, "expected one of the two"),
        ({"num_beams": 2}, "num_beams is 2, expected 1"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens is 2, expected None"),
        ({"uncond_ids": []}, r"uncond_ids has shape \(1, 0\), expected at least one token"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is True"),
        ({"seeds": [0, 1]}, "seeds are given with do_sample False"),
        ({"seeds": [0], "do_sample": True}, "seeds has 1 entries for a batch of 2"),
        ({"s": torch.ones(3)}, "the scale has 3 values for a batch of 2"),
        ({"branches": {"x": Branch(NULLS)}}, r"branches has \['x'\]"),
        ({"s": Guidance(branches.negative(2.0, 1.0))}, "expected branches={'negative'"),
        ({"s": Guidance(3.0, (mitigations.rescale(0.7),))}, "rescale"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "input_ids hold no token|both|inputs_embeds"),
    ],
)
def test_what_cannot_be_done_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        guided(llama, **options)


def test_guidance_is_not_applied_twice(llama):
    theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, llama)
    for other in (theirs, processor(llama)[0]):
        with pytest.raises(ValueError, match=f"{type(other).__name__}, which guides already"):
            guided(llama, logits_processor=LogitsProcessorList([other]))
    llama.generation_config.guidance_scale = 2.0
    try:
        with pytest.raises(ValueError, match=r"generation_config\.guidance_scale=None"):
            guided(llama)
    finally:
        llama.generation_config.guidance_scale = None


def test_other_models_are_named():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": V}
    with pytest.raises(TypeError, match="BertForMaskedLM, which does not generate"):
        GuidedLogitsProcessor(BertForMaskedLM(BertConfig(**sizes)), Guidance(2.0), NULLS)
    encoder = BertLMHeadModel(BertConfig(**sizes))
    with pytest.raises(TypeError, match="BertLMHeadModel with is_decoder False"):
        guided(encoder)
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=32, d_kv=8, num_heads=2, num_layers=1, vocab_size=V)
    )
    with pytest.raises(TypeError, match="an encoder and a decoder"):
        GuidedLogitsProcessor(t5, Guidance(2.0), NULLS)
    model = make("llama")
    for scale in (schedules.linear(1.0, 3.0), branches.context_aware(schedules.linear(0.0, 5.0))):
        with pytest.raises(ValueError, match="num_tokens is None with a schedule"):
            processor(model, guidance=Guidance(scale))
    electra = ElectraForCausalLM(ElectraConfig(**sizes, embedding_size=32))
    with pytest.raises(TypeError, match="ElectraForCausalLM with is_decoder False"):
        guided(electra)
    with pytest.raises(ValueError, match="model is in training mode"):
        guided(MAKERS["llama"]().train())


def test_a_cache_that_has_seen_tokens_is_refused_and_an_empty_one_taken(llama):
    cache = StaticCache(config=llama.config, max_cache_len=5 + NEW - 1)  # just enough
    own = {cache_argument(llama): cache}
    assert torch.equal(guided(llama, **own), guided(llama))
    with pytest.raises(ValueError, match="the cache holds 12 tokens"):
        guided(llama, **own)


def test_emu3_draws_image_tokens_only():
    """Its images are tokens of the same vocabulary as its text: rows of them, each with an end."""
    torch.manual_seed(0)
    text = {"vocab_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2} | SIZES
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"codebook_size": 16, "embed_dim": 4, "z_channels": 4, "latent_channels": 4}
    vision |= {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    vision |= {"hidden_size": 32, "num_attention_heads": 2, "attn_resolutions": []}
    names = {"<image>": 60} | {f"<|visual token {i:06d}|>": 40 + i for i in range(16)}
    config = Emu3Config(text_config=text, vq_config=vision, vocabulary_map=names)
    model = Emu3ForConditionalGeneration(config).eval()
    visual, end = list(range(40, 56)), 57

    def allowed(batch, ids):
        place = len(ids) - PROMPTS.shape[1]
        return [end] if place % 4 == 3 else visual

    options = {"max_new_tokens": 8, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    out = guided(model, PROMPTS, uncond_ids=NULLS, **options)
    assert out[:, 5:].unflatten(1, (2, 4))[..., 3].eq(end).all()
    assert out[:, 5:].unflatten(1, (2, 4))[..., :3].sub(40).lt(16).all()
    for row, ids, null in zip(out, PROMPTS, NULLS, strict=True):
        theirs = {"guidance_scale": 2.5, "negative_prompt_ids": null[None]}
        assert torch.equal(row, model.generate(ids[None], **theirs, **options)[0])


def test_the_page_runs():
    page = Path(__file__).parent.parent / "docs" / "integrations" / "transformers.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    scope = {}
    exec(code, scope)
    assert scope["out"].shape[0] == 2


def test_importing_unicfg_imports_no_host():
    import subprocess
    import sys

    code = "import sys, unicfg, unicfg.integrations; assert not {'transformers', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    hidden = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import unicfg.integrations.transformers\n"
        "except ImportError as error:\n    assert \"pip install 'unicfg[transformers]'\" in str(error), error\n"
        "else:\n    raise SystemExit('imported')"
    )
    subprocess.run([sys.executable, "-c", hidden], check=True)


@pytest.fixture(autouse=True)
def _quiet():
    """What transformers warns of is not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield
