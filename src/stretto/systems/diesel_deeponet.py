"""Diesel DeepONet: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="diesel-deeponet",
    title="Diesel DeepONet",
    room="science",
    purpose=(
        "Predicts gas-flow states of a diesel engine faster than real time, with an uncertainty, "
        "for many rollouts at once."
    ),
    paper=(
        "Real-Time Prediction of Gas Flow Dynamics in Diesel Engines using a Deep Neural Operator "
        "Framework (Kumar, Goswami, Smith, Karniadakis), Apr 2023 (arXiv 2304.00567)"
    ),
    claims=(
        Claim(
            name="error",
            paper="maximum relative L2 error about 6.5 % over the output states",
            bar=(
                "mean error at most 6.5 % on the gas path over 60 s rollouts; per-state mean and "
                "maximum reported"
            ),
        ),
        Claim(
            name="noise and uncertainty",
            paper="low sensitivity to input noise; worst error at mu + 2 sigma 12 %",
            bar="error with 5 % noise close to that without; coverage at 2 sigma reported",
        ),
        Claim(
            name="speed",
            paper="real-time prediction",
            bar="60 s of engine time well under a second; 10-100x the ODE solver when batched",
        ),
    ),
)
