"""ThreadWeaver."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="threadweaver",
    title="ThreadWeaver",
    purpose=(
        "Fork-join reasoning threads on any plain completion engine, trained on a prefix trie and "
        "then with RL for speed and accuracy."
    ),
    paper=(
        "ThreadWeaver: Adaptive Threading for Efficient Parallel Reasoning in Language Models, "
        "Nov/Dec 2025 (arXiv 2512.07843)"
    ),
    claims=(
        Claim(
            "Best single problems 3.05x",
            "Best single problems 3.05x (MATH500), 3.56x (Minerva)",
        ),
        Claim(
            "Stages on AIME24",
            (
                "Stages on AIME24: first SFT (959 samples) 74.5 % / format-correct 56.4 %; self-"
                "training (17k) 74.0 % / 77.0 %; + RL 79.9 % / 72.4 %"
            ),
        ),
        Claim(
            "Public synthetic task",
            (
                "Public synthetic task (products of 5-8 integers): SFT pass@1 93.8 %; after 400 RL "
                "steps both models 99.0 %, critical path 2632 vs 3322 tokens (1.26x)"
            ),
        ),
    ),
)
