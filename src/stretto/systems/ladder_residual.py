"""Ladder Residual."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="ladder-residual",
    title="Ladder Residual",
    purpose=(
        "Feed each block the stream without its immediate predecessor's output, so that the "
        "predecessor's all-reduce hides behind the block's compute."
    ),
    paper=(
        "\"Ladder-residual: parallelism-aware architecture for accelerating large model inference with"
        " communication overlapping\" (Jan 2025, ICML 2025, arXiv 2501.06589)"
    ),
    claims=(
        Claim(
            "70B Llama shape",
            (
                "70B Llama shape, TP=8, whole model laddered: 29-30 % end-to-end inference speed-up "
                "with NVLink; more without it"
            ),
        ),
        Claim(
            "Communication is ~38 % of the latency",
            (
                "Communication is ~38 % of the latency of a 70B at TP=8, more than 50 % without P2P "
                "(second-hand summary, plausible from the table)"
            ),
        ),
        Claim(
            "From scratch",
            (
                "From scratch: 1.2B and 3.5B models on 100B tokens (unverified token count) reach "
                "about the loss and task scores of the standard model"
            ),
        ),
    ),
)
