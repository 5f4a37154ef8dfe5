"""MPIrigen: Predict where MPI calls go, which, and with what arguments."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="mpirigen",
    title="MPIrigen",
    purpose="Predict where MPI calls go, which, and with what arguments.",
    paper=(
        "\"MPIrigen: MPI Code Generation through Domain-Specific Language Models\" (Schneider, "
        "Hasabnis, Vo, Kadosh, et al., arXiv 2402.09126, Feb 2024)"
    ),
    claims=(
        Claim(
            "General models",
            (
                "General models (GPT-3.5, PolyCoder) lose much quality on MPI programs compared to "
                "general code; the domain-specific MonoCoder does better for its size (context "
                "experiments with 100/300/600 tokens"
            ),
        ),
        Claim(
            "Fine-tuned model",
            "Fine-tuned model: location and function accuracy up to 0.8, arguments >0.9",
        ),
        Claim(
            "Key trick",
            "Key trick: completion after the whole program",
        ),
    ),
)
