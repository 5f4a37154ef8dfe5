"""xLLM: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="xllm",
    title="xLLM",
    room="serving",
    purpose=(
        "Runs one endpoint over many engines: it splits prefill and decode, fills idle capacity, "
        "and survives a dead engine."
    ),
    paper="xLLM Technical Report, 16 Oct 2025 (arXiv 2510.14686)",
    claims=(
        Claim(
            name="same time per token, Ascend",
            paper="up to 1.7x MindIE and 2.2x vLLM-Ascend on Qwen2 and Qwen3",
        ),
        Claim(
            name="dynamic roles",
            paper="1.67x the served rate of minimal load on bursty traffic, 1.1x on steady",
            bar="beats the best static split in service level over a trace that changes",
        ),
        Claim(
            name="online and offline together",
            paper="up to 3x offline throughput at the same online service level",
            bar="online p99 within its limits under a saturating offline load",
        ),
        Claim(
            name="asynchronous scheduling and graphs",
            paper="+17.4 % (1.5B), +0.6 % (7B); graphs +27.4 % (1.7B)",
            bar="idle time between steps before and after",
        ),
    ),
)
