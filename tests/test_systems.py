"""The index: all 54 systems, complete entries, honest states."""

import importlib
import json
import re

import pytest

from stretto.errors import UnknownNameError, UnsupportedError
from stretto.systems import all_systems, get, write_evidence

SLUGS = """
adaptorch atts aurora bytescale c4 cd4lm clover des diesel-deeponet distzo2 dparallel dpc exflow flover freedave
galvatron heterogeneous-low-bandwidth hidden-transfer hogwild holmes hpc-paradigms jacobi-forcing ladder-residual
learn2pd lightningrl lip-sync llep mirror-sd moe-folding moe-inference-survey mpirigen multiverse nap nexus oneflow
online-surrogates parallelbench pararnn parevo parscale pdf-embeddings ppd qimeng-mupa simpletool
speak-while-watching specmemo speculative-moe stable-rps threadweaver wedlm xllm youtu-parsing zeppelin zo2
""".split()


ROOMS = """
serving threads multimodal pipelines programs science bench training planning decoding experts engine parallel models
""".split()


def test_every_system_is_there_once():
    assert [s.slug for s in all_systems()] == sorted(SLUGS) and len(SLUGS) == 54


@pytest.mark.parametrize("system", all_systems(), ids=lambda s: s.slug)
def test_entries_are_complete_and_honest(system):
    assert system.title and system.purpose.endswith(".") and len(system.purpose) < 160
    assert re.search(r"20\d\d", system.paper) and system.room in ROOMS
    assert len({c.name for c in system.claims}) == len(system.claims) >= 2
    assert all(c.name and c.paper for c in system.claims) and any(c.bar for c in system.claims)
    for part in system.parts:
        importlib.import_module(part)
    assert (system.state == "missing") == (not system.parts)
    assert set(system.row()) == {
        "slug",
        "title",
        "purpose",
        "paper",
        "room",
        "state",
        "command",
        "evidence",
    }
    if system.evidence is None:
        with pytest.raises(UnsupportedError, match=system.slug):
            system.measure(True)


def test_unknown_slug_names_the_nearest():
    with pytest.raises(UnknownNameError, match="freedave"):
        get("freedav")


def test_evidence_files_carry_their_provenance(tmp_path):
    path = write_evidence({"system": "x", "holds": False, "claims": []}, tmp_path)
    data = json.loads(path.read_text())
    assert data["system"] == "x" and data["provenance"]["version"]
