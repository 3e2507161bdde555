"""Arithmetic word problems with worked answers that end in `#### n`: the twin of GSM8K (task world_math).

One to four steps with numbers from 1 to 99; every step of the answer is one line, such as `12+5=17`. Names and things vary,
but the key of a problem is its template and its numbers, so that no test problem is a training problem with another name.

>>> evaluate("12+5=17\\n17-3=14\\n#### 14")
14
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from suite.zoo.world import World

KIND = "sums"
THINGS = ("apples", "eggs", "nuts", "hats", "lamps", "bells", "coins", "books", "bricks", "shoes", "knives", "cakes")
PLACES = ("boxes", "bags", "rows", "carts")
GAIN = ("{p} buys {k} more.", "{p} finds {k} more.", "{p} gets {k} from a friend.")
LOSS = ("{p} sells {k}.", "{p} gives {k} away.", "{p} loses {k}.")
LIMIT = 99  # no number in a problem is larger
CHANGE = 20  # the largest gain, loss or difference


@dataclass(frozen=True)
class Problem:
    """question and answer in the form of GSM8K; number is the final answer."""

    question: str
    answer: str
    number: int
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        return f"Question: {self.question}\nAnswer: {self.answer}"


def step(a: int, operator: str, b: int) -> tuple[str, int]:
    """A line of working and its result: step(12, "+", 5) -> ("12+5=17", 17)."""
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
    return f"{a}{operator}{b}={result}", result


def changes(total: int, count: int, person: str, rng: random.Random) -> tuple[list[str], list[str], int]:
    """`count` gains and losses from `total`: sentences, lines of working, what is left."""
    said, lines = [], []
    for _ in range(count):
        gain = total < 5 or (total <= LIMIT - 10 and rng.random() < 0.5)
        amount = rng.randint(1, min(CHANGE, LIMIT - total) if gain else min(CHANGE, total - 1))
        said.append(rng.choice(GAIN if gain else LOSS).format(p=person, k=amount))
        line, total = step(total, "+" if gain else "-", amount)
        lines.append(line)
    return said, lines, total


def holdings(rng, person, other, thing):
    """Starts with a number of things; gains and losses follow."""
    start = rng.randint(5, 80)
    said, lines, total = changes(start, rng.randint(1, 4), person, rng)
    return [f"{person} has {start} {thing}."] + said + [f"How many {thing} does {person} have?"], lines, total


def packed(rng, person, other, thing):
    """Boxes of equal size, then perhaps a gain or a loss."""
    boxes, each = rng.randint(2, 9), rng.randint(2, 9)
    line, total = step(boxes, "*", each)
    said, lines, total = changes(total, rng.randint(0, 2), person, rng)
    return ([f"{person} has {boxes} {rng.choice(PLACES)} of {each} {thing}."] + said
            + [f"How many {thing} does {person} have?"], [line] + lines, total)


def compared(rng, person, other, thing):
    """One has more or fewer than the other; asks for the second or for both."""
    first, gap = rng.randint(6, 60), rng.randint(1, CHANGE)
    more = gap >= first or rng.random() < 0.5
    line, second = step(first, "+" if more else "-", gap)
    said = [f"{person} has {first} {thing}.", f"{other} has {gap} {'more' if more else 'fewer'}."]
    if rng.random() < 0.5 or first + second > LIMIT:
        return said + [f"How many {thing} does {other} have?"], [line], second
    together, total = step(first, "+", second)
    return said + [f"How many {thing} do they have together?"], [line, together], total


def shared(rng, person, other, thing):
    """Equal shares of a product, then perhaps a gain or a loss."""
    people, each = rng.randint(2, 9), rng.randint(2, 9)
    line, total = step(people * each, "/", people)
    said, lines, total = changes(total, rng.randint(0, 2), person, rng)
    return ([f"{person} and friends share {people * each} {thing} among {people}."] + said
            + [f"How many {thing} does {person} have?"], [line] + lines, total)


def shopping(rng, person, other, thing):
    """So many at so much each, and perhaps the change."""
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    line, cost = step(count, "*", price)
    said = [f"{person} buys {count} {thing} for {price} coins each."]
    if rng.random() < 0.5 or cost > 90:
        return said + [f"How many coins does {person} pay?"], [line], cost
    rest = rng.randint(1, min(CHANGE, LIMIT - cost))
    change, rest = step(cost + rest, "-", cost)
    return [f"{person} has {cost + rest} coins."] + said + [f"How many coins does {person} have now?"], [line, change], rest


TEMPLATES = (holdings, holdings, packed, compared, shared, shopping)


def sample(world: World, rng: random.Random) -> Problem:
    person, other = rng.sample([e.name for e in world.entities["person"]], 2)
    thing = rng.choice(THINGS[:6] + THINGS[7:])
    template = rng.choice(TEMPLATES)
    said, lines, number = template(rng, person, other, thing)
    question = " ".join(said)
    key = f"{template.__name__}|{said[-1].split()[-1]}|{' '.join(lines)}"
    return Problem(question, "\n".join(lines + [f"#### {number}"]), number, key)


def drill(rng: random.Random) -> str:
    """A page of bare sums, for practice: facts of arithmetic, no problem among them."""
    lines = []
    for _ in range(rng.randint(6, 20)):
        operator = rng.choice("++--*/")
        if operator in "*/":
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            lines.append(step(a, "*", b)[0] if operator == "*" else step(a * b, "/", b)[0])
        else:
            a, b = rng.randint(2, LIMIT), rng.randint(1, CHANGE)
            a = min(a, LIMIT - b) if operator == "+" else max(a, b + 1)
            lines.append(step(a, operator, b)[0])
    return "\n".join(lines)


def evaluate(answer: str) -> int:
    """Check every line of a worked answer by computing it anew; return the final number. Raises on a false line."""
    *lines, last = answer.split("\n")
    for line in lines:
        a, operator, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
        true = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operator]
        if true != int(result):
            raise ValueError(f"false working: {line}")
    number = int(re.fullmatch(r"#### (\d+)", last).group(1))
    if number != int(lines[-1].split("=")[1]):
        raise ValueError(f"the answer {number} is not the result of the last line {lines[-1]}")
    return number
