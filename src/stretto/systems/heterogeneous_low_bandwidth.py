"""Heterogeneous low-bandwidth pre-training: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="heterogeneous-low-bandwidth",
    title="Heterogeneous low-bandwidth pre-training",
    room="training",
    purpose=(
        "Trains one model over ordinary internet links, also on machines too small for it, by rare "
        "sparse syncs and compressed pipelines."
    ),
    paper="Heterogeneous Low-Bandwidth Pre-Training of LLMs, 5 Jan 2026 (arXiv 2601.02360)",
    claims=(
        Claim(
            name="compressing only the weak replicas",
            paper=(
                "a better loss for the bytes than compressing all, 178M-1B models, 87.5-99.9 % of "
                "the activations removed"
            ),
            bar="small loss at 87.5 %; at 97 % less loss when heterogeneous",
        ),
        Claim(
            name="SparseLoCo alone",
            paper="1-3 % of the entries at 2 bits beat dense DiLoCo at equal tokens",
            bar="within a few hundredths of data parallel's loss",
        ),
        Claim(
            name="subspace pipelines alone",
            paper="up to 100x smaller activations at matching convergence",
            bar="tokens a second approach the compression ratio on a link-bound network",
        ),
    ),
)
