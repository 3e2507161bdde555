"""A comparison as text for the terminal, as JSON, and as a JUnit file. No torch, no model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import tabulate

from suite.report.comparison import Comparison, Line
from suite.report.data import heading, title_of
from suite.store import significant

FORMAT = 1  # of the JSON
_SHOWN = ("better", "worse", "equal", "undecided", "incomparable")


def text(comparison: Comparison, unchanged: bool = True) -> str:
    """One table per model and opponent, and what it comes to. unchanged: show identical results line by line too."""
    rules = comparison.rules
    tested = sum(line.verdict is not None for line in comparison.lines)
    parts = [f"{comparison.title}, {comparison.setting}",
             f"difference: paired over windows or documents, {rules.level:.0%} intervals; p after Holm over {tested} "
             f"tests; equal within {rules.margin_ppl:.2%} of the perplexity, {100 * rules.margin_acc:g} points"]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in comparison.lines:
        groups.setdefault((line.match.model, line.match.against), []).append(line)
    for (model, against), lines in groups.items():
        shown = [line for line in lines if unchanged or line.verdict is None or line.verdict.why != "identical"]
        parts.append(f"\n{title_of(model)}, against {against}:")
        if shown:
            several = len({line.match.method for line in lines}) > 1
            parts.append(_table(shown, against, several))
        if len(shown) < len(lines):
            parts.append(f"{len(lines) - len(shown)} of {len(lines)} results are identical.")
    noted = dict.fromkeys(f"{line.match.method}: {note}" for line in comparison.lines for note in line.match.noted)
    parts += ["", *noted] if noted else []
    parts += ["", summary(comparison)]
    return "\n".join(parts)


def summary(comparison: Comparison) -> str:
    """The verdicts counted, and the tasks of those that are worse."""
    counts = [f"{len(found)} {word}" for word in _SHOWN if (found := comparison.having(word))]
    told = f"{len(comparison.lines)} verdicts: {', '.join(counts)}"
    worse = comparison.having("worse")
    if worse:
        told += f"; worse: {', '.join(f'{li.match.method} than {li.match.against} on {li.match.task}' for li in worse[:6])}"
        told += ", ..." if len(worse) > 6 else ""
    return told


def _table(lines: Sequence[Line], against: str, several: bool) -> str:
    head = [*(["method"] if several else []), "task", "n", against if len(against) <= 20 else "other",
            "now" if several else lines[0].match.method, "difference", "interval", "noise", "p (Holm)", "verdict"]
    rows = []
    for line in lines:
        first = [*([line.match.method] if several else []), heading(line.match.task)]
        if line.verdict is None:
            rows.append([*first, "", "", "", "", "", "", "", f"incomparable: {'; '.join(line.match.apart)}"])
            continue
        v, number = line.verdict, _number(line)
        word = v.word if not v.why else f"{v.word}: {v.why}"
        rows.append([*first, f"{v.n} {line.unit}", number(v.other), number(v.mine), number(v.difference.value, "+"),
                     f"[{number(v.difference.low, '+')}, {number(v.difference.high, '+')}]",
                     "not measured" if v.noise is None else number(v.noise), f"{v.p_holm:.2g}", word])
    return tabulate.tabulate(rows, head, tablefmt="simple", disable_numparse=True, stralign="left")


def _number(line: Line) -> Any:
    """How the scores of a line are written: perplexities with four decimals, accuracies in percent."""
    def write(value: float, sign: str = "") -> str:
        if not math.isfinite(value):
            return "-"
        return f"{value:{sign}.4f}" if line.kind == "perplexity" else f"{100 * value:{sign}.2f}"
    return write


def as_json(comparison: Comparison) -> str:
    """Everything, one object: {"format", "title", "setting", "rules", "status", "counts", "comparisons": [...]}."""
    rules = comparison.rules
    content = {
        "format": FORMAT, "title": comparison.title, "setting": comparison.setting, "status": comparison.status,
        "rules": {"level": rules.level, "margin_ppl": rules.margin_ppl, "margin_acc": rules.margin_acc,
                  "power": rules.power},
        "counts": {word: len(comparison.having(word)) for word in _SHOWN},
        "comparisons": [_object(line) for line in comparison.lines],
    }
    return json.dumps(significant(content), indent=1, ensure_ascii=False, allow_nan=False)


def _object(line: Line) -> dict[str, Any]:
    match, v = line.match, line.verdict
    told = {"model": match.model, "method": match.method, "against": match.against, "task": match.task,
            "kind": line.kind, "metric": match.other.result["headline"], "verdict": line.word,
            "apart": list(match.apart), "noted": list(match.noted)}
    if v is None:
        return told
    return told | {
        "n": v.n, "unit": line.unit, "score": v.mine, "other": v.other, "difference": v.difference.value,
        "low": v.difference.low, "high": v.difference.high, "relative": v.difference.value / v.other if v.other else None,
        "test": v.test, "p": v.p, "p_holm": v.p_holm, "p_equal": v.p_equal, "margin": v.margin, "noise": v.noise,
        "within_noise": v.within_noise, "needed": v.needed, "why": v.why}


def junit(comparison: Comparison) -> bytes:
    """A JUnit file: a suite per model and opponent, a case per method and task. Worse is a failure; what is undecided or
    incomparable is skipped, with the reason."""
    root = ElementTree.Element("testsuites", name="ptq compare", tests=str(len(comparison.lines)),
                               failures=str(len(comparison.having("worse"))), errors="0")
    suites: dict[str, ElementTree.Element] = {}
    for line in comparison.lines:
        name = f"{line.match.model}, against {line.match.against}"
        if name not in suites:
            suites[name] = ElementTree.SubElement(root, "testsuite", name=name)
        case = ElementTree.SubElement(suites[name], "testcase", classname=f"{line.match.model}.{line.match.method}",
                                      name=line.match.task)
        told = _sentence(line)
        if line.word == "worse":
            ElementTree.SubElement(case, "failure", type="worse", message=told).text = told
        elif line.word in ("undecided", "incomparable"):
            ElementTree.SubElement(case, "skipped", message=told)
        ElementTree.SubElement(case, "system-out").text = told
    return _document(root, suites.values())


def _sentence(line: Line) -> str:
    match, v = line.match, line.verdict
    start = f"{match.method} is {line.word} compared with {match.against} on {match.task}"
    if v is None:
        return f"{start}: {'; '.join(match.apart)}"
    number = _number(line)
    noise = "not measured" if v.noise is None else number(v.noise)
    return (f"{start}: {number(v.other)} became {number(v.mine)}, difference {number(v.difference.value, '+')} "
            f"[{number(v.difference.low, '+')}, {number(v.difference.high, '+')}], noise {noise}, {v.test} "
            f"p {v.p_holm:.2g} (Holm), {v.n} {line.unit}{f'; {v.why}' if v.why else ''}")


# ---------------------------------------------------------------------------------------------- contract checks


def checks_text(name: str, outcomes: Iterable[Any]) -> str:
    """The outcomes of `suite.testing.run_checks`, one line each, the sentence below those that did not pass."""
    outcomes = list(outcomes)
    width = max((len(o.check) for o in outcomes), default=0)
    lines = []
    for o in outcomes:
        lines.append(f"{o.check:{width}}  {o.toy:9} {o.status}")
        lines += [f"{'':{width}}  {o.message}"] if o.message else []
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    return "\n".join([*lines, "", f"{name}: " + ", ".join(f"{count} {status}" for status, count in counts.items())])


def checks_json(name: str, outcomes: Iterable[Any]) -> str:
    return json.dumps({"format": FORMAT, "method": name, "checks": [vars(o) for o in outcomes]}, indent=1)


def checks_junit(name: str, outcomes: Iterable[Any]) -> bytes:
    """A JUnit file: a case per check and toy; an expected failure is skipped, with its reason."""
    outcomes = list(outcomes)
    root = ElementTree.Element("testsuites", name="ptq check", tests=str(len(outcomes)),
                               failures=str(sum(o.status == "failed" for o in outcomes)), errors="0")
    suite = ElementTree.SubElement(root, "testsuite", name=name)
    for o in outcomes:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=f"{o.check}[{o.toy}]")
        if o.status == "failed":
            ElementTree.SubElement(case, "failure", type="contract", message=o.message).text = o.message
        elif o.status == "expected failure":
            ElementTree.SubElement(case, "skipped", message=o.message)
    return _document(root, [suite])


def _document(root: ElementTree.Element, suites: Iterable[ElementTree.Element]) -> bytes:
    for suite in suites:
        cases = suite.findall("testcase")
        for key, tag in (("failures", "failure"), ("skipped", "skipped")):
            suite.set(key, str(sum(case.find(tag) is not None for case in cases)))
        suite.set("tests", str(len(cases)))
        suite.set("errors", "0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
