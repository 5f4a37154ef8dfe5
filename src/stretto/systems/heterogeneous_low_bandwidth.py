"""Heterogeneous low-bandwidth pre-training."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="heterogeneous-low-bandwidth",
    title="Heterogeneous low-bandwidth pre-training",
    purpose="Sparse, infrequent sync between replicas; subspace-compressed pipelines inside the weak ones.",
    paper="\"Heterogeneous Low-Bandwidth Pre-Training of LLMs\", arXiv 2601.02360, 5 Jan 2026 (Templar / Mila)",
    claims=(
        Claim(
            "178M-1B models",
            (
                "178M-1B models: activation compression composes with SparseLoCo at modest loss cost;"
                " compressing only the weak replicas (heterogeneous) gives a better loss-per-byte "
                "trade-off than compressing all"
            ),
        ),
        Claim(
            "SparseLoCo alone",
            (
                "SparseLoCo alone: top 1-3 % of entries + 2-bit values, better than dense DiLoCo at "
                "equal tokens in its paper; used for a 72B run with about 20 peers over the internet "
                "(146x smaller updates"
            ),
        ),
        Claim(
            "Subspace alone",
            "Subspace alone: up to 100x smaller activations, matching convergence",
        ),
    ),
)
