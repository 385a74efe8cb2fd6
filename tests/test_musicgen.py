"""MusicGen in transformers: side by side with its own generation, and where that cannot go."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    BatchEncoding,
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    logging,
)

from unicfg import Branch, Guidance, guide
from unicfg.guidance import branches, mitigations
from unicfg.guidance.schedules import interval, linear
from unicfg.integrations.transformers.musicgen import (
    HIDDEN,
    MusicgenCodes,
    decode_codes,
    generate_codes,
)
from unicfg.sampling.randomness import generators, uniform
from unicfg.sampling.tokens import TokenFilter, draw

logging.set_verbosity_error()
B, T, K, V, F = 3, 6, 4, 32, 8
STEPS = F + K - 1


def make(seed=0, channels=1, text_width=16, **settings):
    torch.manual_seed(seed)
    text = T5Config(vocab_size=40, d_model=text_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    sizes = {"num_filters": 4, "hidden_size": 8, "codebook_size": V, "codebook_dim": 8}
    sizes |= {"upsampling_ratios": [2, 2], "num_lstm_layers": 1, "sampling_rate": 100}
    audio = EncodecConfig(target_bandwidths=[1.0], **sizes)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": V, "bos_token_id": V}
    decoder = MusicgenDecoderConfig(vocab_size=V, num_codebooks=K, audio_channels=channels, **sizes)
    config = MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder, **settings)
    model = MusicgenForConditionalGeneration(config).eval()
    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(20 if "encoder_attn" in name else 8)  # so that the text matters
    model.generation_config.pad_token_id = V
    model.generation_config.bos_token_id = V
    model.generation_config.decoder_start_token_id = V
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
    """Three texts, the first of them padded on the right."""
    ids = torch.randint(1, 40, (B, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def passes(model):
    """The rows and steps of every pass of the decoder, codebooks taken together."""
    seen = []

    def note(module, args, kwargs):
        rows, steps = kwargs["input_ids"].shape
        seen.append((rows // K, steps))

    hook = model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def run(model, inputs, s=3.0, **options):
    guidance = s if isinstance(s, Guidance) else Guidance(s)
    settings = {"seeds": range(len(inputs["input_ids"])), "temperature": 0.0, "frames": F} | options
    return generate_codes(model, **inputs, guidance=guidance, **settings)


def first(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


def its_own(model, inputs, s, steps, monkeypatch):
    """The codes that its own generation decodes."""
    decoded, decode = [], model.audio_encoder.decode

    def note(codes, *args, **kwargs):
        decoded.append(codes[0])
        return decode(codes, *args, **kwargs)

    monkeypatch.setattr(model.audio_encoder, "decode", note)
    audio = model.generate(**inputs, guidance_scale=s, do_sample=False, max_new_tokens=steps)
    monkeypatch.undo()
    return torch.stack(decoded, dim=2).flatten(1, 2), audio


def by_hand(model, inputs, s):
    """Greedy codes without a cache, one pass a branch and step; ``s`` is a function of progress."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    states = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    drawn = torch.full((len(ids), K, 1), V)
    for index in range(STEPS):
        logits = []
        for part in (1, 0):
            out = model(
                encoder_outputs=(states * part,),
                attention_mask=mask * part,
                decoder_input_ids=drawn.flatten(0, 1),
                use_cache=False,
            )
            logits.append(out.logits[:, -1].view(len(ids), K, V))
        best = guide(*logits, s(index / (STEPS - 1))).argmax(-1)
        for k in range(K):
            if not k <= index < k + F:
                best[:, k] = V
        drawn = torch.cat([drawn, best[..., None]], dim=2)
    return torch.stack([drawn[:, k, 1 + k : 1 + k + F] for k in range(K)], dim=1)


