"""The model `ptq` of lm-eval and the window tasks: same logits, same numbers, no mix-ups."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys

import suite  # noqa: F401  registers the model
from suite import adapter, arch, calib, checkpoint, method, models, paths, walk, windows
from suite.adapter import PTQ
from suite.errors import PTQError

TOKENS = torch.randint(0, toys.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(5))
CALIB = dict(nsamples=4, seqlen=64)


@pytest.fixture(autouse=True)
def no_report_of_the_machine(monkeypatch):
    """lm-eval asks half a dozen programs about the machine after every evaluation; no test reads it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory, toy_tokenizer):
    model = toys.make_toy()
    walk.quantize_model(method.build("rtn", wbits=3), model, None)
    record = {"method": method.to_config(method.build("rtn", wbits=3)), "scheme": "W3A8 g128"}
    return checkpoint.save(model, toy_tokenizer, tmp_path_factory.mktemp("quantized") / "toy-rtn", record)


@pytest.fixture
def task_folder(tmp_path, monkeypatch, toy_text):
    """A folder of tasks with one window task, in the place of the suite's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "text.txt").write_text(toy_text[:20_000])
    (folder / "toy_ppl.yaml").write_text(
        "task: toy_ppl\nclass: !function suite.adapter.WindowPerplexity\noutput_type: window_nll\n"
        'text_file: text.txt\njoin: "\\n\\n"\ndefault_window: 96\nmetadata:\n  version: 2.0\n')
    monkeypatch.setattr(paths, "tasks", lambda: folder)
    return folder


def evaluate(lm, tasks, **arguments):
    import lm_eval

    manager = adapter.task_manager(arguments.pop("metadata", None))
    return lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **arguments)


def direct(model, tokenizer, text, window, count=None):
    """The definition, with nothing of the suite's."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[:len(ids) // window * window].reshape(-1, window)[:count]
    with torch.no_grad():
        chosen = model(rows).logits[:, :-1].double().log_softmax(-1).gather(-1, rows[:, 1:, None])
    return math.exp(-float(chosen.mean()))


# ---------------------------------------------------------------------------------------------- registration


