"""MPIrigen: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="mpirigen",
    title="MPIrigen",
    room="programs",
    purpose=(
        "Says where a C program needs MPI calls, which, and with what arguments, and checks each "
        "by compiling and running."
    ),
    paper=(
        "MPIrigen: MPI Code Generation through Domain-Specific Language Models, Feb 2024 (arXiv "
        "2402.09126)"
    ),
    claims=(
        Claim(
            name="exact line, all programs",
            paper="location 0.445, function 0.599, arguments 0.948",
            bar="above 0.9 on the random split, with a clear drop on unseen families",
        ),
        Claim(
            name="up to 5 calls, within 2 lines",
            paper="0.80 / 0.77 / 0.97",
        ),
        Claim(
            name="GPT-3.5 zero-shot, exact line",
            paper="0.235 / 0.398 / 0.826",
        ),
        Claim(
            name="completion after the whole program",
            paper="the model sees all lines before it places a call",
            bar="labels last beat left-to-right infilling on location",
        ),
    ),
)
