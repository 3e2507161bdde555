"""Everyday events with four continuations, one of them sensible: the twin of HellaSwag (task world_events).

A script is a list of steps in their natural order with slots for the things in play. An item shows the first steps; the right
continuation is the next step with the right thing; the wrong ones are the same step with another thing, a step out of order,
and a step of another script. So a model needs the order of events and must remember what is in hand. The key is the whole
story without the person's name, so a test story never occurs in training, not even under another name or at another length
(of stories cut so short that a thing is not named yet, none is tested: `complete`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from suite.zoo.world import World

KIND = "events"
TIMES = ("In the morning", "At noon", "In the evening", "At night", "On a cold day", "On a warm day", "After the rain",
         "Before the feast")

# activity -> (things for slot {a}, things for slot {b}, steps). {p}: person, {e}: He or She.
SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "Cooking": (("fish", "eggs", "rice", "soup", "roots", "nuts"), ("pan", "pot", "bowl", "jar"),
                ("{p} buys {a} at the market.", "{e} takes a clean {b}.", "{e} puts the {a} into the {b}.",
                 "{e} cooks the {a} on the fire.", "{e} eats the {a} with bread.", "{e} washes the {b}.")),
    "Making tea": (("mint", "rose", "apple", "pine"), ("cup", "glass", "bowl"),
                   ("{p} heats some water.", "{e} puts {a} leaves into the water.", "{e} waits until the {a} tea is strong.",
                    "{e} pours the {a} tea into a {b}.", "{e} drinks from the {b}.")),
    "Fixing": (("roof", "door", "window", "boat", "wall", "cart"), ("hammer", "rope", "saw", "knife"),
               ("{p} sees that the {a} is broken.", "{e} fetches a {b}.", "{e} works on the {a} with the {b}.",
                "{e} looks at the mended {a}.", "{e} puts the {b} away.")),
    "Painting": (("door", "boat", "wall", "fence", "chair"), ("red", "blue", "green", "white", "black"),
                 ("{p} wants a {b} {a}.", "{e} buys {b} paint.", "{e} cleans the {a}.", "{e} paints the {a} {b}.",
                  "{e} waits until the {b} {a} is dry.")),
    "Gardening": (("beans", "roses", "apples", "herbs", "berries"), ("spring", "summer"),
                  ("{p} digs a hole in {b}.", "{e} puts {a} seeds into the hole.", "{e} waters the {a} every day.",
                   "{e} sees the {a} grow.", "{e} picks the {a} with both hands.")),
    "Shopping": (("hat", "lamp", "book", "coat", "bell", "knife"), ("red", "new", "small", "large"),
                 ("{p} needs a {b} {a}.", "{e} goes to the shop.", "{e} asks for a {b} {a}.", "{e} pays for the {a}.",
                  "{e} carries the {b} {a} home.")),
    "Fishing": (("fish", "snail", "crab"), ("boat", "bridge", "beach"),
                ("{p} walks to the {b}.", "{e} throws a line from the {b}.", "{e} feels a {a} on the line.",
                 "{e} pulls the {a} out of the water.", "{e} takes the {a} home.")),
    "Walking a pet": (("dog", "goat", "pony", "cat"), ("forest", "lake", "hill", "market"),
                      ("{p} calls the {a}.", "{e} ties a rope to the {a}.", "{e} walks with the {a} to the {b}.",
                       "{e} rests at the {b} with the {a}.", "{e} brings the {a} home.")),
    "Writing": (("friend", "doctor", "ruler", "singer"), ("letter", "song", "book"),
                ("{p} thinks of the {a}.", "{e} takes paper and writes a {b}.", "{e} reads the {b} again.",
                 "{e} sends the {b} to the {a}.", "{e} waits for a word from the {a}.")),
    "Washing": (("shirt", "coat", "blanket", "hat"), ("river", "bowl", "lake"),
                ("{p} has a dirty {a}.", "{e} takes soap to the {b}.", "{e} washes the {a} in the {b}.",
                 "{e} hangs the wet {a} on a rope.", "{e} puts on the dry {a}.")),
    "Playing": (("ball", "drum", "flute", "card game"), ("house", "garden", "street", "school"),
                ("{p} meets friends in the {b}.", "{e} brings the {a}.", "{e} plays with the {a} in the {b}.",
                 "{e} grows tired and puts the {a} away.", "{e} leaves the {b} at night.")),
    "Building": (("hut", "wall", "shed", "bridge"), ("stone", "wood", "clay"),
                 ("{p} wants to build a {a}.", "{e} brings {b} on a cart.", "{e} builds the {a} from {b}.",
                  "{e} shows the new {a} to the people.", "{e} is proud of the {b} {a}.")),
    "Sailing": (("village", "town", "port", "beach"), ("salt", "wine", "wool", "glass"),
                ("{p} loads the boat with {b}.", "{e} sails to the {a}.", "{e} lands at the {a}.",
                 "{e} sells the {b} at the {a}.", "{e} sails home from the {a} without {b}.")),
    "Healing": (("hand", "leg", "foot", "head"), ("herbs", "oil", "honey"),
                ("{p} hurts a {a}.", "{e} goes to the doctor with the bad {a}.", "{e} gets {b} from the doctor.",
                 "{e} puts the {b} on the {a}.", "{e} is glad that the {a} is well.")),
    "Baking": (("bread", "cake", "pie"), ("nuts", "honey", "berries", "eggs"),
               ("{p} mixes flour and {b}.", "{e} forms a {a} with {b}.", "{e} puts the {a} into the oven.",
                "{e} smells the hot {a}.", "{e} cuts the {a} and tastes the {b}.")),
    "Keeping warm": (("hut", "house", "school"), ("coal", "wood", "leaves"),
                     ("{p} is cold in the {a}.", "{e} looks for {b}.", "{e} brings {b} to the {a}.",
                      "{e} burns the {b}.", "{e} sits in the warm {a}.")),
}


@dataclass(frozen=True)
class Event:
    """activity and context, four endings, the index of the right one."""

    activity: str
    context: str
    endings: tuple[str, str, str, str]
    label: int
    person: str
    things: tuple[str, str]
    shown: int  # steps in the context
    complete: bool
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        return f"{self.activity}: {self.context} {self.endings[self.label]}"


def sample(world: World, rng: random.Random) -> Event:
    person = rng.choice(world.entities["person"])
    activity = rng.choice(list(SCRIPTS))
    many_a, many_b, steps = SCRIPTS[activity]
    a, b, time = rng.choice(many_a), rng.choice(many_b), rng.choice(TIMES)

    def say(template: str, a: str = a, b: str = b) -> str:
        return template.format(p=person.name, e=person.pronoun, a=a, b=b)

    shown = rng.randint(2, len(steps) - 1)
    right = say(steps[shown])

    wrong = set()
    slots = [slot for slot in "ab" if "{" + slot + "}" in steps[shown]]
    for _ in range(rng.randint(1, 2) if slots else 0):  # the same step with another thing
        slot = rng.choice(slots)
        if slot == "a":
            wrong.add(say(steps[shown], a=rng.choice([x for x in many_a if x != a])))
        else:
            wrong.add(say(steps[shown], b=rng.choice([x for x in many_b if x != b])))
    out_of_order = [s for i, s in enumerate(steps) if i not in (0, shown)]
    wrong.add(say(rng.choice(out_of_order)))
    while len(wrong) < 3:
        other = rng.choice([name for name in SCRIPTS if name != activity])
        step = rng.choice(SCRIPTS[other][2][1:])
        wrong.add(step.format(p=person.name, e=person.pronoun, a=rng.choice(SCRIPTS[other][0]),
                              b=rng.choice(SCRIPTS[other][1])))
    wrong.discard(right)
    endings = sorted(wrong)[:3]
    if len(endings) < 3:
        return sample(world, rng)
    label = rng.randrange(4)
    rng.shuffle(endings)
    endings.insert(label, right)
    context = f"{time} " + " ".join(say(s) for s in steps[:shown])
    complete = all(thing in f"{context} {right}" for thing in (a, b))
    return Event(activity, context, tuple(endings), label, person.name, (a, b), shown, complete, f"{activity}|{a}|{b}|{time}|{person.pronoun}")


def answerable(event: Event) -> bool:
    """Whether every thing of the right ending has been named before, so that an ending with another thing is wrong."""
    right = event.endings[event.label]
    return all(thing in event.context for thing in event.things if thing in right)


def harden(event: Event, rng: random.Random) -> Event:
    """The event with wrong endings that all are the right step with other things, as far as the script has enough of them."""
    many_a, many_b, steps = SCRIPTS[event.activity]
    right = event.endings[event.label]
    pronoun = right.split()[0]
    variants = {steps[event.shown].format(p=event.person, e=pronoun, a=a, b=b) for a in many_a for b in many_b} - {right}
    wrong = rng.sample(sorted(variants), min(3, len(variants)))
    wrong += [ending for ending in event.endings if ending != right and ending not in wrong][:3 - len(wrong)]
    rng.shuffle(wrong)
    wrong.insert(event.label, right)
    return replace(event, endings=tuple(wrong))
