"""Guidance in diffusers: pipelines run from start to end with tiny random networks, beside their own guidance and hand
loops; the guider beside that of diffusers, and inside a modular pipeline."""

import contextlib
import copy
import math
import runpy
import threading
from pathlib import Path

import pytest
import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UVit2DModel,
    VQModel,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

from unicfg import Branch, Guidance, guide
from unicfg.guidance import branches, mitigations, schedules, spaces
from unicfg.integrations.diffusers import GuidanceGuider, Layout, guided_pipeline
from unicfg.sampling.branches import progress_at

pytestmark = [
    # diffusers hands tensors to numpy in a way that numpy 2 is about to drop
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # Stable Diffusion would like to see another offset in the schedulers' own settings
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples/6_diffusers_pipeline.py"))
STEPS = 5
BATCH = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(out, wanted):
    """Equal up to rounding, where a random network may make latents large."""
    largest = max(1.0, wanted.abs().max().item())
    assert out.shape == wanted.shape
    assert (out - wanted).abs().max() <= 1e-5 * largest


def livened(network):
    """A network whose output does not begin at zero, and depends on its condition."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def ddim(prediction="v_prediction"):
    return DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction)


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()


def unet(**changes):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    return livened(UNet2DConditionModel(**{**settings, **changes}))


def embeds(tokens=4, width=16, batch=BATCH):
    return {
        "prompt_embeds": randn(batch, tokens, width, seed=3),
        "negative_prompt_embeds": randn(batch, tokens, width, seed=4),
    }


def pooled(width):
    return {
        "pooled_prompt_embeds": randn(BATCH, width, seed=5),
        "negative_pooled_prompt_embeds": randn(BATCH, width, seed=6),
    }


def masks(tokens=4):
    ones = torch.ones(BATCH, tokens, dtype=torch.long)
    other = ones.clone()
    other[:, 2:] = 0
    return {"prompt_attention_mask": ones, "negative_prompt_attention_mask": other}


def stable_diffusion(scheduler=None):
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"latents": randn(BATCH, 4, 8, 8), **embeds()}


def stable_diffusion_xl():
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    # what the pipeline asks of its second encoder
    pipe.text_encoder_2 = Projection()
    return pipe, {"latents": randn(BATCH, 4, 8, 8), **embeds(), **pooled(8)}


class Projection(torch.nn.Module):
    class config:
        projection_dim = 8

    dtype, device = torch.float32, torch.device("cpu")


def stable_diffusion_3():
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=livened(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    size = 8 * pipe.vae_scale_factor
    arguments = {"latents": randn(BATCH, 4, 8, 8), **embeds(), **pooled(8)}
    return pipe, {**arguments, "height": size, "width": size}


def dit(out_channels=8):
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(livened(network), Plain(), ddim("epsilon"))
    return pipe, {"class_labels": [207, 360]}


class Plain(torch.nn.Module):
    """In place of a VAE: shows the latents, before the pipeline clamps them to [0, 1]."""

    class config:
        scaling_factor = 1.0

    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents):
        self.latents = latents
        return type("Decoded", (), {"sample": latents})


def pixart(kind):
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    pipe = kind(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=livened(network),
        scheduler=DPMSolverMultistepScheduler(),
    )
    size = 8 * pipe.vae_scale_factor
    arguments = {"latents": randn(BATCH, 4, 8, 8), **embeds(), **masks(), "negative_prompt": None}
    return pipe, {**arguments, "height": size, "width": size, "use_resolution_binning": False}


def amused():
    torch.manual_seed(0)
    network = UVit2DModel(
        hidden_size=16,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=12,
        codebook_size=10,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        block_num_heads=2,
        intermediate_size=16,
        sample_size=8,
    )
    vq = VQModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=10,
        lookup_from_codebook=True,
    )
    pipe = AmusedPipeline(vq.eval(), None, None, livened(network), AmusedScheduler(11))
    arguments = {
        "prompt_embeds": randn(BATCH, 8, seed=3),
        "encoder_hidden_states": randn(BATCH, 4, 16, seed=4),
        "negative_prompt_embeds": randn(BATCH, 8, seed=5),
        "negative_encoder_hidden_states": randn(BATCH, 4, 16, seed=6),
    }
    return pipe, arguments


PIPELINES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "dit": dit,
    "dit without variance": lambda: dit(4),
    "pixart": lambda: pixart(PixArtAlphaPipeline),
    "pixart sigma": lambda: pixart(PixArtSigmaPipeline),
    "amused": amused,
}


def run(call, pipe, arguments, steps=STEPS, **changes):
    """Latents or ids of a pipeline, or of a guided one."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator().manual_seed(0), **arguments, **changes}
    if isinstance(pipe, DiTPipeline):
        call(num_inference_steps=steps, output_type="pt", **arguments)
        return pipe.vae.latents
    return call(num_inference_steps=steps, output_type="latent", return_dict=False, **arguments)[0]


def guided(pipe, arguments, guidance, steps=STEPS, **changes):
    return run(guided_pipeline(pipe, guidance), pipe, arguments, steps, **changes)


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


class rows_of:
    """Counts the rows of each call of a network."""

    def __init__(self, network):
        self.network = network

    def __enter__(self):
        self.rows = []
        self.hook = self.network.register_forward_hook(self._note)
        return self.rows

    def _note(self, module, args, result):
        out = getattr(result, "sample", result)
        self.rows.append(len(out if isinstance(out, torch.Tensor) else out[0]))

    def __exit__(self, *error):
        self.hook.remove()


@contextlib.contextmanager
def seen_by(network, samples):
    """Notes what a network is shown."""

    def note(module, args, kwargs):
        samples.append(args[0] if args else kwargs["sample"])

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    yield
    hook.remove()


# --- pipelines without guiders


@pytest.mark.parametrize("name", PIPELINES)
def test_a_fixed_scale_is_the_pipelines_own(name):
    pipe, arguments = PIPELINES[name]()
    plain = run(pipe, pipe, arguments, guidance_scale=1.0)
    wanted = run(pipe, pipe, arguments, guidance_scale=4.0)
    with rows_of(network_of(pipe)) as rows:
        out = guided(pipe, arguments, Guidance(4.0))
    assert not torch.equal(plain, wanted)
    near(out, wanted)
    assert rows == [2 * BATCH] * STEPS


@pytest.mark.parametrize("name", PIPELINES)
def test_scale_1_is_the_condition_alone_and_runs_its_rows_alone(name):
    pipe, arguments = PIPELINES[name]()
    wanted = run(pipe, pipe, arguments, guidance_scale=1.0)
    with rows_of(network_of(pipe)) as rows:
        out = guided(pipe, arguments, Guidance(1.0))
    near(out, wanted)
    assert rows == [BATCH] * STEPS


@pytest.mark.parametrize("name", ["sd", "dit", "pixart", "amused"])
def test_scale_0_is_the_null_condition_alone(name):
    pipe, arguments = PIPELINES[name]()
    if name == "dit":
        swapped = {"class_labels": [1000, 1000]}
    else:
        swapped = dict(arguments)
        for key in arguments:
            if f"negative_{key}" in arguments:
                swapped[key] = arguments[f"negative_{key}"]
    wanted = run(pipe, pipe, swapped, guidance_scale=1.0)
    with rows_of(network_of(pipe)) as rows:
        out = guided(pipe, arguments, Guidance(0.0))
    near(out, wanted)
    assert rows == [BATCH] * STEPS


def level_at(scheduler, t, x, space):
    kept = scheduler.alphas_cumprod[int(t)]
    return spaces.Level(x, kept.sqrt(), (1 - kept).sqrt(), space)


def hand_loop(pipe, arguments, guidance, space):
    """The loop of Stable Diffusion written out, two passes a step, guided in float32 with our own conversions."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    guidance = guidance.begin(space)
    x = arguments["latents"] * scheduler.init_noise_sigma
    total = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            cond, uncond = (
                pipe.unet(seen, t, encoder_hidden_states=arguments[key]).sample
                for key in ("prompt_embeds", "negative_prompt_embeds")
            )
        level = level_at(scheduler, t, seen, space)
        out = guidance.combine(progress_at(i, total), cond, uncond, level)
        x = scheduler.step(out, t, x).prev_sample
    return x


GUIDANCES = {
    "interval": Guidance(schedules.interval(5.0, 0.2, 0.8)),
    "linear": Guidance(schedules.linear(1.0, 6.0)),
    "per sample": Guidance(torch.tensor([1.0, 5.0])),
    "rescale": Guidance(5.0, [mitigations.rescale(0.7)]),
    "apg": Guidance(5.0, [mitigations.apg(threshold=2.5)]),
    "apg with momentum": Guidance(5.0, [mitigations.apg(momentum=-0.5)]),
    "two of them": Guidance(
        schedules.linear(1.0, 6.0), [mitigations.apg(), mitigations.dynamic_threshold(0.9)]
    ),
    "no space": Guidance(5.0, [mitigations.frequency_decoupled()]),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", GUIDANCES)
def test_schedules_and_mitigations_are_those_of_a_hand_loop(name, prediction):
    """In doubles: the loop runs its branches one by one, and a threshold may enlarge what rounding makes of that."""
    pipe, arguments = stable_diffusion(DDIMScheduler(clip_sample=False, prediction_type=prediction))
    pipe.to(torch.float64)
    arguments = {key: own.double() for key, own in arguments.items()}
    space = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    wanted = hand_loop(pipe, arguments, GUIDANCES[name], space)
    out = guided(pipe, arguments, GUIDANCES[name])
    near(out, wanted)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(timestep_spacing="trailing"),
        PNDMScheduler(skip_prk_steps=True),
        DPMSolverMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_noise_levels_of_other_schedulers(scheduler):
    """Rounded timesteps are the level to within their rounding."""
    pipe, arguments = stable_diffusion(scheduler)
    guidance = GUIDANCES["apg"]
    wanted = hand_loop(pipe, arguments, guidance, "eps")
    plain = hand_loop(pipe, arguments, Guidance(5.0), "eps")
    out = guided(pipe, arguments, guidance)
    assert (plain - wanted).abs().max() > 0.1
    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)


def test_rescale_is_that_of_the_pipeline_where_it_predicts_v():
    """The pipeline rescales what the network predicts, whatever that is; the paper and this library rescale v."""
    for prediction, equal in (("v_prediction", True), ("epsilon", False)):
        pipe, arguments = stable_diffusion(ddim(prediction))
        theirs = run(pipe, pipe, arguments, guidance_scale=5.0, guidance_rescale=0.7)
        ours = guided(pipe, arguments, GUIDANCES["rescale"])
        assert torch.allclose(ours, theirs, atol=1e-4) == equal


def test_a_flow_is_mitigated_at_its_own_levels():
    pipe, arguments = stable_diffusion_3()
    guidance = Guidance(5.0, [mitigations.apg(threshold=2.5)])
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = arguments["latents"]
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            cond, uncond = (
                pipe.transformer(
                    hidden_states=x,
                    timestep=t.expand(BATCH),
                    encoder_hidden_states=arguments[f"{prefix}prompt_embeds"],
                    pooled_projections=arguments[f"{prefix}pooled_prompt_embeds"],
                ).sample
                for prefix in ("", "negative_")
            )
        sigma = scheduler.sigmas[i]
        # x0 = x - sigma * velocity, where x = (1 - sigma) x0 + sigma eps
        c, u = x - sigma * cond, x - sigma * uncond
        g = mitigations.apg(threshold=2.5)(guide(c, u, 5.0), c, u)
        x = scheduler.step((x - g) / sigma, t, x).prev_sample
    near(guided(pipe, arguments, guidance), x)


def test_an_interval_saves_rows():
    pipe, arguments = stable_diffusion()
    with rows_of(pipe.unet) as rows:
        guided(pipe, arguments, GUIDANCES["interval"])
    assert rows == [BATCH, 2 * BATCH, 2 * BATCH, 2 * BATCH, BATCH]


def test_an_interval_in_noise_levels():
    pipe, arguments = stable_diffusion()
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    ratios = ((1 - kept) / kept).sqrt().tolist()
    guidance = Guidance(schedules.noise_interval(5.0, ratios[3] * 0.99, ratios[1] * 1.01))
    with rows_of(pipe.unet) as rows:
        out = guided(pipe, arguments, guidance)
    assert rows == [BATCH, 2 * BATCH, 2 * BATCH, 2 * BATCH, BATCH]
    torch.testing.assert_close(out, guided(pipe, arguments, GUIDANCES["interval"]))


def test_of_a_token_model_the_interval_is_in_the_share_revealed():
    """With the cosine schedule of five steps the shares are 0, .07, .28, .6 and 1."""
    pipe, arguments = amused()
    with rows_of(pipe.transformer) as rows:
        guided(pipe, arguments, Guidance(schedules.interval(4.0, 0.2, 0.7)))
    assert rows == [BATCH, BATCH, 2 * BATCH, 2 * BATCH, BATCH]


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "pixart"])
def test_one_scale_per_sample(name):
    """A sample is drawn as by its own scale alone."""
    pipe, arguments = PIPELINES[name]()
    both = guided(pipe, arguments, Guidance(torch.tensor([2.0, 6.0])))
    for index, s in enumerate((2.0, 6.0)):
        alone = guided(pipe, arguments, Guidance(s))
        near(both[index], alone[index])
        assert not torch.allclose(both[1 - index], alone[1 - index], atol=1e-2)


def logits_of_amused(pipe, arguments, guidance):
    """What the guided network returns at the first step, and both outputs of the network itself."""
    seen = []
    step = AmusedScheduler.step

    def note(self, model_output, *args, **kwargs):
        seen.append(model_output)
        return step(self, model_output, *args, **kwargs)

    AmusedScheduler.step = note
    try:
        guided(pipe, arguments, guidance, steps=1)
    finally:
        AmusedScheduler.step = step
    ids = torch.full((BATCH, 8, 8), 11)
    size = 8 * pipe.vae_scale_factor
    micro = torch.tensor([[size, size, 0, 0, 6]]).float().expand(BATCH, -1)
    with torch.no_grad():
        cond, uncond = (
            pipe.transformer(
                ids,
                micro_conds=micro,
                pooled_text_emb=arguments[f"{prefix}prompt_embeds"],
                encoder_hidden_states=arguments[f"{prefix}encoder_hidden_states"],
            )
            for prefix in ("", "negative_")
        )
    return seen[0], cond, uncond


def test_one_scale_per_sample_of_a_token_model():
    """Its samples share one source of noise, so what is compared are the logits they are drawn from."""
    pipe, arguments = amused()
    out, cond, uncond = logits_of_amused(pipe, arguments, Guidance(torch.tensor([2.0, 6.0])))
    for index, s in enumerate((2.0, 6.0)):
        near(out[index], guide(cond, uncond, s)[index])


def test_mitigations_of_logits_see_rows_of_tokens():
    """The network has the tokens in its second dimension, and what is masked stays out without NaN."""
    pipe, arguments = amused()
    chain = [mitigations.temperature_matching(0.5), mitigations.top_k_of_cond(3)]
    out, cond, uncond = logits_of_amused(pipe, arguments, Guidance(4.0, chain))
    c, u = cond.permute(0, 2, 3, 1), uncond.permute(0, 2, 3, 1)
    wanted = chain[1](chain[0](guide(c, u, 4.0), c, u), c, u)
    out = out.permute(0, 2, 3, 1)
    masked = wanted.isneginf()
    assert masked.sum() == 7 * BATCH * 64
    assert (out[masked] == torch.finfo(out.dtype).min).all()
    near(out[~masked], wanted[~masked])
    assert guided(pipe, arguments, Guidance(4.0, chain)).max() < 10


def test_the_variance_of_dit_takes_no_part():
    """Norms are those of the four channels that are guided, of the eight that the network returns."""
    pipe, arguments = dit()
    guidance = Guidance(5.0, [mitigations.apg(threshold=1.0)])
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.randn((BATCH, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            cond, uncond = (
                pipe.transformer(
                    x, timestep=t.expand(BATCH), class_labels=torch.tensor(labels)
                ).sample[:, :4]
                for labels in ([207, 360], [1000, 1000])
            )
        level = level_at(scheduler, t, x, "eps")
        out = guidance.combine(progress_at(i, STEPS), cond, uncond, level)
        x = scheduler.step(out, t, x).prev_sample
    near(guided(pipe, arguments, guidance), x)


def test_a_picture_to_start_from():
    """Progress runs from 0 to 1 over the steps that are left, and the noise levels are theirs."""
    source, arguments = stable_diffusion()
    pipe = StableDiffusionImg2ImgPipeline(**source.components, requires_safety_checker=False)
    del arguments["latents"]
    arguments = {**arguments, "image": torch.rand(BATCH, 3, 16, 16), "strength": 0.6}
    wanted = run(pipe, pipe, arguments, guidance_scale=4.0)
    out = guided(pipe, arguments, Guidance(4.0))
    near(out, wanted)
    asked, timesteps = [], pipe.scheduler.timesteps[2:]

    def schedule(progress):
        asked.append(progress)
        return 4.0

    # the first step by hand, from what the pipeline starts with
    starts = []
    with seen_by(pipe.unet, starts):
        out = guided(pipe, arguments, Guidance(schedule, [mitigations.apg()]), steps=5)
    assert sorted(set(asked)) == [0.0, 0.5, 1.0] and len(starts) == 3
    first, second = starts[0].chunk(2)[0], starts[1].chunk(2)[0]
    with torch.no_grad():
        cond, uncond = (
            pipe.unet(first, timesteps[0], encoder_hidden_states=arguments[key]).sample
            for key in ("prompt_embeds", "negative_prompt_embeds")
        )
    level = level_at(pipe.scheduler, timesteps[0], first, "v")
    out = Guidance(4.0, [mitigations.apg()]).combine(0.0, cond, uncond, level)
    x = pipe.scheduler.step(out, timesteps[0], first).prev_sample
    near(second, x)


def test_a_start_at_the_timestep_that_pndm_lists_twice():
    """It is not known before the second call which of the two it was."""
    source, arguments = stable_diffusion()
    parts = source.components | {"scheduler": PNDMScheduler(skip_prk_steps=True)}
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    del arguments["latents"]
    arguments = {**arguments, "image": torch.rand(BATCH, 3, 16, 16), "strength": 0.6}
    scheduler = copy.deepcopy(pipe.scheduler)  # of which the pipeline changes a setting
    scheduler.set_timesteps(5)
    steps = scheduler.timesteps[2:]  # what is left of t0, t1, t1, t2, t3, t4
    assert steps[0] == scheduler.timesteps[1]
    share = float(scheduler.alphas_cumprod[steps[2]])
    ratio = ((1 - share) / share) ** 0.5
    for schedule, rows in (
        (schedules.interval(4.0, 1.0, 1.0), [1, 1, 1, 2]),
        (schedules.noise_interval(4.0, ratio * 0.999, ratio * 1.001), [1, 1, 2, 1]),
    ):
        seen = []
        with seen_by(pipe.unet, seen):
            guided(pipe, arguments, Guidance(schedule), steps=5)
        assert [len(x) for x in seen] == [count * BATCH for count in rows]


def test_each_evaluation_of_a_second_order_scheduler_is_one():
    pipe, arguments = stable_diffusion(HeunDiscreteScheduler())
    with rows_of(pipe.unet) as rows:
        guided(pipe, arguments, Guidance(schedules.interval(3.0, 0.0, 0.5), [mitigations.apg()]))
    assert rows == [4, 4, 4, 4, 4, 2, 2, 2, 2]


def test_another_network_for_a_weak_branch():
    pipe, arguments = stable_diffusion()
    small = unet(block_out_channels=(4, 8))
    call = guided_pipeline(
        pipe, Guidance(branches.weak(2.0)), branches={"weak": Branch(model=small)}
    )
    with rows_of(pipe.unet) as rows, rows_of(small) as small_rows:
        out = run(call, pipe, arguments)
    assert rows == small_rows == [BATCH] * STEPS
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = arguments["latents"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            strong, weak = (
                network(x, t, encoder_hidden_states=arguments["prompt_embeds"]).sample
                for network in (pipe.unet, small)
            )
        x = scheduler.step(guide(strong, weak, 2.0), t, x).prev_sample
    near(out, x)


def test_nothing_is_left_on_the_pipeline_even_after_an_error():
    pipe, arguments = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    before = {key: id(value) for key, value in vars(pipe).items()}
    network_before = dict(vars(pipe.unet))
    timesteps, config = pipe.scheduler.timesteps.clone(), dict(pipe.config)

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("stop here")

    call = guided_pipeline(pipe, GUIDANCES["apg"])
    with pytest.raises(RuntimeError, match="stop here"):
        call(callback_on_step_end=fail, **arguments)
    call(num_inference_steps=3, output_type="latent", **arguments)
    assert {key: id(value) for key, value in vars(pipe).items()} == before
    assert dict(vars(pipe.unet)) == network_before and dict(pipe.config) == config
    assert torch.equal(pipe.scheduler.timesteps, timesteps)


def test_momentum_does_not_outlive_a_call():
    pipe, arguments = stable_diffusion()
    call = guided_pipeline(pipe, GUIDANCES["apg with momentum"])
    assert torch.equal(run(call, pipe, arguments), run(call, pipe, arguments))


def test_two_guidances_of_one_pipeline_at_the_same_time():
    """Each call waits for the other in every step."""
    pipe, arguments = stable_diffusion()
    names = ["apg with momentum", "linear"]
    alone = {name: guided(pipe, arguments, GUIDANCES[name]) for name in names}
    barrier, together = threading.Barrier(2, timeout=60), {}

    def wait(pipe, step, timestep, tensors):
        barrier.wait()
        return tensors

    def draw(name):
        together[name] = guided(pipe, arguments, GUIDANCES[name], callback_on_step_end=wait)

    threads = [threading.Thread(target=draw, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert torch.equal(together[name], alone[name])


class Mine(StableDiffusionPipeline):
    """A pipeline of one's own."""


def test_another_pipeline_by_its_layout():
    source, arguments = stable_diffusion()
    pipe = Mine(**source.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"pipe is a .*Mine, expected one of StableDiffusionPipe"):
        guided_pipeline(pipe, Guidance(3.0))
    layout = Layout("unet", "sample", "timestep", ("encoder_hidden_states",))
    wanted = guided(source, arguments, Guidance(3.0))
    out = run(guided_pipeline(pipe, Guidance(3.0), layout=layout), pipe, arguments)
    torch.testing.assert_close(out, wanted)
    # halves in the other order are the other branches: u + 3 (c - u) = c - 2 (u - c)
    swapped = Layout("unet", "sample", "timestep", ("encoder_hidden_states",), ("cond", "uncond"))
    out = run(guided_pipeline(pipe, Guidance(-2.0), layout=swapped), pipe, arguments)
    near(out, wanted)
    wrong = Layout("unet", "sample", "timestep", ("encoder_hidden_states", "timestep_cond"))
    run(guided_pipeline(pipe, Guidance(1.0), layout=wrong), pipe, arguments)  # None has no rows


def flux():
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    nothing = dict.fromkeys(["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"])
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler=scheduler, vae=vae(), transformer=network, **nothing)


