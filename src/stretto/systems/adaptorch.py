"""AdaptOrch."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="adaptorch",
    title="AdaptOrch",
    purpose=(
        "Choose parallel, sequential, hierarchical or hybrid agent topology from the task's "
        "dependency graph, then synthesize with a consistency check."
    ),
    paper=(
        "AdaptOrch: Task-Adaptive Multi-Agent Orchestration in the Era of LLM Performance "
        "Convergence, Feb 2026 (arXiv 2602.16873)"
    ),
    claims=(
        Claim(
            "When models are within ε of each",
            (
                "When models are within ε of each other, the choice of topology matters more than the"
                " choice of model: 12-23 % better than the best static single topology with the same "
                "models, on SWE-bench Verified"
            ),
        ),
        Claim(
            "Routing in O",
            "Routing in O(|V|+|E|); synthesis that always terminates",
        ),
        Claim(
            "Own limitations named by the paper",
            (
                "Own limitations named by the paper: quality depends on the decomposition; coupling "
                "is estimated in coarse discrete levels"
            ),
        ),
    ),
)
