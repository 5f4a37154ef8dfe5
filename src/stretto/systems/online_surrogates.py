"""Online training of deep surrogates: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="online-surrogates",
    title="Online training of deep surrogates",
    room="science",
    purpose=(
        "Trains a surrogate while its simulations run, without storing the data, and better than "
        "from a fixed set."
    ),
    paper=(
        "Training Deep Surrogate Models with Large Scale Online Learning, ICML 2023 (arXiv "
        "2306.16133)"
    ),
    claims=(
        Claim(
            name="fully connected",
            paper="68 % more accurate than offline training",
            bar="online far ahead of offline at equal batches",
        ),
        Claim(
            name="FNO and message passing",
            paper="16 % and 7 %",
            bar="single to tens of per cent, 3 seeds",
        ),
        Claim(
            name="heat equation (SC'23 companion)",
            paper="8 TB in 2 h, +47 % accuracy, 13x batch throughput",
            bar="the reservoir wins on throughput with a throttled solver; FIFO below FIRO",
        ),
    ),
)
