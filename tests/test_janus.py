"""Janus in transformers: side by side with its own image generation, and where that cannot go."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    BatchEncoding,
    DynamicCache,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    logging,
)

from unicfg import Branch, Guidance, guide, sample_autoregressive
from unicfg.guidance import branches, mitigations
from unicfg.guidance.schedules import interval, linear
from unicfg.integrations.transformers.janus import JanusImages, generate_images
from unicfg.integrations.transformers.prompts import HIDDEN
from unicfg.integrations.transformers.row_cache import RowCache, cache_argument

logging.set_verbosity_error()
PAD, BOS, EOS, BEGIN = range(4)
B, T, L, V = 3, 6, 9, 24
CACHE = cache_argument(LlamaForCausalLM)


def make(seed=0, **settings):
    torch.manual_seed(seed)
    text = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1}
    vision |= {"image_size": 12, "patch_size": 4, "num_image_tokens": L, "projection_dim": 32}
    vq = {"embed_dim": 8, "num_embeddings": V, "latent_channels": 16, "base_channels": 32}
    vq |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "num_hidden_layers": 1}
    vq |= {"projection_dim": 32, "image_token_embed_dim": 32}
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, **settings)
    model = JanusForConditionalGeneration(config).eval()
    own = model.model
    for part in (own.language_model, own.generation_head, own.generation_embeddings):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(6)  # so that the condition decides what is drawn
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two would wait for one another in networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def inputs():
    """Three prompts, the first of them padded on the left."""
    ids = torch.randint(4, 60, (B, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[:, 0], ids[:, -1] = BOS, BEGIN
    ids[0, :3], mask[0, :2] = torch.tensor([PAD, PAD, BOS]), 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def passes(model):
    """The rows and tokens of every pass of the language model."""
    seen = []

    def note(module, args, kwargs):
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def run(model, inputs, s=3.0, **options):
    guidance = s if isinstance(s, Guidance) else Guidance(s)
    settings = {"seeds": range(len(inputs["input_ids"])), "temperature": 0.0} | options
    return generate_images(model, **inputs, guidance=guidance, **settings)


def first(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


def by_hand(model, inputs, s):
    """Greedy tokens without a cache, one pass a branch and token; ``s`` is a function of progress."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    null = torch.where((ids == BOS) | (ids == BEGIN), ids, PAD)
    drawn = ids.new_empty(len(ids), 0)
    for index in range(L):
        logits = []
        for prompt in (ids, null):
            embeds = model.get_input_embeddings()(prompt)
            if index:
                image = model.prepare_embeddings_for_image_generation(drawn)
                embeds = torch.cat([embeds, image], dim=1)
            seen = torch.cat([mask, torch.ones_like(drawn)], dim=1)
            out = model.model.language_model(inputs_embeds=embeds, attention_mask=seen)
            logits.append(model.model.generation_head(out.last_hidden_state[:, -1]))
        best = guide(*logits, s(index / (L - 1))).argmax(-1)
        drawn = torch.cat([drawn, best[:, None]], dim=1)
    return drawn


# --- equality ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("s", [1.5, 5.0])
def test_greedy_tokens_equal_its_own_generation(inputs, s, attention):
    model = make(attn_implementation=attention)
    theirs = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_mode="image",
        guidance_scale=s,
        do_sample=False,
    )
    ours = run(model, inputs, s)
    assert torch.equal(ours, theirs)
    assert ours.shape == (B, L) and len(ours.unique()) > 4


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 3.0])
def test_every_scale_equals_two_passes_without_a_cache(model, inputs, s):
    with torch.no_grad():
        expected = by_hand(model, inputs, lambda progress: s)
    assert torch.equal(run(model, inputs, s), expected)
    assert not torch.equal(expected, run(model, inputs, 8.0))


@pytest.mark.parametrize(
    "schedule", [interval(6.0, 0.3, 0.7), linear(0.0, 6.0), interval(4.0, 0, 0.5, outside=0.0)]
)
def test_schedules_drop_rows_and_join_late_without_a_trace(model, inputs, schedule):
    with torch.no_grad():
        expected = by_hand(model, inputs, schedule)
    assert torch.equal(run(model, inputs, Guidance(schedule)), expected)


