"""The real clients of the hub (huggingface_hub, transformers, datasets, lm-eval) against a hub on loopback: what is
there arrives whole, and what is not is told in one line, soon, with what to do instead."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_sets
import pytest
import torch
import toys
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file

from suite import hub
from suite.errors import PTQError

ROOT = Path(__file__).resolve().parent.parent
MODEL, GATED = "Qwen/Qwen1.5-0.5B", "meta-llama/Llama-3.2-1B"
PAPER = "wikitext2_ppl,c4_ppl,gsm8k,humaneval,hellaswag,mmlu_anatomy"  # one of MMLU's 57 subjects: they are alike

CLIENT = """
import json, os, sys, time
import datasets, transformers.models.auto.modeling_auto  # noqa: before the clock starts
from suite import hub, models, trust
from suite.errors import PTQError
from suite.evaluation import Tasks
for line in sys.stdin:
    start = time.perf_counter()
    try:
        told = eval(line)
    except PTQError as error:
        told = f"PTQError: {error}"
    print(json.dumps([told, time.perf_counter() - start]), flush=True)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, kind in ((MODEL, "qwen"), (GATED, "llama"), ("somebody/large", "llama"), ("somebody/flaky", "qwen")):
        toys.save_toy(root / "models" / name, kind, max_position_embeddings=2048, seed=len(name))
    (root / "models" / "somebody/large/remote.py").write_text("raise SystemExit('code of the model ran')\n")
    (root / "models" / "somebody/large/pytorch_model.bin").write_bytes(b"never fetched")
    shutil.copytree(root / "models" / MODEL, root / "models" / "somebody/pickled")
    weights = load_file(root / "models" / "somebody/pickled/model.safetensors")
    (root / "models" / "somebody/pickled/model.safetensors").unlink()
    torch.save(weights, root / "models" / "somebody/pickled/pytorch_model.bin")
    hub_sets.write(root)
    with HubServer(root) as server:
        server.gated.add(GATED)
        yield server


def environment(server, cache, **more):
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and k != "HF_HOME"}
    return kept | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


class Client:
    """A process that has the hub's clients, and evaluates what it is told to: `(result, seconds)`."""

    def __init__(self, env):
        self._process = subprocess.Popen([sys.executable, "-c", CLIENT], env=env, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, expression: str):
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()
        return json.loads(line)

    def close(self):
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    found = Client(environment(served, tmp_path_factory.mktemp("cache")))
    yield found
    found.close()


def test_a_model_arrives_whole_with_its_revision(served, client):
    told, _ = client(f"[(m := models.load('qwen1.5-0.5b')).name, m.digest, m.revision, m.note, "
                     f"models.identify({MODEL!r})['digest']]")
    name, digest, revision, note, again = told
    assert name == MODEL and digest == again and note == ""
    assert revision == served.commit("models", MODEL)
    # A file in the cache is identified by its name there, the same digest that the file itself gives.
    from suite import models

    assert digest == models.identify(str(served.folder("models", MODEL)))["digest"]


def test_only_safetensors_and_no_code_is_fetched(served, client):
    asked = len(served.requests)
    told, _ = client("models.load('somebody/large').name")
    assert told == "somebody/large"
    fetched = " ".join(served.requests[asked:])
    assert "model.safetensors" in fetched and "remote.py" not in fetched and ".bin" not in fetched


def test_pickled_weights_and_code_are_fetched_if_allowed(served, client):
    """Weights in a pickle: only of a model that has no others."""
    told, _ = client("models.load('somebody/pickled')")
    assert "--allow-pickle" in told
    asked = len(served.requests)
    expression = ("[os.environ.update({trust.CODE: '1', trust.PICKLE: '1'}), [models.load(name).trusted for name in "
                  "('somebody/pickled', 'somebody/large')], [os.environ.pop(n) for n in (trust.CODE, trust.PICKLE)]]")
    told, _ = client(expression)
    assert told[1] == [["pickled weights"], []]
    fetched = " ".join(served.requests[asked:])
    assert "somebody/pickled/resolve" in fetched and "remote.py" in fetched
    assert [line for line in served.requests[asked:] if line.startswith("GET") and "large" in line and ".bin" in line] == []


@pytest.mark.parametrize(("expression", "words"), [
    (f"models.load({GATED!r})", ["is gated", "accept its licence", "hf auth login", "tiny-llama-s"]),
    ("models.load('llama-3.2-1b')", ["is gated", "meta-llama/Llama-3.2-1B"]),
    ("models.load('nobody/nothing')", ["'nobody/nothing' is not on the hub", "check the name", "tiny-llama-s"]),
    (f"models.load({MODEL!r}, revision='v9')", ["no such revision", "'v9'"]),
    ("hub.dataset('nobody/nothing', None, 'test', 'X')", ["'nobody/nothing' is not on the hub", "pass X"]),
    ("hub.dataset('openai/gsm8k', 'sub', 'test', 'X')", ["openai/gsm8k", "sub"]),
])
def test_what_cannot_be_had_is_one_line_at_once(client, expression, words):
    told, seconds = client(expression)
    assert told.startswith("PTQError: ") and "\n" not in told and seconds < 10
    for word in words:
        assert word in told


def test_a_token_opens_a_gated_model(client):
    """One that was not granted access is not told to log in only."""
    with_token = "[__import__('os').environ.update(HF_TOKEN={!r}), models.load('llama-3.2-1b').name]"
    told, _ = client(with_token.format("hf_other"))
    assert "is gated" in told and "accept its licence" in told
    assert client(with_token.format(TOKEN))[0] == [None, GATED]
    client("__import__('os').environ.pop('HF_TOKEN')")


