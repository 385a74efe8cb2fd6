"""VibeVoice in transformers: its diffusion head under one guidance, side by side with its own."""

import re
import threading
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    VibeVoiceConfig,
    VibeVoiceForConditionalGeneration,
    logging,
)

from unicfg import Guidance, guide
from unicfg.guidance import branches, mitigations
from unicfg.guidance.schedules import interval, linear
from unicfg.integrations.transformers.vibevoice import guided_latents, guided_vibevoice
from unicfg.sampling.randomness import generators, normal

logging.set_verbosity_error()
# numpy's, of the tables in diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PAD, EOS, BEGIN, END, AUDIO = range(5)
B, T, C, D, STEPS = 3, 6, 6, 32, 5
# the tokens of each sample: the third starts with the end of an earlier audio, the second begins anew on its way
TOKENS = [
    [AUDIO, AUDIO, AUDIO, AUDIO, EOS, PAD],
    [AUDIO, AUDIO, BEGIN, AUDIO, AUDIO, AUDIO],
    [END, AUDIO, AUDIO, AUDIO, AUDIO, AUDIO],
]
ACTIVE = [[row for row in range(B) if TOKENS[row][i] == AUDIO] for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two would wait for one another in networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed=0):
    torch.manual_seed(seed)
    text = {"model_type": "qwen2", "vocab_size": 40, "hidden_size": D, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    audio = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
    audio |= {"kernel_size": 3, "hidden_size": C}
    head = {"num_hidden_layers": 2, "intermediate_size": 48, "frequency_embedding_size": 16}
    config = VibeVoiceConfig(
        text_config=text,
        audio_config={"model_type": "vibevoice_acoustic_tokenizer"} | audio,
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder"} | audio,
        diffusion_head_config=head,
        pad_token_id=PAD,
        eos_token_id=EOS,
        audio_bos_token_id=BEGIN,
        audio_eos_token_id=END,
        audio_token_id=AUDIO,
    )
    model = VibeVoiceForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)  # so that the prompt matters
    return model


def scheduler(**settings):
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"} | settings
    return diffusers.DPMSolverMultistepScheduler(**settings)