def test_pipelines_that_cannot_be_guided():
    pipe, arguments = stable_diffusion()
    with pytest.raises(ValueError, match="pipe is guided already"):
        guided_pipeline(guided_pipeline(pipe, Guidance(2.0)), Guidance(3.0))
    with pytest.raises(TypeError, match="pipe is a UNet2DConditionModel, expected a pipeline"):
        guided_pipeline(pipe.unet, Guidance(3.0))
    with pytest.raises(ValueError, match="guidance_embeds = True: it takes the scale as an input"):
        guided_pipeline(flux(), Guidance(3.0))
    distilled, _ = stable_diffusion()
    distilled.unet = unet(time_cond_proj_dim=4)
    with pytest.raises(ValueError, match="time_cond_proj_dim = 4: it takes the scale as an input"):
        guided_pipeline(distilled, Guidance(3.0))

    def nest(pipe, step, timestep, tensors):
        guided_pipeline(pipe, Guidance(3.0))

    with pytest.raises(ValueError, match="the copy of a guided pipeline"):
        guided(pipe, arguments, Guidance(3.0), callback_on_step_end=nest)
    layout = Layout("transformer", "sample", "timestep", ())
    with pytest.raises(
        ValueError, match="network 'transformer', which StableDiffusionPipeline lac"
    ):
        guided_pipeline(pipe, Guidance(3.0), layout=layout)
    with pytest.raises(ValueError, match="order is"):
        Layout("unet", "sample", "timestep", (), ("cond", "cond"))


