"""Asynchronous multilingual lip-sync: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="lip-sync",
    title="Asynchronous multilingual lip-sync",
    room="pipelines",
    purpose=(
        "Turns speech in one language into a talking mouth in another with less delay, as stages "
        "decoupled by queues."
    ),
    paper=(
        "Asynchronous Pipeline Parallelism for Real-Time Multilingual Lip Synchronization in Video "
        "Communication Systems, 20 Dec 2025 (arXiv 2512.18318, IEEE Big Data 2025)"
    ),
    claims=(
        Claim(
            name="end-to-end latency",
            paper="up to 3.1x lower than one module after another",
            bar=(
                "1.3-1.9x with real stages on 2 cores; sum over maximum of the stages when they "
                "sit on other resources"
            ),
        ),
        Claim(
            name="lip model inference",
            paper="4.7x faster with a compiled fp16 engine",
            bar="the compiled stage against the plain one",
        ),
        Claim(
            name="quality",
            paper="no loss of accuracy or visual quality reported",
            bar=(
                "media bit-equal to the sequential run; sound and lips within 20 ms at every "
                "closure"
            ),
        ),
    ),
)
