"""A transformer over continuous latents whose next-token distribution is a small diffusion model.

Autoregressive image generation without vector quantization: Li et al., arXiv 2406.11838.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import (
    AdaLN,
    AdaLNZero,
    EncodedCondition,
    KVCache,
    TimeEmbedding,
    modulate,
)
from models.body import (
    MOST_DEPTH,
    MOST_WIDTH,
    Body,
    BodyConfig,
    check_places,
    initialize,
    previous_tokens,
)
from models.compiled import compiled_method
from models.denoiser import check_path_and_space
from models.packed import pack
from tokenizers_vq.files import check_counts
from tokenizers_vq.hub import StrictHubMixin
from unicfg.guidance.core import guide_unchecked

Denoise = Callable[[Tensor], Tensor]
Walk = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]

_STRETCH = 5  # steps in one compiled call


class DiffusionHead(nn.Module):
    """A residual MLP that denoises one token's latent, given the hidden state of a transformer at its place.

    Time and hidden state enter by adaLN-zero (arXiv 2406.11838, section 3.3). It can be put on any transformer:
    ``sample_diffusion(head, hidden, ...)`` draws latents for hidden states.

    Args:
        channels: C, of one latent.
        condition_width: D, of the hidden states.
        width: of the MLP.
        depth: residual blocks.
        path: a key of ``unicfg.sampling.paths.PATHS``.
        space: what it predicts.

    Raises:
        ValueError: if path or space are unknown or do not go together.
    """

    def __init__(
        self,
        channels: int,
        condition_width: int,
        width: int = 256,
        depth: int = 2,
        path: str = "straight",
        space: str = "flow",
    ) -> None:
        super().__init__()
        self.path, self.space = check_path_and_space(path, space)
        self.latent_shape = (channels,)
        self.inputs = nn.Linear(channels, width)
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_width, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        # one layer for all blocks and for the last norm: a sampler makes all of it for all times at once
        self.modulation = AdaLNZero(width, depth + 1)
        self.outputs = nn.Linear(width, channels)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    def forward(self, x: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
        """The prediction for noisy latents of single tokens.

        Args:
            x: (..., C), of any float dtype whatever that of the weights.
            hidden: states of the transformer (..., D); leading sizes broadcast against those of x.
            t: time in [0, 1] (...).

        Returns:
            (..., C) in the space of the head, in the dtype of x.
        """
        return self._modulated(x, self.modulation(self.time(t) + self.condition(hidden)))

    def _modulated(self, x: Tensor, modulations: Sequence[AdaLN]) -> Tensor:
        *inner, last = modulations
        h = self.inputs(x.to(self.inputs.bias.dtype))
        for block, by in zip(self.blocks, inner, strict=True):
            h = block(h, by)
        out: Tensor = self.outputs(modulate(F.layer_norm(h, h.shape[-1:]), last))
        return out.to(x.dtype)

    def prepare(self, times: Tensor) -> Callable[[Tensor], list[Denoise]]:
        """The head at fixed times: hidden states give denoisers of x alone, one a time.

        A sampler calls the head thousands of times on a few rows, where the time goes into starting each operation
        and not into its arithmetic. So what depends on the times or on the states is computed once, and the
        denoisers are written with as few operations as there can be.

        Args:
            times: (N,).

        Returns:
            hidden (..., D) -> N functions (..., C) -> (..., C).
        """
        at_times = self.time(times.to(self.inputs.weight.device))[:, None]
        blocks = [(*_transposed(block.up), *_transposed(block.down)) for block in self._blocks()]
        first, final = _transposed(self.inputs), _transposed(self.outputs)
        width = (self.inputs.out_features,)

        def denoiser(inner: list[AdaLN], last: AdaLN) -> Denoise:
            def denoise(x: Tensor) -> Tensor:
                h = torch.addmm(first[0], x.flatten(0, -2).to(first[0].dtype), first[1])
                for by, (up_bias, up, down_bias, down) in zip(inner, blocks, strict=True):
                    normed = torch.addcmul(by.shift, torch.layer_norm(h, width), by.factor)
                    fed = torch.addmm(down_bias, F.silu(torch.addmm(up_bias, normed, up)), down)
                    h = torch.addcmul(h, by.gate, fed)
                normed = torch.addcmul(last.shift, torch.layer_norm(h, width), last.factor)
                return torch.addmm(final[0], normed, final[1]).view(x.shape).to(x.dtype)

            return denoise

        def denoisers(hidden: Tensor) -> list[Denoise]:
            by = self.modulation(at_times + self.condition(hidden.flatten(0, -2)))
            per_half = [zip(*(part.unbind(0) for part in half), strict=True) for half in by]
            result = []
            for modulations in zip(*per_half, strict=True):
                *inner, last = (AdaLN(*parts) for parts in modulations)
                result.append(denoiser(inner, last))
            return result

        return denoisers

    def prepare_walk(self, times: Tensor, weights: Tensor) -> Walk:
        """The whole walk of a first-order solver from noise to a latent, guided, in compiled code.

        Args:
            times: (N,).
            weights: of x and of the guided output in the next x, at each time (N, 2).

        Returns:
            ``(hidden (R, D), x (B, C), s (B, 1)) -> (B, C)`` with R = 2B rows [cond; uncond], or R = B rows and no s;
            or None where this machine cannot compile.
        """
        compiled = compiled_method(self, "walk")
        device = self.inputs.weight.device
        at_times, weights = self.time(times.to(device))[:, None], weights.to(device)
        # all but the gate of the last norm, which nothing uses
        layer, used = self.modulation.linear, -self.inputs.out_features
        modulation, bias = layer.weight[:used], layer.bias[:used]
        # a call of a few steps: more would make the compiler work for minutes, fewer would spend the time on calls
        stride = max(n for n in range(1, _STRETCH + 1) if len(times) % n == 0)
        stretches = torch.arange(len(times), device=device).split(stride)

        def walk(hidden: Tensor, x: Tensor, s: Tensor | None) -> Tensor | None:
            by = F.linear(F.silu(at_times + self.condition(hidden)), modulation, bias)
            for places in stretches:
                moved = compiled(x, s, by, places, weights)
                if moved is None:
                    return None
                x = moved
            return x

        return walk

    def walk(
        self, x: Tensor, s: Tensor | None, by: Tensor, places: Tensor, weights: Tensor
    ) -> Tensor:
        """Some steps of :meth:`prepare_walk`.

        Args:
            x: (B, C).
            s: scale (B, 1); None where there is no guidance, and R = B.
            by: modulations at all times (N, R, 3 * halves * width), without the last gate.
            places: of these steps in the N times (n,).
            weights: (N, 2).

        Returns:
            (B, C).
        """
        for place in places.split(1):
            of_x, of_out = weights.index_select(0, place)[0]
            at_time = by.index_select(0, place)[0]
            modulations = self.modulation.split(F.pad(at_time, (0, self.inputs.out_features)))
            out = self._modulated(x if s is None else torch.cat([x, x]), modulations)
            if s is not None:
                cond_out, uncond_out = out.chunk(2)
                out = guide_unchecked(cond_out, uncond_out, s)
            x = of_x * x + of_out * out
        return x

    def _blocks(self) -> list[HeadBlock]:
        return [block for block in self.blocks if isinstance(block, HeadBlock)]


def _transposed(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Bias and weight as ``torch.addmm`` takes them; a few rows are multiplied faster in this layout."""
    return linear.bias, linear.weight.t().contiguous()