def test_guidance_that_a_pipeline_cannot_run():
    pipe, arguments = stable_diffusion()
    with pytest.raises(TypeError, match=r"guidance is 3\.0, expected a Guidance"):
        guided_pipeline(pipe, 3.0)
    with pytest.raises(ValueError, match=r"branches \['negative'\]"):
        guided_pipeline(pipe, Guidance(branches.negative(3.0, 1.0)))
    with pytest.raises(ValueError, match="cfg_pp"):
        guided_pipeline(pipe, Guidance(branches.cfg_pp(0.6)))
    with pytest.raises(ValueError, match="top_k_of_cond works on logits"):
        guided_pipeline(pipe, Guidance(3.0, [mitigations.top_k_of_cond(2)]))
    with pytest.raises(ValueError, match="apg works on x0"):
        guided_pipeline(amused()[0], Guidance(3.0, [mitigations.apg()]))
    weak = Guidance(branches.weak(2.0))
    with pytest.raises(ValueError, match="expected a Branch with a model and no cond"):
        guided_pipeline(pipe, weak, branches={"weak": Branch(torch.zeros(4))})
    with pytest.raises(ValueError, match="branches has 'cond'"):
        guided_pipeline(pipe, Guidance(2.0), branches={"cond": Branch(model=pipe.unet)})
    with pytest.raises(ValueError, match=r"branches has 'weak', and guidance knows"):
        guided_pipeline(pipe, Guidance(2.0), branches={"weak": Branch(model=pipe.unet)})
    with pytest.raises(ValueError, match=f"the scale has 3 values for a batch of {BATCH}"):
        guided(pipe, arguments, Guidance(torch.tensor([1.0, 2.0, 3.0])))
    pipe.unet.train()
    with pytest.raises(ValueError, match=r"training mode, expected model\.eval"):
        guided(pipe, arguments, Guidance(3.0))


