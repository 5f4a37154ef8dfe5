"""Asynchronous multilingual lip-sync."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="lip-sync",
    title="Asynchronous multilingual lip-sync",
    purpose="Speech in one language to a talking mouth in another, as stages decoupled by message queues.",
    paper=(
        "Asynchronous Pipeline Parallelism for Real-Time Multilingual Lip Synchronization in Video "
        "Communication Systems, arXiv 2512.18318, 20 Dec 2025 (AIDE4IoT workshop, IEEE Big Data 2025)"
    ),
    claims=(
        Claim(
            "End-to-end latency up to 3.1× lower than",
            "End-to-end latency up to 3.1× lower than running the modules one after another",
        ),
        Claim(
            "Two cooperating pipelines",
            (
                "Two cooperating pipelines: an asynchronous translation pipeline (ATP: segmentation →"
                " recognition → translation → synthesis) and a real-time video pipeline (RVP: lip-"
                "synchronised frames)"
            ),
        ),
        Claim(
            "Companion paper of the group",
            (
                "Companion paper of the group: turn-taking makes multi-party cost linear instead of "
                "quadratic; real time means processing/duration τ < 1"
            ),
        ),
    ),
)
