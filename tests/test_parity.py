"""Side by side with transformers, wherever it is right."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, logging
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unicfg import Guidance, guide, sample_autoregressive
from unicfg.sampling import TokenFilter

logging.set_verbosity_error()
V, T, L = 40, 5, 12


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


class Rows:
    """What the adapter remembers: the prompts. It has no cache and runs everything again."""

    def __init__(self, prompts):
        self.prompts, self.length = prompts, 0

    def rows(self, start, stop):
        return Rows(self.prompts[start:stop])


class Adapter(nn.Module):
    """A transformers model, made fit for our sampler: another foreign model in twenty lines."""

    num_tokens = L

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()
        self.eval()

    def make_cache(self, rows):
        return Rows(torch.zeros(rows, T, dtype=torch.long))

    def prefill(self, cond, cache):
        cache.prompts[:] = cond

    def decode(self, ids, cache):
        cache.length = ids.shape[1] + 1
        return self.model(torch.cat([cache.prompts, ids], dim=1)).logits[:, -1]


@pytest.mark.parametrize("s", [0.5, 1.5, 3.0, 7.5])
def test_greedy_tokens_equal_generate_with_guidance_scale(llama, s):
    prompt = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(1))
    null = torch.zeros(T, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = llama.generate(
            prompt,
            guidance_scale=s,
            negative_prompt_ids=null.expand(3, T),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=L,
            do_sample=False,
            pad_token_id=0,
        )[:, T:]
    ours = sample_autoregressive(
        Adapter(llama), prompt, uncond=null, guidance=Guidance(s), seeds=[0, 1, 2], temperature=0.0
    )
    assert torch.equal(ours, theirs)


def test_guide_equals_their_batched_processor():
    cond, uncond = torch.randn(2, 4, V)
    theirs = ClassifierFreeGuidanceLogitsProcessor(3.0)(
        torch.zeros(4, 1), torch.cat([cond, uncond])
    )
    torch.testing.assert_close(guide(cond, uncond, 3.0), theirs)


@pytest.mark.parametrize(("k", "p"), [(5, None), (None, 0.8), (7, 0.6)])
def test_filters_equal_their_warpers(k, p):
    logits = torch.randn(6, V) * 3
    theirs = logits
    if k is not None:
        theirs = TopKLogitsWarper(k)(None, theirs)
    if p is not None:
        theirs = TopPLogitsWarper(p)(None, theirs)
    torch.testing.assert_close(TokenFilter(top_k=k, top_p=p)(logits), theirs.softmax(-1))
