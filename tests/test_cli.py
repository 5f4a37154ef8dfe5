"""The command line as a person or a script meets it: help without torch, JSON, errors in one line, exit codes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from stretto.cli import app

LIGHT = [["--help"], ["--version"], ["methods"], ["methods", "ngram"], ["systems", "--json"], ["train"], ["bench", "--help"]]


def invoke(*args):
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_listings_import_no_torch(args):
    code = (
        "import sys\nfrom stretto.cli import app\n"
        f"try:\n    app({args!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_import_stretto_is_light():
    code = "import stretto, sys; assert 'torch' not in sys.modules; stretto.SamplingParams; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    "args, key", [(["methods"], "methods"), (["systems"], "systems"), (["train"], "recipes"), (["methods", "ar"], "name")]
)
def test_json_is_one_object(args, key):
    done = invoke(*args, "--json")
    assert done.exit_code == 0 and key in json.loads(done.stdout)


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["methods", "ngarm"], 2, ["ngarm", "ngram"]),
        (["reproduce", "pdd"], 2, ["pdd", "ppd"]),
        (["reproduce", "c4"], 2, ["c4", "not built yet"]),
        (["run", "zoo:tinny", "x"], 2, ["zoo:tinny", "zoo:tiny"]),
        (["run", "/nowhere/at/all", "x"], 1, ["/nowhere/at/all"]),
        (["run", "zoo:tiny", ""], 2, ["empty"]),
        (["run", "zoo:tiny", "x", "--method", "foo"], 2, ["foo", "ar"]),
        (["run", "zoo:tiny", "x", "-o", "k"], 2, ["-o", "key=value"]),
        (["run", "zoo:tiny", "x", "--max-tokens", "0"], 2, ["max_tokens"]),
        (["run", "zoo:tiny", "x", "--temperature", "-1"], 2, ["temperature"]),
        (["bench", "zoo:tiny", "--methods", "foo"], 2, ["foo"]),
        (["eval", "zoo:tiny", "--tasks", "foo"], 2, ["foo"]),
        (["train", "zoo-tinny"], 2, ["zoo-tinny", "zoo-tiny"]),
        (["tune", "zoo:tiny", "/nowhere.txt"], 2, ["/nowhere.txt"]),
        (["doctor", "--threads", "0"], 2, ["threads"]),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else str(v),
)
def test_wrong_input_is_one_clear_line(args, code, words):
    done = invoke(*args)
    assert done.exit_code == code, done.output
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("stretto: ") and all(w in line for w in words), line
    again = invoke(*args, "--json")
    assert again.exit_code == code
    assert words[0] in json.loads(again.stdout)["error"]["message"]


def test_unknown_verbs_and_flags_are_refused():
    assert invoke("sing").exit_code == 2
    assert invoke("run", "zoo:tiny", "x", "--loud").exit_code == 2
