"""PDF: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="pdf-embeddings",
    title="PDF",
    room="multimodal",
    purpose=(
        "Gives better embeddings from one multimodal model: several learned prefixes look at an "
        "input in different ways."
    ),
    paper=(
        "Explore More, Learn Better: Parallel MLLM Embeddings under Mutual Information "
        "Minimization, Nov 2025 (arXiv 2511.01588)"
    ),
    claims=(
        Claim(
            name="MMEB, LLaVA-1.6 7B",
            paper="+8.9 points over VLM2Vec",
            bar="the aggregate beats one path by a few points of hit@1",
        ),
        Claim(
            name="MMEB, Qwen2VL",
            paper="+4.2 (2B), +3.1 (7B)",
        ),
        Claim(
            name="half the compute",
            paper="2B still +2.6",
            bar="compared at equal steps and at equal compute",
        ),
        Claim(
            name="the penalty keeps paths apart",
            paper="mutual information is minimised",
            bar="similarity between paths clearly lower than without it",
        ),
    ),
)
