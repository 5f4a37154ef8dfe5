"""AdaptOrch: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="adaptorch",
    title="AdaptOrch",
    room="threads",
    purpose=(
        "Answers tasks with several parts better and sooner: the task's dependency graph decides "
        "which agents run in parallel, in sequence or in layers."
    ),
    paper=(
        "AdaptOrch: Task-Adaptive Multi-Agent Orchestration in the Era of LLM Performance "
        "Convergence, Feb 2026 (arXiv 2602.16873)"
    ),
    claims=(
        Claim(
            name="quality over the best fixed topology",
            paper="12-23 % better than the best single static topology with the same models",
            bar=(
                "auto at least as good as the best static topology on each kind of task, and ahead "
                "of every single one in the mean"
            ),
        ),
        Claim(
            name="absolute scores",
            paper="SWE-bench Verified 52.6, GPQA Diamond 53.1, HotpotQA F1 76.4",
        ),
        Claim(
            name="cost of routing",
            paper="O(|V| + |E|)",
            bar="10^5 nodes and 3x10^5 edges in under a second, time linear in the size",
        ),
        Claim(
            name="termination",
            paper="synthesis always terminates",
            bar="a validator that always fails ends after at most 4 rounds",
        ),
    ),
)
