"""Web chatter: the twin of C4 (task world_chat_ppl). Questions and answers among neighbours, polls, reports, things for sale.

Looser than the articles (moods, prices, weather), but what it says of the world is true. The key of a thread is its first part
(a question and its answers, a poll, ...).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo import world as w

KIND = "chatter"
GREETINGS = ("hello all", "hi", "good day", "hey", "morning", "dear all")
THANKS = ("thanks", "thanks a lot", "good to know", "great", "oh nice", "ok")
MOODS = ("great", "bad", "fine", "too cold", "so nice", "boring", "lovely", "strange")
WEATHER = ("rain", "snow", "sun", "wind", "fog")
DISHES = ("soup", "bread", "fish", "cake", "eggs", "rice", "tea", "nuts")
DAYS = ("today", "last week", "last summer", "this morning", "last winter")
STATES = ("new", "old", "used", "clean", "broken")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Thread:
    text: str
    key: str
    kind: str = KIND


def fact(world: w.World, rng: random.Random, kind: str | None = None) -> tuple[w.Entity, w.Attribute]:
    entity = w.pick(world, rng, kind)
    return entity, rng.choice(w.ATTRIBUTES[entity.kind])


def ask(world: w.World, rng: random.Random, users: list[str]) -> list[str]:
    """A question about a fact, answered in one word or in a sentence."""
    entity, attribute = fact(world, rng)
    question = rng.choice(attribute.questions).format(n=entity.name)
    value = entity.facts[attribute.name]
    full = w.sentence(rng.choice(attribute.sentences), entity, value, w.name_with_article(entity))
    answer = rng.choice((f"{value}", f"{value} i think", f"i say {value}", full))
    lines = [f"{users[0]}: {rng.choice(GREETINGS)}, {question}", f"{users[1]}: {answer}"]
    return lines + ([f"{users[0]}: {rng.choice(THANKS)}"] if rng.random() < 0.5 else [])


def poll(world: w.World, rng: random.Random, users: list[str]) -> list[str]:
    """Four options by letter and some votes; each names a letter and the word that it stands for."""
    options = rng.sample(rng.choice((DISHES, w.COLOURS, w.GOODS, w.PETS, w.FOODS, w.HABITATS, w.TRADES)), 4)
    lines = ["poll: what do you like?"] + [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    for chosen in rng.sample(range(4), rng.randint(1, 2)):
        lines.append(f"- {LETTERS[chosen]}, {options[chosen]} is {rng.choice(MOODS)}")
    return lines


def report(world: w.World, rng: random.Random, users: list[str]) -> list[str]:
    """A trip to a town, with a true fact or two and the weather."""
    town, first = fact(world, rng, "town")
    other, second = fact(world, rng)
    return [f"{users[0]}: we went to {town.name} {rng.choice(DAYS)}. there was {rng.choice(WEATHER)} and it was "
            f"{rng.choice(MOODS)}. " + w.sentence(rng.choice(first.sentences), town, town.facts[first.name], town.name),
            f"{users[1]}: {rng.choice(THANKS)}. " + w.sentence(rng.choice(second.sentences), other, other.facts[second.name],
                                                               w.name_with_article(other))]


def sale(world: w.World, rng: random.Random, users: list[str]) -> list[str]:
    goods, price = rng.choice(w.GOODS), rng.randint(5, 90)
    town = rng.choice(world.entities["town"]).name
    less = rng.randint(1, 4)
    return [f"{users[0]}: for sale in {town}: {rng.choice(STATES)} {goods}, {price} coins",
            f"{users[1]}: {price - less} coins?", f"{users[0]}: " + rng.choice(("ok", "no, sorry", f"no, {price} coins"))]


FORMS = (ask, ask, ask, ask, poll, report, report, sale)


def sample(world: w.World, rng: random.Random) -> Thread:
    users = rng.sample([e.name for e in world.entities["person"]], 2)
    parts = ["\n".join(rng.choice(FORMS)(world, rng, users)) for _ in range(rng.randint(1, 3))]
    return Thread("\n".join(parts), parts[0])