def test_the_null_is_padding_that_is_attended_to(model, inputs):
    images = JanusImages(model)
    cond = images.condition(**inputs)
    assert cond[0].tolist()[:3] == [HIDDEN, HIDDEN, BOS]
    null = images.null(cond)
    assert (
        null.tolist() == [[HIDDEN, HIDDEN, BOS, PAD, PAD, BEGIN]] + [[BOS, *[PAD] * 4, BEGIN]] * 2
    )
    # were the padding hidden, as one would think, other tokens came out
    hidden = null.masked_fill(null == PAD, HIDDEN)
    settings = {"guidance": Guidance(5.0), "seeds": [0, 1, 2], "temperature": 0.0}
    right = sample_autoregressive(images, cond, uncond=null, **settings)
    wrong = sample_autoregressive(images, cond, uncond=hidden, **settings)
    assert torch.equal(right, run(model, inputs, 5.0)) and not torch.equal(right, wrong)


def test_images_are_those_of_its_own_decoder(model, inputs):
    ids = run(model, inputs)
    images = JanusImages(model).decode_images(ids)
    assert images.shape == (B, 3, 6, 6) and float(images.abs().max()) <= 1
    theirs = model.decode_image_tokens(ids).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, theirs.clamp(-1, 1))


# --- passes ---


def test_one_pass_a_token_of_the_rows_that_are_needed(model, inputs, passes):
    prefill = (B, T - 1)
    for s, expected in (
        (3.0, [prefill, prefill, *[(2 * B, 1)] * L]),
        (1.0, [prefill, *[(B, 1)] * L]),
        (0.0, [prefill, *[(B, 1)] * L]),
        # joins at the fifth token with one chunk, and is dropped after the seventh
        (
            interval(3.0, 0.45, 0.75),
            [prefill, prefill, *[(B, 1)] * 4, (B, 1), (B, 5), *[(2 * B, 1)] * 2, *[(B, 1)] * 2],
        ),
    ):
        passes.clear()
        run(model, inputs, Guidance(s))
        assert passes == expected


def test_a_third_branch_runs_in_the_same_pass(model, inputs, passes):
    images = JanusImages(model)
    cond = images.condition(**inputs)
    negative = images.condition(inputs["input_ids"].flip(0), inputs["attention_mask"].flip(0))
    sample_autoregressive(
        images,
        cond,
        uncond=images.null(cond),
        branches={"negative": Branch(cond=negative)},
        guidance=Guidance(branches.negative(3.0, 1.5)),
        seeds=[0, 1, 2],
    )
    assert passes[3:] == [(3 * B, 1)] * L


# --- samples ---


def test_a_sample_depends_on_its_seed_and_scale_and_nothing_else(model, inputs):
    scales, seeds = torch.tensor([1.0, 4.0, 0.5]), [7, 8, 9]
    settings = {"temperature": 0.9, "top_k": 12, "top_p": 0.95}
    together = run(model, inputs, Guidance(scales), seeds=seeds, **settings)
    for row, (scale, seed) in enumerate(zip(scales.tolist(), seeds, strict=True)):
        alone = run(model, first(inputs, [row]), scale, seeds=[seed], **settings)
        assert torch.equal(together[[row]], alone)
    other = run(model, inputs, Guidance(scales), seeds=[17, 18, 19], **settings)
    assert not torch.equal(together, other)


def test_padding_changes_nothing(model, inputs):
    plain = first(inputs, [1])
    wide = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in plain.items()}
    settings = {"seeds": [3], "temperature": 1.0}
    assert torch.equal(run(model, plain, **settings), run(model, wide, **settings))


def test_mitigations_and_callback_see_every_token(model, inputs):
    steps = []
    matched = Guidance(6.0, (mitigations.temperature_matching(),))
    run(model, inputs, matched, callback=steps.append)
    assert [step.index for step in steps] == list(range(L))
    assert steps[3].guided.shape == (B, V) and set(steps[3].outputs) == {"cond", "uncond"}
    plain = guide(steps[3].cond_out, steps[3].uncond_out, 6.0)
    assert not torch.allclose(steps[3].guided, plain)


def test_half_precision(inputs):
    ids = run(make().to(torch.bfloat16), inputs, 3.0, temperature=1.0)
    assert ids.shape == (B, L) and ids.min() >= 0 and ids.max() < V


