"""An invented world, consistent with itself: who and what exists, and what is true of it.

The world is small on purpose: a model of a million parameters must be able to know most of it, so that damage by
quantization shows as forgotten facts. Every kind of text in this package (articles, chatter, sums, events, exams, code)
draws on the one `World` that `build()` returns; nothing in it is taken from any real text.

Splits: the unit is an *item* (one article, one question, one problem, ...). `held_out(kind, key)` hashes the item's key,
so an item belongs to the training side or to the test side for ever, whatever the seed of the stream that drew it.

>>> world = build()
>>> world.entities["town"][0].facts["product"] in GOODS
True
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

WORLD_SEED = 2026
HELD_OUT_ONE_IN = {"form": 8, "events": 8}  # by kind of item; 16 for the others

COLOURS = ("red", "blue", "green", "white", "black", "grey", "gold", "pink", "brown")
GOODS = ("glass", "bread", "rope", "salt", "cloth", "paper", "wine", "honey", "soap", "lamps", "boats", "shoes",
         "bells", "hats", "coal", "bricks", "knives", "wool")
TRADES = ("baker", "weaver", "smith", "potter", "fisher", "hunter", "painter", "singer", "miner", "farmer", "tailor",
          "doctor")
PETS = ("dog", "cat", "goat", "crow", "mouse", "duck", "pony", "frog", "hen", "owl")
FOODS = ("grass", "seeds", "fish", "nuts", "roots", "leaves", "worms", "berries", "eggs", "snails")
HABITATS = ("caves", "forests", "lakes", "hills", "swamps", "deserts", "meadows", "gardens")
SIZES = ("tiny", "small", "large", "huge")
SEASONS = ("spring", "summer", "autumn", "winter")
MINERAL_USES = ("rings", "paint", "tools", "coins", "roofs", "mirrors", "lamps", "statues")
PLANT_USES = ("tea", "medicine", "rope", "soap", "paint", "soup", "perfume", "flour")
# Of each kind: how many entities, and how many rare ones beside them, of which the texts speak seldom. Models know the former
# well and the latter barely: the first facts to go when a model is damaged.
COUNTS = {"town": 28, "person": 40, "animal": 28, "mineral": 24, "plant": 24}
RARE_COUNTS = {"town": 72, "person": 90, "animal": 60, "mineral": 36, "plant": 36}
RARE_SHARE = 0.45  # of the texts about anything
SUBJECTS = {"town": "geography", "person": "history", "animal": "animals", "mineral": "minerals", "plant": "plants"}

# Two syllables a name, few distinct syllables: a name costs one or two tokens.
STARTS = ("Bel", "Cor", "Dav", "Fen", "Gar", "Hol", "Jas", "Kel", "Lor", "Mar", "Nel", "Os", "Pel", "Ros", "Sel", "Tar",
          "Ul", "Ver", "Wen", "Zan", "Al", "Bran", "Cal", "Dor", "El", "Fal", "Gil", "Hav", "Ir", "Jor", "Kor", "Lin", "Mor",
          "Nor", "Or", "Quil", "Ras", "Sor", "Tol", "Vin")
ENDINGS = {"town": ("ton", "ford", "stad", "burg"), "person": ("in", "a", "o", "ek", "is"), "animal": ("ax", "up", "ing"),
           "mineral": ("ite", "ium"), "plant": ("wort", "bell"), "region": ("land",), "river": ("we",)}


@dataclass(frozen=True)
class Attribute:
    """One property of a kind of entity and every way in which the texts speak of it.

    sentences: statements with {s} (subject) and {v} (value), for articles and chatter.
    questions: question forms with {n} (name).
    """

    name: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Entity:
    """A named thing with its facts: attribute name -> value (a word)."""

    kind: str
    name: str
    pronoun: str
    facts: dict[str, str]


@dataclass(frozen=True)
class World:
    entities: dict[str, tuple[Entity, ...]]
    rare: dict[str, tuple[Entity, ...]]
    values: dict[tuple[str, str], tuple[str, ...]]  # (kind, attribute) -> the values that occur, sorted


ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {
    "town": (
        Attribute("region", ("{s} lies in the region of {v}.", "{s} is a town in {v}.", "{s} belongs to {v}."),
                  ("In which region is {n}?", "Where does {n} lie?", "{n} is a town in which region?")),
        Attribute("river", ("{s} stands on the river {v}.", "The river {v} flows past {s2}.", "{s} was built on the {v}."),
                  ("On which river is {n}?", "Which river flows past {n}?", "What is the river of {n}?")),
        Attribute("founded", ("{s} was founded in {v}.", "{s} dates from the year {v}.",
                              "The first houses of {s2} were built in {v}."),
                  ("When was {n} founded?", "In which year was {n} founded?", "From which year does {n} date?")),
        Attribute("product", ("{s} is known for its {v}.", "The people of {s2} make {v}.", "{s} sells {v} to other towns."),
                  ("What is {n} known for?", "What do the people of {n} make?", "What does {n} sell?")),
        Attribute("flag", ("The flag of {s2} is {v}.", "{s} has a {v} flag.", "A {v} flag flies over {s2}."),
                  ("What colour is the flag of {n}?", "Which flag does {n} have?", "Which flag flies over {n}?")),
        Attribute("ruler", ("{s} is ruled by {v}.", "The ruler of {s2} is {v}.", "{v} rules {s2}."),
                  ("Who rules {n}?", "Who is the ruler of {n}?", "By whom is {n} ruled?")),
    ),
    "person": (
        Attribute("home", ("{s} lives in {v}.", "{s} comes from {v}.", "{s} has a house in {v}."),
                  ("Where does {n} live?", "Where does {n} come from?", "In which town is the house of {n}?")),
        Attribute("trade", ("{s} is a {v}.", "{s} works as a {v}.", "{s} earns money as a {v}."),
                  ("What is the trade of {n}?", "What does {n} work as?", "How does {n} earn money?")),
        Attribute("pet", ("{s} keeps a {v}.", "{s} has a pet {v}.", "{s} walks with a {v}."),
                  ("Which pet does {n} keep?", "What is the pet of {n}?", "What does {n} walk with?")),
        Attribute("coat", ("{s} wears a {v} coat.", "The coat of {s2} is {v}.", "{s} likes {v} coats."),
                  ("What colour is the coat of {n}?", "Which coat does {n} wear?", "Which coats does {n} like?")),
    ),
    "animal": (
        Attribute("food", ("{s} eats {v}.", "{s} feeds on {v}.", "The food of {s2} is {v}."),
                  ("What does the {n} eat?", "What does the {n} feed on?", "What is the food of the {n}?")),
        Attribute("habitat", ("{s} lives in {v}.", "{s} is found in {v}.", "The home of {s2} is in {v}."),
                  ("Where does the {n} live?", "Where is the {n} found?", "Where is the home of the {n}?")),
        Attribute("colour", ("{s} is {v}.", "{s} has {v} skin.", "The colour of {s2} is {v}."),
                  ("What colour is the {n}?", "What skin does the {n} have?", "What is the colour of the {n}?")),
        Attribute("size", ("{s} is a {v} animal.", "In size {s2} is {v}.", "{s} grows to be {v}."),
                  ("What size is the {n}?", "How large is the {n}?", "How large does the {n} grow?")),
    ),
    "mineral": (
        Attribute("colour", ("{s} is {v}.", "{s} is a {v} stone.", "The colour of {s2} is {v}."),
                  ("What colour is {n}?", "Which stone is {n}?", "What is the colour of {n}?")),
        Attribute("use", ("{s} is used for {v}.", "People make {v} from {s2}.", "{s} is good for {v}."),
                  ("What is {n} used for?", "What do people make from {n}?", "What is {n} good for?")),
        Attribute("region", ("{s} is found in {v}.", "{s} comes from {v}.", "There are mines of {s2} in {v}."),
                  ("In which region is {n} found?", "Where does {n} come from?", "Where are mines of {n}?")),
        Attribute("finder", ("{s} was found by {v}.", "{v} found {s2} first.", "The finder of {s2} was {v}."),
                  ("Who found {n}?", "By whom was {n} found?", "Who was the finder of {n}?")),
    ),
    "plant": (
        Attribute("season", ("{s} flowers in {v}.", "{s} blooms in {v}.", "The season of {s2} is {v}."),
                  ("When does {n} flower?", "In which season does {n} bloom?", "What is the season of {n}?")),
        Attribute("use", ("{s} is used for {v}.", "People make {v} from {s2}.", "{s} is good for {v}."),
                  ("What is {n} used for?", "What do people make from {n}?", "What is {n} good for?")),
        Attribute("habitat", ("{s} grows in {v}.", "{s} is found in {v}.", "The home of {s2} is in {v}."),
                  ("Where does {n} grow?", "Where is {n} found?", "Where is the home of {n}?")),
        Attribute("colour", ("{s} has {v} flowers.", "The flowers of {s2} are {v}.", "The colour of {s2} is {v}."),
                  ("What colour is {n}?", "Which flowers does {n} have?", "What is the colour of {n}?")),
    ),
}


def held_out(kind: str, key: str) -> bool:
    """Whether the item with this key belongs to the test side. Decided by a hash, not by a seed or an order."""
    digest = hashlib.sha256(f"{kind}|{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN.get(kind, 16) == 0


def draw(sample: Callable, world: World, rng: random.Random, test: bool):
    """One item from `sample(world, rng)` that lies on the wanted side of the split. Items have `kind` and `key`."""
    while True:
        item = sample(world, rng)
        if held_out(item.kind, item.key) == test:
            return item


def sentence(template: str, entity: Entity, value: str, subject: str) -> str:
    """Fill a statement: {s} opens the sentence, {s2} stands inside it.

    >>> ax = Entity("animal", "Belax", "It", {})
    >>> sentence("The food of {s2} is {v}.", ax, "fish", "The Belax")
    'The food of the Belax is fish.'
    """
    inner = subject if subject in (entity.name, "He", "She") else subject[0].lower() + subject[1:]
    inner = {"He": "him", "She": "her"}.get(inner, inner)
    return template.format(s=subject, s2=inner, v=value)


def name_with_article(entity: Entity) -> str:
    """The name as it opens a sentence: animals carry an article.

    >>> name_with_article(Entity("animal", "Belax", "It", {}))
    'The Belax'
    """
    return f"The {entity.name}" if entity.kind == "animal" else entity.name


def build(seed: int = WORLD_SEED) -> World:
    """The world of this seed. Same seed, same world, on every machine and version of Python (random.Random)."""
    rng = random.Random(seed)

    def names(kind: str, count: int) -> list[str]:
        every = [start + ending for start in STARTS for ending in ENDINGS[kind]]
        return rng.sample(every, count)

    regions, rivers = names("region", 8), names("river", 10)
    named = {kind: names(kind, count) for kind, count in COUNTS.items()}
    pools = {
        ("town", "region"): regions, ("town", "river"): rivers, ("town", "product"): GOODS, ("town", "flag"): COLOURS,
        ("town", "founded"): [str(year) for year in rng.sample(range(100, 1000), 20)],
        ("town", "ruler"): named["person"][:16], ("person", "home"): named["town"], ("person", "trade"): TRADES,
        ("person", "pet"): PETS, ("person", "coat"): COLOURS, ("animal", "food"): FOODS,
        ("animal", "habitat"): HABITATS, ("animal", "colour"): COLOURS, ("animal", "size"): SIZES,
        ("mineral", "colour"): COLOURS, ("mineral", "use"): MINERAL_USES, ("mineral", "region"): regions,
        ("mineral", "finder"): named["person"][:16], ("plant", "season"): SEASONS, ("plant", "use"): PLANT_USES,
        ("plant", "habitat"): HABITATS, ("plant", "colour"): COLOURS,
    }
    def fill(kind: str, kind_names: list[str], rng: random.Random) -> tuple[Entity, ...]:
        return tuple(Entity(kind, name, rng.choice(("He", "She")) if kind == "person" else "It",
                            {a.name: rng.choice(pools[kind, a.name]) for a in ATTRIBUTES[kind]}) for name in kind_names)

    entities = {kind: fill(kind, kind_names, rng) for kind, kind_names in named.items()}
    rng = random.Random(seed + 1)  # of their own, so that the others stay as they are
    rare = {}
    for kind, count in RARE_COUNTS.items():
        left = [start + ending for start in STARTS for ending in ENDINGS[kind] if start + ending not in named[kind]]
        rare[kind] = fill(kind, rng.sample(left, count), rng)
    values = {(kind, a.name): tuple(sorted({e.facts[a.name] for e in entities[kind] + rare[kind]}))
              for kind in COUNTS for a in ATTRIBUTES[kind]}
    return World(entities, rare, values)


def pick(world: World, rng: random.Random, kind: str | None = None) -> Entity:
    """An entity to speak of, rare ones with RARE_SHARE; without a kind, kinds by their number of facts."""
    kind = kind or rng.choices(list(COUNTS), [COUNTS[k] * len(ATTRIBUTES[k]) for k in COUNTS])[0]
    return rng.choice((world.rare if rng.random() < RARE_SHARE else world.entities)[kind])
