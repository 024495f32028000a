"""All suites, by the name the command line takes."""

from bench.case import Suite
from bench.suites import adamw, lora, loss, nf4_gemm, nf4_quant

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (nf4_quant.SUITE, nf4_gemm.SUITE, lora.SUITE, adamw.SUITE, loss.SUITE)
}

__all__ = ["SUITES"]
