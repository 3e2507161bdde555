"""Experiments as data: one YAML file each, a grid of configurations and how to show it. No torch.

    title: Which methods the pool needs
    table: 3                         # of the paper's list; figures have none
    says: What is varied, in a sentence or two.
    tasks: perplexity                # "perplexity", "wiki" (the first corpus), "all", or a list of names
    large: {tasks: wiki, nsamples: 16}  # models of more than four decoder layers: their tasks, where they are others, and,
                                     # of the embedded ones, the calibration sequences (unless --nsamples says how many)
    schemes: [{wbits: 4, abits: 8}]
    further: [{wbits: 3, abits: 8}]  # measured only where the experiment is asked for by name; shown wherever it is there
    against: full pool               # the row that the others are compared with; default: full precision
    rows:
      - {name: full precision, method: fp16}
      - {name: full pool, method: cka-hybrid}
      - {name: chosen at random, method: cka-hybrid, options: {pick: random}, repeat: {pick_seed: [0, 1, 2, 3, 4]}}
      - {name: best uniform method, best_of: [GPTQ, AWQ]}        # of other rows, in hindsight, corpus by corpus
    columns: [recovered, choices]    # beside the tasks; see COLUMNS
    figures: [granularity]           # see FIGURES
    study: exhaustive                # instead of rows: a measurement of its own, with `options`; see STUDIES
    layers: [1, 4]                   # only models with so many decoder layers

A row may have `uniform: true` (a baseline of the column `recovered`), `calibration: {nsamples: 16}`, and `schemes`,
`further`, `tasks` and `layers` of its own. `repeat` varies one option, or the calibration's seed, and the row shows the mean.
`small` holds options of a study for models of at most four layers, which are cheap enough for more; `quick` those of a
first look (--fast), which takes everything at its first scheme only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from suite.errors import PTQError, unknown

FOLDER = Path(__file__).resolve().parent / "experiments"
TASKS = ("perplexity", "wiki", "all")
COLUMNS = {
    "recovered": "share of the gap between the best uniform baseline and full precision that a row closes",
    "choices": "how often each method was chosen",
    "changed": "layers whose choice differs from the row compared with",
    "spread": "standard deviation over repeats",
    "regret": "perplexity above the best of all assignments (models of few layers)",
    "seconds": "to quantize",
    "memory": "peak, in MiB, while quantizing",
}
FIGURES = ("choices_by_depth", "candidates", "statistics", "error_growth", "pareto", "granularity", "sensitivity",
           "metrics", "reconstruction", "cost", "recovered", "degradation", "swaps")
STUDIES = ("exhaustive", "swaps", "degradation", "reconstruction", "statistics", "cost")
CALIBRATION = ("seed", "nsamples", "seqlen")
_KEYS = {"title": str, "table": int, "says": str, "tasks": (str, list), "schemes": list, "against": str, "rows": list,
         "columns": list, "figures": list, "study": str, "options": dict, "note": str, "small": dict, "quick": dict,
         "layers": list, "large": dict, "further": list}
_LARGE_KEYS = {"tasks": (str, list), "nsamples": int}
_ROW_KEYS = {"name": str, "method": str, "options": dict, "repeat": dict, "best_of": list, "uniform": bool,
             "calibration": dict, "schemes": list, "layers": list, "tasks": (str, list), "further": list}


@dataclass(frozen=True)
class Row:
    """One line of an experiment: a method with its options at each scheme, or the best of other lines."""

    name: str
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    repeat: tuple[str, tuple[Any, ...]] | None = None
    best_of: tuple[str, ...] = ()
    uniform: bool = False
    calibration: Mapping[str, int] = field(default_factory=dict)
    schemes: tuple[Mapping[str, Any], ...] | None = None
    further: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[int, int] | None = None
    tasks: str | tuple[str, ...] = ""

    def configurations(self) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """(options of the method, of the calibration) of each repeat.

        >>> Row("r", "gptq", repeat=("seed", (0, 1))).configurations()
        [({}, {'seed': 0}), ({}, {'seed': 1})]
        """
        if self.repeat is None:
            return [(dict(self.options), dict(self.calibration))]
        key, values = self.repeat
        if key in CALIBRATION:
            return [(dict(self.options), {**self.calibration, key: value}) for value in values]
        return [({**self.options, key: value}, dict(self.calibration)) for value in values]

    def fits(self, layers: int) -> bool:
        return self.layers is None or self.layers[0] <= layers <= self.layers[1]


@dataclass(frozen=True)
class Experiment:
    """One file: the grid, and how it is shown. See the module's text."""

    name: str
    title: str
    says: str = ""
    table: int | None = None
    tasks: str | tuple[str, ...] = "perplexity"
    schemes: tuple[Mapping[str, Any], ...] = ({"wbits": 4, "abits": 8},)
    further: tuple[Mapping[str, Any], ...] = ()
    asked: bool = False  # for by name: then the further schemes are measured, too
    against: str = ""
    rows: tuple[Row, ...] = ()
    columns: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    study: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)  # options of a study on models of few layers
    quick: Mapping[str, Any] = field(default_factory=dict)  # and of a first look
    note: str = ""
    layers: tuple[int, int] | None = None
    large: Mapping[str, Any] = field(default_factory=dict)  # "tasks", "nsamples" of models of more layers

    def tasks_of(self, row: Row, layers: int) -> str | tuple[str, ...]:
        """The tasks of a row on a model of so many layers."""
        return row.tasks or (self.large.get("tasks", self.tasks) if layers > SMALL_LAYERS else self.tasks)

    def sampling_of(self, layers: int) -> dict[str, int]:
        """What the calibration of every row is cut to on an embedded model of so many layers."""
        return {"nsamples": self.large["nsamples"]} if layers > SMALL_LAYERS and "nsamples" in self.large else {}

    def schemes_of(self, row: Row | None = None, fast: bool = False) -> list[tuple[Mapping[str, Any], bool]]:
        """The schemes of a row, or of the study, each with whether it is measured where it is not there; a first look has
        the first only."""
        usual, further = self.schemes, self.further
        if row is not None and row.schemes is not None:
            usual, further = row.schemes, row.further
        found = [(scheme, True) for scheme in usual] + [(scheme, self.asked) for scheme in further]
        return [one for one in found if one[1]][:1] if fast else found

    def study_options(self, layers: int, fast: bool = False) -> dict[str, Any]:
        return {**self.options, **(self.small if layers <= SMALL_LAYERS else {}), **(self.quick if fast else {})}

    def fits(self, layers: int) -> bool:
        return self.layers is None or self.layers[0] <= layers <= self.layers[1]


