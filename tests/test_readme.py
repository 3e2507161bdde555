"""What the README says is so: its commands parse, its files exist, its example method runs."""

import re
import shlex
import sys
from pathlib import Path

import torch
import toys

from suite import calib, cli, method, walk
from suite.linear import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def indented() -> str:
    """The lines of all indented blocks: commands and listings."""
    return "\n".join(re.findall(r"^    (.*)$", README, re.MULTILINE))


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_parse():
    lines = [line.split("#")[0] for line in indented().replace("\\\n", " ").splitlines()]
    found = [shlex.split(line.partition("  (")[0]) for line in lines if line.strip().startswith("ptq ")]
    assert len(found) >= 7
    for _, *words in found:
        target = cli.commands
        while words and words[0] in getattr(target, "commands", {}):
            target = target.commands[words.pop(0)]
        target.make_context("ptq", words)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\n ])", README)) - {"and"}
    assert {"reproduce", "test", "setup", "bench"} <= told <= targets


def test_files_of_the_layout_exist():
    table = README.partition("| floor | files | what |")[2].partition("###")[0]
    for cell in re.findall(r"^\| \d \| (.*?) \|", table, re.MULTILINE):
        for group in re.findall(r"`(.*?)`", cell):
            first, *rest = group.split()
            folder = Path(first).parent
            for name in [first, *(str(folder / r) for r in rest)]:
                assert list(ROOT.glob(name)), f"the README's table names {name}, which is not there"


def test_every_file_is_in_the_layout():
    table = README.partition("| floor | files | what |")[2].partition("###")[0]
    for path in (ROOT / "suite").glob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"[ /`]{re.escape(path.name)}\b", table), (
            f"{path.name} is missing"
        )


def test_the_example_is_the_file_it_names():
    (source,) = fenced("python")
    assert source == (ROOT / "examples" / "range_search.py").read_text()


def test_example_method_quantizes(monkeypatch):
    namespace = {"__name__": "example"}
    (source,) = fenced("python")
    monkeypatch.setitem(sys.modules, "example", type(method)("example"))
    exec(compile(source, "README.md", "exec"), namespace)
    example = namespace["RangeSearch"]
    example.__module__ = "example"
    model = toys.make_toy()
    data = calib.from_tokens(torch.arange(256).view(4, 64))
    plain = toys.make_toy()
    walk.quantize_model(method.build("rtn"), plain, data)
    walk.quantize_model(example(), model, data)
    mine, nearest = (m.model.layers[0].mlp.up_proj for m in (model, plain))
    assert isinstance(mine, QuantLinear) and not mine.weight.equal(nearest.weight)
    assert mine.weight.abs().max() <= nearest.weight.abs().max()  # ranges only shrink
