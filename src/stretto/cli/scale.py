"""``stretto scale``: many chains a question over a draft and a target model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import Config, Device, Dtype, Json, Seed, Threads, emit, verb
from stretto.errors import InputError, OptionError, PromptError


@verb
def scale(
    question: Annotated[str | None, typer.Argument(help="A question; or give --questions.")] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions",
            help="A file: one question a line, or JSON lines with 'prompt' (and 'answer'); or steps:N, held-out "
            "problems of the zoo.",
        ),
    ] = None,
    draft: Annotated[str, typer.Option("--draft", help="The model that writes.")] = "zoo:tiny-steps-draft",
    target: Annotated[str, typer.Option("--target", help="The model that scores and takes over.")] = "zoo:tiny-steps",
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m",
            help="atts; sync (all chains wait every turn); draft or target alone; reject or fork (the draft alone).",
        ),
    ] = "atts",
    k: Annotated[int, typer.Option("-k", help="Chains a question.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Share of chunks the target may take over.")] = 0.4,
    turns: Annotated[int, typer.Option("--turns", help="Most chunks of a chain.")] = 15,
    chunk: Annotated[int, typer.Option("--chunk", help="Most tokens of a chunk.")] = 128,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Ends a chunk earlier; \\n is a new line.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of both models.")] = 0.8,
    coverage: Annotated[
        str, typer.Option("--coverage", help="marginal: over the stream of questions; conditional: per question.")
    ] = "marginal",
    calibration: Annotated[
        str, typer.Option("--calibration", help="online, or a file that --calibrate made.")
    ] = "online",
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="Score first chunks of these questions, keep them in this file.")
    ] = None,
    on_reject: Annotated[
        str, typer.Option("--on-reject", help="continue: behind the rejected chunk; replace: in its place.")
    ] = "continue",
    draft_limit: Annotated[int, typer.Option("--draft-limit", help="Jobs of the draft at the same time.")] = 16,
    target_limit: Annotated[int, typer.Option("--target-limit", help="Jobs of the target at the same time.")] = 4,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template around the questions.")] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Answer questions by many chains over two models.

    The draft writes chunk after chunk, the target scores each, and a conformal test decides who takes over.
    """
    asked = _read(question, questions)
    if calibrate is not None and method != "atts":
        raise OptionError("--calibrate", str(calibrate), f"with --method atts, not {method}")
    from stretto.threads.chains import Setting

    setting = Setting(
        variant=method, k=k, alpha=alpha, turns=turns, chunk=chunk, temperature=temperature, seed=seed,
        coverage=coverage, on_reject=on_reject, draft_limit=draft_limit,  # type: ignore[arg-type]
        target_limit=target_limit, stop=tuple(s.replace("\\n", "\n") for s in stop or ()),
    )
    from stretto.llm import LLM
    from stretto.threads.atts import atts
    from stretto.threads.atts import calibrate as make

    open_ = lambda name: LLM(name, dtype=dtype, device=device, threads=threads, enable_prefix_caching=False)
    small = None if method == "target" else open_(draft)
    large = open_(target) if method in ("atts", "sync", "target") else None
    first = small or large
    template = "" if raw or not first.tokenizer.templates else first.chat_prompt([{"role": "user", "content": "\0"}])
    prompts = [template.replace("\0", q["prompt"]) if template else q["prompt"] for q in asked]
    if calibrate is not None:
        made = make(small, large, prompts, setting=setting, template=template)
        made.save(calibrate)
        n = len(made.scores[0])
        emit({"calibration": str(calibrate), "scores": n}) if as_json else typer.echo(f"{n} scores in {calibrate}")
        return
    result = atts(small, large, prompts, setting=setting, calibration=calibration, template=template)
    references = [q.get("answer") for q in asked]
    grade = result.grade(references) if all(r is not None for r in references) else None
    if as_json:
        emit({"draft": draft, "target": target, "grade": grade, **result.data()})
    else:
        _show(result, grade)


def _read(question: str | None, source: str | None) -> list[dict[str, Any]]:
    """[{"prompt": ..., "answer": ... if known}]"""
    if (question is None) == (source is None):
        raise InputError("give either a question or --questions FILE (or --questions steps:N)")
    if source is None:
        if not question or not question.strip():
            raise PromptError("the question is empty")
        return [{"prompt": question}]
    if source.startswith("steps:"):
        from stretto.training.step_units import problems

        count = source.removeprefix("steps:")
        if not count.isdecimal() or not 1 <= int(count) <= 10_000:
            raise OptionError("--questions", source, "steps:N with N from 1 to 10000")
        return [{"prompt": p.prompt, "answer": str(p.answer)} for p in problems("test", int(count), 0)]
    return _lines(Path(source))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    out: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        item: Any = {"prompt": line}
        if line.lstrip().startswith("{"):
            try:
                item = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
            raise InputError(f"{path}, line {number}: a question is a line of text, or JSON with 'prompt'")
        out.append({k: str(v) for k, v in item.items() if k in ("prompt", "answer") and v is not None})
    if not out:
        raise PromptError(f"{path} holds no question")
    return out


def _show(result: Any, grade: dict[str, float] | None) -> None:
    for q in result.questions:
        typer.echo(f"{q.vote if q.vote is not None else 'no answer'}    {' '.join(str(a) for a in q.answers)}")
    if grade is not None:
        shares = [f"{grade[key]:.3f} {word}" for key, word in
                  (("vote", "by vote"), ("pass_at_k", "pass@k"), ("mean", "of chains"))]
        typer.echo(f"right: {', '.join(shares)}")
    for r in result.rates():
        loose = f", {r['uncalibrated']} uncalibrated" if r["uncalibrated"] else ""
        share = f"{r['rate']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        typer.echo(f"turn {r['turn']:2}: taken over {share} of {r['n']}{loose}", err=True)
    words = ", ".join(f"{v} {n}" for n, v in result.tokens.items())
    times = ", ".join(f"{n} {v:.2f} s" for n, v in result.seconds.items())
    typer.echo("\n".join([f"tokens: {words}; {times}", *result.notes]), err=True)