def test_arguments_that_would_guide_a_second_time():
    pipe, arguments = stable_diffusion()
    with pytest.raises(ValueError, match=r"guidance_scale is 7\.5, expected none"):
        guided(pipe, arguments, Guidance(3.0), guidance_scale=7.5)
    with pytest.raises(ValueError, match=r"guidance_rescale is 0\.7, .*mitigations\.rescale\(0\.7"):
        guided(pipe, arguments, Guidance(3.0), guidance_rescale=0.7)
    pipe, arguments = stable_diffusion_3()
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    with pytest.raises(ValueError, match="another method of guidance may be at work"):
        guided(pipe, arguments, Guidance(3.0), **skipping)


def test_schedulers_whose_levels_cannot_be_told():
    needing = Guidance(3.0, [mitigations.rescale()])
    for scheduler, why in (
        (EDMEulerScheduler(), "has neither alphas_cumprod nor"),
        (KDPM2DiscreteScheduler(), "evaluates the network between"),
    ):
        pipe, arguments = stable_diffusion(scheduler)
        with pytest.raises(ValueError, match=f"rescale works on v predictions, .*{why}"):
            guided(pipe, arguments, needing)
        wanted = run(pipe, pipe, arguments, guidance_scale=3.0)
        out = guided(pipe, arguments, Guidance(3.0))
        torch.testing.assert_close(out, wanted, atol=1e-3, rtol=1e-3)
    odd = DDIMScheduler(steps_offset=1)
    odd.register_to_config(prediction_type="velocity")
    with pytest.raises(ValueError, match="prediction_type 'velocity', expected 'epsilon'"):
        guided_pipeline(stable_diffusion(odd)[0], Guidance(3.0))