# --- the cache ---


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@torch.no_grad()
def test_views_of_a_cache_share_its_memory(llama):
    ids = torch.randint(0, 40, (4, 7))
    cache = RowCache.empty(2, rows=4, spare=3)
    for rows in (slice(0, 2), slice(2, 4)):
        view = cache.rows(rows.start, rows.stop)
        llama(ids[rows, :4], **{CACHE: view})
        assert (view.length, cache.length) == (4, 0)
    cache.length = 4
    dynamic = DynamicCache(config=llama.config)
    llama(ids[:, :4], **{CACHE: dynamic})
    for part in (slice(4, 6), slice(6, 7)):
        ours = llama(ids[:, part], **{CACHE: cache}).logits
        torch.testing.assert_close(ours, llama(ids[:, part], **{CACHE: dynamic}).logits)
    assert cache.length == 7 == cache.get_max_length()
    with pytest.raises(ValueError, match="room for 7 tokens, and 8"):
        llama(ids[:, :1], **{CACHE: cache})


@torch.no_grad()
def test_one_row_serves_all_rows_of_a_view(llama):
    ids = torch.randint(0, 40, (1, 5)).repeat(3, 1)
    cache = RowCache.empty(2, rows=3, spare=1)
    llama(ids[:1, :4], **{CACHE: cache})
    ours = llama(ids[:, 4:], **{CACHE: cache}).logits
    torch.testing.assert_close(ours[:, 0], llama(ids).logits[:, -1])


def test_views_of_views(llama, model, inputs):
    ids = torch.randint(0, 40, (4, 3), generator=torch.Generator().manual_seed(2))
    cache = RowCache.empty(2, rows=4, spare=1)
    with torch.no_grad():
        llama(ids, **{CACHE: cache})
        inner = cache.rows(1, 4).rows(1, 2)
        ours = llama(ids[:1, :1], **{CACHE: inner}).logits
        theirs = llama(torch.cat([ids[2:3], ids[:1, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(ours, theirs)
    images = JanusImages(model)
    prompts, cond = images.make_cache(B), images.condition(**inputs)
    images.prefill(cond, prompts)
    assert torch.equal(prompts.rows(1, 3).rows(1, 2).prompt, cond[2:])


def test_a_cache_can_be_used_again(llama):
    ids = torch.randint(0, 40, (2, 5))
    cache = RowCache.empty(2, rows=2, spare=0)
    with torch.no_grad():
        once = llama(ids, **{CACHE: cache}).logits
        cache.reset()
        torch.testing.assert_close(llama(ids, **{CACHE: cache}).logits, once)


def test_the_page_runs(inputs, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/integrations/token-models.md").read_text()
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "JanusFor" in block
    )
    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda name: make())

    def processor(text, **settings):
        return BatchEncoding({name: value[: len(text)] for name, value in inputs.items()})

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    page_of = {}
    exec(compile(block, "token-models.md", "exec"), page_of)
    assert page_of["images"].shape == (1, 3, 6, 6)


# --- errors ---


def test_errors(model, inputs, llama):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with pytest.raises(TypeError, match="LlamaForCausalLM, expected a JanusFor"):
        JanusImages(llama)
    with pytest.raises(ValueError, match="training mode"):
        JanusImages(make().train())
    lacking = make()
    lacking.generation_config.generation_kwargs = None
    with pytest.raises(ValueError, match="boi_token_id"):
        JanusImages(lacking)
    with pytest.raises(ValueError, match=r"begin of an image, 3, in every row"):
        generate_images(model, ids[:, :-1], seeds=[0, 1, 2])
    with pytest.raises(ValueError, match=r"begin of an image"):  # padded on the right
        generate_images(model, ids, mask.flip(1), seeds=[0, 1, 2])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        generate_images(model, ids, mask[:, 1:], seeds=[0, 1, 2])
    with pytest.raises(TypeError, match=r"input_ids is torch.float32"):
        generate_images(model, ids.float(), seeds=[0, 1, 2])
    with pytest.raises(ValueError, match="seeds has 1 entries"):
        generate_images(model, ids, seeds=[0])
    with pytest.raises(ValueError, match="scale has 2 values for a batch of 3"):
        run(model, inputs, torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match="expected a Guidance"):
        generate_images(model, ids, seeds=[0, 1, 2], guidance=3.0)
    images = JanusImages(model)
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        sample_autoregressive(images, images.condition(ids), guidance=Guidance(3.0), seeds=[0] * B)
    with pytest.raises(ValueError, match="prefill"):
        images.decode(ids, images.make_cache(B))
