"""Encyclopaedia articles about the world: the twin of WikiText-2 (task world_wiki_ppl).

An article renders all or most facts of one entity in a random order and wording, and ends with a line or two that link to
another entity. The key of an article is its title and its first two sentences: test articles are other renderings, about
the same world, and none is the beginning of a training article.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo.world import ATTRIBUTES, Entity, World, name_with_article, pick, sentence

KIND = "article"


@dataclass(frozen=True)
class Article:
    text: str
    key: str
    kind: str = KIND


def facts_in_words(entity: Entity, rng: random.Random) -> list[str]:
    """One sentence per fact, in random order and wording; after the first, mostly with a pronoun."""
    attributes = list(ATTRIBUTES[entity.kind])
    rng.shuffle(attributes)
    if rng.random() < 0.5:
        attributes = attributes[:-1]
    lines = []
    for number, attribute in enumerate(attributes):
        template = rng.choice(attribute.sentences)
        # Where the subject stands inside the sentence a name reads better than a pronoun.
        by_name = number == 0 or "{s2}" in template or rng.random() < 0.35
        subject = name_with_article(entity) if by_name else entity.pronoun
        lines.append(sentence(template, entity, entity.facts[attribute.name], subject))
    return lines


def links(entity: Entity, world: World, rng: random.Random) -> list[str]:
    """A sentence that ties the entity to others: shared values, or a fact of somebody named in the article."""
    attribute = rng.choice(ATTRIBUTES[entity.kind])
    value = entity.facts[attribute.name]
    same = [e for e in world.entities[entity.kind] if e.facts[attribute.name] == value and e is not entity]
    lines = []
    if same and rng.random() < 0.6:
        other = rng.choice(same)
        lines.append("The same is true of another. " + sentence(rng.choice(attribute.sentences), other, value,
                                                                name_with_article(other)))
    people = [e for e in world.entities["person"] if e.name in entity.facts.values()]
    if people and rng.random() < 0.6:
        person = rng.choice(people)
        about = rng.choice(ATTRIBUTES["person"])
        lines.append(sentence(rng.choice(about.sentences), person, person.facts[about.name], person.name))
    return lines


def sample(world: World, rng: random.Random) -> Article:
    entity = pick(world, rng)
    body = facts_in_words(entity, rng)
    cut = rng.randint(2, len(body))
    paragraphs = [" ".join(body[:cut]), " ".join(body[cut:] + links(entity, world, rng))]
    text = f"= {entity.name} =\n\n" + "\n\n".join(p for p in paragraphs if p)
    return Article(text, f"{entity.name}|{' '.join(body[:2])}")