def test_a_network_that_breaks_is_named():
    pipe, arguments = stable_diffusion()
    broken = arguments["prompt_embeds"].clone()
    broken[0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 0, in the branches \['cond'\]"):
        guided(pipe, {**arguments, "prompt_embeds": broken}, Guidance(3.0))


def test_half_precision():
    pipe, arguments = stable_diffusion()
    wanted = guided(pipe, arguments, GUIDANCES["apg"])
    pipe.to(torch.bfloat16)
    arguments = {key: value.bfloat16() for key, value in arguments.items()}
    out = guided(pipe, arguments, GUIDANCES["apg"])
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).norm() < 0.1 * wanted.norm()


def test_the_example_draws_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["6_diffusers_pipeline.py", "--out", str(tmp_path / "a.png")])
    EXAMPLE["main"]()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "18 rows, 22 without the interval" in capsys.readouterr().out
    pipe = EXAMPLE["tiny_pipeline"]()
    pipe.set_progress_bar_config(disable=True)
    pictures = {EXAMPLE["draw"](pipe, "a cat", s, 4)[0].tobytes() for s in (1.0, 7.5)}
    assert len(pictures) == 2


def test_the_code_of_the_page_runs():
    text = (Path(__file__).parent.parent / "docs/integrations/diffusers.md").read_text()
    snippets = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(snippets) == 2
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(names["images"]) == 2 and isinstance(names["guider"], GuidanceGuider)


