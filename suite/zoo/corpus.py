"""The training text: an endless seeded stream of documents in six kinds, and the files cut from its two sides.

`documents(seed)` yields only training items; `test_items(kind, count, seed)` only held-out ones (see `world.held_out`).
`python -m suite.zoo.corpus` rewrites the committed files: tasks/data/* and suite/zoo/data/calib.txt. The calibration text is
drawn from the training side, so it shares no document with any test file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from suite.zoo import articles, chatter, code, events, exams, sums
from suite.zoo.world import World, build, draw

SEEDS = {"train": 1, "test": 2, "calib": 3, "tokenizer": 4}
TASKS = Path(__file__).resolve().parents[2] / "tasks" / "data"
CALIB = Path(__file__).resolve().parent / "data" / "calib.txt"
CALIB_CHARACTERS = 560_000
PLAIN_CHARACTERS = 150_000


def article(world: World, rng: random.Random) -> str:
    return draw(articles.sample, world, rng, test=False).text


def thread(world: World, rng: random.Random) -> str:
    return draw(chatter.sample, world, rng, test=False).text


def problem(world: World, rng: random.Random) -> str:
    return draw(sums.sample, world, rng, test=False).text


def drill(world: World, rng: random.Random) -> str:
    return sums.drill(rng)


def event(world: World, rng: random.Random) -> str:
    return "\n\n".join(draw(events.sample, world, rng, test=False).text for _ in range(rng.randint(1, 3)))


def exam(world: World, rng: random.Random) -> str:
    return exams.paper(world, rng, rng.randint(3, 8))


def function(world: World, rng: random.Random) -> str:
    item = draw(code.sample, world, rng, test=False)
    return item.with_test if rng.random() < 0.25 else item.text


# What a document is drawn from, and how many of every hundred documents.
MIX: tuple[tuple[Callable[[World, random.Random], str], int], ...] = (
    (article, 32), (thread, 12), (problem, 30), (drill, 8), (event, 10), (exam, 10), (function, 18))


def documents(seed: int) -> Iterator[str]:
    """Training documents without end. The same seed gives the same documents."""
    world, rng = build(), random.Random(seed)
    makers, weights = zip(*MIX)
    while True:
        yield rng.choices(makers, weights)[0](world, rng)


def pages(seed: int) -> Iterator[str]:
    """The documents as they are trained on: one alone, or up to eight joined by blank lines, of one kind or of any.

    Test and calibration texts are documents joined by blank lines; a model that has seen every document end in an end token
    would be surprised at each join, and the perplexity would measure that.
    """
    world, rng, stream = build(), random.Random(seed), documents(seed)
    makers, weights = zip(*MIX)
    while True:
        form = rng.random()
        count = rng.randint(2, 8)
        if form < 0.4:
            yield next(stream)
        elif form < 0.7:
            yield "\n\n".join(next(stream) for _ in range(count)) + "\n"
        else:
            maker = rng.choices(makers, weights)[0]
            yield "\n\n".join(maker(world, rng) for _ in range(count)) + "\n"


def test_items(sample: Callable, count: int, seed: int = SEEDS["test"], keep: Callable = lambda item: True) -> list:
    """`count` different held-out items."""
    world, rng = build(), random.Random(seed)
    items: dict[str, object] = {}
    while len(items) < count:
        item = draw(sample, world, rng, test=True)
        if keep(item):
            items.setdefault(item.text, item)
    return list(items.values())


def plain_text(sample: Callable, characters: int) -> str:
    """Held-out documents joined by blank lines, about as many characters as asked for."""
    texts, total = [], 0
    for item in test_items(sample, 2000):
        texts.append(item.text)
        total += len(item.text)
        if total > characters:
            break
    return "\n\n".join(texts) + "\n"


def quiz_items() -> list[exams.Question]:
    """100 held-out questions, half of them about rare entities, and 200 choices between statements."""
    known = test_items(exams.sample, 50, keep=lambda q: not q.rare)
    rare = test_items(exams.sample, 50, keep=lambda q: q.rare)
    world, rng = build(), random.Random(SEEDS["test"] + 1)
    stated: dict[str, exams.Question] = {}
    while len(stated) < 200:
        item = exams.statements(world, rng)
        stated.setdefault(item.key, item)
    found = list(stated.values())
    return [question for four in zip(known, rare, *(found[i::4] for i in range(4))) for question in four]


def event_items() -> list[events.Event]:
    """300 stories whose right ending names something for the first time."""
    return test_items(events.sample, 300, keep=lambda event: event.fresh)


def math_items() -> list[sums.Problem]:
    """240 problems of two to four steps; those of one step are for practice."""
    return test_items(sums.sample, 240, keep=lambda p: p.answer.count("\n") >= 2)


def calib_text() -> str:
    stream, texts, total = documents(SEEDS["calib"]), [], 0
    while total < CALIB_CHARACTERS:
        texts.append(next(stream))
        total += len(texts[-1])
    return "\n\n".join(texts) + "\n"


def files() -> dict[Path, str]:
    """Every committed file of generated text: path -> content."""
    def lines(rows: list[dict]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    return {
        TASKS / "world_wiki_test.txt": plain_text(articles.sample, PLAIN_CHARACTERS),
        TASKS / "world_chat_test.txt": plain_text(chatter.sample, PLAIN_CHARACTERS),
        TASKS / "world_math.jsonl": lines([{"question": p.question, "answer": p.answer} for p in math_items()]),
        TASKS / "world_events.jsonl": lines([
            {"activity_label": e.activity, "query": f"{e.activity}: {e.context}", "choices": list(e.endings), "label": e.label}
            for e in event_items()]),
        TASKS / "world_quiz.jsonl": lines([
            {"subject": q.subject, "prompt": exams.prompt(q), "choices": list(q.choices), "answer": q.answer,
             "rare": q.rare} for q in quiz_items()]),
        TASKS / "world_code.jsonl": lines([
            {"task_id": f"world_code/{i}", "prompt": f.prompt, "entry_point": f.entry_point,
             "canonical_solution": f.canonical_solution, "test": f.test}
            for i, f in enumerate(test_items(code.sample, 160))]),
        CALIB: calib_text(),
    }


def main() -> None:
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(f"{path.name}: {len(content)} characters")


if __name__ == "__main__":
    main()
