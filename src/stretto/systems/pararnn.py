"""ParaRNN: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="pararnn",
    title="ParaRNN",
    room="models",
    purpose=(
        "Trains nonlinear recurrent layers in parallel over the sequence, so that decoding needs "
        "no growing cache."
    ),
    paper=(
        "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models, Oct "
        "2025 (arXiv 2510.21450, ICLR 2026)"
    ),
    claims=(
        Claim(
            name="speed of a cell",
            paper="up to 665x over stepping, long sequences, fused kernel",
            bar="2-8x on two cores for small width and long sequences; the crossover is reported",
        ),
        Claim(
            name="quality",
            paper="ParaGRU and ParaLSTM up to 7B near Transformer and Mamba2 in perplexity",
            bar="small language model within a few per cent of attention's loss",
        ),
        Claim(
            name="three Newton iterations",
            paper="are enough; the backward needs none",
            bar="error below 1e-5 in fp32 after 3",
        ),
        Claim(
            name="state tracking",
            paper="better than linear state-space models",
            bar="generalises on parity where a linear recurrence fails",
        ),
    ),
)
