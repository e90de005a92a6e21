"""Train nano from a seed: tokenizer, data, three pre-training stages, an instruction stage, BF16 weights.

    python -m fox_edge.nano.train --gsm8k train.jsonl --out FOLDER --seed 0

The plan is in `plan.py`. Two or more workers share every batch, one process each, because processes that
meet once per step lose less to a busy machine than threads that meet at every operation.
A run that is stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fox_edge.config import FoxConfig
from fox_edge.model import Fox
from fox_edge.nano import data
from fox_edge.nano.evaluate import accuracy
from fox_edge.nano.make_tokenizer import write_json, write_model_files
from fox_edge.nano.plan import Plan, Stage
from fox_edge.nano.problems import held_out
from fox_edge.partial import partial_files

# On a CPU, plain matrix products beat the fused attention kernel up to this many positions.
MATMUL_ATTENTION_POSITIONS = 512


class MatmulAttention(TorchFunctionMode):
    """Causal grouped-query attention as two matrix products: the heads of a group share one product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention (q (B, H, T, D), k and v (B, 1, T, D)); pass on all else."""
        if func is not F.scaled_dot_product_attention or args[1].shape[1] != 1:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        B, H, T, D = q.shape
        scores = (q.reshape(B, H * T, D) @ k.reshape(B, T, D).transpose(1, 2)).view(B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        shares = (scores.float() * D**-0.5).masked_fill(future, -1e9).softmax(-1).to(q.dtype)
        return (shares.view(B, H * T, T) @ v.reshape(B, T, D)).view(B, H, T, D)


def initialise(model: Fox, seed: int) -> None:
    """Normal weights of deviation 0.02; what writes to the residual stream is smaller by sqrt(2 * layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(2 * model.config.num_layers) if residual else 0.02
        torch.nn.init.normal_(weight, std=deviation, generator=generator)


def make_optimizer(model: Fox, plan: Plan) -> torch.optim.AdamW:
    """AdamW over float32 master weights; norms are not decayed."""
    groups = [
        {"params": [w for w in model.parameters() if w.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [w for w in model.parameters() if w.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=plan.betas, fused=True)


def summed_loss(model: Fox, inputs: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Sum, in nats, of the cross entropies of `targets` (N,) at `positions` (N,) of inputs (B, T), flattened.

    Only those positions get logits. Matrix products in bfloat16; a target of IGNORE counts nothing.
    """
    matmul = inputs.device.type == "cpu" and inputs.shape[1] <= MATMUL_ATTENTION_POSITIONS
    with torch.autocast(inputs.device.type, torch.bfloat16), MatmulAttention() if matmul else nullcontext():
        logits = model.logits(model.hidden(inputs).flatten(0, 1)[positions])
    return F.cross_entropy(logits.float(), targets, ignore_index=data.IGNORE, reduction="sum")


def read_positions(targets: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the targets (rows, chunk) are, and what they are: (capacity,) int64 each, the rest IGNORE."""
    flat = targets.reshape(-1).astype(np.int64)
    found = np.flatnonzero(flat != data.IGNORE)[:capacity]
    positions, values = np.zeros(capacity, dtype=np.int64), np.full(capacity, data.IGNORE, dtype=np.int64)
    positions[: len(found)], values[: len(found)] = found, flat[found]
    return positions, values


@dataclass
class Progress:
    """Where a run is, and what it has measured; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """A model, its optimizer and how far they are; one of `workers` that each take their part of a batch."""

    def __init__(
        self, config: FoxConfig, plan: Plan, seed: int, rank: int = 0, workers: int = 1, compiled: bool = True
    ) -> None:
        self.model, self.plan, self.rank, self.workers = Fox(config), plan, rank, workers
        initialise(self.model, seed)
        self.optimizer = make_optimizer(self.model, plan)
        self.loss = torch.compile(summed_loss, dynamic=False) if compiled else summed_loss
        self.progress = Progress()
        # Gradients live in one buffer, so that workers exchange them in one message.
        weights = list(self.model.parameters())
        self.gradients = torch.zeros(sum(w.numel() for w in weights))
        for weight, part in zip(weights, self.gradients.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)

    def step(self, inputs: np.ndarray, targets: np.ndarray, capacity: int) -> float:
        """One optimizer step on a batch (rows, chunk); returns the mean loss in nats per target.

        No micro-batch may have more than `capacity` targets.
        """
        rate = self.plan.learning_rate(self.progress.step, self.progress.tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counted = max(int((targets != data.IGNORE).sum()), 1)
        total = torch.zeros(1)
        for part in micro_batches(inputs, self.plan, self.workers)[self.rank :: self.workers]:
            positions, values = read_positions(targets[part], capacity)
            x = torch.from_numpy(inputs[part].astype(np.int64))
            loss = self.loss(self.model, x, torch.from_numpy(positions), torch.from_numpy(values)) / counted
            loss.backward()
            total += loss.detach()
        if self.workers > 1:
            dist.all_reduce(self.gradients)
            dist.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.grad_clip)
        self.optimizer.step()
        self.gradients.zero_()
        self.progress.step += 1
        self.progress.tokens += inputs.size
        return total.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        with partial_files(path) as [partial]:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def micro_batches(batch: np.ndarray, plan: Plan, workers: int) -> list[slice]:
    """Slices of a batch's rows of at most `micro_batch_tokens`, as many for each worker."""
    rows = min(max(plan.micro_batch_tokens // batch.shape[1], 1), max(len(batch) // workers, 1))
    return [slice(first, first + rows) for first in range(0, len(batch), rows)]


def export_weights(model: Fox, path: Path) -> None:
    """Write the weights as one BF16 safetensors file under Hugging Face's names; tied means no head."""
    weights = {name: w.to(torch.bfloat16) for name, w in model.state_dict().items()}
    with partial_files(path) as [partial]:
        save_file(weights, partial, {"format": "pt"})


def _steps(plan: Plan, done: int) -> Iterator[tuple[int, Stage, int]]:
    """(index of the stage, stage, step within it) for every step of a plan that is not done."""
    first = 0
    for index, stage in enumerate(plan.stages):
        for step in range(max(done - first, 0), stage.steps):
            yield index, stage, step
        first += stage.steps


def prepare(gsm8k_path: Path, out: Path, seed: int, plan: Plan) -> None:
    """Write the model's files but its weights, and every stage's token ids, into `out`."""
    gsm8k = data.read_gsm8k(gsm8k_path)
    processor = write_model_files(out, data.tokenizer_texts(gsm8k, 10_000 + seed))
    for index, stage in enumerate(plan.stages):
        arrays = data.stage_batches(stage, processor, gsm8k, 1000 * seed + index)
        np.save(out / f"stage-{index}.npy", np.stack(arrays))


def stage_data(out: Path, index: int, stage: Stage, plan: Plan, workers: int) -> tuple[np.ndarray, int]:
    """A stage's (2, rows, chunk) inputs and targets, mapped, and the most targets in one micro-batch."""
    arrays = np.load(out / f"stage-{index}.npy", mmap_mode="r")
    parts = micro_batches(arrays[1, : stage.rows], plan, workers)
    counts = (arrays[1] != data.IGNORE).sum(1).reshape(-1, parts[0].stop).sum(1)
    return arrays, math.ceil(int(counts.max()) / 64) * 64


def work(rank: int, workers: int, out: Path, seed: int, plan: Plan, evaluate_every: int) -> None:
    """One worker's whole run over prepared data; the first one reports, evaluates and saves."""
    _keep_freed_memory()
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    if workers > 1:
        rendezvous = f"file://{(out / 'rendezvous').absolute()}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    processor = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    trainer = Trainer(FoxConfig.nano(), plan, seed, rank, workers)
    if (out / "checkpoint.pt").exists():
        trainer.load(out / "checkpoint.pt")
    progress, current = trainer.progress, -1
    losses: list[float] = []
    started = time.monotonic() - progress.wall_s
    for index, stage, step in _steps(plan, progress.step):
        if index != current:
            arrays, capacity = stage_data(out, index, stage, plan, workers)
            current, losses = index, []
        rows = slice(step * stage.rows, (step + 1) * stage.rows)
        losses.append(trainer.step(arrays[0, rows], arrays[1, rows], capacity))
        progress.wall_s = time.monotonic() - started
        last = step + 1 == stage.steps
        if rank == 0 and (progress.step % 50 == 0 or last):
            _log(plan, stage, progress, losses)
        if last:
            mean = sum(losses[-100:]) / len(losses[-100:])
            progress.stages.append(asdict(stage) | {"tokens": stage.tokens, "loss_nats": round(mean, 4)})
        if rank == 0 and (progress.step % evaluate_every == 0 or last):
            _evaluate_and_save(trainer, processor, stage, out)


def _evaluate_and_save(
    trainer: Trainer, processor: spm.SentencePieceProcessor, stage: Stage, out: Path
) -> None:
    export_weights(trainer.model, out / "model.safetensors")
    percent = accuracy(trainer.model, processor, held_out(50), chat=stage.chat)
    trainer.progress.accuracy.append({"step": trainer.progress.step, "held_out_50_percent": percent})
    print(f"held-out accuracy on 50: {percent:.0f} %", flush=True)
    trainer.save(out / "checkpoint.pt")


def _log(plan: Plan, stage: Stage, progress: Progress, losses: list[float]) -> None:
    recent = losses[-50:]
    print(
        f"{progress.wall_s:6.0f} s  {stage.name}  step {progress.step}  {progress.tokens / 1e6:.2f}M of "
        f"{plan.tokens / 1e6:.2f}M tokens  loss {sum(recent) / len(recent):.4f}  "
        f"lr {plan.learning_rate(progress.step, progress.tokens):.2e}  "
        f"{progress.tokens / progress.wall_s:.0f} tok/s",
        flush=True,
    )


def run(gsm8k_path: Path, out: Path, seed: int, plan: Plan, workers: int, evaluate_every: int = 400) -> None:
    """Train to the end of the plan, from the checkpoint in `out` when there is one; write training.json."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    prepare(gsm8k_path, out, seed, plan)
    arguments = (workers, out, seed, plan, evaluate_every)
    if workers > 1:
        mp.spawn(work, arguments, nprocs=workers)
    else:
        work(0, *arguments)
    progress = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]
    machine = {"machine": f"{os.cpu_count()}-core {platform.machine()} CPU", "torch": torch.__version__}
    write_json(
        out / "training.json", {"seed": seed, "workers": workers, **machine, **progress, "plan": asdict(plan)}
    )


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks; else every step's activations are mapped and zeroed anew."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2
    for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        libc.mallopt(option, value)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train nano, the embedded model, from a seed.")
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model's files and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that share each batch (2)")
    arguments = parser.parse_args()
    run(arguments.gsm8k, arguments.out, arguments.seed, Plan(), arguments.workers)


if __name__ == "__main__":
    main()
