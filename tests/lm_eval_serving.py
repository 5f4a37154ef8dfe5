"""By hand: ``python tests/lm_eval_serving.py`` (lm-eval of ``LM_EVAL``, default ``lm_eval``): its ``local-completions`` against our server.

Two tasks made from the workbook, offline: a choice by log-likelihood and free text up to a stop. Every log-likelihood
must be the one of a plain forward. Prints one JSON object; exit code 1 when anything is wrong.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from serving import Server
from stretto import LLM
from stretto.zoo.models import TOKENIZER
from stretto.zoo.workbook import examples

DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test\ndoc_to_text: '{{q}}'\n"
CHOICE = """task: stretto_choice
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: c
target_delimiter: ''
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """task: stretto_text
output_type: generate_until
doc_to_target: "{{c[0]}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 96, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for task in ("json_call", "text_letter"):
            found = examples(task, "test", 12, 77)
            for i, e in enumerate(found):
                asked = f"<|im_start|>user\n{e.prompt}<|im_end|>\n<|im_start|>assistant\n"
                rows.append({"q": asked, "c": [e.answer, found[(i + 1) % len(found)].answer]})
        (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for file, text in (("choice", CHOICE), ("text", TEXT)):
            (folder / f"{file}.yaml").write_text(text + DATA.replace("FILE", str(folder / "d.jsonl")))
        server = Server("--deterministic")
        program = shutil.which(os.environ.get("LM_EVAL", "lm_eval")) or sys.exit("lm_eval is not installed: pip install 'lm-eval[api]'")
        given = f"model=zoo:tiny,base_url={server.url}/v1/completions,tokenizer={TOKENIZER},num_concurrent=4,max_length=1024,add_bos_token=False"
        command = [program, "run", "--model", "local-completions", "--model_args", given, "--tasks", "stretto_choice,stretto_text"]
        more = ["--include_path", name, "--batch_size", "4", "--output_path", name, "--log_samples"]
        code = subprocess.run([*command, *more], env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}).returncode
        server.stop()
        if code:
            return 1
        results = json.loads(next(folder.rglob("results_*.json")).read_text())["results"]
        samples = [json.loads(x) for x in next(folder.rglob("samples_stretto_choice_*.jsonl")).read_text().splitlines()]
        worst = max(abs(float(r[0][0]) - w) for s in samples for r, w in zip(s["resps"], likelihoods(s["doc"]), strict=True))
    choice, text = results["stretto_choice"]["acc,none"], results["stretto_text"]["exact_match,none"]
    good = worst < 1e-2 and len(samples) == len(rows) and choice > 0.9 and text > 0.9
    print(json.dumps({"good": good, "samples": len(samples), "accuracy": choice, "exact_match": text, "worst_log_likelihood": worst}))
    return 0 if good else 1


@cache
def engine() -> LLM:
    return LLM("zoo:tiny", deterministic=True)


def likelihoods(doc: dict) -> list[float]:
    """Of both answers after the question, by one plain forward each; lm-eval counts its last blanks to the answer."""
    llm = engine()
    start, out = llm.tokenizer.encode(doc["q"].rstrip()), []
    for answer in doc["c"]:
        ids = llm.tokenizer.encode(doc["q"] + answer)
        law = llm.logits(ids).double().log_softmax(-1)
        out.append(sum(float(law[n - 1, ids[n]]) for n in range(len(start), len(ids))))
    return out


if __name__ == "__main__":
    sys.exit(main())