def test_importing_the_suite_registers_the_model_by_name_only():
    """In a process of its own: lm-eval leaves out its own models where somebody was first to register one."""
    code = ("import sys, suite\n"
            "from lm_eval.api.registry import model_registry\n"
            "assert {'ptq', 'hf'} <= set(model_registry) and not {'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    from lm_eval.api.registry import get_model

    assert get_model("ptq") is PTQ


def test_by_name_from_python(toy_folder, task_folder):
    found = evaluate("ptq", ["toy_ppl"], model_args=f"pretrained={toy_folder},method=rtn,wbits=3,device=cpu", limit=4)
    assert found["config"]["model_name"] == f"{toy_folder.name}, rtn W3A8 g128"
    assert found["results"]["toy_ppl"]["perplexity,none"] > 1


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", toys.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapping_leaves_the_logits(toy_tokenizer, kind, dtype):
    model = toys.make_toy(kind, dtype)
    expected = model(TOKENS).logits
    assert torch.equal(PTQ(model, tokenizer=toy_tokenizer)._model_call(TOKENS), expected)


def test_wrapping_leaves_an_untied_head(toy_tokenizer):
    """HFLM ties weights again by what the configuration says (a rotation, for one, sets the head apart)."""
    model = toys.make_toy("llama-tied")
    arch.untie(model)
    model.lm_head.weight.data.mul_(-1)
    expected = model(TOKENS).logits
    assert torch.equal(PTQ(model, tokenizer=toy_tokenizer)._model_call(TOKENS), expected)
    model.config.tie_word_embeddings = True
    with pytest.raises(PTQError, match="tied the head to the embedding again"):
        PTQ(model, tokenizer=toy_tokenizer)


@pytest.mark.parametrize("name", ["rtn", "gptq", "smoothquant"])
def test_quantizes_like_the_engine(toy_folder, toy_tokenizer, toy_text_file, name):
    lm = PTQ(str(toy_folder), method=name, wbits="3", calib=str(toy_text_file), seed=1, device="cpu", **CALIB)
    model, sequences = toys.make_toy(), calib.load(str(toy_text_file), toy_tokenizer, seed=1, **CALIB)
    walk.quantize_model(method.build(name, wbits=3), model, sequences)
    assert torch.equal(lm._model_call(TOKENS), model(TOKENS).logits)
    assert not torch.equal(lm._model_call(TOKENS), toys.make_toy()(TOKENS).logits)


def test_native_mode_takes_the_published_setting(toy_folder, toy_text_file):
    lm = PTQ(str(toy_folder), method="smoothquant", mode="native", calib=str(toy_text_file), device="cpu", **CALIB)
    published = method.native("smoothquant").options
    assert published and method.to_config(lm._configured)["options"].items() >= dict(published).items()
    assert lm.variant.endswith("native")


def test_a_model_in_memory_is_not_changed(toy_llama, toy_tokenizer, toy_text_file):
    before = copy.deepcopy(toy_llama.state_dict())
    lm = PTQ(toy_llama, tokenizer=toy_tokenizer, method="gptq", wbits=2, calib=str(toy_text_file), **CALIB)
    assert not torch.equal(lm._model_call(TOKENS), toy_llama(TOKENS).logits)
    after = toy_llama.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert PTQ(toy_llama, tokenizer=toy_tokenizer).model is toy_llama  # and without a method not even copied


def test_quantized_folder(quantized_folder):
    lm = PTQ(str(quantized_folder), device="cpu")
    assert torch.equal(lm._model_call(TOKENS), checkpoint.load(quantized_folder)[0](TOKENS).logits)
    assert lm.variant == "toy-rtn, rtn W3A8 g128"
    with pytest.raises(PTQError, match="is quantized already: leave out method=gptq"):
        PTQ(str(quantized_folder), method="gptq")


def test_arguments_of_hflm_keep_their_meaning(toy_folder):
    lm = PTQ(str(toy_folder), device="cpu", dtype="bfloat16", batch_size="3", max_length=100, add_bos_token=False,
             prefix_token_id=7, softmax_dtype="float32", logits_cache=False, truncation=True)
    assert (lm.model.dtype, lm.batch_size, lm.max_length, lm.prefix_token_id) == (torch.bfloat16, 3, 100, 7)
    assert lm.tok_encode("Bado")[0] != lm.tokenizer.bos_token_id and lm.truncation and not lm.logits_cache
    for batch_size in (None, "auto"):
        assert PTQ(str(toy_folder), device="cpu", batch_size=batch_size).batch_size == 32


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(methd="gptq"), "unknown argument of model ptq 'methd': did you mean 'method'"),
    (dict(method="gptq", dampp=1), "unknown argument of model ptq with method gptq 'dampp': did you mean 'damp'"),
    (dict(method="gptqq"), "unknown method 'gptqq': did you mean 'gptq'"),
    (dict(method="rtn", damp=0.1), "with method rtn 'damp'"),
    (dict(method="rtn", wbits=9), "bits is 9"),
    (dict(wbits=4), "wbits without a method"),
    (dict(calib="x.txt", seed=1), "calib, seed without a method"),
    (dict(method="rtn", mode="nativ"), "unknown mode 'nativ': did you mean 'native'"),
    (dict(mode="native"), "mode native without a method"),
    (dict(peft="adapter"), "argument peft has no effect on model ptq: merge"),
    (dict(parallelize=True), "parallelize has no effect"),
    (dict(backend="seq2seq"), "only causal models"),
    (dict(batch_size="many"), "batch_size is 'many'"),
    (dict(dtype="float8"), "unknown dtype"),
])
def test_arguments_that_are_refused(toy_folder, arguments, message):
    with pytest.raises(PTQError, match=message):
        PTQ(str(toy_folder), **{"device": "cpu", **arguments})


def test_defaults_that_lm_eval_spells_out_are_no_mistake(toy_folder):
    PTQ(str(toy_folder), device="cuda:0", max_batch_size=None, trust_remote_code=False, parallelize=False,
        backend="causal")


def test_whose_seed(toy_folder, toy_text_file):
    """pretrained=NAME@outliers=8,seed=1 loses its seed to the calibration when lm-eval splits at the comma."""
    with pytest.raises(PTQError, match="may be meant for the outliers or for the calibration"):
        PTQ(f"{toy_folder}@outliers=8", method="rtn", seed=1)
    lm = PTQ(f"{toy_folder}@outliers=8,seed=2", method="rtn", seed=1, calib=str(toy_text_file), device="cpu", **CALIB)
    assert lm.calibration.seed == 1 and "seed=2" in lm.variant


