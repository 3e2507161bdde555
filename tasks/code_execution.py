"""Scoring of tasks whose answers are programs: each runs on its test in the suite's sandbox, and nowhere else.

In place of `code_eval` of Hugging Face's `evaluate`, which lm-eval's own humaneval uses: that one downloads itself, and
runs the programs unconfined in the evaluating user's name. Prompts, stop words and the assembly of programs are
lm-eval's.
"""

from __future__ import annotations

from suite import sandbox


def build_predictions(answers: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Whole programs: each prompt with what the model wrote after it."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(answers, docs, strict=True)]


def process_results(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """pass@1 of one problem: of its first answer, as nothing is sampled."""
    program = results[0][0] if isinstance(results[0], list) else results[0]
    verdict = sandbox.check(program, doc["prompt"], doc["test"], doc["entry_point"])
    return {"pass@1": float(verdict.passed)}