# --- the guider


def modular_loop(guider, pipe, arguments, start=0, inputs="dict"):
    """The denoising loop of a modular pipeline, as in its blocks: one call of the network a branch."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x = arguments["latents"] * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps[start:]
    for i, t in enumerate(timesteps):
        guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=t)
        names = ("prompt_embeds", "negative_prompt_embeds")
        if inputs == "dict":
            states = guider.prepare_inputs({"embeds": tuple(arguments[name] for name in names)})
        else:
            states = guider.prepare_inputs_from_block_state(
                BlockState(**arguments), {"embeds": names}
            )
        for state in states:
            guider.prepare_models(pipe.unet)
            with torch.no_grad():
                seen = scheduler.scale_model_input(x, t)
                out = pipe.unet(seen, t, encoder_hidden_states=state.embeds)
            state.noise_pred = out.sample
            guider.cleanup_models(pipe.unet)
        x = scheduler.step(guider(states)[0], t, x).prev_sample
    return x


@pytest.mark.parametrize("inputs", ["dict", "block state"])
@pytest.mark.parametrize("s", [0.5, 1.0, 4.0])
def test_the_guider_is_that_of_diffusers_at_a_fixed_scale(s, inputs):
    pipe, arguments = stable_diffusion()
    theirs = ClassifierFreeGuidance(guidance_scale=s)
    wanted = modular_loop(theirs, pipe, arguments, inputs=inputs)
    with rows_of(pipe.unet) as rows:
        out = modular_loop(GuidanceGuider(Guidance(s)), pipe, arguments, inputs=inputs)
    near(out, wanted)
    assert rows == [BATCH] * STEPS * (1 if s == 1 else 2)


@pytest.mark.parametrize("name", GUIDANCES)
def test_the_guider_does_what_the_pipeline_does(name):
    pipe, arguments = stable_diffusion()
    wanted = guided(pipe, arguments, GUIDANCES[name])
    guider = GuidanceGuider(GUIDANCES[name], pipe.scheduler)
    for _ in range(2):  # the second sampling begins anew
        out = modular_loop(guider, pipe, arguments)
        near(out, wanted)
    assert not pipe.unet._forward_pre_hooks


def test_the_guiders_apg_is_that_of_diffusers_in_x0():
    """On a network that predicts x0 theirs, which converts nothing, is in the paper's space."""
    pipe, arguments = stable_diffusion(ddim("sample"))
    theirs = AdaptiveProjectedGuidance(
        guidance_scale=3.0,
        eta=0.0,
        adaptive_projected_guidance_rescale=2.5,
        use_original_formulation=True,
    )
    wanted = modular_loop(theirs, pipe, arguments)
    guidance = Guidance(4.0, [mitigations.apg(eta=0.0, threshold=2.5)])
    out = modular_loop(GuidanceGuider(guidance, pipe.scheduler), pipe, arguments)
    near(out, wanted)


