"""The embedded world: same on every machine, split by construction, true in what it says; the outlier dial changes nothing."""

import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from suite import arch, zoo
from suite.errors import PTQError
from suite.zoo import articles, chatter, code, corpus, events, exams, outliers, sums, tokenizer, world

SAMPLES = {"article": articles.sample, "chatter": chatter.sample, "sums": sums.sample, "events": events.sample,
           "form": exams.sample, "code": code.sample}


@pytest.fixture(scope="module")
def built():
    return world.build()


@pytest.fixture(scope="module")
def documents():
    return list(itertools.islice(corpus.documents(corpus.SEEDS["train"]), 20_000))


def test_the_same_seed_gives_the_same_world_and_documents(built, documents):
    assert world.build() == built
    assert world.build(seed=1) != built
    assert list(itertools.islice(corpus.documents(corpus.SEEDS["train"]), 500)) == documents[:500]


def test_committed_data_are_what_the_generator_makes():
    for path, content in corpus.files().items():
        assert path.read_text() == content, f"{path.name} differs: run python -m suite.zoo.corpus"


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_test_item_never_lies_on_the_training_side(kind, built):
    held = corpus.test_items(SAMPLES[kind], 50)
    assert all(world.held_out(kind, item.key) for item in held)
    rng = random.Random(5)
    trained = {world.draw(SAMPLES[kind], built, rng, test=False).key for _ in range(5000)}
    assert not trained & {item.key for item in held}


def test_no_text_of_the_tests_occurs_in_training_or_calibration(documents):
    """Beyond keys: the very texts, looked for in 20,000 documents of training and in the calibration text."""
    both = "\n\n".join(documents) + corpus.CALIB.read_text()
    rows = {task: [json.loads(line) for line in (corpus.TASKS / f"{task}.jsonl").read_text().splitlines()]
            for task in ("world_math", "world_events", "world_quiz", "world_code")}
    texts = [f"{p['question']}\nAnswer: {p['answer']}" for p in rows["world_math"]]
    texts += [f"{e['query']} {e['choices'][e['label']]}" for e in rows["world_events"]]
    texts += [f"{q['prompt']} {q['choices'][q['answer']]}" for q in rows["world_quiz"]]
    texts += [f["prompt"] + "\n" for f in rows["world_code"]]
    texts += [a.text for a in corpus.test_items(articles.sample, 200) + corpus.test_items(chatter.sample, 200)]
    assert [text for text in texts if text.strip() + "\n" in both] == []


def test_training_exams_never_ask_what_the_test_asks(documents):
    tested = {q.question for q in corpus.quiz_items()}
    asked = {line for d in documents if d.startswith("Short answers") for line in d.split("\n")[2::2]}
    assert tested and len(asked) > 1000 and not tested & asked


def test_exam_answers_are_facts_and_the_distractors_are_not(built):
    facts = {(e.name, a.name): e.facts[a.name] for group in (*built.entities.values(), *built.rare.values()) for e in group
             for a in world.ATTRIBUTES[e.kind]}
    true = {world.sentence(t, e, e.facts[a.name], world.name_with_article(e)) for group in built.rare.values() for e in group
            for a in world.ATTRIBUTES[e.kind] for t in a.sentences}
    for question in corpus.quiz_items():
        assert len(set(question.choices)) == 4
        if question.question == exams.LEAD:
            assert [c in true for c in question.choices] == [i == question.answer for i in range(4)]
        else:
            name, attribute, *_ = question.key.split("|")
            assert question.choices[question.answer] == facts[name, attribute]


def test_articles_state_only_facts(built):
    """Every entity's article with a fact replaced by another value is a sentence that no article of it contains."""
    for article in corpus.test_items(articles.sample, 100):
        name = article.text.split("=")[1].strip()
        entity = next(e for group in (*built.entities.values(), *built.rare.values()) for e in group if e.name == name)
        opening = article.text.split("\n\n")[1].split(". ")[0].rstrip(".") + "."
        said = {world.sentence(t, entity, entity.facts[a.name], world.name_with_article(entity))
                for a in world.ATTRIBUTES[entity.kind] for t in a.sentences}
        assert opening in said


