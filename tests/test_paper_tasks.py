"""The tasks of the paper: prompts, examples, extraction of answers and scores as lm-eval defines them; and no answer of
one variant reaches another.

On invented rows. Where PTQ_DATA_DIR names a folder with the real sets, the same is checked on their rows.
"""

import json
import os
import re
from pathlib import Path

import hub_sets
import lm_eval.tasks
import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from suite import adapter, hub, paths
from suite.errors import PTQError
from suite.evaluation import Tasks, evaluate_quietly, outcome_of

REAL = os.environ.get(hub.DATA_DIR)


class Answers(LM):
    """Answers every question as it is told to: generations by a function of the document, choices by an index."""

    def __init__(self, generated=None, chosen=None):
        super().__init__()
        self._generated, self._chosen, self.asked = generated, chosen, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += requests
        return [self._generated(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += requests
        return [(0.0 if request.idx == self._chosen(request.doc) else -9.0, False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise AssertionError("no task of the paper asks this")


@pytest.fixture(params=["invented", *(["real"] if REAL else [])])
def sets(request, tmp_path_factory, monkeypatch):
    if request.param == "invented":
        root = tmp_path_factory.mktemp("sets")
        monkeypatch.setenv(hub.DATA_DIR, str(hub_sets.write(root)))
    return request.param


def scored(task, model, limit=5, **options):
    tests = Tasks([task], limit=limit, **options)
    return outcome_of(task, evaluate_quietly(model, tests, task)), model.asked


def test_the_group_states_its_examples():
    tests = Tasks(["paper"], leave_out_code=True)
    assert tests.names == ("wikitext2_ppl", "c4_ppl", "gsm8k", "hellaswag", "mmlu")
    assert "humaneval left out" in tests.note and "--allow-code-execution" in tests.note
    assert tests._shots == {"gsm8k": 5, "humaneval": 0, "hellaswag": 0, "mmlu": 5}
    text = (paths.tasks() / "paper.yaml").read_text()
    for word in ("gsm8k 5", "humaneval 0", "hellaswag 0", "mmlu 5", "word-level"):
        assert word in text


def test_gsm8k(sets):
    """Five examples before the question; the number after #### counts, commas and dollars aside."""
    right, asked = scored("gsm8k", Answers(lambda doc: " so it is\n" + doc["answer"].replace("#### ", "#### $")
                                           if "$" in doc["answer"] else f" {doc['answer']}"))
    strict = right["metrics"]["exact_match,flexible-extract"]["value"]
    assert strict == 1.0 and right["info"]["documents"] == 5
    prompt = asked[0].args[0]
    assert prompt.count("Question: ") == 6 and prompt.endswith("\nAnswer:") and prompt.count("#### ") == 5
    assert asked[0].args[1]["until"] == ["Question:", "</s>", "<|im_end|>"]
    for wrong in (" I do not know.", " #### 999999999", ""):
        found, _ = scored("gsm8k", Answers(lambda doc, wrong=wrong: wrong))
        assert found["metrics"]["exact_match,strict-match"]["value"] == 0.0
    only, _ = scored("gsm8k", Answers(lambda doc: re.search(r"#### (.*)", doc["answer"]).group(1)))
    assert only["metrics"]["exact_match,strict-match"]["value"] == 0.0  # the form is asked for
    assert only["metrics"]["exact_match,flexible-extract"]["value"] == 1.0


def test_mmlu(sets):
    """Five examples of the same subject, in the order of its dev set; the letter that is likeliest counts."""
    right, asked = scored("mmlu_anatomy", Answers(chosen=lambda doc: doc["answer"]), fewshot=5)
    wrong, _ = scored("mmlu_anatomy", Answers(chosen=lambda doc: (doc["answer"] + 1) % 4), fewshot=5)
    assert (right["metrics"]["acc,none"]["value"], wrong["metrics"]["acc,none"]["value"]) == (1.0, 0.0)
    prompt = asked[0].args[0]
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
    assert prompt.count("\nAnswer:") == 6 and prompt.endswith("\nAnswer:")
    assert [request.args[1] for request in asked[:4]] == [" A", " B", " C", " D"]


def test_hellaswag(tmp_path, monkeypatch):
    """Of this set nobody here has a copy: on invented rows alone."""
    monkeypatch.setenv(hub.DATA_DIR, str(hub_sets.write(tmp_path)))
    right, asked = scored("hellaswag", Answers(chosen=lambda doc: int(doc["label"])))
    assert right["metrics"]["acc_norm,none"]["value"] == 1.0
    assert asked[0].args[0] == "Cooking: Bado takes 0 eggs. He"


def test_humaneval(sets):
    """The prompt as it is, cut at lm-eval's stop words; the program is prompt and completion, and runs in the sandbox."""
    right, asked = scored("humaneval", Answers(lambda doc: doc["canonical_solution"]), allow_code_execution=True)
    assert right["metrics"] == {"pass@1,create_test": {"value": 1.0, "stderr": 0.0}}
    assert right["headline"] == "pass@1,create_test"
    assert asked[0].args[0] == asked[0].doc["prompt"]
    assert asked[0].args[1]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    wrong, _ = scored("humaneval", Answers(lambda doc: "    return None\n"), allow_code_execution=True)
    assert wrong["metrics"]["pass@1,create_test"]["value"] == 0.0


@pytest.mark.skipif(REAL is None, reason="no folder with the real sets")
def test_all_canonical_solutions_pass():
    found, _ = scored("humaneval", Answers(lambda doc: doc["canonical_solution"]), None, allow_code_execution=True)
    assert found["metrics"]["pass@1,create_test"]["value"] == 1.0 and found["info"]["documents"] == 164


def test_the_embedded_twin_runs_in_the_same_sandbox():
    found, _ = scored("world_code", Answers(lambda doc: doc["canonical_solution"]), allow_code_execution=True)
    assert found["metrics"]["pass@1,create_test"]["value"] == 1.0
    wrong, _ = scored("world_code", Answers(lambda doc: "\n    return 'no'\n"), 3, allow_code_execution=True)
    assert wrong["metrics"]["pass@1,create_test"]["value"] == 0.0


# ---------------------------------------------------------------------------------------------- permission


@pytest.mark.parametrize("task", ["world_code", "humaneval", "paper"])
def test_nothing_runs_without_permission(task, monkeypatch):
    from suite import sandbox

    monkeypatch.setattr(sandbox, "check", lambda *_: pytest.fail("code was run"))
    with pytest.raises(PTQError, match="executes code that the model writes: pass --allow-code-execution"):
        Tasks([task])


def test_lm_eval_itself_refuses_too():
    loaded = adapter.task_manager().load(["world_code"])
    with pytest.raises(ValueError, match="marked as unsafe"):
        evaluate(lm=Answers(lambda doc: ""), task_dict=loaded, limit=1)


def test_the_command_line_of_lm_eval_asks_as_well():
    with pytest.raises(PTQError, match="pass --allow-code-execution"):
        adapter.run_lm_eval(["run", "--model", "ptq", "--model_args", "pretrained=nowhere", "--tasks", "world_code"])


def test_what_lm_eval_would_run_in_the_open_is_refused():
    """Its other tasks of this kind have the metric that humaneval has there."""
    folder = Path(lm_eval.tasks.__file__).parent / "humaneval"
    manager = adapter.task_manager(include_path=str(folder))
    with pytest.raises(PTQError, match="humaneval_plus executes code of the model, and lm-eval does so unconfined"):
        adapter.check_code_execution(manager, ["humaneval_plus"], True)


def test_where_code_cannot_be_confined_the_task_is_refused_before_any_work(monkeypatch):
    from suite import sandbox

    monkeypatch.setattr(sandbox, "_way", lambda: (None, "no namespaces"))
    with pytest.raises(PTQError, match="cannot be confined on this machine"):
        Tasks(["world_code"], allow_code_execution=True)


# ---------------------------------------------------------------------------------------------- answers and variants


def test_kept_answers_belong_to_one_variant(tmp_path, toy_folder):
    """Two variants of one model, both interrupted at the same task, each find their own answers again."""
    from suite import resume
    from suite.adapter import PTQ

    results = {}
    for name, options in (("fp16", {}), ("rtn", {"method": "rtn", "wbits": 2})):
        for again in (False, True):
            with pytest.raises(InterruptedError), resume.into(tmp_path / name, {"variant": name}):
                found, _ = scored_by(PTQ(str(toy_folder), batch_size=4, **options))
                results[name, again] = found
                raise InterruptedError  # the folder stays
    assert results["fp16", True] == results["fp16", False] != results["rtn", False] == results["rtn", True]


def scored_by(model):
    tests = Tasks(["world_events"], limit=3)
    samples = evaluate_quietly(model, tests, "world_events")["samples"]["world_events"]
    return json.dumps([sample["filtered_resps"] for sample in samples], default=str), None
