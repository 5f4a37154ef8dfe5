"""Diesel DeepONet: A neural operator that predicts engine gas-flow states faster than real time."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="diesel-deeponet",
    title="Diesel DeepONet",
    purpose="A neural operator that predicts engine gas-flow states faster than real time.",
    paper=(
        "\"Real-Time Prediction of Gas Flow Dynamics in Diesel Engines using a Deep Neural Operator "
        "Framework\" (V. Kumar, S. Goswami, D. Smith, G. E. Karniadakis; arXiv 2304.00567, Apr 2023; "
        "earlier title \"…Multiple Output States…\"; journal version exists)"
    ),
    claims=(
        Claim(
            "Maximum relative L2 error about 6.5% over",
            (
                "Maximum relative L2 error about 6.5% over the output states; low sensitivity to "
                "input noise; ensemble (mean) uncertainty: worst error at mu+2sigma 12%; real-time "
                "prediction"
            ),
        ),
    ),
)
