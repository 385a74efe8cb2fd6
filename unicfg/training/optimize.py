"""The training loop, the same for tokenizers and for models of every family, on one process or many.

A batch is split into equal parts, one for each process, or several where a recipe says ``accumulate``. Order, losses
and condition dropout do not depend on the split, so a model's recipe is the same training on any number of processes, up
to the rounding of sums and to the draws of ``dropout`` in the network, which differ by part. A tokenizer's is where it has
no learned codebook, which moves in every pass, and no critic, which is balanced in every pass.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from tokenizers_vq.files import write_text_atomically
from unicfg.processes import join_processes
from unicfg.training.checkpoint import (
    Checkpoints,
    gathered,
    restore_training_state,
    training_state,
)
from unicfg.training.dropout import Part
from unicfg.training.families import step_seed
from unicfg.training.recipe import LOGGING_SETTINGS, Optimization

LossFunction = Callable[[nn.Module, Any, int, Part], Tensor]
"""(module, this part of the batch, step, part) -> scalar loss; the mean over the parts is the loss of the batch."""
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
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Batches that are left."""
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of one batch after another."""
        for step in range(self.start, self.steps):
            yield self.at(step)

    def at(self, step: int) -> list[int]:
        """The indices of the batch of one step."""
        per_epoch = self.count // self.batch_size
        if step // per_epoch != self._epoch:
            self._epoch = step // per_epoch
            generator = torch.Generator().manual_seed(step_seed(self.seed, self._epoch))
            self._order = torch.randperm(self.count, generator=generator)
        first = step % per_epoch * self.batch_size
        return self._order[first : first + self.batch_size].tolist()


class MetricsLog:
    """Numbers by step, one JSON object a line; a resumed run drops what lies beyond its first step.

    Lines are appended as they come, so a kill or a full disk may leave half a line, which is dropped, too.
    """

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if 0 <= _step_of(line) <= start]
        write_text_atomically("".join(line + "\n" for line in kept), file)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        try:
            with self.file.open("a") as handle:
                handle.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.file}: {error}") from error


def _step_of(line: str) -> int:
    """The step of a line of the log, -1 where it is no whole one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def learning_rate(step: int, settings: Optimization) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    rise = (1 + math.cos(math.pi * done)) / 2
    return settings.final_learning_rate + rise * (
        settings.learning_rate - settings.final_learning_rate
    )