def test_a_model_in_memory_stays_as_it_is(toy_llama, toy_tokenizer):
    for arguments, message in ((dict(dtype="bfloat16"), "cast it before"), (dict(device="meta"), "move it before")):
        with pytest.raises(PTQError, match=message):
            PTQ(toy_llama, tokenizer=toy_tokenizer, **arguments)
    with pytest.raises(PTQError, match="pass tokenizer="):
        PTQ(toy_llama)
    with pytest.raises(PTQError, match="pretrained is a int"):
        PTQ(7)


# ---------------------------------------------------------------------------------------------- identity


def test_variants_differ_in_identity(toy_folder, quantized_folder, toy_text_file):
    def identity(pretrained=str(toy_folder), **arguments):
        return json.dumps(PTQ(pretrained, device="cpu", **arguments).model_identity(), sort_keys=True)

    source = dict(method="rtn", calib=str(toy_text_file))
    first = identity(**source, **CALIB)
    others = [identity(), identity(f"{toy_folder}@outliers=8"), identity(str(quantized_folder)),
              identity(dtype="bfloat16"), identity(max_length=64), identity(add_bos_token=False),
              identity(**source, wbits=3, **CALIB), identity(**source, seed=1, **CALIB),
              identity(**source, nsamples=5, seqlen=64)]
    assert len({first, *others}) == 1 + len(others)
    assert identity(**source, **CALIB) == first


def test_results_name_the_variant(toy_folder, task_folder):
    lm = PTQ(str(toy_folder), method="rtn", device="cpu")
    config = evaluate(lm, ["toy_ppl"], limit=2)["config"]
    assert config["model"] == config["model_name"] == f"{toy_folder.name}, rtn W4A8 g128"
    assert config["model_identity"]["method"]["options"]["wbits"] == 4
    assert lm.model.config._name_or_path != lm.config._name_or_path  # the model itself is not renamed



