"""int8 weights: little is changed, less memory is held, and what cannot be done is refused."""

import copy

import pytest
import torch

from models import TextToImage
from models.quantized import stored
from unicfg import Guidance

pytest.importorskip("torchao")


def held(network):
    return sum(part.nbytes for p in network.parameters() for part in stored(p))


@pytest.mark.parametrize("family", ["ar", "masked", "diffusion", "hybrid"])
def test_every_family_draws_with_them(family, tmp_path):
    pipe = TextToImage.from_pretrained("shapes", family)
    before = copy.deepcopy(pipe.network.state_dict())
    small = pipe.quantize()
    assert held(small.network) < 0.6 * held(pipe.network)
    options = {"guidance": Guidance(2.0), "seeds": [0, 1]}
    a, b = (p.sample(["a red circle"] * 2, **options) for p in (pipe, small))
    assert a.shape == b.shape and torch.isfinite(b).all()
    for name, value in pipe.network.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="was quantized, which is not saved"):
        small.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="which is not saved: expected the model before quantize"):
        small.network.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="int8 already"):
        small.quantize()


def test_the_distribution_of_tokens_hardly_changes():
    pipe = TextToImage.from_pretrained("shapes", "ar")
    small = pipe.quantize()
    cond = pipe.encode_prompts(["a red circle", "two small blue squares"])
    ids = torch.randint(0, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (own.network(ids, cond).log_softmax(-1) for own in (pipe, small))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < divergence < 0.01


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_is_the_same(monkeypatch):
    from models import compiled

    monkeypatch.setitem(compiled._OPTIONS, "max_autotune", False)
    small = TextToImage.from_pretrained("shapes", "ar").quantize()
    draw = [
        small.sample(["a red circle"], guidance=Guidance(2.0), seeds=[0], compile=c)
        for c in (False, True)
    ]
    assert torch.equal(*draw)