def check_batches(settings: Optimization) -> None:
    """Refuse batches that cannot be split among processes and passes, before anything is read.

    Raises:
        ValueError: names the sizes.
    """
    processes = join_processes().num_processes
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"batch_size is {settings.batch_size}, expected a multiple of {processes * settings.accumulate}: "
            f"{processes} processes with accumulate {settings.accumulate}"
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
    workers: int = 0,
    shard: bool = False,
    find_unused: bool = False,
) -> nn.Module:
    """Train ``module`` and return its moving average, in eval mode.

    The first process writes ``metrics.jsonl``, tensorboard events where that is installed, and checkpoints into
    ``folder``, which all processes can read.

    Args:
        module: what to train.
        data: a map-style dataset of the samples.
        loss_function: ``(module, batch, step, part) -> loss``.
        settings: the optimization section of the recipe; its ``batch_size`` is that of all processes together.
        folder: for logs and checkpoints.
        resume: continue from the newest whole checkpoint in ``folder``, exactly as if never interrupted.
        report: called in the first process with the moving average every ``sample_every`` steps, and at the end.
        tracker: write tensorboard events.
        workers: processes that read samples ahead, of each process.
        shard: split parameters, their average, gradients and the optimizers' state among the processes (FSDP), where
            there are several; else each has all of them (DDP).
        find_unused: whether some steps leave parameters without a gradient.

    Raises:
        ValueError: if there is nothing to train on, a batch cannot be split among the processes, or the checkpoint was
            made with other settings.
        FloatingPointError: if the loss or its gradient is not finite in more steps in a row than ``skip_not_finite``
            allows; names the step and the samples.
        OSError: if a checkpoint cannot be written; the one before stays whole.
    """
    state = join_processes()
    # what a launcher says of precision and accumulation must not change what the recipe says
    accelerator = Accelerator(
        mixed_precision="no",
        log_with="tensorboard" if tracker and _has_tensorboard() else None,
        project_dir=folder,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    if accelerator.distributed_type.startswith(("FSDP", "DEEPSPEED", "MEGATRON", "TP")):
        raise ValueError(
            f"the processes were started for {accelerator.distributed_type}, expected DDP: "
            "launch without it, and split the model by unicfg train --fsdp"
        )
    # not accelerate's: its mixed precision is one for the whole process, a tokenizer and a model may differ
    bfloat16 = torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=_uses_bfloat16(settings)
    )
    count, parts = len(data), state.num_processes * settings.accumulate  # type: ignore[arg-type]
    check_batches(settings)
    if count < parts:
        raise ValueError(
            f"there are {count} samples, expected at least {parts}: {state.num_processes} processes with accumulate "
            f"{settings.accumulate}"
        )
    batch_size = min(settings.batch_size, count // parts * parts)
    if batch_size < settings.batch_size and state.is_main_process:
        tqdm.write(f"{folder.name}: batch_size is {batch_size}, for there are {count} samples")
    batches = EpochBatches(count, batch_size, settings.steps, settings.seed)
    shard = shard and state.num_processes > 1
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    average.to(accelerator.device)
    plain = copy.deepcopy(module) if shard else average.module
    if shard:
        module.to(accelerator.device)
        for own in (module, average.module):
            _shard(own)
    optimizers = make_optimizers(module, settings)
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep_checkpoints)
    # a generator of its own: starting an epoch draws a number, which would shift all that come after a resume
    loader = DataLoader(
        data,
        batch_sampler=batches,
        generator=torch.Generator().manual_seed(0),
        num_workers=workers,
    )
    if shard:
        model, loader = module, accelerator.prepare(loader)
    else:
        model, loader, *optimizers = accelerator.prepare(module, loader, *optimizers)
    start, resumed = 0, checkpoints.load() if resume else None
    if resumed is not None:
        start, tensors, made_with = resumed
        _check_settings(made_with, settings, folder)
        restore_training_state(tensors, module, average, optimizers)
        batches.start = start
        if state.is_main_process:
            tqdm.write(f"{folder.name} goes on from step {start}")
    starts = gather_object([start])
    if len(set(starts)) > 1:
        raise ValueError(
            f"the processes found checkpoints of the steps {starts} in {checkpoints.folder}, expected the same: "
            "they need one folder that all of them can read"
        )
    if accelerator.log_with:
        accelerator.init_trackers("events")

    log = MetricsLog(folder / "metrics.jsonl", start) if state.is_main_process else None
    bar = tqdm(
        total=settings.steps,
        initial=start,
        desc=folder.name,
        disable=not state.is_main_process,
    )
    began, seen, skipped = time.perf_counter(), 0, 0
    for step, batch in enumerate(loader, start):
        model.train()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, settings)
        for optimizer in optimizers:
            optimizer.zero_grad()
        # a pass may change buffers, as a learned codebook does: a step that is skipped must leave none
        held = [b.clone() for b in module.buffers()] if settings.skip_not_finite else []
        losses = []
        for i in range(settings.accumulate):
            part = Part(state.process_index * settings.accumulate + i, parts)
            # what draws from the global generator, as dropout does, must go on after a resume as if never stopped
            torch.manual_seed(step_seed(settings.seed, step) * parts + part.index)
            last_part = i + 1 == settings.accumulate
            # gradients are summed over the processes once a step
            with nullcontext() if last_part else accelerator.no_sync(model):
                with bfloat16:
                    loss = loss_function(model, _rows(batch, i, settings.accumulate), step, part)
                (loss / settings.accumulate).backward()
            losses.append(loss.detach())
        norm = gathered(nn.utils.clip_grad_norm_(module.parameters(), settings.clip))
        # of all processes, so that all of them go on, or none does
        mean = accelerator.gather(torch.stack(losses)).mean()
        if bool(torch.isfinite(mean) & torch.isfinite(norm)):
            skipped = 0
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(module)
        else:
            skipped += 1
            told = _not_finite(mean, norm, step, batches.at(step))
            if skipped > settings.skip_not_finite:
                raise FloatingPointError(
                    f"{told}: lower the learning rate, or look at the batch; "
                    f"the last whole checkpoint is in {checkpoints.folder}"
                )
            for buffer, before in zip(module.buffers(), held, strict=True):
                buffer.copy_(before)
            if state.is_main_process:
                row = f"{skipped} of {settings.skip_not_finite} in a row"
                tqdm.write(f"{told}: the step is skipped ({row})")
        seen += batches.batch_size
        done, last = step + 1, step + 1 == settings.steps
        bar.update()
        if log is not None and (done % settings.log_every == 0 or last):
            rate = seen / (time.perf_counter() - began)
            values = {
                "loss": float(mean),
                "learning_rate": learning_rate(step, settings),
                "gradient_norm": float(norm),
                "samples_per_second": round(rate, 2),
            }
            bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{rate:.0f}")
            log.write(done, values)
            accelerator.log(values, step=done)
        if report is not None and (done % settings.sample_every == 0 or last):
            _gather(average.module, plain)
            if log is not None:
                values = report(plain.eval(), done)
                log.write(done, values)
                accelerator.log(values, step=done)
        if done % settings.checkpoint_every == 0 or last:
            tensors = training_state(module, average, optimizers, keep=state.is_main_process)
            if log is not None:
                checkpoints.save(done, tensors, dataclasses.asdict(settings))
            # a process that ends a training must find its checkpoint
            state.wait_for_everyone()
    bar.close()
    for own in accelerator.trackers:  # end_training would end the run of all processes, too
        own.finish()
    _gather(average.module, plain)
    return plain.eval()