def test_cached_answers_stay_with_their_variant(toy_folder, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    def requests():
        return [Instance("loglikelihood", {}, ("Bado", " bidi"), 0), Instance("loglikelihood", {}, ("Bado", " gu"), 0)]

    file = str(tmp_path / "cache.db")
    first, other = PTQ(str(toy_folder), device="cpu"), PTQ(str(toy_folder), method="rtn", wbits=2, device="cpu")
    expected = first.loglikelihood(requests(), disable_tqdm=True)
    assert CachingLM(first, file).loglikelihood(requests()) == expected
    again = PTQ(str(toy_folder), device="cpu")
    cached = CachingLM(again, file)
    again._loglikelihood_tokens = None  # what is in the cache is not computed
    assert cached.loglikelihood(requests()) == expected
    with pytest.raises(PTQError, match=r"holds answers of another variant, not of .*rtn W2A8"):
        CachingLM(other, file)
    assert CachingLM(other, str(tmp_path / "other.db")).loglikelihood(requests()) != expected


def test_a_cache_that_nobody_signed_is_refused(toy_folder, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM
    from lm_eval.models.huggingface import HFLM

    plain = HFLM(pretrained=str(toy_folder), device="cpu")
    CachingLM(plain, str(tmp_path / "cache.db")).loglikelihood([Instance("loglikelihood", {}, ("Bado", " bidi"), 0)])
    with pytest.raises(PTQError, match="holds answers of an unnamed model"):
        CachingLM(PTQ(str(toy_folder), device="cpu"), str(tmp_path / "cache.db"))


# ---------------------------------------------------------------------------------------------- window tasks


def test_equals_the_direct_computation(toy_folder, task_folder, toy_tokenizer):
    lm = PTQ(str(toy_folder), method="rtn", wbits=3, device="cpu")
    found = evaluate(lm, ["toy_ppl"])
    expected = direct(lm.model, toy_tokenizer, (task_folder / "text.txt").read_text(), 96)
    assert found["results"]["toy_ppl"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)
    assert found["versions"]["toy_ppl"] == 2.0 and found["higher_is_better"]["toy_ppl"] == {"perplexity": False}


def test_runs_on_lm_evals_own_model(toy_folder, task_folder, toy_tokenizer, toy_llama):
    arguments = {"pretrained": str(toy_folder), "device": "cpu", "dtype": "float32"}
    found = evaluate("hf", ["toy_ppl"], model_args=arguments, limit=5)
    expected = direct(toy_llama, toy_tokenizer, (task_folder / "text.txt").read_text(), 96, 5)
    assert found["results"]["toy_ppl"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_windows_and_protocol_are_kept(toy_folder, task_folder, toy_tokenizer):
    found = evaluate(PTQ(str(toy_folder), device="cpu"), ["toy_ppl"], limit=7)
    (sample,) = found["samples"]["toy_ppl"]
    (answer,) = sample["filtered_resps"]
    text = (task_folder / "text.txt").read_text()
    cut = windows.token_windows(text, toy_tokenizer, 96, max_windows=7)
    expected = windows.window_nll(toys.make_toy(), cut.tokens)
    torch.testing.assert_close(torch.tensor(answer["nll"], dtype=torch.float64), expected, rtol=1e-6, atol=0)
    protocol = found["configs"]["toy_ppl"]["metadata"]["protocol"]
    assert protocol == {**cut.protocol, "join": r"'\n\n'"} and protocol["windows"] == 7 and answer["predicted"] == 95
    assert text[:100] not in json.dumps(found["samples"], default=str)


def test_window_follows_the_model_and_the_user(make_toy, toy_tokenizer, task_folder):
    lm = PTQ(make_toy(max_position_embeddings=64), tokenizer=toy_tokenizer)

    def window(**arguments):
        return evaluate(lm, ["toy_ppl"], limit=2, **arguments)["configs"]["toy_ppl"]["metadata"]["protocol"]["window"]

    assert window() == 64 and window(metadata={"window": 32}) == 32
    with pytest.raises(PTQError, match="window is 65, the model takes at most 64"):
        window(metadata={"window": 65})
    with pytest.raises(PTQError, match="window is 'x'"):
        window(metadata={"window": "x"})


def test_processes_share_the_windows(toy_folder, task_folder):
    """What two ranks of lm-eval compute adds up to what one computes."""
    lm = PTQ(str(toy_folder), device="cpu")

    def run(rank, world_size):
        task = adapter.task_manager().load(["toy_ppl"])["tasks"]["toy_ppl"]
        task.build_all_requests(rank=rank, world_size=world_size)
        (request,) = task.instances
        request.resps = lm.window_nll([request])
        task.apply_filters()
        ((identifier, doc),) = task.doc_iterator(rank=rank, world_size=world_size)
        assert identifier == request.doc_id == rank
        return task, task.process_results(doc, [request.filtered_resps["none"]])["perplexity"]

    task, whole = run(0, 1)
    parts = [run(rank, 2)[1] for rank in (0, 1)]
    combine = task.aggregation()["perplexity"]
    assert sum(part[1] for part in parts) == whole[1]
    assert combine(parts) == pytest.approx(combine([whole]), rel=1e-9)


def test_batch_size_does_not_change_it(toy_folder, task_folder):
    one, five = (evaluate(PTQ(str(toy_folder), device="cpu", batch_size=b), ["toy_ppl"], limit=12)["results"]["toy_ppl"]
                 for b in (1, 5))
    assert one["perplexity,none"] == pytest.approx(five["perplexity,none"], rel=1e-6)


def test_any_text(toy_folder, toy_tokenizer, toy_text_file, toy_text):
    lm = PTQ(str(toy_folder), device="cpu")
    found = evaluate(lm, ["text_ppl"], metadata={"text": str(toy_text_file), "window": 128}, limit=6)
    expected = direct(lm.model, toy_tokenizer, toy_text, 128, 6)
    assert found["results"]["text_ppl"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(PTQError, match="text_ppl needs a text file: pass --metadata text=FILE"):
        evaluate(lm, ["text_ppl"])
    with pytest.raises(PTQError, match="'nowhere.txt' does not exist"):
        evaluate(lm, ["text_ppl"], metadata={"text": "nowhere.txt"})
    with pytest.raises(PTQError, match="has windows, not samples"):
        evaluate(lm, ["text_ppl"], metadata={"text": str(toy_text_file)}, samples={"text_ppl": [1]})


def test_short_text(toy_folder, task_folder):
    (task_folder / "text.txt").write_text("Bado bidi gu.")
    with pytest.raises(PTQError, match=r"the text of task toy_ppl has \d+ tokens, fewer than one window of 96"):
        evaluate(PTQ(str(toy_folder), device="cpu"), ["toy_ppl"])


def test_calibrating_on_the_evaluated_text(toy_folder, task_folder):
    arguments = dict(method="gptq", calib=str(task_folder / "text.txt"), device="cpu", **CALIB)
    with pytest.raises(PTQError, match="evaluates the text that the model was calibrated on"):
        evaluate(PTQ(str(toy_folder), **arguments), ["toy_ppl"], limit=2)
    found = evaluate(PTQ(str(toy_folder), allow_eval_calibration=True, **arguments), ["toy_ppl"], limit=2)
    assert found["configs"]["toy_ppl"]["metadata"]["protocol"]["calibrated_on_this_text"] is True


@pytest.mark.parametrize(("task", "rows", "expected"), [
    ("wikitext2_ppl", 3000, "\n\n".join(f"line {i}" for i in range(3000))),
    ("c4_ppl", 3000, " ".join(f"line {i}" for i in range(1100))),
])
def test_hub_data_is_joined_as_the_papers_do(monkeypatch, task, rows, expected):
    import datasets

    asked = []

    def dataset(path, name, split, instead, **options):
        asked.append((path, name, split, options))
        return datasets.Dataset.from_dict({"text": [f"line {i}" for i in range(rows)]})

    monkeypatch.setattr(adapter.hub, "dataset", dataset)
    found = adapter.task_manager().load([task])["tasks"][task]
    assert found.text == expected
    shard = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}}
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {}) if task == "wikitext2_ppl" else
                     ("allenai/c4", None, "validation", shard)]
    found.build_all_requests(limit=None)
    assert found.instances[0].args[1]["max_windows"] == (256 if task == "c4_ppl" else None)