# --- equality ---


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("s", [1.5, 3.0])
def test_greedy_codes_equal_its_own_generation(inputs, s, channels, monkeypatch):
    model = make(channels=channels)
    ours = run(model, inputs, s)
    theirs, audio = its_own(model, inputs, s, F + K // channels - 1, monkeypatch)
    assert torch.equal(ours, theirs)
    assert ours.shape == (B, K, F) and len(ours.unique()) > 8
    torch.testing.assert_close(decode_codes(model, ours), audio)
    assert audio.shape[1] == channels


def test_unguided_codes_equal_its_own_generation(model, inputs, monkeypatch):
    theirs, _ = its_own(model, inputs, 1.0, STEPS, monkeypatch)
    assert torch.equal(run(model, inputs, 1.0), theirs)


@pytest.mark.parametrize("settings", [{"text_width": 32}, {"attn_implementation": "eager"}])
def test_other_architectures(inputs, settings, monkeypatch):
    model = make(**settings)
    assert hasattr(model, "enc_to_dec_proj") == ("text_width" not in settings)
    theirs, _ = its_own(model, inputs, 3.0, STEPS, monkeypatch)
    assert torch.equal(run(model, inputs, 3.0), theirs)


@pytest.mark.parametrize("settings", [{}, {"attn_implementation": "eager"}])
def test_no_text_is_the_same_alone_and_among_texts(inputs, settings):
    model = make(**settings)
    network = MusicgenCodes(model, F)
    mixed = network.condition(**inputs).flip(0)
    mixed[1] = HIDDEN
    assert torch.equal(run(model, inputs, 3.0, uncond=mixed)[1], run(model, inputs, 3.0)[1])


@pytest.mark.parametrize(
    "s", [0.0, 0.5, 1.0, interval(6.0, 0.3, 0.7), linear(0.0, 6.0), interval(3.0, 0, 0.5, 0.0)]
)
def test_every_scale_and_schedule_equals_two_passes_without_a_cache(model, inputs, s):
    with torch.no_grad():
        expected = by_hand(model, inputs, s if callable(s) else lambda progress: s)
    assert torch.equal(run(model, inputs, Guidance(s)), expected)
    assert not torch.equal(expected, run(model, inputs, 8.0))


# --- passes ---


def test_one_pass_a_step_of_the_rows_that_are_needed(model, inputs, passes):
    text, null = (B, 1), (1, 1)  # the null condition is one row, written to all
    for s, expected in (
        (3.0, [text, null, *[(2 * B, 1)] * STEPS]),
        (1.0, [text, *[(B, 1)] * STEPS]),
        (0.0, [null, *[(B, 1)] * STEPS]),
        # joins at the sixth step with one chunk, and is dropped after the eighth
        (
            interval(3.0, 0.45, 0.75),
            [text, null, *[(B, 1)] * 5, (B, 1), (B, 6), *[(2 * B, 1)] * 2, *[(B, 1)] * 3],
        ),
    ):
        passes.clear()
        run(model, inputs, Guidance(s))
        assert sorted(passes[:2]) == sorted(expected[:2])
        assert passes[2:] == expected[2:]


def test_the_encoder_runs_once_and_not_for_the_null(model, inputs):
    calls = []
    hook = model.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    run(model, inputs)
    hook.remove()
    assert calls == [1]


def test_a_negative_text_and_a_weaker_model_are_branches(model, inputs, passes):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    negative = MusicgenCodes(model, F).condition(ids.flip(0), mask.flip(0))
    against = run(model, inputs, 3.0, uncond=negative)
    assert not torch.equal(against, run(model, inputs, 3.0))
    # what is its own opposite is not moved
    assert torch.equal(
        run(model, inputs, 3.0, uncond=MusicgenCodes(model, F).condition(ids, mask)),
        run(model, inputs, 1.0),
    )
    passes.clear()
    weaker = {"weak": Branch(model=MusicgenCodes(make(1), F))}
    run(model, inputs, Guidance(branches.weak(2.0)), branches=weaker)
    assert passes == [(B, 1)] * (1 + STEPS)


# --- samples ---


def test_a_sample_depends_on_its_seed_and_scale_and_nothing_else(model, inputs):
    scales, seeds = torch.tensor([1.0, 4.0, 0.5]), [7, 8, 9]
    settings = {"temperature": 0.9, "top_k": 16, "top_p": 0.95}
    together = run(model, inputs, Guidance(scales), seeds=seeds, **settings)
    for row, (scale, seed) in enumerate(zip(scales.tolist(), seeds, strict=True)):
        alone = run(model, first(inputs, [row]), scale, seeds=[seed], **settings)
        assert torch.equal(together[[row]], alone)
    other = run(model, inputs, Guidance(scales), seeds=[17, 18, 19], **settings)
    assert not torch.equal(together, other)


def test_each_token_is_drawn_with_noise_of_its_own(model, inputs):
    steps = []
    run(model, inputs, seeds=[4, 5, 6], temperature=0.8, callback=steps.append)
    noise = uniform(generators([4, 5, 6]), (STEPS, K))
    for step in steps[K - 1 : F]:
        drawn = draw(TokenFilter(0.8)(step.guided), noise[:, step.index])
        assert torch.equal(step.ids[:, -1], drawn)


def test_padding_and_length_change_nothing(model, inputs):
    plain = first(inputs, [1])
    wide = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in plain.items()}
    settings = {"seeds": [3], "temperature": 1.0}
    codes = run(model, plain, **settings)
    assert torch.equal(codes, run(model, wide, **settings))
    longer = run(model, plain, frames=F + 3, **settings)
    assert torch.equal(codes[:, 0], longer[:, 0, :F])