def _rows(batch: Any, index: int, count: int) -> Any:
    """Part ``index`` of ``count`` of a tensor, or of a list of tensors, that a loader gave."""
    if isinstance(batch, Tensor):
        return Part(index, count).rows(batch)
    return [_rows(own, index, count) for own in batch]


def _not_finite(loss: Tensor, norm: Tensor, step: int, samples: list[int]) -> str:
    """What was not finite, and in which batch."""
    what, value = ("the gradient", norm) if bool(torch.isfinite(loss)) else ("loss", loss)
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    named = ", ".join(map(str, samples[:8]))
    return f"{what} is {float(value)} at step {step}, batch of samples {named}{more}"


def _shard(module: nn.Module) -> None:
    """Split the parameters of a module among the processes (FSDP2); a pass gathers all of them at once.

    Not block by block: the prefix goes through the blocks by a way of its own, which FSDP's hooks do not see.
    """
    state = join_processes()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    fully_shard(module, mesh=mesh)


def _gather(module: nn.Module, plain: nn.Module) -> None:
    """Copy a module that may be split among processes into one that is not; all processes take part."""
    if module is not plain:
        plain.load_state_dict({key: gathered(own) for key, own in module.state_dict().items()})


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
    now, usual = (
        json.loads(json.dumps(dataclasses.asdict(own))) for own in (settings, Optimization())
    )
    was = usual | made_with  # what a later release has added was as it is by default
    changed = [k for k in now if k not in LOGGING_SETTINGS and now[k] != was[k]]
    if changed:
        raise ValueError(
            f"cannot resume {folder}: {changed} were {[was[k] for k in changed]}, "
            f"now {[now[k] for k in changed]}; restore the recipe or choose another folder"
        )
