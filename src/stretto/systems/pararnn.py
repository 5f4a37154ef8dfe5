"""ParaRNN."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="pararnn",
    title="ParaRNN",
    purpose=(
        "Train a nonlinear recurrent mixer in parallel over the sequence by solving all its steps at "
        "once with Newton and an associative scan."
    ),
    paper=(
        "\"ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models\" (Oct "
        "2025, arXiv 2510.21450, ICLR 2026 oral)"
    ),
    claims=(
        Claim(
            "Up to 665x faster than stepping sequentially",
            (
                "Up to 665x faster than stepping sequentially (cell level, long sequences, fully "
                "fused CUDA kernel); cost comparable to a Mamba scan"
            ),
        ),
        Claim(
            "ParaGRU and ParaLSTM language models up to",
            (
                "ParaGRU and ParaLSTM language models up to 7B parameters reach perplexity comparable"
                " to Transformer and Mamba2 of the same size (SlimPajama without books, sequence "
                "length 2048)"
            ),
        ),
        Claim(
            "Three Newton iterations are enough in practice",
            "Three Newton iterations are enough in practice, backward needs none (it is linear)",
        ),
    ),
)
