"""All suites, by the name the command line takes."""

from bench.case import Suite
from bench.suites import (
    adamw,
    blocks,
    decode,
    dpo_step,
    experts,
    lora,
    loss,
    memory,
    nf4_gemm,
    nf4_quant,
    paged_adamw,
    ppo_step,
    train_step,
)

_ALL = (
    *(nf4_quant.SUITE, nf4_gemm.SUITE, experts.SUITE, lora.SUITE, blocks.SUITE, adamw.SUITE, paged_adamw.SUITE),
    loss.SUITE,
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}

# Suites whose rows are whole stacks, each in its process; they read their own options.
OF_STACKS = {suite.NAME: suite for suite in (train_step, dpo_step, ppo_step, decode, memory)}

__all__ = ["OF_STACKS", "SUITES"]
