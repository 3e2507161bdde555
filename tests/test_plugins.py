"""A method from outside works wherever a name is taken; a broken one is answered with the file and what was expected."""

import importlib.metadata
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from suite import cli, experiments, measuring, method, plugins, testing, variants, walk
from suite.adapter import PTQ
from suite.errors import PTQError
from suite.store import Store

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE, BROKEN = ROOT / "examples" / "range_search.py", ROOT / "examples" / "range_search_broken.py"

MINE = '''"""Mine."""
from dataclasses import dataclass
from suite.grid import Scheme
from suite.method import Uniform
from suite.rounding import round_to_nearest

@dataclass(frozen=True)
class Mine(Uniform):
    scheme: Scheme = Scheme()
    shrink: float = 0.9

    def quantize(self, layer):
        return round_to_nearest(layer, self.scheme, {n: self.shrink for s in layer.sites for n in s.linears})
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(method, "_ADDED", {})
    monkeypatch.setattr(plugins, "_LOADED", {})
    yield
    for name in [name for name in sys.modules if name.startswith(plugins._MODULE)]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def file(text=MINE, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    return file


def refused(path) -> str:
    before, modules = method.names(), set(sys.modules)
    with pytest.raises(PTQError) as error:
        plugins.load(path)
    assert method.names() == before and str(path) in str(error.value) and "\n" not in str(error.value)
    assert not any(name.startswith(plugins._MODULE) for name in set(sys.modules) - modules)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- names


def test_the_name_is_that_of_the_file(write):
    assert plugins.load(write()) == ("mine",)
    assert plugins.load(write()) == ("mine",) and "mine" in method.names()
    made = method.build("mine", shrink="0.8", wbits=3)
    assert method.from_config(json.loads(json.dumps(method.to_config(made)))) == made
    assert variants.label(made) == "mine shrink=0.8"


def test_a_file_may_name_its_methods(write):
    text = MINE + "\nclass Other(Mine):\n    pass\n\nMETHODS = {'first-one': Mine, 'other': Other}\n"
    assert plugins.load(write(text)) == ("first-one", "other")
    assert method.build("other").scheme.weight.bits == 4


def test_a_folder_is_a_plug_in_too(write, tmp_path):
    write(name="mine/numerics.py")
    write("from .numerics import Mine\nMETHODS = {'mine': Mine}\n", "mine/__init__.py")
    assert plugins.load(tmp_path / "mine") == ("mine",)
    assert method.build("mine").shrink == 0.9


# ---------------------------------------------------------------------------------------------- everywhere


def test_in_pools_and_compositions(write, toy_llama):
    plugins.load(write())
    data = testing.TOYS["gqa"].calib()
    records = walk.quantize_model(method.build("cka-hybrid", pool="mine|awq+mine"), toy_llama, data)
    assert set(records[0]["candidates"]) == {"mine", "awq+mine"}


def test_with_ptq_quantize_and_lm_eval(write, toy_folder, toy_text_file, tmp_path, capsys):
    path = write()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["quantize", "--model", str(toy_folder), "--method", "mine", "--plugin", str(path), "--calib",
                  str(toy_text_file), "--nsamples", "2", "--seqlen", "32", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 0, capsys.readouterr().err
    made = json.loads((tmp_path / "out" / "ptq.json").read_text())
    assert plugins.code_of({"method": "mine"})["mine"] in json.dumps(made)
    method.remove("mine"), plugins._LOADED.clear()  # the adapter finds it by itself
    wrapped = PTQ(str(toy_folder), method="mine", plugin=str(path), calib=str(toy_text_file), nsamples=2, seqlen=32)
    assert "mine W4A8" in wrapped.variant and wrapped.model_identity()["plugins"]


def test_worker_processes_know_it(write):
    """What a worker is sent is unpickled by the name of the plug-in's module: it must have been loaded there."""
    path = write()
    plugins.load(path)
    sent = pickle.dumps(method.build("mine", shrink=0.7)).hex()
    code = ("import pickle, sys; from suite import plugins; plugins.load(sys.argv[1]); "
            f"print(pickle.loads(bytes.fromhex('{sent}')))")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "shrink=0.7" in done.stdout, done.stderr


def test_workers_load_the_plug_ins_before_the_first_job(write):
    class Waiting:
        def get(self):
            assert "mine" in method.names()

    measuring._work(Waiting(), None, (str(write()),))


def test_an_edited_file_never_gets_its_former_results(write, tmp_path, toy_folder, toy_text_file):
    """Its digest is part of every identity, also where it stands in a pool; built-in methods keep theirs."""
    given = dict(store=Store(tmp_path / "results"), calib_source=str(toy_text_file), nsamples=2, seqlen=32)

    def identities(text):
        plugins.load(write(text))
        pools = [method.build("cka-hybrid", pool=("gptq", "rtn")),
                 method.build("cka-hybrid", pool=("gptq", "mine"), metric="mse")]
        methods = ["gptq", "mine", "awq+mine", *pools]
        planned = experiments.plan(str(toy_folder), methods, ["world_wiki_ppl"], **given)
        assert set(planned.outcome.setting.plugins) == {"mine"}
        return [planned.quantization(variant) for variant in planned.variants]

    before = identities(MINE)
    assert ["plugins" in identity for identity in before] == [False, True, True, False, True]
    method.remove("mine"), plugins._LOADED.clear()  # another process
    after = identities(MINE + "\n# edited\n")
    assert [a == b for a, b in zip(before, after)] == [True, False, False, True, False]


# ---------------------------------------------------------------------------------------------- mistakes


def test_what_is_no_plug_in(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.py")
    (tmp_path / "notes.txt").write_text("x")
    assert "is no Python file" in refused(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "has no __init__.py" in refused(tmp_path / "empty")


@pytest.mark.parametrize("text, words", [
    ("import no_such_module\n", ["ModuleNotFoundError", "no_such_module", "line 1"]),
    ("x = 1\ndef f(:\n", ["SyntaxError", "line 2"]),
    ("x = 1\n\n1 / 0\n", ["ZeroDivisionError", "line 3"]),
    ("import sys\nsys.exit(3)\n", ["SystemExit", "line 2"]),
])
def test_a_file_that_fails_to_import(write, text, words):
    message = refused(write(text))
    assert "cannot be imported" in message and all(word in message for word in words), message


@pytest.mark.parametrize("text, words", [
    ("x = 1\n", ["has no method", "found no class", "def quantize(self, layer) -> LayerEdit"]),
    ("class A:\n    def quantize(self, layer): pass\n", ["A, which has quantize but no plan", "suite.method.Uniform"]),
    (MINE + "\nclass Other(Mine):\n    pass\n", ["defines 2 methods, Mine, Other", 'METHODS = {"mine": Mine, ...}']),
    (MINE + "\nMETHODS = [Mine]\n", ["expected METHODS ="]),
    (MINE + "\nMETHODS = {'my method': Mine}\n", ["method name 'my method'", "allowed are letters"]),
    (MINE + "\nMETHODS = {'mine': 3}\n", ["expected a class, found 3"]),
])
def test_a_file_without_one_method(write, text, words):
    message = refused(write(text))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("old, new, words", [
    ("def quantize(self, layer):", "def quantize(self, layer, calib):",
     ["line 7", "expected quantize(self, layer) -> LayerEdit, found quantize(self, layer, calib)"]),
    ("def quantize(self, layer):", "def quantise(self, layer):", ["expected quantize(self, layer) -> LayerEdit, found none"]),
    ("def quantize(self, layer):", "def plan(self, model): pass\n    def quantize(self, layer):",
     ["expected plan(self, model, calib) -> Sequence[LayerMethod], found plan(self, model)"]),
    ("def quantize(self, layer):", "def transform(self): pass\n    def quantize(self, layer):",
     ["expected transform(self, layer) -> LayerEdit, found transform(self)"]),
    ("def quantize(self, layer):", "@staticmethod\n    def quantize(layer):", ["found a staticmethod"]),
    ("@dataclass(frozen=True)", "@dataclass", ["expected @dataclass(frozen=True), found a dataclass that is not frozen"]),
    ("@dataclass(frozen=True)\n", "", ["found Mine without @dataclass(frozen=True)"]),
    ("shrink: float = 0.9", "shrink: float = 0.9\n    more: object = None\n    def __post_init__(self): 1 / 0",
     ["expected that Mine() works, found ZeroDivisionError"]),
    ("    scheme: Scheme = Scheme()\n", "", ["expected the field `scheme: Scheme = Scheme()`, found the fields shrink"]),
    ("scheme: Scheme = Scheme()", "scheme: int = 4", ["found scheme = 4"]),
    ("    scheme: Scheme = Scheme()\n", "    amount: float\n    scheme: Scheme = Scheme()\n",
     ["a default for every option, found none for amount"]),
])
def test_a_class_that_has_not_the_form_of_a_method(write, old, new, words):
    assert MINE.count(old) == 1
    message = refused(write(MINE.replace(old, new)))
    assert "'mine'" in message and all(word in message for word in words), message


def test_all_mistakes_of_a_class_are_told_at_once(write):
    text = MINE.replace("(frozen=True)", "").replace("quantize(self, layer)", "quantize(self)")
    assert all(word in refused(write(text)) for word in ("not frozen", "found quantize(self)"))


def test_names_that_are_taken(write, tmp_path):
    assert "'gptq'" in (message := refused(write(name="gptq.py"))) and "baselines.gptq:GPTQ" in message
    plugins.load(write())
    assert "have the same file name" in refused(write(name="other/mine.py"))
    assert "taken by" in refused(write(MINE + "\nMETHODS = {'mine': Mine}\n", "another.py"))


def test_a_rule_that_returns_no_edit(write, toy_llama):
    plugins.load(write(MINE.replace("return round_to_nearest", "round_to_nearest")))
    for made in (method.build("mine"), method.build("cka-hybrid", pool=("mine",))):
        with pytest.raises(PTQError, match=r"layer 0: expected .*Mine.quantize\(layer\) -> LayerEdit, found NoneType"):
            walk.quantize_model(made, toy_llama, testing.TOYS["gqa"].calib())


def test_a_plan_that_returns_no_rules(write, toy_llama):
    plugins.load(write(MINE.replace("    def quantize", "    def plan(self, model, calib): return self\n\n    def quantize")))
    with pytest.raises(PTQError, match=r"expected Mine.plan\(model, calib\) -> Sequence\[LayerMethod\], found Mine"):
        walk.quantize_model(method.build("mine"), toy_llama, testing.TOYS["gqa"].calib())


# ---------------------------------------------------------------------------------------------- installed packages


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Installs modules as packages with an entry point: name -> source, or the value of an existing one."""
    monkeypatch.syspath_prepend(tmp_path)

    def points(*pairs):
        found = []
        for i, (name, source) in enumerate(pairs):
            value = source
            if ":" not in source or "\n" in source:
                module = f"theirs_{i}_of_{tmp_path.name}"  # of each test its own: modules outlive tests
                value = f"{module}:Mine"
                (tmp_path / f"{module}.py").write_text(source)
            found.append(importlib.metadata.EntryPoint(name, value, method.ENTRY_POINTS))
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [p for p in found if p.group == group])
    return points


def test_an_installed_package(install):
    install(("theirs", MINE))
    assert method.build("theirs", wbits=3).shrink == 0.9 and method.name_of(method.build("theirs")) == "theirs"
    assert len(plugins.code_of({"options": {"pool": ["gptq", "awq+theirs"]}})["theirs"]) == 64
    assert plugins.code_of(method.to_config(method.build("gptq"))) == {}


def test_a_broken_package_spoils_its_own_name_only(install, capsys):
    install(("theirs", "import no_such_module\n"))
    with pytest.raises(PTQError, match="'theirs' of entry point theirs = .* cannot be imported: ModuleNotFoundError"):
        method.build("theirs")
    assert method.name_of(method.build("gptq")) == "gptq" and "awq+gptq" in method.compositions()
    with pytest.raises(SystemExit):
        cli.main(["ls", "methods"])
    assert "CANNOT BE USED: method 'theirs'" in capsys.readouterr().out


def test_a_package_without_the_form_of_a_method(install):
    install(("theirs", MINE.replace("self, layer", "self")))
    with pytest.raises(PTQError, match=r"entry point theirs.*found quantize\(self\)"):
        method.build("theirs")


def test_clashes_of_packages(install, write):
    install(("gptq", MINE), ("twice", MINE), ("twice", MINE))
    for name, words in (("gptq", "claimed by this suite and by entry point gptq"),
                        ("twice", "claimed by entry point twice = .* and by entry point twice")):
        with pytest.raises(PTQError, match=words):
            method.build(name)
    assert method.build("rtn")
    assert "'twice'" in refused(write(name="twice.py"))


# ---------------------------------------------------------------------------------------------- the example


def test_the_example_passes_every_check():
    plugins.load(EXAMPLE)
    assert {(o.status, o.message) for o in testing.run_checks("range_search")} == {("passed", "")}


def test_the_broken_example_is_rejected_with_the_reason():
    plugins.load(BROKEN)
    failed = [o for o in testing.run_checks("range_search_broken", ["error_falls_with_bits"])]
    assert [o.status for o in failed] == ["failed"] and "clipped ranges" in failed[0].message


def test_a_class_can_be_checked_without_a_name():
    """In people's own test files: the class itself, which its tests import from wherever it is."""
    plugins.load(EXAMPLE)
    cls = method.lookup("range_search")
    method.remove("range_search")
    cases = testing.parametrize_with_checks([cls]).mark.args[1]
    check, make_method, toy = next(case.values for case in cases if case.id.startswith("RangeSearch-configuration"))
    check(make_method, toy)
