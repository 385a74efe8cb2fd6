"""One process of a run that test_processes.py starts: trains tiny networks and writes down what it saw.

python training_worker.py OUT RUNS, with RUNS as a JSON object of folders and what differs from the defaults there.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import network
from torch.utils.data import Dataset

from tokenizers_vq import VQTokenizer, VQTokenizerConfig
from unicfg import ConditionDropout
from unicfg.processes import join_processes
from unicfg.training.families import step_generator, step_seed, training_loss
from unicfg.training.optimize import fit
from unicfg.training.recipe import ModelRecipe, Optimization, TokenizerRecipe
from unicfg.training.trainer import _TokenizerLoss

COUNT = 48
DEFAULTS = {"steps": 6, "batch_size": 16, "log_every": 1, "warmup": 1, "sample_every": 99}
DEFAULTS |= {"checkpoint_every": 3}


class Samples(Dataset):
    """Tokens or latents with conditions, and their indices."""

    def __init__(self, tokens: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(0, 24, (COUNT, 16), generator=generator)
        latents = torch.randn(COUNT, 2, 4, 4, generator=generator)
        self.data = ids if tokens else latents
        self.cond = torch.randint(1, 12, (COUNT, 3), generator=generator)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return self.data[index], self.cond[index], index


def run(out: Path, families: list[str], *, shard=False, resume_half_of=None, **settings) -> None:
    """Train each family in ``out``; or a copy of another folder, which lost its last checkpoint, to the end again."""
    process = join_processes()
    if resume_half_of is not None and process.is_main_process:
        shutil.copytree(out.parent / resume_half_of, out)
        for file in out.glob("*/checkpoints/step-00000006.safetensors"):
            file.unlink()
    process.wait_for_everyone()
    for name in families:
        family = name.split()[0]
        model = network(name)
        wrapped = ConditionDropout(model, torch.zeros(3, dtype=torch.long), 0.3)
        loss = training_loss(ModelRecipe(family=family), model)
        seen = {"indices": [], "dropped": [], "noise": []}

        def step(module, batch, step, part, wrapped=wrapped, loss=loss, seen=seen):
            data, cond, index = batch
            wrapped.reseed(step_seed(0, step), part)
            drawn = []
            hook = wrapped.model.register_forward_pre_hook(
                lambda _, given: drawn.append((given[1] == 0).all(1).tolist())
            )
            value = loss(module, data, cond, step_generator(0, step), part)
            hook.remove()
            seen["indices"].append(index.tolist())
            seen["dropped"].append(drawn[0])
            seen["noise"].append(torch.rand(()).item())
            return value

        optimization = Optimization(**DEFAULTS | settings)
        trained = fit(
            wrapped,
            Samples(family in ("ar", "masked")),
            step,
            optimization,
            out / name,
            resume=resume_half_of is not None,
            tracker=False,
            shard=shard,
        )
        (out / name / f"seen-{process.process_index}.json").write_text(json.dumps(seen))
        state = {k: v.clone() for k, v in trained.state_dict().items()}
        save_file(state, out / name / f"trained-{process.process_index}.safetensors")


def run_tokenizer(out: Path) -> None:
    """Train a tokenizer with a learned codebook and a critic, which has parameters that its first steps leave alone."""
    config = VQTokenizerConfig(16, 4, width=16, depth=1, quantizer="vq", codebook_size=32)
    optimization = Optimization(**DEFAULTS)
    torch.manual_seed(0)
    loss = _TokenizerLoss(
        VQTokenizer(config), TokenizerRecipe(adversarial=0.1, training=optimization)
    )
    pictures = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trained = fit(
        loss,
        [*pictures],
        lambda module, batch, step, part: module(batch, step),
        optimization,
        out,
        tracker=False,
        find_unused=True,
    )
    # channels come last in memory, which safetensors does not take
    state = {k: v.clone().contiguous() for k, v in trained.state_dict().items()}
    save_file(state, out / f"trained-{join_processes().process_index}.safetensors")


if __name__ == "__main__":
    for name, settings in json.loads(sys.argv[2]).items():
        run(Path(sys.argv[1]) / name, **settings)
    run_tokenizer(Path(sys.argv[1]) / "tokenizer")
