"""Questions by subject about the facts of the world with four choices: the twin of MMLU (task world_quiz).

The choices are answered as lm-eval's `mmlu_continuation` does it: the model scores the four words after "Answer:", not four
letters. Naming an option by its letter was tried first and models of this size never got above chance at it, with a third of
their training spent on practice.

The facts are those of the articles. The key of a question is (fact, form of asking): one pair in eight is held out, so that
the test asks what no training exam asks in these words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo.world import ATTRIBUTES, SUBJECTS, World, draw, pick

KIND = "form"


@dataclass(frozen=True)
class Question:
    """A question, four choices, the index of the right one."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    rare: bool  # whether it asks about a rare entity
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        return f"{self.question}\nAnswer: {self.choices[self.answer]}"


def header(subject: str) -> str:
    return f"Short answers about {subject}."


def sample(world: World, rng: random.Random, kind: str | None = None) -> Question:
    entity = pick(world, rng, kind)
    kind = entity.kind
    attribute = rng.choice(ATTRIBUTES[kind])
    form = rng.randrange(len(attribute.questions))
    right = entity.facts[attribute.name]
    others = [v for v in world.values[kind, attribute.name] if v != right]
    choices = rng.sample(others, 3)
    answer = rng.randrange(4)
    choices.insert(answer, right)
    question = attribute.questions[form].format(n=entity.name)
    fact = f"{entity.name}|{attribute.name}"
    return Question(SUBJECTS[kind], question, tuple(choices), answer, entity in world.rare[kind], f"{fact}|{form}")


def paper(world: World, rng: random.Random, count: int) -> str:
    """A training document: a header and `count` questions of one subject, none of them held out."""
    kind = pick(world, rng).kind
    questions = [draw(lambda w, r: sample(w, r, kind), world, rng, test=False) for _ in range(count)]
    return header(SUBJECTS[kind]) + "\n\n" + "\n".join(q.text for q in questions)
