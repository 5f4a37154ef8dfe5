"""Online training of deep surrogates: Simulate and train at the same time (Melissa)."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="online-surrogates",
    title="Online training of deep surrogates",
    purpose="Simulate and train at the same time (Melissa).",
    paper=(
        "\"Training Deep Surrogate Models with Large Scale Online Learning\" (Meyer, Schouler, Caulk, "
        "Ribés, Raffin; ICML 2023, PMLR 202; arXiv 2306.16133)"
    ),
    claims=(
        Claim(
            "A static dataset on disk limits how",
            "A static dataset on disk limits how much a solver can teach",
        ),
    ),
)
