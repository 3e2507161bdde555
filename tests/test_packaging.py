"""What a user installs and types first: make targets, pins, entry points, files that travel along."""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from suite import paths

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What a shell has: neither the variables of the `make test` that runs this, nor those that the Makefile reads.
READ = re.findall(r"\$\((?:if \$\()?([A-Z]+)\)", (ROOT / "Makefile").read_text())
SHELL = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k not in READ}


def dry(*words: str) -> str:
    """The commands that make would run, .venv taken as up to date."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/stamp", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=SHELL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", "reproduce tiny-llama-m"),
        ("MODEL=tiny-qwen-s", "reproduce tiny-qwen-s"),
        ("METHODS=gptq,awq TASKS=world_math WBITS=3", "--methods gptq,awq --tasks world_math --wbits 3"),
        ("FAST=1 ABITS=16 MODE=native", "--fast --abits 16 --mode native"),
        ("CALIB=a.txt SEED=1 RESULTS=/tmp/r", "--calib a.txt --seed 1 --results /tmp/r"),
    ],
)
def test_make_reproduce_hands_its_variables_on(words, expected):
    assert expected in " ".join(dry("reproduce", *words.split()).split())


def test_what_is_not_given_to_make_keeps_its_default():
    """But for the folder: the committed records in results/ would be found, and nothing measured."""
    assert dry("reproduce").split()[-4:] == ["reproduce", "tiny-llama-m", "--results", "runs"]
    assert "--fast" not in dry("reproduce", "FAST=0")


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            "METHOD=mine PLUGIN=mine.py MODEL=tiny-qwen-s WBITS=3",
            "compare mine --against gptq,cka-hybrid --model tiny-qwen-s --wbits 3 --plugin mine.py --results runs",
        ),
        ("METHOD=awq AGAINST=rtn", "compare awq --against rtn --model tiny-llama-m --results runs"),
        ("BASELINE=b.json", "compare --against-baseline b.json --results runs"),
        ("BASELINE=b.json MODEL=tiny-qwen-s", "compare --against-baseline b.json --model tiny-qwen-s --results runs"),
    ],
)
def test_make_regress_hands_its_variables_on(words, expected):
    assert " ".join(dry("regress", *words.split()).split()).endswith(expected)


def test_ci_runs_the_tests_and_the_gate():
    assert dry("test").endswith("-m pytest")
    script = ROOT / ".ci" / "run"
    lines = script.read_text().rstrip().splitlines()
    assert os.access(script, os.X_OK) and "make test" in lines and lines[-1].startswith("exec make regress BASELINE=")
    assert "    make test" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(not (ROOT / "results" / "baselines").is_dir(), reason="no reference is committed yet")
def test_the_committed_reference_fits_the_embedded_models():
    """A reference of other weights or versions would be refused, and the gate with it."""
    from suite import baseline, compare

    (named,) = re.findall(r"BASELINE=(\S+) MODEL=tiny-llama-s", (ROOT / ".ci" / "run").read_text())
    reference = baseline.read(ROOT / named)
    run = reference.run("tiny-llama-s")
    assert {"rtn", "gptq", "cka-hybrid"} <= set(run.labels) and len(run.tasks) >= 5
    assert all(entry.noise is not None for entry in run.entries)
    for run in reference.runs:
        compare._require_comparable(reference, run, run.entries)


def test_make_without_a_fitting_python_says_so(tmp_path):
    """A Python that is too old is refused before anything is built."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, text=True, capture_output=True, env=SHELL)
    assert done.returncode == 2 and "3.11" in done.stderr and "PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_constraints_pin_every_dependency_exactly():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    # a name and a version: no path, no host
    pins = dict(re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9a-z.]*)", line).groups() for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert pinned["torch"] == "2.13.0"
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, f"{name} is not pinned"
        assert re.search(r"[<>=]", requirement), f"{requirement} has no bound"


def test_the_environment_is_the_pinned_one():
    """The tests, and the committed numbers, speak of these versions."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert importlib.metadata.version(name).partition("+")[0] == version


def test_entry_points():
    assert PROJECT["project"]["scripts"]["ptq"] == "suite.cli:main"
    (point,) = [p for p in importlib.metadata.entry_points(group="lm_eval.models") if p.name == "ptq"]
    from suite.adapter import PTQ

    assert point.load() is PTQ


def test_tasks_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    assert paths.tasks() == ROOT / "tasks"
    (tmp_path / "tasks").mkdir()  # somebody else's folder of that name, as in site-packages
    (tmp_path / "suite" / "_tasks").mkdir(parents=True)
    (tmp_path / "suite" / "_tasks" / "a.yaml").touch()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "suite")
    assert paths.tasks() == tmp_path / "suite" / "_tasks"
    (tmp_path / "suite" / "_tasks" / "a.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        paths.tasks()