def test_a_connection_that_breaks_is_told_and_the_next_try_is_whole(served, client):
    served.dropped["model.safetensors"] = 100_000
    told, seconds = client("models.load('somebody/flaky')")
    assert told.startswith("PTQError: ") and "somebody/flaky" in told and "try again" in told and "\n" not in told
    assert seconds < 30
    served.dropped.clear()
    told, _ = client("models.load('somebody/flaky').digest")
    from suite import models

    assert told == models.identify(str(served.folder("models", "somebody/flaky")))["digest"]


def test_tasks_arrive_with_their_documents(client):
    told, _ = client("[(t := Tasks(['paper'], allow_code_execution=True)).names, t.identity('gsm8k')['num_fewshot'], "
                     "len(t.loaded('hellaswag')['tasks']['hellaswag'].eval_docs), t.identity('humaneval')['digest']]")
    names, shots, events, digest = told
    assert names == ["wikitext2_ppl", "c4_ppl", "gsm8k", "humaneval", "hellaswag", "mmlu"]
    assert (shots, events, len(digest)) == (5, 8, 64)


@pytest.mark.slow
def test_the_paper_is_reproduced_from_the_hub_and_again_without_it(tmp_path):
    """`ptq reproduce qwen1.5-0.5b`: fetched through the hub, then with the hub gone and the cache warm, then with the hub
    gone and the cache cold."""
    root, cache = tmp_path / "hub", tmp_path / "cache"
    toys.save_toy(root / "models" / MODEL, "qwen", max_position_embeddings=2048)
    hub_sets.write(root)
    server = HubServer(root).__enter__()

    def reproduce(**more):
        line = ["reproduce", "qwen1.5-0.5b", "--methods", "fp16,rtn", "--limit", "1", "--nsamples", "4", "--workers", "1",
                "--tasks", PAPER, "--allow-code-execution", "--results", "results"]
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "suite.cli", *line], cwd=tmp_path, text=True, capture_output=True,
                              env=environment(server, more.pop("cache", cache), **more), timeout=300)
        return done, time.monotonic() - start

    done, _ = reproduce()
    assert done.returncode == 0, done.stderr
    assert "12 results measured, 0 found" in done.stdout and "HumanEval" in done.stdout
    records = [json.loads(p.read_text()) for p in (tmp_path / "results").rglob("*.json")]
    assert {r["identity"]["model"]["name"] for r in records} == {MODEL}
    assert {r["result"]["revision"] for r in records if r["identity"]["kind"] == "quantization"} == {
        server.commit("models", MODEL)}
    server.stop()
    gone, seconds = reproduce()
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1 and seconds < 25, gone.stderr  # imports included
    assert "HF_HUB_OFFLINE=1" in gone.stderr and "an embedded model" in gone.stderr
    warm, _ = reproduce(HF_HUB_OFFLINE="1")
    assert warm.returncode == 0 and "0 results measured, 12 found" in warm.stdout, warm.stderr
    cold, _ = reproduce(HF_HUB_OFFLINE="1", cache=tmp_path / "cold")
    assert cold.returncode == 2 and "not in the cache" in cold.stderr and cold.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- local copies


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Sets as a user may have them: the hub's own files, and plain files by split."""
    monkeypatch.setenv(hub.DATA_DIR, str(tmp_path))
    hub_sets.write(tmp_path / "hub")
    for name in ("Salesforce/wikitext", "openai/gsm8k"):
        target = tmp_path / name.replace("/", "--")
        (tmp_path / "hub" / "datasets" / name).rename(target)
    (tmp_path / "cais_mmlu").mkdir()
    for split, first in (("dev", 0), ("test", 10)):
        rows = [hub_sets.question(s, first + i) for s in ("anatomy", "virology") for i in range(5)]
        (tmp_path / "cais_mmlu" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "openai_humaneval").mkdir()
    (tmp_path / "openai_humaneval" / "HumanEval.jsonl").write_text(
        "".join(json.dumps(hub_sets.function(i)) + "\n" for i in range(3)))
    return tmp_path


def test_local_copies_stand_in_for_the_hub(copies):
    from suite.evaluation import Tasks

    tests = Tasks(["gsm8k", "mmlu_anatomy", "humaneval", "wikitext2_ppl"], allow_code_execution=True)
    loaded = {name: tests.loaded(name)["tasks"][name] for name in tests.names}
    assert [len(loaded[name].eval_docs) for name in tests.names] == [8, 5, 3, 1]
    anatomy = loaded["mmlu_anatomy"]
    assert {doc["subject"] for doc in anatomy.eval_docs} == {"anatomy"}
    assert "ptq" not in loaded["wikitext2_ppl"].text and len(loaded["wikitext2_ppl"].text) > 1000


def test_calibration_from_a_local_copy(copies):
    from suite import calib

    assert len(calib.read_text("wikitext2")) > 1000


def test_what_a_local_copy_lacks_is_told(copies):
    (copies / "openai_humaneval" / "HumanEval.jsonl").unlink()
    with pytest.raises(PTQError, match="local copy .*openai_humaneval' has no file of split 'test'.*name files by split"):
        hub.dataset("openai/openai_humaneval", None, "test", "X")
    (copies / "allenai--c4").mkdir()
    with pytest.raises(PTQError, match="lacks c4-validation.00000-of-00008.json.gz"):
        hub.dataset("allenai/c4", None, "validation", "X",
                    data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"})


def test_a_data_folder_that_is_not_there(tmp_path):
    with pytest.raises(PTQError, match="data folder .*nowhere' does not exist"):
        hub.use_data_dir(tmp_path / "nowhere")


def test_the_loader_is_put_back(copies):
    import datasets

    before = datasets.load_dataset
    with hub.local_sets():
        assert datasets.load_dataset is not before
    assert datasets.load_dataset is before