SMALL_LAYERS = 4  # models of so few layers are cheap enough for everything


def names() -> list[str]:
    """The experiments that come with the suite."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(wanted: Sequence[str] = ()) -> list[Experiment]:
    """Experiments by name, or all that come with the suite; a name that ends in .yaml is a file of the user's.

    Raises PTQError: unknown name, file that is missing or no YAML, a key, column, figure or study that is unknown.
    """
    found = []
    for name in wanted or names():
        path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
        if not path.is_file():
            if path.parent != FOLDER:
                raise PTQError(f"experiment file {name!r} does not exist: give a YAML file, "
                               f"or one of {', '.join(names())}")
            raise unknown("experiment", name, names())
        found.append(replace(parse(path.stem, path.read_text(encoding="utf-8")), asked=bool(wanted)))
    return sorted(found, key=lambda e: (e.table is None, e.table or 0, e.name))


def parse(name: str, text: str) -> Experiment:
    """An experiment from the text of its file. Raises PTQError, naming the file and the key."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PTQError(f"experiment {name}: not YAML: {' '.join(str(error).split())}") from None
    where = f"experiment {name}"
    _check(content, _KEYS, where)
    if "title" not in content:
        raise PTQError(f"{where}: it has no title")
    if ("rows" in content) == ("study" in content):
        raise PTQError(f"{where}: it needs rows or a study, and not both")
    rows = tuple(_row(row, f"{where}, row {i + 1}") for i, row in enumerate(content.get("rows", ())))
    known = [row.name for row in rows]
    twice = sorted({row for row in known if known.count(row) > 1})
    if twice:
        raise PTQError(f"{where}: row {twice[0]!r} stands there twice")
    for row in rows:
        for other in row.best_of:
            if other not in known:
                raise unknown(f"row in best_of of {row.name!r}, {where}", other, known)
    against = content.get("against", "")
    if against and against not in known:
        raise unknown(f"row in against of {where}", against, known)
    for key, allowed in (("columns", COLUMNS), ("figures", FIGURES)):
        for word in content.get(key, ()):
            if word not in allowed:
                raise unknown(f"word in {key} of {where}", str(word), allowed)
    if "study" in content and content["study"] not in STUDIES:
        raise unknown(f"study of {where}", content["study"], STUDIES)
    plain = {key: content[key] for key in ("title", "table", "says", "study", "options", "small", "quick", "note")
             if key in content}
    plain |= {key: tuple(content[key]) for key in ("schemes", "further", "columns", "figures", "layers") if key in content}
    if "tasks" in content:
        plain["tasks"] = _tasks(content["tasks"], where)
    if "large" in content:
        _check(content["large"], _LARGE_KEYS, f"{where}, large")
        plain["large"] = {key: _tasks(value, where) if key == "tasks" else value for key, value in content["large"].items()}
    return Experiment(name=name, rows=rows, against=against, **plain)


def _row(content: Any, where: str) -> Row:
    _check(content, _ROW_KEYS, where)
    if "name" not in content or ("method" in content) == ("best_of" in content):
        raise PTQError(f"{where}: a row has a name, and either a method or best_of")
    made = dict(content)
    for key in ("best_of", "schemes", "further", "layers"):
        if key in made:
            made[key] = tuple(made[key])
    if "repeat" in made:
        if len(made["repeat"]) != 1:
            raise PTQError(f"{where}: repeat varies one option, {len(made['repeat'])} found")
        ((key, values),) = made["repeat"].items()
        made["repeat"] = (key, tuple(values))
    if stray := sorted(set(made.get("calibration", ())) - set(CALIBRATION)):
        raise unknown(f"key in calibration of {where}", stray[0], CALIBRATION)
    if "tasks" in made:
        made["tasks"] = _tasks(made["tasks"], where)
    return Row(**made)


def _tasks(found: Any, where: str) -> str | tuple[str, ...]:
    if isinstance(found, list):
        return tuple(map(str, found))
    if found not in TASKS:
        raise unknown(f"tasks of {where}", str(found), (*TASKS, "a list of names"))
    return found


def _check(content: Any, keys: Mapping[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise PTQError(f"{where}: a mapping of keys is expected, {type(content).__name__} found")
    for key, value in content.items():
        if key not in keys:
            raise unknown(f"key of {where}", str(key), keys)
        if not isinstance(value, keys[key]):
            kinds = keys[key] if isinstance(keys[key], tuple) else (keys[key],)
            raise PTQError(f"{where}: {key} is {value!r}: expected is {' or '.join(kind.__name__ for kind in kinds)}")
