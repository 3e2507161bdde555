"""Short Python functions with docstring and tests: the twin of HumanEval (data now, the task elsewhere).

A family is a docstring, a body and inputs to test it on, with constants that vary. The key is (family, constants, wording),
so that a test prompt's combination never occurs in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from suite.zoo.world import World

KIND = "code"

NUMBER, PAIR, LIST, WORD = "number", "pair", "list", "word"
# name stem -> (shape of the arguments, wordings of the docstring, body, number of constants).
# {n}, {m}: constants; {x}, {y}: arguments.
FAMILIES: dict[str, tuple[str, tuple[str, ...], str, int]] = {
    "add": (NUMBER, ("Return {x} plus {n}.", "Add {n} to {x}."), "return {x} + {n}", 1),
    "take": (NUMBER, ("Return {x} minus {n}.", "Take {n} from {x}."), "return {x} - {n}", 1),
    "times": (NUMBER, ("Return {x} times {n}.", "Multiply {x} by {n}."), "return {x} * {n}", 1),
    "add_times": (NUMBER, ("Add {n} to {x}, then multiply by {m}.", "Return {x} plus {n}, times {m}."),
                  "return ({x} + {n}) * {m}", 2),
    "times_add": (NUMBER, ("Multiply {x} by {n}, then add {m}.", "Return {x} times {n}, plus {m}."),
                  "return {x} * {n} + {m}", 2),
    "over": (NUMBER, ("Is {x} more than {n}?", "Return whether {x} is more than {n}."), "return {x} > {n}", 1),
    "under": (NUMBER, ("Is {x} less than {n}?", "Return whether {x} is less than {n}."), "return {x} < {n}", 1),
    "between": (NUMBER, ("Is {x} between {n} and {m}?", "Return whether {x} is between {n} and {m}."),
                "return min({n}, {m}) <= {x} <= max({n}, {m})", 2),
    "divides": (NUMBER, ("Can {x} be divided by {n}?", "Return whether {n} divides {x}."), "return {x} % {n} == 0", 1),
    "at_least": (NUMBER, ("Return {x}, but at least {n}.", "Return {x} or {n}, the larger one."), "return max({x}, {n})", 1),
    "at_most": (NUMBER, ("Return {x}, but at most {n}.", "Return {x} or {n}, the smaller one."), "return min({x}, {n})", 1),
    "add_both": (PAIR, ("Return {x} plus {y} plus {n}.", "Add {x}, {y} and {n}."), "return {x} + {y} + {n}", 1),
    "mix": (PAIR, ("Return {n} times {x} plus {m} times {y}.", "Add {n} times {x} and {m} times {y}."),
            "return {n} * {x} + {m} * {y}", 2),
    "gap": (PAIR, ("Return {x} minus {y}, plus {n}.", "Take {y} from {x} and add {n}."), "return {x} - {y} + {n}", 1),
    "add_each": (LIST, ("Add {n} to each item of {x}.", "Return {x} with {n} added to each item."),
                 "return [i + {n} for i in {x}]", 1),
    "times_each": (LIST, ("Multiply each item of {x} by {n}.", "Return each item of {x} times {n}."),
                   "return [i * {n} for i in {x}]", 1),
    "keep_over": (LIST, ("Keep the items of {x} that are more than {n}.", "Return the items of {x} more than {n}."),
                  "return [i for i in {x} if i > {n}]", 1),
    "keep_under": (LIST, ("Keep the items of {x} that are less than {n}.", "Return the items of {x} less than {n}."),
                   "return [i for i in {x} if i < {n}]", 1),
    "count_item": (LIST, ("Count how often {n} is in {x}.", "Return how often {n} is in {x}."), "return {x}.count({n})", 1),
    "has_item": (LIST, ("Is {n} in {x}?", "Return whether {n} is in {x}."), "return {n} in {x}", 1),
    "sum_add": (LIST, ("Return the sum of {x} plus {n}.", "Add {n} to the sum of {x}."), "return sum({x}) + {n}", 1),
    "max_add": (LIST, ("Return the largest item of {x} plus {n}.", "Add {n} to the largest item of {x}."),
                "return max({x}) + {n}", 1),
    "first_items": (LIST, ("Return the first {n} items of {x}.", "Keep the first {n} items of {x}."), "return {x}[:{n}]", 1),
    "drop_items": (LIST, ("Return {x} without the first {n} items.", "Drop the first {n} items of {x}."),
                   "return {x}[{n}:]", 1),
    "put_item": (LIST, ("Put {n} at the end of {x}.", "Return {x} with {n} at the end."), "return {x} + [{n}]", 1),
    "say_times": (WORD, ("Repeat {x} {n} times.", "Return {x}, {n} times over."), "return {x} * {n}", 1),
    "first_letters": (WORD, ("Return the first {n} letters of {x}.", "Keep the first {n} letters of {x}."),
                      "return {x}[:{n}]", 1),
    "longer": (WORD, ("Is {x} longer than {n}?", "Return whether {x} is longer than {n}."), "return len({x}) > {n}", 1),
    "length_add": (WORD, ("Return the length of {x} plus {n}.", "Add {n} to the length of {x}."), "return len({x}) + {n}", 1),
}
NAMES = {NUMBER: ("x", "a", "n"), PAIR: ("x", "a"), LIST: ("items", "x"), WORD: ("word", "text")}
FEW = ("first_items", "drop_items", "say_times", "first_letters", "longer")  # constants up to 6, to match short inputs


def inputs(shape: str, n: int) -> tuple[str, ...]:
    """Arguments to test on, around the constant, so that a wrong constant or comparison is found.

    >>> inputs(NUMBER, 7)
    ('6', '7', '15')
    """
    return {NUMBER: (f"{n - 1}", f"{n}", f"{2 * n + 1}"), PAIR: ("2, 3", "9, 4"),
            LIST: (f"[{n}, 1, {n + 1}, {n}, {n - 1}, 5, 9, 3]", "[4]"), WORD: ('"bell"', '"a"', '"glass rope"')}[shape]


@dataclass(frozen=True)
class Function:
    """The fields of HumanEval. The prompt ends before the line break, which belongs to the token of the next indentation."""

    entry_point: str
    prompt: str
    canonical_solution: str
    test: str
    key: str
    kind: str = KIND

    @property
    def text(self) -> str:
        return self.prompt + self.canonical_solution

    @property
    def with_test(self) -> str:
        return f"{self.text}\n{self.test}"


def run(source: str, call: str):
    """The value of a call after executing source. Only ever used on the text made here."""
    scope: dict = {}
    exec(source, scope)  # noqa: S102
    return eval(call, scope)  # noqa: S307


def sample(world: World, rng: random.Random) -> Function:
    stem = rng.choice(list(FAMILIES))
    shape, wordings, body, constants = FAMILIES[stem]
    n, m = rng.randint(2, 6 if stem in FEW else 20), rng.randint(2, 20)
    x = rng.choice(NAMES[shape])
    y = {"x": "y", "a": "b"}.get(x, "")
    wording = rng.randrange(len(wordings))
    name = f"{stem}_{n}" + (f"_{m}" if constants == 2 else "")
    slots = {"x": x, "y": y, "n": n, "m": m}
    arguments = f"{x}, {y}" if shape == PAIR else x
    prompt = f'def {name}({arguments}):\n    """{wordings[wording].format(**slots)}"""'
    solution = f"\n    {body.format(**slots)}\n"
    tests = "".join(f"    assert candidate({given}) == {run(prompt + solution, f'{name}({given})')!r}\n"
                    for given in inputs(shape, n))
    key = f"{stem}|{n}|{m if constants == 2 else ''}|{wording}"
    return Function(name, prompt, solution, f"def check(candidate):\n{tests}", key)