def test_hub_data_without_a_hub():
    with pytest.raises(PTQError, match="data set 'Salesforce/wikitext' .*world_wiki_ppl"):
        adapter.task_manager().load(["wikitext2_ppl"])["tasks"]["wikitext2_ppl"].build_all_requests()


# ---------------------------------------------------------------------------------------------- the tasks folder


def loadable(folder: Path) -> tuple[set, set]:
    """(names that the files have, names that lm-eval finds). It drops a file that it cannot parse, at debug level."""
    return {path.stem for path in folder.glob("*.yaml")}, set(adapter.ours())


def test_every_task_file_loads_by_its_name(monkeypatch):
    written, found = loadable(paths.tasks())
    assert written == found and len(written) > 5
    monkeypatch.setattr(adapter.hub, "dataset", lambda *_, **__: pytest.fail("loading a task fetched its data"))
    for name in sorted(written - {"humaneval", "paper"}):  # which fetch theirs: see test_hub and test_paper_tasks
        loaded = adapter.task_manager().load([name])
        assert name in {**loaded["tasks"], **loaded["groups"]}


def test_a_task_file_that_does_not_parse_would_be_noticed(task_folder):
    (task_folder / "broken.yaml").write_text("task: broken\nclass: [unclosed")
    written, found = loadable(task_folder)
    assert written - found == {"broken"}


def test_a_window_task_with_an_unknown_key(task_folder):
    (task_folder / "odd.yaml").write_text("task: odd\nclass: !function suite.adapter.WindowPerplexity\nwindoww: 3\n")
    with pytest.raises(PTQError, match="unknown key of task odd 'windoww'"):
        adapter.task_manager().load(["odd"])


def test_the_group_holds_the_embedded_tasks():
    loaded = adapter.task_manager().load(["world"])
    assert set(loaded["tasks"]) == {"world_math", "world_events", "world_quiz", "world_wiki_ppl", "world_chat_ppl"}


# ---------------------------------------------------------------------------------------------- lm-eval's command line