class HeadBlock(nn.Module):
    """Norm, modulation, two layers, gate. Shape: (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, by: AdaLN) -> Tensor:
        """Apply the block."""
        # LayerNorm, not the RMSNorm of the transformer: on a CPU it is one operation
        inner = F.silu(self.up(modulate(F.layer_norm(x, x.shape[-1:]), by)))
        return torch.addcmul(x, by.gate, self.down(inner))


@dataclass
class HybridTransformerConfig(BodyConfig):
    """What it takes to rebuild a hybrid; written to ``config.json``."""

    latent_channels: int = 4  # C
    order: Literal["causal", "masked"] = "causal"  # one token after another, or sets in any order
    head_width: int = 256
    head_depth: int = 2
    path: str = "straight"  # cosine and eps are what the paper has
    space: str = "flow"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_counts(self, latent_channels=1 << 12, head_width=MOST_WIDTH, head_depth=MOST_DEPTH)
        if self.order not in ("causal", "masked"):
            raise ValueError(f"order is {self.order!r}, expected 'causal' or 'masked'")
        check_path_and_space(self.path, self.space)


class HybridTransformer(nn.Module, StrictHubMixin, library_name="unicfg", tags=["hybrid-model"]):
    """A transformer over latents with the condition as a prefix, and a :class:`DiffusionHead` on its states.

    Args:
        config: sizes and the order of generation.
    """

    config_class = HybridTransformerConfig

    def __init__(self, config: HybridTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.body = Body(config)
        self.inputs = nn.Linear(config.latent_channels, config.width)
        # before the first latent, and in place of one that is not known
        self.start = nn.Parameter(torch.zeros(config.width))
        self.head = DiffusionHead(
            config.latent_channels,
            config.width,
            config.head_width,
            config.head_depth,
            config.path,
            config.space,
        )
        initialize(self.body, config.depth)
        nn.init.normal_(self.start, std=0.02)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.body.num_tokens

    @property
    def order(self) -> str:
        """How ``sample_hybrid`` goes through the tokens: causal or masked."""
        return self.config.order

    def encode_condition(self, cond: Tensor | EncodedCondition) -> EncodedCondition:
        """What ``states`` needs to know of condition ids (B, T), to be computed once per sampling."""
        return self.body.encode_condition(cond)

    def for_sampling(self) -> HybridTransformer:
        """The same network with its weights in the layout that is fastest here, see ``models.packed``."""
        return pack(self)

    def _embed(self, latents: Tensor) -> Tensor:
        """Latents (..., C), which samplers keep in float32, in the dtype of the weights (..., D)."""
        embedded: Tensor = self.inputs(latents.to(self.inputs.bias.dtype))
        return embedded

    def _causal_inputs(self, latents: Tensor, first: int) -> Tensor:
        embedded = self._embed(latents[:, max(first - 1, 0) :])
        return previous_tokens(self.start, embedded, self.body.positions(), first)

    def states(
        self,
        latents: Tensor,
        cond: Tensor | EncodedCondition,
        known: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of all tokens, from which the head draws them.

        Args:
            latents: (B, L, C).
            cond: condition ids (B, T), or what ``encode_condition`` made of them.
            known: bool (B, L), True where the latent may be seen; needed by the masked order only.
            places: with the masked order, int64 (B, K), the tokens whose states are wanted, 0 to L - 1; None is all.

        Returns:
            (B, L, D), or (B, K, D) at ``places``; with the causal order entry i has seen the latents before i.

        Raises:
            ValueError: if the shapes do not fit, ``known`` is missing or not wanted, or ``places`` are not there.
        """
        expected = (self.num_tokens, self.config.latent_channels)
        if latents.shape[1:] != expected:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, *{expected})"
            )
        if (known is None) != (self.order == "causal"):
            raise ValueError(
                f"known is {'missing' if known is None else 'given'}, expected it with the masked "
                f"order only; this model's is {self.order}"
            )
        check_places(places, len(latents), self.num_tokens)
        if known is None:
            if places is not None:
                raise ValueError("places is given, expected it with the masked order only")
            return self.body.forward_causal(self._causal_inputs(latents[:, :-1], 0), cond)
        x = torch.where(known[..., None], self._embed(latents), self.start)
        states: Tensor = self.body(x + self.body.positions(), cond, None, None, places)
        return states

    def forward(
        self,
        latents: Tensor,
        cond: Tensor | EncodedCondition,
        noisy: Tensor,
        t: Tensor,
        known: Tensor | None = None,
    ) -> Tensor:
        """The head's predictions at every token, for several noise draws of each; used in training.

        Args:
            latents: clean latents (B, L, C).
            cond: condition ids (B, T).
            noisy: K noisy versions of each latent (K, B, L, C).
            t: their times (K, B, L).
            known: see :meth:`states`.

        Returns:
            (K, B, L, C) in the head's space.

        Raises:
            ValueError: see :meth:`states`.
        """
        predictions: Tensor = self.head(noisy, self.states(latents, cond, known), t)
        return predictions

    def make_cache(self, rows: int, compile: bool = False) -> KVCache:
        """An empty cache for ``rows`` sequences, in the model's dtype and on its device.

        Args:
            rows: R.
            compile: decode with the compiled step, see ``models.compiled``.

        Raises:
            ValueError: if ``rows`` is less than 1.
        """
        return self.body.make_cache(rows, self, compile)

    def prefill(self, cond: Tensor, cache: KVCache) -> None:
        """Run the condition (R, T), or one condition (1, T) for all rows, into an empty cache.

        Raises:
            ValueError: if the shape does not fit.
        """
        self.body.prefill(cond, cache)

    def decode(self, latents: Tensor, cache: KVCache) -> Tensor:
        """Hidden state of the next token after all latents so far.

        Args:
            latents: all latents so far (R, n, C), 0 <= n < L.
            cache: a prefilled cache with R rows; it is extended.

        Returns:
            (R, D) for token n.

        Raises:
            ValueError: if ``latents`` are too many, or fewer than the cache holds, or of another row count.
        """
        self.body.check_decode(latents, cache)
        out = self.body.compiled_step(latents, cache)
        if out is not None:
            return out
        network = cache.network if cache.compiled is None else cache.compiled.eager
        assert isinstance(network, HybridTransformer)
        return network.body.extend(network._causal_inputs(latents, cache.length), cache)

    def step(
        self, previous: Tensor, place: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """Hidden state (R, D) of token ``place`` () after the latent ``previous`` (R, C); see :meth:`Body.step`."""
        return self.body.step(self._embed(previous), self.start, place, keys, values)