def test_the_guider_prepares_what_a_step_needs():
    guider = GuidanceGuider(Guidance(schedules.interval(schedules.linear(0.0, 4.0), 0.0, 0.5)))
    assert guider.num_conditions == 2  # a pipeline asks before it encodes the prompts
    cond, uncond = torch.ones(1, 2), torch.zeros(1, 2)
    names = []
    for step in range(5):
        guider.set_state(step, 5, torch.tensor(0))
        states = guider.prepare_inputs({"embeds": (cond, uncond), "shared": cond})
        names.append([state.__guidance_identifier__ for state in states])
        assert guider.num_conditions == len(states)
        for state in states:
            guider.prepare_models(torch.nn.Identity())
            conditional = state.__guidance_identifier__ == "pred_cond"
            assert guider.is_conditional == conditional and guider.is_unconditional != conditional
            assert torch.equal(state.embeds, cond if conditional else uncond)
            assert torch.equal(state.shared, cond)
            state.noise_pred = state.embeds
        guider(states)
    both = ["pred_cond", "pred_uncond"]
    assert names == [["pred_uncond"], ["pred_cond"], both, ["pred_cond"], ["pred_cond"]]
    assert guider.num_conditions == 2  # of the sampling to come, not of the step that was
    assert GuidanceGuider(Guidance(1.0)).num_conditions == 1


def test_a_guider_that_is_disabled_runs_the_condition_alone():
    pipe, arguments = stable_diffusion()
    wanted = guided(pipe, arguments, Guidance(1.0))
    guider = GuidanceGuider(GUIDANCES["apg"], pipe.scheduler)
    guider.disable()
    assert guider.num_conditions == 1 and guider.new().num_conditions == 1
    with rows_of(pipe.unet) as rows:
        out = modular_loop(guider, pipe, arguments)
    assert rows == [BATCH] * STEPS
    near(out, wanted)
    guider.enable()
    assert guider.num_conditions == 2
    assert guider.new(guidance=Guidance(1.0)).num_conditions == 1


def test_a_guider_that_starts_later_in_the_noise():
    """Of the scheduler's timesteps only the last are run: progress starts at 0, and levels are theirs."""
    pipe, arguments = stable_diffusion()
    guidance = Guidance(schedules.linear(3.0, 6.0), [mitigations.apg()])
    out = modular_loop(GuidanceGuider(guidance, pipe.scheduler), pipe, arguments, start=2)
    scheduler, x = copy.deepcopy(pipe.scheduler), arguments["latents"]
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps[2:]):
        with torch.no_grad():
            cond, uncond = (
                pipe.unet(x, t, encoder_hidden_states=arguments[key]).sample
                for key in ("prompt_embeds", "negative_prompt_embeds")
            )
        level = level_at(scheduler, t, x, "v")
        x = scheduler.step(guidance.combine(i / 2, cond, uncond, level), t, x).prev_sample
    near(out, x)