def test_worked_answers_are_true():
    problems = corpus.test_items(sums.sample, 500)
    assert all(sums.evaluate(p.answer) == p.number for p in problems)
    assert {p.answer.count("\n") for p in problems} == {1, 2, 3, 4}
    assert {p.answer.count("\n") for p in corpus.math_items()} == {2, 3, 4}
    assert all(0 < int(n) <= sums.LIMIT for p in problems for n in re.findall(r"\d+", p.text))
    with pytest.raises(ValueError, match="false working"):
        sums.evaluate("12+5=18\n#### 18")
    with pytest.raises(ValueError, match="not the result"):
        sums.evaluate("12+5=17\n#### 18")


def test_functions_pass_their_own_tests_and_an_empty_one_does_not():
    for item in corpus.test_items(code.sample, 100):
        scope: dict = {}
        exec(item.with_test, scope)
        scope["check"](scope[item.entry_point])
        with pytest.raises(AssertionError):
            scope["check"](lambda *_: None)


def test_events_have_one_right_ending_among_four():
    for event in corpus.event_items():
        right = event.endings[event.label]
        assert len(set(event.endings)) == 4
        assert event.text.endswith(right)
        assert any(thing in right and thing not in event.context for thing in event.things)


def test_stories_follow_the_habits(built):
    """Nobody does a thing with other things than the habit says, in training or test; so the wrong endings are wrong."""
    rng = random.Random(0)
    for _ in range(500):
        event = events.sample(built, rng)
        name = event.key.split("|")[0]
        assert event.things == events.habit(name, event.activity)
        unnamed = [thing for thing in event.things if thing not in event.context]
        a_or_b = {thing for many in events.SCRIPTS[event.activity][:2] for thing in many} - set(event.things)
        said = re.findall(r"\w+", event.context.split(" ", 3)[3])
        assert not a_or_b & set(said), (event.context, unnamed)


def test_habits_differ_between_people(built):
    people = [person.name for person in built.entities["person"][:events.PEOPLE]]
    for activity in events.SCRIPTS:
        assert len({events.habit(name, activity) for name in people}) >= 4


def test_labels_are_spread_evenly():
    for items in (corpus.quiz_items(), corpus.event_items()):
        labels = [getattr(i, "answer", getattr(i, "label", None)) for i in items]
        assert min(labels.count(k) for k in range(4)) > 0.18 * len(labels)


# ---------------------------------------------------------------------------------------------- tokenizer and files


@pytest.mark.parametrize("name", zoo.names())
def test_tokenizer_of_the_embedded_model(name):
    from transformers import AutoTokenizer

    coder, facts = AutoTokenizer.from_pretrained(zoo.path(name)), zoo.TABLE[name]
    text = "= Verbell =\n\nIt is 1234 years old.\n    return [i * 18 for i in x]\n"
    ids = coder(text)["input_ids"]
    assert coder.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == coder.bos_token_id) if facts.family == "llama" else coder.bos_token is None
    assert len(coder) == tokenizer.VOCABULARY
    assert all(f"{digit}" in coder.convert_ids_to_tokens(ids) for digit in (1, 2, 3, 4))


@pytest.mark.parametrize("name", zoo.names())
def test_code_is_split_as_in_training(name):
    """transformers overrides the splitting rule in the files of some families: the training has to use what is read."""
    from transformers import AutoTokenizer

    text = zoo.calib_text().read_text(encoding="utf-8")[:20_000]
    assert "\n    return" in text
    trained_on = tokenizer.build(zoo.TABLE[name].family).encode(text).ids
    assert AutoTokenizer.from_pretrained(zoo.path(name))(text, verbose=False)["input_ids"] == trained_on


