"""A comparison: pairs of records, each with its verdict. From records alone: no torch, no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from suite import verdict
from suite.errors import PTQError
from suite.report.data import Score
from suite.store import Record
from suite.verdict import RULES, Pair, Rules, Verdict

_OPPOSITE = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class Match:
    """Two results to be judged: `mine` against `other`.

    method, against: what the two are called. noise: the floor, in units of the score, None if it was not measured.
    remeasured: they are one variant, measured twice. apart: why the two cannot be compared; if there is anything, they
    are not. noted: what else differs.
    """

    model: str
    method: str
    against: str
    task: str
    mine: Record | None
    other: Record
    noise: float | None = None
    remeasured: bool = False
    apart: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A match with its verdict; None where the two are incomparable."""

    match: Match
    verdict: Verdict | None

    @property
    def word(self) -> str:
        return self.verdict.word if self.verdict else "incomparable"

    @property
    def kind(self) -> str:
        return self.match.other.result["kind"]

    @property
    def unit(self) -> str:
        return "windows" if self.kind == "perplexity" else "documents"


@dataclass(frozen=True)
class Comparison:
    """All lines of one comparison. title: what was compared with what; setting: how."""

    title: str
    setting: str
    rules: Rules
    lines: Sequence[Line]

    def having(self, word: str) -> list[Line]:
        return [line for line in self.lines if line.word == word]

    @property
    def status(self) -> int:
        """The exit status of a gate: 1 if any verdict is worse, else 0."""
        return 1 if self.having("worse") else 0


def judge(title: str, setting: str, matches: Iterable[Match], rules: Rules = RULES) -> Comparison:
    """The comparison of all matches, tested together.

    Raises PTQError: two records of different models or tasks that were not marked as such, a task whose records keep no
    single outcomes, too few of them, or nothing that could be compared.
    """
    matches = list(matches)
    comparable = [match for match in matches if not match.apart]
    if matches and not comparable:
        reasons = list(dict.fromkeys(text for match in matches for text in match.apart))
        raise PTQError(f"{title}: none of the {len(matches)} results can be compared, since these differ: "
                       f"{'; '.join(reasons[:6])}{'; ...' if len(reasons) > 6 else ''}")
    verdicts = iter(verdict.judge([_pair(match) for match in comparable], rules))
    lines = [Line(match, None if match.apart else _turned(match, next(verdicts))) for match in matches]
    return Comparison(title, setting, rules, lines)


def _pair(match: Match) -> Pair:
    name = f"task {match.task} on {match.model}"
    first, second = match.mine.identity, match.other.identity
    for part in ("model", "task"):
        if first[part] != second[part]:
            raise PTQError(f"{name}: the records of {match.method} and {match.against} differ in their {part} "
                           f"({first[part]} and {second[part]}), so they cannot be paired")
    samples = [Score(record).sample for record in (match.mine, match.other)]
    if None in samples:
        raise PTQError(f"{name}: its records keep no outcome per document for {match.other.result['headline']}, "
                       f"so it cannot be compared: leave it out of --tasks")
    return Pair(*samples, match.noise, match.remeasured, name)


def _turned(match: Match, found: Verdict) -> Verdict:
    """With better and worse exchanged where lower scores are better although it is no perplexity."""
    if (match.other.result.get("info") or {}).get("higher_is_better") is False and found.word in _OPPOSITE:
        if match.other.result["kind"] != "perplexity":
            return replace(found, word=_OPPOSITE[found.word])
    return found
