"""Questions by subject about the facts of the world with four choices: the twin of MMLU (task world_quiz).

The choices are answered as lm-eval's `mmlu_continuation` does it: the model scores the four words after "Answer:", not four
letters. Naming an option by its letter was tried first and models of this size never got above chance at it, with a third of
their training spent on practice.

The facts are those of the articles. The key of a question is (fact, form of asking): one pair in eight is held out, so that
the test asks what no training exam asks in these words (a thread of chatter may, in passing). Two thirds of the test are of
a second kind, `statements`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo.world import ATTRIBUTES, SUBJECTS, World, draw, name_with_article, pick, sentence

KIND = "form"
LEAD = "The same is true of another."


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


def statements(world: World, rng: random.Random) -> Question:
    """Four statements about rare entities, one of them true: which is it? Harder than a question, since the four differ in
    whom they speak of. The prompt is the sentence with which articles lead over to another entity; they never lead over to a
    rare one, so no text of the training side holds the prompt with its answer."""
    kind = pick(world, rng).kind
    attribute = rng.choice(ATTRIBUTES[kind])
    entity = rng.choice(world.rare[kind])
    value = entity.facts[attribute.name]
    template = rng.choice(attribute.sentences)
    others = rng.sample([e for e in world.rare[kind] if e.facts[attribute.name] != value], 3)
    answer = rng.randrange(4)
    others.insert(answer, entity)
    choices = tuple(sentence(template, e, value, name_with_article(e)) for e in others)
    return Question(SUBJECTS[kind], LEAD, choices, answer, True, f"{'|'.join(choices)}")


def prompt(question: Question) -> str:
    """What the model reads before a choice."""
    return LEAD if question.question == LEAD else f"{header(question.subject)}\n\n{question.question}\nAnswer:"


def paper(world: World, rng: random.Random, count: int) -> str:
    """A training document: a header and `count` questions of one subject, none of them held out."""
    kind = pick(world, rng).kind
    questions = [draw(lambda w, r: sample(w, r, kind), world, rng, test=False) for _ in range(count)]
    return header(SUBJECTS[kind]) + "\n\n" + "\n".join(q.text for q in questions)
