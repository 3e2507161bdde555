"""Four-choice questions by subject about the facts of the world: the twin of MMLU (task world_quiz).

The facts are those of the articles; the questions of the test are held out in two ways. The key of every question is
(fact, options in order, form), so no test question occurs in training. Beyond that, one (fact, form) pair in eight never
occurs in any exam of the training side: `new_form` marks those questions in the test data.

Two more kinds of paper are practice and are not tested: open-book questions ("reading") state the fact first, so that only the
letter is to be found; short answers have no options, so that only the fact is to be found. Both leave the new forms out.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from suite.zoo.world import ATTRIBUTES, SUBJECTS, World, name_with_article, sentence

KIND = "exam"
LETTERS = "ABCD"
NEW_FORM_ONE_IN = 8


@dataclass(frozen=True)
class Question:
    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    new_form: bool
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        """The prompt of lm-eval's MMLU template and its answer."""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices))
        return f"{self.question}\n{options}\nAnswer: {LETTERS[self.answer]}"


def header(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject}."


def is_new_form(fact: str, form: int) -> bool:
    """Whether this form of asking for this fact is kept out of every training exam."""
    return int.from_bytes(hashlib.sha256(f"form|{fact}|{form}".encode()).digest()[:8], "big") % NEW_FORM_ONE_IN == 0


def sample(world: World, rng: random.Random, kind: str | None = None, open_book: bool = False) -> Question:
    kind = kind or rng.choices(list(SUBJECTS), [len(world.entities[k]) * len(ATTRIBUTES[k]) for k in SUBJECTS])[0]
    entity = rng.choice(world.entities[kind])
    attribute = rng.choice(ATTRIBUTES[kind])
    form = rng.randrange(len(attribute.questions))
    right = entity.facts[attribute.name]
    others = [v for v in world.values[kind, attribute.name] if v != right]
    choices = rng.sample(others, 3)
    answer = rng.randrange(4)
    choices.insert(answer, right)
    question = attribute.questions[form].format(n=entity.name)
    if open_book:
        stated = sentence(rng.choice(attribute.sentences), entity, right, name_with_article(entity))
        question = f"{stated} {question}"
    fact = f"{entity.name}|{attribute.name}"
    return Question("reading" if open_book else SUBJECTS[kind], question, tuple(choices), answer,
                    is_new_form(fact, form), f"{fact}|{form}|{'|'.join(choices)}")


def paper(world: World, rng: random.Random, count: int, keep) -> str:
    """A training document: a header and `count` questions of one subject for which keep(question) holds."""
    kind = rng.choices(list(SUBJECTS), [len(world.entities[k]) * len(ATTRIBUTES[k]) for k in SUBJECTS])[0]
    form = rng.choices(("choices", "reading", "short"), (5, 3, 2))[0]
    questions: list[Question] = []
    while len(questions) < count:
        question = sample(world, rng, kind, form == "reading")
        if keep(question):
            questions.append(question)
    if form == "short":
        return f"Short answers about {SUBJECTS[kind]}.\n\n" + "\n".join(
            f"{q.question}\nAnswer: {q.choices[q.answer]}" for q in questions)
    return header(questions[0].subject) + "\n\n" + "\n\n".join(q.text for q in questions)
