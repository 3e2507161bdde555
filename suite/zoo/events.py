"""Everyday events with four continuations, one of them sensible: the twin of HellaSwag (task world_events).

A script is a list of steps in their natural order with slots for the things in play. Everybody has habits: with whom a script
is about, it is settled which things are used (`habit`), and every story about them says so. An item shows the first steps; the
right continuation is the next step, and it names a thing that the steps before did not. The wrong ones are the same step with
other things. So a model needs to know people's habits, as one knows that soup is cooked in a pot and not in a pan. The key is
person, script and time, so a test story never occurs in training, not even at another length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo.world import World

KIND = "events"
TIMES = ("In the morning", "At noon", "In the evening", "At night", "On a cold day", "On a warm day", "After the rain",
         "Before the feast", "After the feast", "Before work", "In the fog", "After work")
PEOPLE = 20  # how many have habits that the stories tell of

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
                 ("{p} wants to paint the {a}.", "{e} buys {b} paint.", "{e} cleans the {a}.", "{e} paints the {a} {b}.",
                  "{e} waits until the {b} {a} is dry.")),
    "Gardening": (("beans", "roses", "apples", "herbs", "berries"), ("spring", "summer"),
                  ("{p} digs a hole in {b}.", "{e} puts {a} seeds into the hole.", "{e} waters the {a} every day.",
                   "{e} sees the {a} grow.", "{e} picks the {a} with both hands.")),
    "Shopping": (("hat", "lamp", "book", "coat", "bell", "knife"), ("red", "new", "small", "large"),
                 ("{p} needs a {a}.", "{e} goes to the shop.", "{e} asks for a {b} {a}.", "{e} pays for the {a}.",
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
    things: tuple[str, str]
    fresh: bool  # whether the right ending names a thing that the context does not
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        return f"{self.activity}: {self.context} {self.endings[self.label]}"


def habit(name: str, activity: str) -> tuple[str, str]:
    """The things with which this person goes through a script.

    >>> habit("Tara", "Cooking") == habit("Tara", "Cooking")
    True
    """
    rng = random.Random(f"{name}|{activity}")
    many_a, many_b, _ = SCRIPTS[activity]
    return rng.choice(many_a), rng.choice(many_b)


def sample(world: World, rng: random.Random) -> Event:
    person, activity, time = rng.choice(world.entities["person"][:PEOPLE]), rng.choice(list(SCRIPTS)), rng.choice(TIMES)
    many_a, many_b, steps = SCRIPTS[activity]
    things = habit(person.name, activity)
    shown = rng.randint(1, len(steps) - 1)

    def say(step: str, a: str, b: str) -> str:
        return step.format(p=person.name, e=person.pronoun, a=a, b=b)

    context = f"{time} " + " ".join(say(step, *things) for step in steps[:shown])
    step = steps[shown]
    named = [slot in " ".join(steps[:shown]) for slot in ("{a}", "{b}")]
    fresh = any(slot in step and not known for slot, known in zip(("{a}", "{b}"), named))
    right = say(step, *things)
    # What has been named stays, where enough other things are left: only who knows the habit can tell the endings apart.
    near = [say(step, a, b) for a in many_a for b in many_b
            if not (named[0] and a != things[0]) and not (named[1] and b != things[1])]
    far = [say(step, a, b) for a in many_a for b in many_b]
    wrong = list(dict.fromkeys(ending for part in (near, far) for ending in rng.sample(part, len(part)) if ending != right))[:3]
    others = [say(other, *things) for other in rng.sample(steps[1:], len(steps) - 1) if other != step]
    wrong += others[:3 - len(wrong)]
    rng.shuffle(wrong)
    label = rng.randrange(4)
    wrong.insert(label, right)
    return Event(activity, context, tuple(wrong), label, things, fresh, f"{person.name}|{activity}|{time}")
