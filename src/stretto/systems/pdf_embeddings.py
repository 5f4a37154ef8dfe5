"""PDF."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="pdf-embeddings",
    title="PDF",
    purpose=(
        "Several different embeddings of one input from one multimodal LLM, by learned deep prefixes "
        "and a mutual-information penalty."
    ),
    paper=(
        "\"Explore More, Learn Better: Parallel MLLM Embeddings under Mutual Information Minimization\""
        " (Nov 2025, arXiv 2511.01588; Parallel Decoupling Framework)"
    ),
    claims=(
        Claim(
            "On MMEB",
            (
                "On MMEB (36 datasets, hit rate@1): +8.9 points for VLM2Vec-LLaVA-1.6 low resolution "
                "7B, +4.2 for VLM2Vec-Qwen2VL 2B, +3.1 for 7B (published baselines of the Qwen2VL "
                "pair: 60.1 and 65.8"
            ),
        ),
        Claim(
            "Inference in a single forward pass",
            "Inference in a single forward pass; even a single path can be used with negligible overhead",
        ),
    ),
)
