"""All suites, by the name the command line takes."""

from bench.case import Suite
from bench.suites import adamw, blocks, lora, loss, nf4_gemm, nf4_quant, paged_adamw

_ALL = (nf4_quant.SUITE, nf4_gemm.SUITE, lora.SUITE, blocks.SUITE, adamw.SUITE, paged_adamw.SUITE, loss.SUITE)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}

__all__ = ["SUITES"]
