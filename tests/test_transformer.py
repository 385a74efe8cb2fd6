"""The transformer: causality, prefix, cache, packed weights, saving and loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import transformer, wrapped_transformer
from torch import nn

from models import TokenTransformer, TokenTransformerConfig
from models.blocks import attention
from models.packed import PackedLinear, pack
from tokenizers_vq import VQTokenizer, VQTokenizerConfig
from unicfg.training.losses import token_loss


def ids_and_cond(model, batch=3):
    generator = torch.Generator().manual_seed(5)
    config = model.config
    ids = torch.randint(config.codebook_size, (batch, model.num_tokens), generator=generator)
    shape = (batch, config.condition_length)
    return ids, torch.randint(1, config.condition_vocabulary, shape, generator=generator)


def test_token_i_depends_on_earlier_tokens_only():
    model = transformer()
    ids, cond = ids_and_cond(model)
    logits = model(ids, cond)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 24
    after = model(changed, cond)
    torch.testing.assert_close(after[:, :8], logits[:, :8])
    assert (after[:, 8] - logits[:, 8]).abs().max() > 1e-3


def test_every_token_of_the_condition_matters_to_every_image_token():
    model = transformer()
    ids, cond = ids_and_cond(model)
    for place in range(3):
        changed = cond.clone()
        changed[:, place] = (changed[:, place] + 1) % 12
        moved = (model(ids, changed) - model(ids, cond)).abs().amax(-1)
        assert (moved > 1e-5).all()


def test_every_parameter_receives_a_gradient():
    wrapped = wrapped_transformer().train()
    ids, cond = ids_and_cond(wrapped.model)
    token_loss(wrapped, ids, cond).backward()
    untouched = [name for name, p in wrapped.named_parameters() if p.grad is None]
    assert untouched == []


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_that_in_float32_rounded_once(autocast):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=autocast):
        out = attention(q, k, v, mask)
    assert torch.equal(out, attention(q.float(), k.float(), v.float(), mask).bfloat16())


def test_cached_equals_uncached():
    model = transformer()
    ids, cond = ids_and_cond(model)
    with torch.inference_mode():
        full = model(ids, cond)
        cache = model.make_cache(3)
        model.prefill(cond, cache)
        steps = [model.decode(ids[:, :i], cache) for i in range(model.num_tokens)]
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("late", [1, 5, 15])
def test_a_late_chunk_equals_single_steps(late):
    model = transformer()
    ids, cond = ids_and_cond(model)
    with torch.inference_mode():
        full = model(ids, cond)
        cache = model.make_cache(3)
        model.prefill(cond, cache)
        torch.testing.assert_close(
            model.decode(ids[:, :late], cache), full[:, late], atol=1e-4, rtol=1e-4
        )
        assert cache.length == late + 1


def test_one_condition_fills_all_rows():
    model = transformer()
    ids, cond = ids_and_cond(model)
    with torch.inference_mode():
        cache = model.make_cache(3)
        model.prefill(cond[:1], cache)
        out = model.decode(ids[:, :0], cache)
    torch.testing.assert_close(out, model(ids, cond[:1].expand(3, -1))[:, 0], atol=1e-4, rtol=1e-4)


def test_two_samplings_at_once_do_not_touch_each_other():
    model = transformer()
    ids, cond = ids_and_cond(model)
    with torch.inference_mode():
        first, second = model.make_cache(3), model.make_cache(3)
        model.prefill(cond, first)
        model.prefill(cond.flip(0), second)
        alone = model(ids, cond)
        for i in range(6):
            a = model.decode(ids[:, :i], first)
            model.decode(ids[:, :i].flip(0), second)
            torch.testing.assert_close(a, alone[:, i], atol=1e-4, rtol=1e-4)
    assert not any(isinstance(v, torch.Tensor) for v in vars(model).values())


def test_class_labels_are_a_prefix_of_length_one():
    model = transformer(condition_length=1)
    ids, _ = ids_and_cond(model)
    assert model(ids, torch.tensor([[1], [2], [3]])).shape == (3, 16, 24)


def test_packed_weights_compute_the_same_and_leave_the_model_alone():
    model = transformer()
    names = list(model.state_dict())
    packed = pack(model)
    assert list(model.state_dict()) == names
    assert all(type(m) is not PackedLinear for m in model.modules())
    linear = nn.Linear(40, 56)
    fast = pack(nn.Sequential(linear))
    for rows in (1, 2, 3, 17):
        x = torch.randn(rows, 40)
        torch.testing.assert_close(fast(x), linear(x), atol=1e-5, rtol=1e-5)
    if torch.backends.mkldnn.is_available():
        assert any(isinstance(m, PackedLinear) for m in packed.modules())


def test_packing_leaves_other_dtypes_as_they_are():
    linear = nn.Linear(8, 8).double()
    assert not any(isinstance(m, PackedLinear) for m in pack(nn.Sequential(linear)).modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30}, r"width is 30, expected a multiple of heads \(4\)"),
        ({"depth": 0}, "depth is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"format_version": 99}, "format_version is 99"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenTransformerConfig(**arguments)


def test_bad_inputs_are_refused():
    model = transformer()
    ids, cond = ids_and_cond(model)
    with pytest.raises(ValueError, match="ids have 15 tokens, expected L = 16"):
        model(ids[:, :15], cond)
    with pytest.raises(ValueError, match=r"cond has shape \(3, 2\), expected \(B, 3\)"):
        model(ids, cond[:, :2])
    with pytest.raises(ValueError, match="cond holds ids from 12 to 12, expected 0 to 11"):
        model(ids, cond.fill_(12))
    with pytest.raises(ValueError, match="rows is 0"):
        model.make_cache(0)
    cache = model.make_cache(2)
    with pytest.raises(ValueError, match="cond has 3 rows, the cache 2"):
        model.prefill(cond, cache)
    with pytest.raises(ValueError, match="ids have 3 rows, the cache 2"):
        model.decode(ids[:, :1], cache)
    with pytest.raises(ValueError, match="ids hold 16 tokens"):
        model.decode(ids[:2], cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saving_and_loading_returns_the_same_model(tmp_path, dtype):
    model = transformer()
    ids, cond = ids_and_cond(model)
    model.to(dtype).save_pretrained(tmp_path)
    model.float()
    loaded = TokenTransformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded(ids, cond), model(ids, cond))


def test_wrong_weights_are_never_loaded_silently(tmp_path):
    model = transformer()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({("x" + k if k == "head.weight" else k): v for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"missing keys \['head.weight'\].*\['xhead.weight'\]"):
        TokenTransformer.from_pretrained(tmp_path)
    save_file({k: (v[:3].clone() if k == "head.weight" else v) for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"head.weight has shape \(3, 32\).*\(24, 32\)"):
        TokenTransformer.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        TokenTransformer.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        TokenTransformer.from_pretrained(tmp_path)


def test_weights_of_a_newer_format_are_refused(tmp_path):
    transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version is 2, expected 1"):
        TokenTransformer.from_pretrained(tmp_path)


def test_a_tokenizer_is_saved_with_its_latent_statistics(tmp_path):
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, width=16, depth=1)).eval()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    tokenizer.fit_latent_statistics(images)
    tokenizer.save_pretrained(tmp_path)
    loaded = VQTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    torch.testing.assert_close(loaded.encode_latents(images), tokenizer.encode_latents(images))
