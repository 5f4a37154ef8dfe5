"""Mirror-SD: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="mirror-sd",
    title="Mirror-SD",
    room="decoding",
    purpose=(
        "Hides the draft's time: it works on another device while the target finishes its upper "
        "layers. Lossless."
    ),
    paper=(
        "Mirror Speculative Decoding: Breaking the Serial Barrier in LLM Inference, 15 Oct 2025 "
        "(arXiv 2510.13161)"
    ),
    claims=(
        Claim(
            name="wall clock on SpecBench, 14B-66B",
            paper="2.8-5.8x over plain decoding",
            bar="with an injected delay of the target, a step costs about the target's own time",
        ),
        Claim(
            name="against EAGLE-3",
            paper="30 % faster on average",
            bar="0.9-1.3x of plain speculation on two bare cores, said so",
        ),
        Claim(
            name="Qwen3-14B, maths",
            paper="5.32x; EAGLE-3 3.36x, plain speculation 2.80x",
        ),
        Claim(
            name="reuse",
            paper="a draft is ready unless the early guess misses",
            bar=(
                "60-95 % of steps reuse; greedy text equals plain decoding even when the draft dies"
            ),
        ),
    ),
)