@pytest.mark.parametrize("name", zoo.names())
def test_no_kind_of_token_is_strange_to_the_model(name):
    """What follows blanks (in code: indentation) costs a model that was trained on other tokens several times the mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    coder, model = AutoTokenizer.from_pretrained(zoo.path(name)), AutoModelForCausalLM.from_pretrained(zoo.path(name))
    ids = torch.tensor(coder(zoo.calib_text().read_text(encoding="utf-8")[:40_000], verbose=False)["input_ids"])
    ids = ids[:len(ids) // 512 * 512].view(-1, 512)
    blank = torch.tensor([not coder.decode([i]).strip() and i not in coder.all_special_ids for i in range(len(coder))])[ids]
    with torch.no_grad():
        logits = model.float()(input_ids=ids).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    after = blank[:, :-1].flatten()
    assert after.sum() > 100
    assert nll[after].mean() < 2 * nll.mean()


@pytest.mark.parametrize("name", zoo.names())
def test_embedded_model_is_what_the_table_says(name):
    from transformers import AutoModelForCausalLM

    facts, model = zoo.TABLE[name], AutoModelForCausalLM.from_pretrained(zoo.path(name))
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (
        facts.family, facts.hidden, facts.layers, facts.intermediate)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (
        facts.heads, facts.kv_heads, facts.tied)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    log = json.loads((zoo.path(name) / "train_log.json").read_text())
    assert log["tokens_seen"] == log["steps"] * log["batch"] * log["length"]
    assert (zoo.path(name) / "README.md").stat().st_size > 0


def test_the_embedded_models_are_small():
    assert sum(f.stat().st_size for f in (zoo.HERE / "models").rglob("*") if f.is_file()) < 60e6


def test_paths():
    with pytest.raises(PTQError, match="tiny-llama-s"):
        zoo.path("tiny-lama-s")
    assert zoo.calib_text().exists()


# ---------------------------------------------------------------------------------------------- training


def test_a_killed_training_continues_where_it_stopped(monkeypatch, tmp_path):
    from dataclasses import replace

    from suite.zoo import train

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train, "CORPUS_TOKENS", 20_000)
    train.corpus_hash.cache_clear()
    train.stream_hash.cache_clear()
    small = replace(zoo.TABLE["tiny-llama-s"], batch=2, length=64, layers=1)
    monkeypatch.setitem(zoo.TABLE, "tiny-llama-s", small)
    monkeypatch.setattr(zoo, "HERE", tmp_path)

    threads = torch.get_num_threads()
    try:
        whole = train.train("tiny-llama-s", steps=6)
        digest = hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest()
        assert train.train("tiny-llama-s", steps=6, stop_at=3).exists()
        again = train.train("tiny-llama-s", steps=6)
    finally:
        torch.set_num_threads(threads)
        train.corpus_hash.cache_clear()
        train.stream_hash.cache_clear()
    assert hashlib.sha256((again / "model.safetensors").read_bytes()).hexdigest() == digest
    assert not list(Path(tmp_path).rglob("*.pt"))


# ---------------------------------------------------------------------------------------------- the outlier dial


@pytest.mark.parametrize("name, expected", [
    ("tiny-llama-m", ("tiny-llama-m", None)),
    ("tiny-llama-m@outliers=8", ("tiny-llama-m", outliers.Outliers(8.0, 0))),
    ("/some/folder@outliers=2.5,seed=3", ("/some/folder", outliers.Outliers(2.5, 3))),
    ("/home/me@work/model", ("/home/me@work/model", None)),
])
def test_parse(name, expected):
    assert outliers.parse(name) == expected


@pytest.mark.parametrize("name, message", [
    ("m@outlier=8", "did you mean 'outliers'"), ("m@outliers=x", "outliers=x.*from 1"), ("m@outliers=0.5", "outliers=0.5"),
    ("m@outliers=nan", "outliers=nan"), ("m@outliers=8,seed=-1", "seed=-1"), ("m@seed=1", "plants nothing"),
    ("@outliers=8", "no model"), ("m@outliers", "from 1"), ("m@outliers=8,outliers=9", "twice"),
])
def test_parse_errors(name, message):
    with pytest.raises(PTQError, match=message):
        outliers.parse(name)


def test_suffix_is_read_back():
    dial = outliers.Outliers(12.5, 3)
    assert outliers.parse("m" + dial.suffix()) == ("m", dial)


def toy(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    common = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**common, num_key_value_heads=4))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return model.double().eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_planting_leaves_the_function(family):
    model, ids = toy(family), torch.arange(64)[None]
    with torch.no_grad():
        before = model(ids).logits
        record = outliers.plant_(model, outliers.Outliers(16.0, 1))
        after = model(ids).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-6
    sites = {site.name for site in arch.sites(model) if site.feeder}
    assert {r["site"] for r in record} == sites
    for site in sites:  # in some layers and not in others
        assert 0 < sum(r["site"] == site for r in record) < 4
    largest = max(f for r in record for f in r["factors"].values())
    assert 50 < largest < 400


def test_severity_one_and_equal_seeds():
    model = toy("qwen2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert outliers.plant_(model, outliers.Outliers(1.0)) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    dial = outliers.Outliers(8.0, 2)
    assert outliers.plant_(toy("qwen2"), dial) == outliers.plant_(toy("qwen2"), dial)
    assert outliers.plant_(toy("qwen2"), dial) != outliers.plant_(toy("qwen2"), outliers.Outliers(8.0, 3))
