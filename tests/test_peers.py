"""The table beside llm-compressor, from losses alone: which runs, what is paired with what, and when a word is said."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).resolve().parent.parent / "peers" / "table.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers_table", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def losses(shift, seed=0):
    drawn = np.random.default_rng(seed).normal(300, 30, 40)
    return {text: (drawn + shift + np.random.default_rng(seed + 1).normal(0, 0.1, 40)).tolist() for text in ("wiki", "chat")}


def test_runs_of_a_method(peers):
    runs = {name: [(run.seed, run.order) for run in peers.runs_of(name, seeds=3, orders=2)] for name in peers.METHODS}
    assert runs["rtn"] == [(0, 0)] and runs["awq"] == runs["smoothquant"] == [(0, 0), (1, 0), (2, 0)]
    assert runs["gptq"] == runs["smoothquant+gptq"] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert all(peers.runs_of(name, seeds=0, orders=3) == [] for name in peers.METHODS)


@pytest.mark.parametrize("shifts, word", [
    ((1, 1, 1), "suite better"), ((-1, -1, -1), "peer better"), ((1, 1), None), ((1, 1, -0.5), None), ((0, 0, 0), None)])
def test_a_word_takes_runs_that_agree(peers, shifts, word):
    rows = [peers.row("fp16", "", peers.Run(0), losses(-5))]
    for seed, shift in enumerate(shifts):
        rows.append(peers.row("gptq", peers.SUITE, peers.Run(seed), losses(0, seed)))
        rows.append(peers.row("gptq", peers.PEER, peers.Run(seed), losses(shift, seed)))
    rows.append(peers.row("awq", peers.PEER, peers.Run(0), losses(9)))  # alone: nothing to pair it with
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in peers.table(rows)[2:]]
    assert [cells[:3] for cells in found] == [["fp16", "", "1"], ["gptq", "suite", str(len(shifts))],
                                              ["gptq", "llm-compressor", str(len(shifts))], ["awq", "llm-compressor", "1"]]
    assert found[0][5:] == found[1][5:] == found[3][5:] == ["", ""]
    for cell in found[2][5:]:
        assert cell.endswith(f": {word}") if word else "better" not in cell
        assert np.sign(float(cell.split()[0])) == np.sign(sum(shifts)) or sum(shifts) == 0
