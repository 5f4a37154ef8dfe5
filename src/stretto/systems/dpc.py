"""DPC: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="dpc",
    title="DPC",
    room="multimodal",
    purpose=(
        "Raises accuracy on the classes a prompt was tuned for without changing it on new ones: a "
        "second prompt is trained on hard negatives and mixed in."
    ),
    paper=(
        "DPC: Dual-Prompt Collaboration for Tuning Vision-Language Models, Mar 2025 (CVPR 2025, "
        "arXiv 2503.13443)"
    ),
    claims=(
        Claim(
            name="base classes, CoOp, mean of 11 data sets",
            paper="81.98 to 85.15",
            bar="+1 to +5 points over CoOp, 3 seeds",
        ),
        Claim(
            name="new classes",
            paper="68.84 unchanged, by construction",
            bar="bit-identical logits at weight 0",
        ),
        Claim(
            name="harmonic mean",
            paper="CoOp 74.84 to 76.13; MaPLe 78.08 to 79.12; PromptSRC 78.87 to 80.04",
            bar="rises with the base accuracy; hard negatives beat random classes",
        ),
    ),
)
