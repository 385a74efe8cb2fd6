"""Guided autoregressive decoding, side by side with transformers' ``generate(guidance_scale=)``.

    python benchmarks/autoregressive.py --out benchmarks/results

Two models of the same size with random weights: vocabulary 1,024, width 384, 6 layers, 6 heads, SwiGLU inner 1,024,
a prefix of 16 condition tokens, then 256 tokens at scale 3 and temperature 1 with no top-k. The cases run in turn,
round after round, in one process, so that a machine that slows down slows down all of them; the table gives medians
with the whole range, and ratios of medians. Milliseconds depend on the machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from models import TokenTransformer, TokenTransformerConfig
from unicfg import ConditionDropout, Guidance, sample_autoregressive

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 1024, 384, 6, 6, 1024
PREFIX, TOKENS, SCALE = 16, 256, 3.0

Case = Callable[[], torch.Tensor]


def our_cases(batch: int) -> dict[str, Case]:
    """unicfg, without and with guidance."""
    config = TokenTransformerConfig(
        codebook_size=VOCABULARY,
        grid=16,
        condition_vocabulary=VOCABULARY,
        condition_length=PREFIX,
        width=WIDTH,
        depth=LAYERS,
        heads=HEADS,
    )
    null = torch.zeros(PREFIX, dtype=torch.long)
    model = ConditionDropout(TokenTransformer(config), null).eval()
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX))

    def sample(s: float) -> torch.Tensor:
        return sample_autoregressive(model, cond, guidance=Guidance(s), seeds=range(batch))

    return {"unicfg": lambda: sample(1.0), "unicfg, guided": lambda: sample(SCALE)}


def transformers_cases(batch: int) -> dict[str, Case]:
    """A Llama of the same size, without and with ``guidance_scale``."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=PREFIX + TOKENS,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    cond = torch.randint(1, VOCABULARY, (batch, PREFIX))
    null = torch.zeros_like(cond)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": True}
    options |= {"top_k": 0, "attention_mask": torch.ones_like(cond), "pad_token_id": 0}

    def guided() -> torch.Tensor:
        return model.generate(cond, guidance_scale=SCALE, negative_prompt_ids=null, **options)

    return {
        "transformers generate": lambda: model.generate(cond, **options),
        "transformers generate(guidance_scale=3)": guided,
    }


def measure(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(seconds: dict[str, list[float]], batch: int) -> list[str]:
    """Markdown rows: milliseconds a step with their range, tokens a second, and cost of guidance."""
    lines = [
        f"Batch {batch}:",
        "",
        "| case | ms a step, median (range) | tokens/s | time against its unguided form |",
        "|---|--:|--:|--:|",
    ]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        low, middle, high = (1000 * v / TOKENS for v in (min(values), medians[name], max(values)))
        base = "unicfg" if name.startswith("unicfg") else "transformers generate"
        lines.append(
            f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {batch * TOKENS / medians[name]:.0f} | {medians[name] / medians[base]:.2f} |"
        )
    ratio = medians["transformers generate(guidance_scale=3)"] / medians["unicfg, guided"]
    return [
        *lines,
        "",
        f"Guided tokens a second, unicfg against transformers: **{ratio:.1f}x**",
        "",
    ]


def machine() -> str:
    """What the numbers were measured on."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        name = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for autoregressive.md and .json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    torch.manual_seed(0)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    command = "python benchmarks/autoregressive.py --batches " + " ".join(map(str, options.batches))
    command += f" --rounds {options.rounds}"
    lines = ["# Guided autoregressive decoding", "", f"{date.today()}, {machine()}, {versions}"]
    lines += ["", f"    {command}", ""]
    results = {}
    for batch in options.batches:
        seconds = measure(our_cases(batch) | transformers_cases(batch), options.rounds)
        results[str(batch)] = seconds
        lines += table(seconds, batch)
    text = "\n".join(lines)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "autoregressive.md").write_text(text)
        record = {
            "machine": machine(),
            "versions": versions,
            "command": command,
            "seconds": results,
        }
        (options.out / "autoregressive.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
