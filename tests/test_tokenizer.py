"""The image tokenizer: shapes, round trips, both quantizers, losses, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizers_vq import (
    AdversarialLoss,
    VQTokenizer,
    VQTokenizerConfig,
    codebook_statistics,
    reconstruction_loss,
)
from tokenizers_vq.images import to_images
from tokenizers_vq.losses import _mean, structural_dissimilarity
from tokenizers_vq.quantizers import FiniteScalarQuantizer, VectorQuantizer


def make(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"image_size": 32, "factor": 4, "width": 16, "depth": 1} | changes
    tokenizer = VQTokenizer(VQTokenizerConfig(**settings))
    if tokenizer.config.quantizer == "vq":
        tokenizer(images(2, tokenizer.config.image_size))  # the first step makes the codebook
    return tokenizer.eval()


def images(batch=2, size=32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize(("size", "factor"), [(32, 4), (64, 8), (32, 2), (48, 6), (32, 8)])
def test_shapes_types_and_ranges(quantizer, size, factor):
    tokenizer = make(image_size=size, factor=factor, quantizer=quantizer)
    x, side = images(2, size), size // factor
    ids, latents = tokenizer.encode(x), tokenizer.encode_latents(x)
    assert ids.shape == (2, side, side) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < tokenizer.codebook_size
    assert latents.shape == (2, tokenizer.latent_channels, side, side)
    for out in (tokenizer.decode(ids), tokenizer.decode_latents(latents)):
        assert out.shape == x.shape and out.min() >= -1 and out.max() <= 1


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_latents_and_ids_decode_to_the_same_image(quantizer):
    tokenizer = make(quantizer=quantizer)
    x = images()
    tokenizer.fit_latent_statistics(x)
    by_ids = tokenizer.decode(tokenizer.encode(x))
    by_latents = tokenizer.decode_latents(tokenizer.encode_latents(x))
    torch.testing.assert_close(by_ids, by_latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_loaded_is_what_was_saved_and_what_is_made_with_it(tmp_path, quantizer, dtype):
    tokenizer = make(quantizer=quantizer)
    tokenizer.to(dtype).save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    assert not again.training
    assert {own.device.type for own in (*again.parameters(), *again.buffers())} == {"cpu"}
    assert all(own.requires_grad for own in again.parameters())
    for (name, own), other in zip(
        again.state_dict().items(), tokenizer.state_dict().values(), strict=True
    ):
        assert own.dtype == (torch.float32 if other.is_floating_point() else other.dtype), name
        assert torch.equal(own, other.to(own.dtype)), name
    x = images()
    if dtype == torch.float32:
        assert torch.equal(again.encode(x), tokenizer.encode(x))
    again(x)[0].sum().backward()


def test_other_sizes_than_the_trained_one_work_if_they_are_multiples():
    assert make().encode(images(1, 64)).shape == (1, 16, 16)


@given(seed=st.integers(0, 10_000))
def test_fsq_ids_round_trip(seed):
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    ids = torch.randint(0, 1000, (2, 3, 3), generator=torch.Generator().manual_seed(seed))
    codes = quantizer.codes(ids)
    # codes are grid points in [-1, 1): their ids, by the mixed-radix number of the levels
    levels = torch.tensor([8, 5, 5, 5])
    half = (levels // 2).view(1, 4, 1, 1)
    digits = (codes * half + half).round().long()
    basis = torch.tensor([1, 8, 40, 200]).view(1, 4, 1, 1)
    assert torch.equal((digits * basis).sum(1), ids)


def test_fsq_index_computed_by_hand():
    """Features of 0 lie in the middle of odd levels and at level 4 of 8: 4 + 2*8 + 2*40 + 2*200."""
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    assert quantizer(torch.zeros(1, 4, 1, 1)).ids.item() == 4 + 2 * 8 + 2 * 40 + 2 * 200


def test_vq_ids_round_trip_and_eval_never_touches_the_codebook():
    quantizer = VectorQuantizer(32, 8)
    quantizer.train()
    quantizer(torch.randn(4, 8, 6, 6))  # k-means start
    quantizer.eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    out = quantizer(torch.randn(2, 8, 6, 6))
    torch.testing.assert_close(quantizer.codes(out.ids), out.codes)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_a_codebook_that_was_never_trained_is_not_made_of_what_is_encoded():
    quantizer = VectorQuantizer(32, 8).eval()
    with pytest.raises(ValueError, match="the codebook has not seen an image"):
        quantizer(torch.randn(4, 8, 6, 6))
    assert not quantizer.vq._codebook.initted


def test_gradients_pass_the_quantizer():
    tokenizer = make().train()
    output, quantized = tokenizer(images())
    (reconstruction_loss(output, images()) + quantized.loss).backward()
    missing = [n for n, p in tokenizer.named_parameters() if p.grad is None]
    assert missing == []
    assert tokenizer.encoder.stem[1].weight.grad.abs().sum() > 0


def test_latent_statistics_make_unit_variance():
    tokenizer = make()
    x = images(16)
    tokenizer.fit_latent_statistics(x)
    latents = tokenizer.encode_latents(x)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_a_few_steps_learn_to_reconstruct():
    torch.manual_seed(0)
    tokenizer = make(width=32).train()
    x = images(4, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)  # blocks of 4 pixels
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        output, _ = tokenizer(x)
        losses.append(reconstruction_loss(output, x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_losses_order_clean_blurred_and_foreign_images():
    x = images()
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert float(reconstruction_loss(x, x)) == pytest.approx(0, abs=1e-5)
    assert 0 < reconstruction_loss(blurred, x) < reconstruction_loss(x.flip(0), x)
    assert float(structural_dissimilarity(x, x)) == pytest.approx(0, abs=1e-5)
    assert structural_dissimilarity(-x, x) > 1.2  # anti-correlated


@pytest.mark.parametrize("window", [1, 4, 7])
def test_means_by_rows_and_then_by_columns_are_those_of_windows(window):
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64, requires_grad=True)
    ours, plain = _mean(x, window), torch.nn.functional.avg_pool2d(x, window, 1)
    assert torch.allclose(ours, plain, atol=1e-12)
    weights = torch.randn_like(plain)
    (of_ours,) = torch.autograd.grad((ours * weights).sum(), x)
    (of_plain,) = torch.autograd.grad((plain * weights).sum(), x)
    assert torch.allclose(of_ours, of_plain, atol=1e-12)


def test_the_adversarial_loss_has_both_sides():
    tokenizer, adversarial = make().train(), AdversarialLoss(0.1)
    x = images()
    output, _ = tokenizer(x)
    loss = adversarial.generator(
        output, reconstruction_loss(output, x), tokenizer.decoder.last_layer
    )
    loss.backward(retain_graph=True)
    assert tokenizer.decoder.stem.weight.grad is not None
    tokenizer.zero_grad()
    adversarial.zero_grad()
    adversarial.critic(output, x).backward()
    assert tokenizer.decoder.stem.weight.grad is None  # the critic does not train the decoder
    assert all(p.grad is not None for p in adversarial.parameters())


def test_codebook_statistics_of_known_ids():
    uniform = codebook_statistics(torch.arange(8).repeat(3), 16)
    assert uniform.usage == 0.5 and uniform.perplexity == pytest.approx(8)
    collapsed = codebook_statistics(torch.zeros(10, dtype=torch.long), 16)
    assert collapsed.usage == 1 / 16 and collapsed.perplexity == pytest.approx(1)
    with pytest.raises(ValueError, match="ids is empty"):
        codebook_statistics(torch.zeros(0, dtype=torch.long), 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 30}, "image_size is 30, expected a multiple of the factor 4"),
        ({"factor": 3, "image_size": 30}, "factor is 3, expected an even number"),
        ({"width": 20}, "width is 20"),
        ({"quantizer": "lfq"}, "quantizer is 'lfq'"),
        ({"format_version": 0}, "format_version is 0"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQTokenizerConfig(**arguments)


def test_bad_inputs_are_refused():
    tokenizer = make()
    with pytest.raises(ValueError, match="image size is 30, expected a multiple of the factor 4"):
        tokenizer.encode(images(1, 32)[..., :30])
    with pytest.raises(ValueError, match=r"\(2, 32, 32\)"):
        tokenizer.encode(images()[:, 0])
    with pytest.raises(ValueError, match="uint8"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[0, 1000\], expected \[0, 999\]"):
        tokenizer.decode(torch.tensor([[[0, 1000]]]))
    with pytest.raises(ValueError, match="float32"):
        tokenizer.decode(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        tokenizer.decode_latents(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="images is empty"):
        tokenizer.fit_latent_statistics(torch.zeros(0, 3, 32, 32))


def test_one_image_of_one_token_has_statistics_and_pixels_are_no_floats():
    tokenizer = make(image_size=32, factor=8)
    tokenizer.fit_latent_statistics(images(1, 8))
    assert bool(tokenizer.latent_std.isfinite().all())
    with pytest.raises(TypeError, match=r"images are torch\.uint8, expected floats in"):
        to_images(torch.full((1, 3, 8, 8), 200, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images have shape \(3, 8, 8\)"):
        to_images(torch.zeros(3, 8, 8))