class Fixed:
    """Chooses the tokens, so that what is compared is the audio."""

    def __init__(self, tokens):
        self.tokens, self.index = tokens, 0

    def __call__(self, ids, scores):
        chosen = torch.full_like(scores, -1e9)
        for row, tokens in enumerate(self.tokens):
            chosen[row, tokens[self.index]] = 0
        self.index += 1
        return chosen


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def inputs():
    ids = torch.randint(5, 40, (B, T), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = BEGIN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def states():
    noise, cond, uncond = (
        torch.randn(B, width, generator=torch.Generator().manual_seed(width + i))
        for i, width in enumerate((C, D, D))
    )
    return noise, cond, uncond


@pytest.fixture
def passes(model):
    """The rows of every pass of the language model, and of the head."""
    seen = {"text": [], "head": []}

    def note_text(module, args, kwargs):
        seen["text"].append(tuple(kwargs["inputs_embeds"].shape[:2]))

    def note_head(module, args, kwargs):
        seen["head"].append(len(args[0]))

    hooks = [
        model.model.language_model.register_forward_pre_hook(note_text, with_kwargs=True),
        model.model.diffusion_head.register_forward_pre_hook(note_head, with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def speak(model, inputs, tokens=TOKENS, **options):
    """The audio of each sample; the model is one of theirs, or a guided one."""
    settings = {"max_new_tokens": 6, "num_diffusion_steps": STEPS, "noise_scheduler": scheduler()}
    return model.generate(
        **inputs, logits_processor=LogitsProcessorList([Fixed(tokens)]), **(settings | options)
    )


def guided(model, inputs, s, seeds=(0, 1, 2), **options):
    guidance = s if isinstance(s, Guidance) else Guidance(s)
    return speak(guided_vibevoice(model, guidance, seeds=seeds), inputs, **options)


def assert_equal_speech(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        # the audio of random weights is quiet
        assert float((own - other).norm() / other.norm()) < 1e-4


def differ(ours, theirs):
    return all(
        float((own - other).norm() / other.norm()) > 1e-3
        for own, other in zip(ours, theirs, strict=True)
    )


# --- the head ---


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 1.3, 5.0])
def test_latents_equal_those_of_its_own_loop(model, states, s):
    _, cond, uncond = states
    torch.manual_seed(3)
    with torch.no_grad():
        theirs = model._sample_audio_latent(cond, uncond, scheduler(), STEPS, s)
    torch.manual_seed(3)
    noise = torch.randn(2 * B, C)[:B]
    ours = guided_latents(
        model.model.diffusion_head,
        scheduler(),
        noise,
        cond,
        uncond,
        guidance=Guidance(s),
        steps=STEPS,
    )
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-4, atol=1e-4)


def test_a_step_is_one_pass_of_the_rows_that_are_needed(model, states, passes):
    head = model.model.diffusion_head
    for s, rows in (
        (3.0, [2 * B] * STEPS),
        (1.0, [B] * STEPS),
        (0.0, [B] * STEPS),
        (interval(3.0, 0.25, 0.5), [B, 2 * B, 2 * B, B, B]),
    ):
        passes["head"].clear()
        guided_latents(head, scheduler(), *states, guidance=Guidance(s), steps=STEPS)
        assert passes["head"] == rows
    # what is not needed need not be there
    guided_latents(head, scheduler(), *states[:2], guidance=Guidance(1.0), steps=STEPS)


def test_a_schedule_runs_over_the_denoising_steps(model, states):
    """By hand: the head twice a step, and the formula between it and the scheduler."""
    head, own, schedule = model.model.diffusion_head, scheduler(), linear(1.0, 6.0)
    noise, cond, uncond = states
    own.set_timesteps(STEPS)
    x = noise
    with torch.no_grad():
        for i, t in enumerate(own.timesteps):
            outs = [head(x, t.repeat(B).to(x), condition=state) for state in (cond, uncond)]
            x = own.step(guide(*outs, schedule(i / (STEPS - 1))), t, x).prev_sample
    ours = guided_latents(head, scheduler(), *states, guidance=Guidance(schedule), steps=STEPS)
    torch.testing.assert_close(ours, x)


def test_mitigations_work_in_their_own_space(model, states):
    """An x0 threshold bounds x0 although the head predicts v; the last step goes to x0 itself."""
    head = model.model.diffusion_head
    plain = guided_latents(head, scheduler(), *states, guidance=Guidance(8.0), steps=STEPS)
    bounded = Guidance(8.0, (mitigations.static_threshold(0.3),))
    ours = guided_latents(head, scheduler(), *states, guidance=bounded, steps=STEPS)
    assert float(plain.abs().max()) > 0.5 > 0.31 > float(ours.abs().max())


def test_no_state_is_left_over(model, states):
    head, own = model.model.diffusion_head, scheduler()
    momentum = Guidance(4.0, (mitigations.apg(momentum=-0.5),))
    once, again = (
        guided_latents(head, own, *states, guidance=momentum, steps=STEPS) for _ in range(2)
    )
    assert torch.equal(once, again)
    assert own.num_inference_steps is None  # the caller's is as it was


def test_noise_of_the_steps_belongs_to_the_sample(model, states):
    head, noisy = model.model.diffusion_head, scheduler(algorithm_type="sde-dpmsolver++")
    settings = {"guidance": Guidance(2.0), "steps": STEPS}
    together = guided_latents(head, noisy, *states, sources=generators([5, 6, 7]), **settings)
    alone = guided_latents(
        head, noisy, *(state[1:2] for state in states), sources=generators([6]), **settings
    )
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


# --- the whole model ---


@pytest.mark.parametrize("s", [1.0, 1.3, 3.0])
def test_speech_equals_its_own_generation(model, inputs, s, monkeypatch):
    sources = generators([0, 1, 2])
    noises = iter([normal([sources[row] for row in rows], (C,)) for rows in ACTIVE])
    ours = guided(model, inputs, s)
    assert [audio.shape[-1] for audio in ours] == [4 * 4, 5 * 4, 5 * 4]
    assert differ(ours, guided(model, inputs, s + 1.0))
    # theirs draws noise for both halves and uses that of the first
    monkeypatch.setattr(torch, "randn", lambda rows, width: next(noises).repeat(2, 1))
    theirs = speak(model, inputs, guidance_scale=s)
    monkeypatch.undo()
    assert_equal_speech(ours, theirs)


def test_the_null_branch_is_run_where_it_is_needed(model, inputs, passes):
    for s, text in ((1.0, 6), (Guidance(linear(1.0, 1.0)), 6), (3.0, 12), (0.0, 12)):
        passes["text"].clear()
        guided(model, inputs, s)
        assert len(passes["text"]) == text
    # the language model of transformers' own runs a third time a token, for its logits
    passes["text"].clear()
    speak(model, inputs, guidance_scale=3.0)
    assert len(passes["text"]) == 18


def test_a_sample_depends_on_its_seed_and_scale_and_nothing_else(model, inputs):
    """As long as its audio goes on: where it pauses, their loop goes on with the null branch if another sample does."""
    tokens = [[AUDIO] * length + [EOS] + [PAD] * (5 - length) for length in (5, 2, 4)]
    scales, seeds = [2.0, 4.0, 0.5], [7, 8, 9]
    together = guided(model, inputs, Guidance(torch.tensor(scales)), seeds, tokens=tokens)
    for row in range(B):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = guided(model, one, scales[row], [seeds[row]], tokens=[tokens[row]])
        assert_equal_speech(together[row : row + 1], alone)
    other = guided(model, inputs, Guidance(torch.tensor(scales)), [17, 18, 19], tokens=tokens)
    assert differ(together, other)


def test_every_call_starts_from_the_seeds_and_the_model_is_left_as_it_is(model, inputs):
    before = set(vars(model))
    voice = guided_vibevoice(model, Guidance(2.0), seeds=[0, 1, 2])
    first, second = speak(voice, inputs), speak(voice, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert type(model) is VibeVoiceForConditionalGeneration and set(vars(model)) == before
    assert voice.lm_head.weight is model.lm_head.weight  # not a copy


def test_two_calls_at_once_do_not_meet(model, inputs):
    voice = guided_vibevoice(model, Guidance(2.0), seeds=[0, 1, 2])
    expected, results = speak(voice, inputs), []
    threads = [
        threading.Thread(target=lambda: results.append(speak(voice, inputs))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_equal_speech(result, expected)
    assert len(results) == 2


def test_the_scale_of_a_checkpoint_does_not_guide_twice(model, inputs, passes, monkeypatch):
    expected = guided(model, inputs, 2.0)
    passes["text"].clear()
    monkeypatch.setattr(model.generation_config, "guidance_scale", 1.3)
    assert_equal_speech(guided(model, inputs, 2.0), expected)
    assert len(passes["text"]) == 12  # with a pass for the logits it would be 18


def test_the_page_runs(inputs, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/integrations/token-models.md").read_text()
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "VibeVoiceFor" in block
    )
    cls = VibeVoiceForConditionalGeneration
    monkeypatch.setattr(cls, "from_pretrained", lambda name: make())
    page_of = {"inputs": {name: value[:1] for name, value in inputs.items()}}
    exec(compile(block, "token-models.md", "exec"), page_of)
    assert len(page_of["audio"]) == 1


# --- errors ---


def test_errors(model, inputs, states):
    head, (noise, cond, uncond) = model.model.diffusion_head, states
    with pytest.raises(TypeError, match="Qwen2ForCausalLM, expected a VibeVoiceFor"):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
        other = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=1, num_key_value_heads=1, **small))
        guided_vibevoice(other, Guidance(2.0), seeds=[0])
    with pytest.raises(ValueError, match="training mode"):
        guided_vibevoice(make().train(), Guidance(2.0), seeds=[0])
    with pytest.raises(TypeError, match="expected a Guidance"):
        guided_vibevoice(model, 2.0, seeds=[0])
    with pytest.raises(ValueError, match="'negative'"):
        guided_vibevoice(model, Guidance(branches.negative(3.0, 1.5)), seeds=[0])
    with pytest.raises(TypeError, match=r"seed is 0.5"):
        guided_vibevoice(model, Guidance(2.0), seeds=[0.5])
    with pytest.raises(ValueError, match="seeds has 1 entries for a batch of 3"):
        guided(model, inputs, 2.0, [0])
    with pytest.raises(ValueError, match="scale has 2 values for a batch of 3"):
        guided(model, inputs, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"guidance_scale is 1.3 beside a guidance of scale 2.0"):
        guided(model, inputs, 2.0, guidance_scale=1.3)
    with pytest.raises(ValueError, match="expected one for denoisers"):
        guided(model, inputs, Guidance(2.0, (mitigations.temperature_matching(),)))
    with pytest.raises(ValueError, match="expected uncond_states"):
        guided_latents(head, scheduler(), noise, cond, guidance=Guidance(2.0))
    with pytest.raises(ValueError, match=r"uncond_states has shape \(2, 32\), expected \(3, D\)"):
        guided_latents(head, scheduler(), noise, cond, uncond[:2], guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction', expected 'epsilon'"):
        guided_latents(head, scheduler(prediction_type="flow_prediction"), noise, cond)
    with pytest.raises(FloatingPointError, match=r"denoising step 0.*uncond"):
        guided_latents(head, scheduler(), noise, cond, uncond * torch.nan, guidance=Guidance(2.0))
