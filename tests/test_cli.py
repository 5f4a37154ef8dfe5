"""The command line as a person or a script meets it: help without torch, JSON, errors in one line, exit codes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from stretto.cli import app
from stretto.cli.common import _flatten

LIGHT = [
    ["--help"],
    ["--version"],
    ["methods"],
    ["methods", "ngram"],
    ["systems", "--json"],
    ["train"],
    ["bench", "--help"],
]
VERBS = "run chat bench eval tune scale train methods systems reproduce doctor".split()


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
    "args, key",
    [
        (["methods"], "methods"),
        (["systems"], "systems"),
        (["train"], "recipes"),
        (["methods", "ar"], "name"),
    ],
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
        (["scale"], 2, ["--questions"]),
        (["scale", "x", "--questions", "steps:2"], 2, ["--questions"]),
        (["scale", "--questions", "steps:x"], 2, ["steps:N"]),
        (["scale", "--questions", "/nowhere.txt"], 2, ["/nowhere.txt"]),
        (["scale", "x", "--alpha", "1.5"], 2, ["alpha", "0 to 1"]),
        (["scale", "x", "--coverage", "conditional", "--alpha", "0.05"], 2, ["alpha (n + 1)", "0.059"]),
        (["scale", "x", "--method", "atss"], 2, ["atss", "atts"]),
        (["scale", "x", "--method", "sync", "--calibrate", "c.json"], 2, ["atts"]),
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


@pytest.mark.parametrize(
    "args, words",
    [
        (["sing"], ["sing", "run"]),
        (["rum"], ["did you mean 'run'"]),
        (["run", "zoo:tiny", "x", "--loud"], ["--loud"]),
        (["bench", "--seed", "x"], ["--seed"]),
        (["reproduce"], ["rgument"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_wrong_command_line_is_one_line(args, words):
    done = invoke(*args)
    assert done.exit_code == 2 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("stretto: ") and all(w in line for w in words), line
    again = invoke(*args, "--json")
    assert again.exit_code == 2 and words[0] in json.loads(again.stdout)["error"]["message"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_tokens: 0", "max_tokens=0"),
        ("max-tokens: 7\ntemperature: -3", "temperature=-3"),
        ("max_tokes: 5", "did you mean 'max-tokens'"),
        ("- a\n- b", "must hold a map"),
        ("a: [", "cannot be read as YAML"),
        ("method: foo\noptions: {num_draft_tokens: 4}", "foo"),
    ],
)
def test_config_files_set_defaults(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    done = invoke("run", "zoo:tiny", "x", "--config", str(path))
    assert done.exit_code == 2 and words in done.stderr.replace("-3.0", "-3"), done.stderr
    assert invoke("run", "zoo:tiny", "x", "--config", str(tmp_path / "none")).exit_code == 2


def test_the_command_line_wins_over_the_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_tokens: 0\nmethod: foo")
    done = invoke("run", "zoo:tiny", "x", "--max-tokens", "5", "--config", str(path))
    assert "foo" in done.stderr and "max_tokens" not in done.stderr


def test_methods_options_in_a_config_are_pairs():
    assert _flatten({"gamma": 4, "adapt": True}) == ["gamma=4", "adapt=true"]
    assert _flatten({"draft": {"gamma": 4, "tree": "wide"}}) == ["draft.gamma=4", "draft.tree=wide"]


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_every_verb_has_help_and_json(verb):
    done = invoke(*([verb] if verb else []), "--help")
    assert done.exit_code == 0 and "--help" in done.stdout
    if verb is None:
        assert all(f"  {v} " in done.stdout for v in VERBS)
    else:
        assert "--json" in done.stdout


def test_no_arguments_show_the_help():
    done = invoke()
    assert done.exit_code == 0 and "Usage: stretto" in done.stderr + done.stdout


def test_every_method_is_described():
    from stretto.decoding.registry import METHODS

    for name, info in METHODS.items():
        done = invoke("methods", name)
        assert done.exit_code == 0 and all(f"-o {o.name}=" in done.stdout for o in info.options)


def test_unexpected_errors_are_json_too(monkeypatch):
    import stretto.decoding.registry as registry

    monkeypatch.setattr(registry, "get", lambda name: 1 / 0)
    done = invoke("methods", "ar", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "ZeroDivisionError"


@pytest.mark.skipif(sys.platform == "win32", reason="needs the rusage of children")
def test_help_is_quick():
    """Measured in processor time, so that a busy machine does not matter."""
    import resource

    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    costs = []
    for _ in range(3):
        start = seconds()
        subprocess.run([sys.executable, "-m", "stretto", "--help"], check=True, capture_output=True)
        costs.append(seconds() - start)
    assert min(costs) < 0.4, costs
