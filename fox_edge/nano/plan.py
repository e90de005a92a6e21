"""What a training run of nano is: its stages, their data, and the learning rate at every step.

The recipe is Fox-1's in small (technical report, table 5): chunks that grow from stage to stage, a batch that
doubles after the first, AdamW (0.9, 0.95, weight decay 0.1) and a warm-up, stable, decay schedule.
The paper's shares of 39, 59 and 2 % of the tokens are changed: at this size the instruction stage
earns the most, so it has the largest share, and the decay runs through it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` optimizer steps of `batch_tokens` tokens in chunks of `chunk` tokens.

    Beside generated problems, it reads documents from GSM8K's train split and sheets of bare sums, each
    with its share: the chance that one more of them comes before the next problem.
    """

    name: str
    chunk: int
    batch_tokens: int
    steps: int
    gsm8k_share: float
    sheets_share: float = 0.0
    chat: bool = False

    @property
    def rows(self) -> int:
        """Chunks in one batch."""
        return self.batch_tokens // self.chunk

    @property
    def tokens(self) -> int:
        """Tokens read in the whole stage."""
        return self.steps * self.batch_tokens


@dataclass(frozen=True)
class Plan:
    """A whole run. The schedule's decay is a share of all tokens, at the end."""

    stages: tuple[Stage, ...] = (
        Stage("stage 1", chunk=256, batch_tokens=2048, steps=2800, gsm8k_share=0.15),
        Stage("stage 2", chunk=512, batch_tokens=4096, steps=800, gsm8k_share=0.15, sheets_share=0.15),
        Stage("stage 3", chunk=1024, batch_tokens=4096, steps=100, gsm8k_share=0.15, sheets_share=0.15),
        Stage(
            "instruction",
            chunk=512,
            batch_tokens=4096,
            steps=1400,
            gsm8k_share=0.06,
            sheets_share=0.1,
            chat=True,
        ),
    )
    peak_lr: float = 3e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 200
    decay_share: float = 0.35
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    micro_batch_tokens: int = 2048

    @property
    def tokens(self) -> int:
        """Tokens read in the whole run."""
        return sum(stage.tokens for stage in self.stages)

    def learning_rate(self, step: int, tokens: int) -> float:
        """Warm-up by steps, then stable, then a line down to `final_lr_share` over the last tokens."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        left = (self.tokens - tokens) / (self.decay_share * self.tokens)
        return self.peak_lr * max(self.final_lr_share, min(1.0, left))