def test_a_guider_is_shown_as_text_and_not_loaded_from_it(tmp_path):
    guider = GuidanceGuider(Guidance(3.0, [mitigations.rescale(0.5)]), ddim())
    assert "rescale(phi=0.5)" in repr(guider) and "DDIMScheduler" in repr(guider)
    guider.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected a Guidance"):
        GuidanceGuider.from_pretrained(tmp_path)


def test_a_guider_names_what_is_missing():
    needing = Guidance(3.0, [mitigations.rescale()])
    with pytest.raises(TypeError, match=r"guidance is 3\.0, expected a Guidance"):
        GuidanceGuider(3.0)
    with pytest.raises(ValueError, match=r"scheduler is None, .* rescale works on v predictions"):
        GuidanceGuider(needing)
    with pytest.raises(ValueError, match="EDMEulerScheduler has neither"):
        GuidanceGuider(needing, EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"branches \['weak'\], expected \('cond', 'uncond'\)"):
        GuidanceGuider(Guidance(branches.weak(2.0)))
    with pytest.raises(ValueError, match="top_k_of_cond works on logits"):
        GuidanceGuider(Guidance(3.0, [mitigations.top_k_of_cond(2)]))
    with pytest.raises(ValueError, match="step is 5 of num_inference_steps 5"):
        GuidanceGuider(Guidance(3.0)).set_state(5, 5, torch.tensor(0))
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="the FluxTransformer2DModel has guidance_embeds = True"):
        GuidanceGuider(Guidance(3.0)).prepare_models(flux().transformer)
    guider = GuidanceGuider(needing, scheduler)
    with pytest.raises(
        ValueError, match=r"timestep is \[3\] in evaluation 0, expected one of DDIM"
    ):
        guider.set_state(0, STEPS, torch.tensor(3))
    out = torch.ones(1, 4, 2, 2)
    guider.set_state(0, STEPS, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="no noisy sample was seen, and the mitigation rescale"):
        guider.forward(out, out)
    guider.set_state(0, STEPS, scheduler.timesteps[0])
    guider.prepare_models(identity := torch.nn.Identity())
    identity(torch.ones(1, 9, 2, 2))
    guider.cleanup_models(identity)
    assert not identity._forward_pre_hooks
    with pytest.raises(ValueError, match=r"sample has shape \(1, 9, 2, 2\) and the predictions"):
        guider.forward(out, out)


def test_a_step_that_was_broken_off_leaves_nothing_behind():
    guider = GuidanceGuider(GUIDANCES["apg"], scheduler := ddim())
    scheduler.set_timesteps(STEPS)
    out = torch.ones(1, 4, 2, 2)
    guider.set_state(0, STEPS, scheduler.timesteps[0])
    guider.prepare_models(network := torch.nn.Identity())
    assert network._forward_pre_hooks
    guider.cleanup_models(network)  # the call failed
    assert not network._forward_pre_hooks
    guider.prepare_models(network)
    network(out)
    guider.set_state(1, STEPS, scheduler.timesteps[1])
    assert not network._forward_pre_hooks
    with pytest.raises(ValueError, match="no noisy sample was seen"):
        guider.forward(out, out)


def test_a_guider_counts_evaluations_with_a_scheduler_of_second_order():
    """The pipeline counts five steps, and calls the network nine times."""
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    asked = []

    def schedule(progress):
        asked.append(progress)
        return 1.0

    guider = GuidanceGuider(Guidance(schedule), scheduler)
    for step, t in enumerate(scheduler.timesteps):
        guider.set_state(step, STEPS, t)
        guider.forward(torch.ones(1))
    assert sorted(set(asked)) == [step / 8 for step in range(9)]
    alone = GuidanceGuider(Guidance(schedule))
    with pytest.raises(ValueError, match="pass scheduler= where a scheduler evaluates the network"):
        alone.set_state(STEPS, STEPS, scheduler.timesteps[STEPS])


def test_the_guider_in_the_blocks_of_a_modular_pipeline():
    """The denoising blocks of SDXL, with our guider in place of theirs, against the classic pipeline."""
    source, arguments = stable_diffusion_xl()
    guidance = Guidance(schedules.interval(5.0, 0.0, 0.5), [mitigations.rescale()])
    wanted = guided(source, arguments, guidance)
    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    scheduler = source.scheduler
    guider = GuidanceGuider(guidance, scheduler)
    pipe.update_components(unet=source.unet, scheduler=scheduler, guider=guider)
    assert pipe.guider is guider and repr(pipe)
    scheduler.set_timesteps(STEPS)
    size = 8 * source.vae_scale_factor
    ids = torch.tensor([[size, size, 0, 0, size, size]]).float().expand(BATCH, -1)
    embedded = {key: value for key, value in arguments.items() if key != "latents"}
    with rows_of(source.unet) as rows:
        out = pipe(
            latents=arguments["latents"] * scheduler.init_noise_sigma,
            timesteps=scheduler.timesteps,
            num_inference_steps=STEPS,
            denoiser_input_fields={
                **embedded,
                "add_time_ids": ids,
                "negative_add_time_ids": ids,
            },
            output="latents",
        )
    assert rows == [BATCH] * 8
    near(out, wanted)
