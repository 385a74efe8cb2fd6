"""The training loop, the same for tokenizers and for models of every family."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from unicfg.training.checkpoint import Checkpoints, restore_training_state, training_state
from unicfg.training.recipe import LOGGING_SETTINGS, Optimization

LossFunction = Callable[[nn.Module, Any, int], Tensor]
"""(module, batch, step) -> scalar loss."""
Report = Callable[[nn.Module, int], dict[str, float]]
"""(moving average, step) -> numbers for the log; draws pictures as it likes."""


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of indices, from any step on: the order is a function of seed and step alone.

    Args:
        count: number of samples.
        batch_size: of each batch; the last incomplete batch of an epoch is left out.
        steps: batches in all.
        seed: of the order.
        start: the step to begin with.
    """

    def __init__(self, count: int, batch_size: int, steps: int, seed: int, start: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, expected at least one sample to train on")
        self.count, self.batch_size = count, min(batch_size, count)
        self.steps, self.seed, self.start = steps, seed, start

    def __len__(self) -> int:
        """Batches that are left."""
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of one batch after another."""
        per_epoch = self.count // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator)
            first = step % per_epoch * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class MetricsLog:
    """Numbers by step, one JSON object a line; a resumed run drops what lies beyond its first step."""

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        file.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        try:
            with self.file.open("a") as handle:
                handle.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.file}: {error}") from error


def learning_rate(step: int, settings: Optimization) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    rise = (1 + math.cos(math.pi * done)) / 2
    return settings.final_learning_rate + rise * (
        settings.learning_rate - settings.final_learning_rate
    )


def fit(
    module: nn.Module,
    data: Dataset[Any],
    loss_function: LossFunction,
    settings: Optimization,
    folder: Path,
    *,
    resume: bool = False,
    report: Report | None = None,
    tracker: bool = True,
) -> nn.Module:
    """Train ``module`` and return its moving average, in eval mode.

    Writes ``metrics.jsonl``, tensorboard events where that is installed, and checkpoints into ``folder``.

    Args:
        module: what to train.
        data: a map-style dataset of the samples.
        loss_function: ``(module, batch, step) -> loss``.
        settings: the optimization section of the recipe.
        folder: for logs and checkpoints.
        resume: continue from the newest whole checkpoint in ``folder``, exactly as if never interrupted.
        report: called with the moving average every ``sample_every`` steps, and at the end.
        tracker: write tensorboard events.

    Raises:
        ValueError: if there is nothing to train on, or the checkpoint was made with other settings.
        FloatingPointError: if the loss or its gradient is not finite; names the step.
        OSError: if a checkpoint cannot be written; the one before stays whole.
    """
    accelerator = Accelerator(
        log_with="tensorboard" if tracker and _has_tensorboard() else None,
        project_dir=folder,
    )
    # not accelerate's: its mixed precision is one for the whole process, a tokenizer and a model may differ
    bfloat16 = torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=_uses_bfloat16(settings)
    )
    optimizers = make_optimizers(module, settings)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    average.to(accelerator.device)
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep_checkpoints)
    start, resumed = 0, checkpoints.load() if resume else None
    batches = EpochBatches(len(data), settings.batch_size, settings.steps, settings.seed)  # type: ignore[arg-type]
    # a generator of its own: starting an epoch draws a number, which would shift all that come after a resume
    loader = DataLoader(data, batch_sampler=batches, generator=torch.Generator().manual_seed(0))
    model, loader, *optimizers = accelerator.prepare(module, loader, *optimizers)
    bare = accelerator.unwrap_model(model)
    if resumed is not None:
        start, tensors, made_with = resumed
        _check_settings(made_with, settings, folder)
        restore_training_state(tensors, bare, average, optimizers)
        batches.start = start
    if accelerator.log_with:
        accelerator.init_trackers("events")

    log = MetricsLog(folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    bar = tqdm(
        total=settings.steps,
        initial=start,
        desc=folder.name,
        disable=not accelerator.is_main_process,
    )
    began, seen = time.perf_counter(), 0
    for step, batch in enumerate(loader, start):
        model.train()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, settings)
        with bfloat16:
            loss = loss_function(model, batch, step)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {step}: lower the learning rate, or look at the "
                f"batch; the last whole checkpoint is in {checkpoints.folder}"
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient is {float(norm)} at step {step}: lower the learning rate; "
                f"the last whole checkpoint is in {checkpoints.folder}"
            )
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(bare)
        seen += settings.batch_size
        done, last = step + 1, step + 1 == settings.steps
        bar.update()
        if log is not None and (done % settings.log_every == 0 or last):
            rate = seen / (time.perf_counter() - began)
            values = {
                "loss": loss.item(),
                "learning_rate": learning_rate(step, settings),
                "gradient_norm": float(norm),
                "samples_per_second": round(rate, 2),
            }
            bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{rate:.0f}")
            log.write(done, values)
            accelerator.log(values, step=done)
        if log is not None and report is not None and (done % settings.sample_every == 0 or last):
            values = report(average.module.eval(), done)
            log.write(done, values)
            accelerator.log(values, step=done)
        if log is not None and (done % settings.checkpoint_every == 0 or last):
            state = training_state(bare, average, optimizers)
            checkpoints.save(done, state, dataclasses.asdict(settings))
    bar.close()
    accelerator.end_training()
    return average.module.eval()


def _uses_bfloat16(settings: Optimization) -> bool:
    """As the recipe says, or where a GPU has it."""
    if settings.precision is None:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return settings.precision == "bfloat16"


def _has_tensorboard() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def make_optimizers(module: nn.Module, settings: Optimization) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the transformer blocks and AdamW for the rest.

    Muon (Jordan et al., 2024; scaled as in Liu et al., arXiv 2502.16982, equation 4, so that both take the same
    learning rate) needs about half the samples here, and on a CPU samples are what is dear. Only matrices decay:
    biases, norms and single vectors are not what overfits.

    Raises:
        ValueError: if Muon is asked for and there are no such matrices.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in trained.items() if ".blocks." in name and p.ndim == 2}
    if settings.optimizer == "adamw":
        hidden = {}
    elif not hidden:
        raise ValueError("optimizer is 'muon', expected 'adamw' for a module without blocks")
    rest = [p for name, p in trained.items() if name not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=settings.betas)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden.values(),
                lr=rate,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _check_settings(made_with: dict[str, Any], settings: Optimization, folder: Path) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    changed = [k for k in now if k not in LOGGING_SETTINGS and now[k] != made_with.get(k)]
    if changed:
        raise ValueError(
            f"cannot resume {folder}: {changed} were {[made_with.get(k) for k in changed]}, "
            f"now {[now[k] for k in changed]}; restore the recipe or choose another folder"
        )