@pytest.mark.parametrize(
    "name",
    ["temperature_matching", "kl_trust_region", "kl_scale", "project_logits", "plausibility"],
)
def test_mitigations_act_on_each_codebook_by_itself(model, inputs, name):
    steps = []
    method = getattr(mitigations, name)()
    run(model, inputs, Guidance(6.0, (method,)), callback=steps.append)
    assert len(steps) == STEPS and steps[-1].ids.shape == (B, STEPS, K)
    step = steps[4]
    assert step.guided.shape == (B, K, V)
    for k in range(K):
        cond, uncond = step.cond_out[:, k], step.uncond_out[:, k]
        alone = method(guide(cond, uncond, 6.0), cond, uncond)
        torch.testing.assert_close(step.guided[:, k], alone)


def test_the_delay_is_kept(model, inputs):
    steps = []
    codes = run(model, inputs, callback=steps.append)
    ids = steps[-1].ids
    for k in range(K):
        assert (ids[:, :k, k] == V).all() and (ids[:, k + F :, k] == V).all()
        assert torch.equal(ids[:, k : k + F, k], codes[:, k])
    assert codes.max() < V


def test_the_page_runs(inputs, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/integrations/token-models.md").read_text()
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "MusicgenFor" in block
    )
    monkeypatch.setattr(MusicgenForConditionalGeneration, "from_pretrained", lambda name: make())

    def processor(text, **settings):
        return BatchEncoding({name: value[: len(text)] for name, value in inputs.items()})

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    page_of = {}
    exec(compile(block, "token-models.md", "exec"), page_of)
    assert page_of["audio"].shape == (1, 1, 4 * 5 * 25)


# --- errors ---


def test_errors(model, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with pytest.raises(TypeError, match="T5EncoderModel, expected a MusicgenFor"):
        MusicgenCodes(T5EncoderModel(model.config.text_encoder), F)
    with pytest.raises(ValueError, match="training mode"):
        MusicgenCodes(make().train(), F)
    for frames in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"frames is {frames}, expected an int >= 1"):
            MusicgenCodes(model, frames)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        run(model, {"input_ids": ids, "attention_mask": mask[:, 1:]})
    with pytest.raises(ValueError, match="uncond has shape"):
        run(model, inputs, uncond=torch.full((T + 1,), HIDDEN))
    with pytest.raises(ValueError, match="seeds has 1 entries"):
        run(model, inputs, seeds=[0])
    with pytest.raises(ValueError, match="scale has 2 values for a batch of 3"):
        run(model, inputs, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"rescale works on|expected one for logits"):
        run(model, inputs, Guidance(3.0, (mitigations.rescale(),)))
    with pytest.raises(ValueError, match=r"codes has shape \(3, 2, 8\), expected \(B, 4, L\)"):
        decode_codes(model, torch.zeros(B, 2, F, dtype=torch.long))
    network = MusicgenCodes(model, F)
    with pytest.raises(ValueError, match="prefill"):
        network.decode(ids.new_empty(B, 0, K), network.make_cache(B))
