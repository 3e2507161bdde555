"""The committed reference: its records are those that the code of today would look for."""

from pathlib import Path

import pytest

from suite import evaluation, experiments, zoo
from suite.ablate import book, plan, run
from suite.report import data, rotations, tables
from suite.store import Store

REFERENCE = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def tests():
    return evaluation.Tasks(evaluation.EMBEDDED_TASKS)


@pytest.mark.parametrize("name", zoo.names())
def test_the_main_table_is_found_whole(name, tests):
    """A change of an option, of a task, of a model or of the identity itself orphans the records: measure them anew."""
    planned = experiments.plan(name, store=Store(REFERENCE), tests=tests)
    assert planned.outcome.found > 40 and planned.jobs == [], [job.variant.label for job in planned.jobs]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in REFERENCE.glob("*/records")))
def test_committed_tables_are_what_the_records_say(folder):
    store = Store(REFERENCE)
    model = next(name for name in store.models() if store.folder(name).name == folder)
    drawn = {setting.stem: tables.markdown(data.compare(store, setting)) for setting in data.settings(store, model)}
    for file in (REFERENCE / folder).glob("W*.md"):
        assert file.read_text() == drawn[file.stem]


@pytest.mark.parametrize("file", sorted(REFERENCE.glob("*/spinquant.md")), ids=lambda path: path.parent.name)
def test_the_rotations_are_what_the_records_say(file):
    store = Store(REFERENCE, rotations.SHELF)
    model = next(name for name in store.models() if store.folder(name) == file.parent)
    for name, text in rotations.content(store, model).items():
        assert (file.parent / name).read_text() == text
    rows = rotations.table(store, model)
    whole = {(row["scheme"], row["rotation"]) for row in rows if None not in (row["seed_0"], row["seed_1"], row["seed_2"])}
    usual = {(f"W4A{bits} g128", rotation) for bits in (4, 8) for rotation in experiments.ROTATIONS}
    assert whole >= (usual if "planted" not in file.parent.name else set())


PLANTED = ["tiny-llama-s@outliers=16", "tiny-qwen-s@outliers=16"], [
    "pool", "granularity", "metric", "exhaustive", "search", "swaps", "statistics", "degradation"]


@pytest.mark.parametrize("folder, models, experiments", [
    ("ablations", zoo.names(), ()), ("ablations-planted", *PLANTED)], ids=["plain", "planted"])
def test_committed_ablations_are_found_whole_and_are_what_the_records_say(folder, models, experiments):
    wanted = plan.load(experiments)
    done = run.ablate(models, wanted, root=REFERENCE, whole=False, runner=_nothing)
    assert (done.measured, done.implied) == (0, 0) and done.found > 100 * len(models)
    pages = book.content(done, wanted, REFERENCE, lambda _, stem: {f"{stem}.png": b"", f"{stem}.svg": b""})
    committed = {path.name: path for path in (REFERENCE / folder).iterdir()}
    assert set(committed) == set(pages)
    for name, path in committed.items():
        if path.suffix in (".md", ".csv", ".tex"):
            assert path.read_text() == pages[name].decode(), name


def _nothing(*_, **__):
    raise AssertionError("a record is missing: the committed ablations would have to be measured again")