def test_command_line(toy_folder, task_folder, capsys):
    before = list(sys.argv)
    adapter.run_lm_eval(["run", "--model", "ptq", "--model_args", f"pretrained={toy_folder},method=rtn,wbits=3",
                         "--tasks", "toy_ppl", "--limit", "3"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "toy_ppl" in line)
    assert "perplexity" in line and sys.argv == before
    import lm_eval.tasks

    assert lm_eval.tasks.TaskManager.__name__ == "TaskManager"  # given back


def test_command_line_takes_planted_names_in_quotes(toy_folder, task_folder, capsys):
    planted = f'pretrained="{toy_folder}@outliers=8,seed=1",method=rtn'
    adapter.run_lm_eval(["run", "--model", "ptq", "--model_args", planted, "--tasks", "toy_ppl", "--limit", "1"])
    assert "outliers=8,seed=1" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["run", "--model", "ptq", "--model_args", "pretrained=nothing-like-it", "--tasks", "toy_ppl"], "unknown model"),
    (["run", "--model", "ptq", "--tasks", "toy_ppl", "--log_samples"], "lm-eval refuses these.*output_path"),
])
def test_command_line_mistakes(task_folder, argv, message):
    with pytest.raises(PTQError, match=message):
        adapter.run_lm_eval(argv)


@pytest.fixture
def few_defaults(monkeypatch):
    """lm-eval's own tasks, but one in place of 14,000, whose index takes seconds."""
    import lm_eval.tasks
    from lm_eval.tasks._index import Entry, Kind

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, *positional, include_defaults=True, **named):
            super().__init__(*positional, include_defaults=False, **named)
            if include_defaults:
                self._all_tasks = [*self._all_tasks, "their_task"]
                theirs = {"task": "their_task", "dataset_path": "theirs/set"}
                self._index["their_task"] = Entry("their_task", Kind.TASK, None, theirs)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    mentioned = adapter._mentioned
    monkeypatch.setattr(adapter, "_mentioned", lambda name, folders: name == "their_task" or mentioned(name, folders))


def test_command_line_with_an_unknown_task(few_defaults, task_folder, toy_folder):
    with pytest.raises(PTQError, match="unknown task 'toy_pl': did you mean 'toy_ppl'.* a task of [^,]*, toy_ppl$"):
        adapter.run_lm_eval(["run", "--model", "ptq", "--model_args", f"pretrained={toy_folder}", "--tasks", "toy_pl"])


def test_an_unknown_task_is_told_without_reading_the_index_of_all(monkeypatch, tmp_path):
    from suite.evaluation import Tasks

    manager = adapter.task_manager
    monkeypatch.setattr(adapter, "task_manager", lambda *positional, include_defaults=False, **named: (
        pytest.fail("the whole index was read") if include_defaults else manager(*positional, **named)))
    with pytest.raises(PTQError, match="unknown task 'gsm8kk': did you mean 'gsm8k'"):
        Tasks(["gsm8kk"])
    adapter.check_mentioned(["arc_easy", "arc_*", str(tmp_path)])  # theirs, and what is no name
    (tmp_path / "new.yaml").write_text("task: gsm8kk\n")
    adapter.check_mentioned(["gsm8kk"], [tmp_path])


def test_lm_evals_own_tasks_miss_the_hub_before_the_model_is_loaded(few_defaults, task_folder, monkeypatch):
    monkeypatch.setattr(adapter.hub, "offline", lambda: False)
    monkeypatch.setattr(adapter.hub, "reachable", lambda: False)
    with pytest.raises(PTQError, match="the data of task 'their_task' needs a hub, and none answers"):
        adapter.run_lm_eval(["run", "--model_args", "pretrained=none", "--tasks", "toy_ppl,their_task"])


# ---------------------------------------------------------------------------------------------- a trained model


def test_on_an_embedded_model():
    """All five kinds of request, on the smallest model; a quantized one differs from it."""
    try:
        models.resolve("tiny-llama-s")
    except PTQError as error:
        pytest.skip(str(error))
    full, low = (evaluate(PTQ("tiny-llama-s", device="cpu", **arguments), ["world"], limit=16)["results"]
                 for arguments in ({}, dict(method="rtn", wbits=2, nsamples=4, seqlen=64)))
    before, after = (results["world_wiki_ppl"]["perplexity,none"] for results in (full, low))
    assert 1 < before < 0.9 * after < 1000
