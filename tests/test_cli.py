"""The command line as a new user meets it: help, examples, results, and every mistake answered with one line."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toys

from suite import cli

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    [],
    ["quantize"],
    ["plan"],
    ["ppl"],
    ["lm-eval"],
    ["reproduce"],
    ["ablate"],
    ["report"],
    ["rotations"],
    ["check"],
    ["compare"],
    ["export"],
    ["baseline"],
    ["baseline", "save"],
    ["ls"],
    ["zoo"],
    ["zoo", "train"],
    ["zoo", "card"],
]


def started(command, **options):
    """A process that hears Ctrl-C, even where the tests themselves were started with it ignored, as by nohup or `&`."""
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def ptq_process(*arguments, cwd, **environment):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "suite.cli", *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def left_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------- help


def test_help_is_instant_and_needs_no_torch(tmp_path):
    def spent():  # processor time: another program on the machine does not count
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    done = ptq_process("--help", cwd=tmp_path)
    assert done.returncode == 0 and "reproduce" in done.stdout
    assert spent() - before < 1.0
    code = (
        "import sys, suite.cli\n"
        "try: suite.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(ptq, command):
    status, out, err = ptq(*command, "--help")
    assert status == 0 and err == ""
    examples = re.findall(r"^ +(ptq .*?)$", out.partition("Examples:")[2], re.MULTILINE)
    assert examples and all(line.startswith(" ".join(["ptq", *command])) for line in examples)


def test_all_commands_are_tested_for_help():
    found = [[]]
    for name, command in cli.commands.commands.items():
        found.append([name])
        found += [[name, inner] for inner in getattr(command, "commands", {})]
    assert sorted(found) == sorted(COMMANDS)


def test_examples_use_options_and_names_that_exist():
    """Every example in the help parses; a renamed option would make it a lie."""
    import shlex

    for command in COMMANDS:
        if command == ["lm-eval"] or command == []:
            continue
        inner = cli.commands
        for name in command:
            inner = inner.commands[name]
        text = inner.help.partition("Examples:")[2].replace("\\\n", " ")
        for line in re.findall(r"^ *(ptq .*?)$", text, re.MULTILINE):
            words = shlex.split(line)[1:]
            target = cli.commands
            while words and words[0] in getattr(target, "commands", {}):
                target = target.commands[words.pop(0)]
            target.make_context("ptq", words)


# ---------------------------------------------------------------------------------------------- ls


@pytest.mark.parametrize(
    "thing, expected",
    [
        ("methods", ["fp16", "rtn", "gptq", "awq", "smoothquant", "cka-hybrid", "awq+gptq", "smoothquant+gptq"]),
        ("models", ["tiny-llama-s", "tiny-llama-m", "tiny-qwen-s", "tiny-qwen-m", "llama-3-8b", "qwen1.5-0.5b"]),
        (
            "tasks",
            [
                "world_math",
                "world_events",
                "world_quiz",
                "world_wiki_ppl",
                "world_chat_ppl",
                "wikitext2_ppl",
                "c4_ppl",
                "text_ppl",
            ],
        ),
        ("metrics", ["cka", "mse", "cosine", "sqnr", "kl"]),
        ("experiments", ["perplexity", "pool", "metric", "search", "degradation"]),
    ],
)
def test_ls(ptq, thing, expected):
    status, out, err = ptq("ls", thing, "--json")
    rows = json.loads(out)
    assert status == 0 and err == ""
    assert set(expected) <= {row["name"] for row in rows}
    assert all(row["what"] for row in rows)
    status, out, _ = ptq("ls", thing)
    assert status == 0 and {row["name"] for row in rows} <= set(out.split())


# ---------------------------------------------------------------------------------------------- quantize and ppl


def direct_perplexity(folder, text, window, max_tokens):
    """Perplexity as the issue defines it, in five lines of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text).input_ids[:max_tokens])
    ids = ids[: len(ids) // window * window].view(-1, window)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -logits.gather(-1, ids[:, 1:, None])
    return math.exp(nll.mean()), nll.numel(), len(ids)


def test_ppl_equals_a_direct_computation(ptq, toy_folder, toy_text_file, toy_text):
    status, out, err = ptq(
        "ppl", "--model", toy_folder, "--text", toy_text_file, "--window", 128, "--max-tokens", 2000, "--json"
    )
    assert status == 0 and err == ""
    found = json.loads(out)
    expected, tokens, windows = direct_perplexity(toy_folder, toy_text, 128, 2000)
    assert found["ppl"] == pytest.approx(expected, rel=1e-5)
    assert (found["tokens"], found["windows"], found["window"]) == (tokens, windows, 128)
    assert {"bos", "join", "data_hash"} <= set(found)


def quantize(ptq, out, *more, method="gptq", model=None, calib=None):
    return ptq(
        "quantize",
        "--model",
        model,
        "--method",
        method,
        "--calib",
        calib,
        "--nsamples",
        4,
        "--seqlen",
        64,
        "--out",
        out,
        *more,
    )


@pytest.mark.parametrize(
    "method, more",
    [
        ("rtn", []),
        ("gptq", ["--set", "damp=0.05", "--set", "act_order=true"]),
        ("awq+gptq", ["--wbits", "3", "--abits", "16"]),
        ("cka-hybrid", ["--pool", "rtn,gptq", "--metric", "mse", "--block", "2"]),
    ],
)
def test_quantize_then_ppl(ptq, tmp_path, toy_folder, toy_text_file, method, more):
    status, out, err = quantize(ptq, "quantized", *more, method=method, model=toy_folder, calib=toy_text_file)
    assert (status, err) == (0, "") and "bits per weight" in out
    record = json.loads((tmp_path / "quantized" / "ptq.json").read_text())["record"]
    assert record["calibration"]["nsamples"] == 4 and record["calibration"]["seqlen"] == 64
    assert left_in(tmp_path)[0] == "quantized" and all(name.startswith("quantized") for name in left_in(tmp_path))

    status, out, _ = ptq(
        "ppl", "--model", "quantized", "--text", toy_text_file, "--window", 128, "--max-tokens", 2000, "--json"
    )
    full = ptq("ppl", "--model", toy_folder, "--text", toy_text_file, "--window", 128, "--max-tokens", 2000, "--json")[
        1
    ]
    assert status == 0
    assert json.loads(out)["ppl"] != json.loads(full)["ppl"]
    assert json.loads(out)["ppl"] == pytest.approx(json.loads(full)["ppl"], rel=0.3)
    assert json.loads(out)["data_hash"] == json.loads(full)["data_hash"]


def test_quantize_does_what_its_options_say(ptq, tmp_path, toy_folder, toy_text_file):
    """Options reach the method and the record; the seed reaches the calibration."""
    quantize(ptq, "a", "--set", "damp=0.05", "--wbits", 3, "--group-size", 64, model=toy_folder, calib=toy_text_file)
    quantize(ptq, "b", "--seed", 1, model=toy_folder, calib=toy_text_file)
    a, b = (json.loads((tmp_path / name / "ptq.json").read_text())["record"] for name in "ab")
    assert a["method"]["options"]["damp"] == 0.05 and a["scheme"] == "W3A8 g64" and b["scheme"] == "W4A8 g128"
    assert a["calibration"]["digest"] != b["calibration"]["digest"] and b["calibration"]["seed"] == 1


def test_overwrite(ptq, tmp_path, toy_folder, toy_text_file):
    assert quantize(ptq, "q", method="rtn", model=toy_folder, calib=toy_text_file)[0] == 0
    before = (tmp_path / "q" / "ptq.json").read_text()
    status, _, err = quantize(ptq, "q", "--wbits", 3, method="rtn", model=toy_folder, calib=toy_text_file)
    assert status == 2 and "--overwrite" in err
    assert (tmp_path / "q" / "ptq.json").read_text() == before
    assert quantize(ptq, "q", "--wbits", 3, "--overwrite", method="rtn", model=toy_folder, calib=toy_text_file)[0] == 0
    assert (tmp_path / "q" / "ptq.json").read_text() != before


# ---------------------------------------------------------------------------------------------- reproduce, report


@pytest.fixture(scope="module")
def measured(tmp_path_factory, toy_folder, toy_text_file):
    """A small comparison, run once: the folder it was run in, and what was printed."""
    folder = tmp_path_factory.mktemp("measured")
    done = ptq_process(
        "reproduce", toy_folder, *SMALL, "--calib", toy_text_file, "--methods", "fp16,rtn,cka-hybrid", cwd=folder
    )
    return folder, done


SMALL = ["--tasks", "world_wiki_ppl,world_events", "--fast", "--nsamples", "4", "--seqlen", "64", "--workers", "1"]


def test_reproduce_prints_the_table_and_the_paths(measured):
    folder, done = measured
    assert done.returncode == 0 and done.stderr == ""
    assert all(re.search(rf"^{re.escape(name)} ", done.stdout, re.MULTILINE) for name in ("fp16", "rtn", "cka-hybrid"))
    told = re.findall(r"^ +(results/.*)$", done.stdout, re.MULTILINE)
    assert {Path(path).suffix for path in told} == {".md", ".csv", ".tex", ".png", ".svg"}
    assert all((folder / path).stat().st_size > 100 for path in told)
    assert "6 results measured, 0 found" in done.stdout
    assert not [name for name in left_in(folder) if name.endswith(".tmp")]


def copied(measured, tmp_path):
    shutil.copytree(measured[0] / "results", tmp_path / "results")


def test_a_second_run_measures_only_what_is_missing(ptq, measured, tmp_path, toy_folder, toy_text_file):
    copied(measured, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path) if (tmp_path / name).is_file()}
    run = ["reproduce", toy_folder, *SMALL, "--calib", toy_text_file, "--methods"]
    status, out, err = ptq(*run, "fp16,rtn,cka-hybrid")
    assert (status, err) == (0, "") and "0 results measured, 6 found" in out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    next((tmp_path / "results").rglob("rtn-*world_events*.json")).unlink()
    assert "1 results measured, 5 found" in ptq(*run, "fp16,rtn,cka-hybrid")[1]
    assert "2 results measured, 2 found" in ptq(*run, "fp16,rtn", "--wbits", "3")[1]  # another scheme shares FP16 alone


def test_report_draws_the_same_from_records_alone(ptq, measured, tmp_path, toy_folder):
    copied(measured, tmp_path)
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file() and p.suffix != ".json"}
    for name in drawn:
        next((tmp_path / "results").rglob(name)).unlink()
    status, out, err = ptq("report", toy_folder.name)
    assert (status, err) == (0, "")
    again = {p.name: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file() and p.suffix != ".json"}
    assert again == drawn and out.split("\n")[0] in measured[1].stdout


@pytest.mark.slow
def test_severities_draw_their_figure(ptq, tmp_path, toy_folder, toy_text_file):
    status, out, err = ptq(
        "reproduce",
        toy_folder,
        "--fast",
        "--nsamples",
        4,
        "--seqlen",
        64,
        "--calib",
        toy_text_file,
        "--methods",
        "fp16,rtn",
        "--severities",
        "4,16",
        "--workers",
        1,
    )
    assert (status, err) == (0, "") and "outliers" in out
    figures = [line.strip() for line in out.splitlines() if "severity" in line and line.strip().endswith(".png")]
    assert figures and all((tmp_path / figure).stat().st_size > 5000 for figure in figures)


@pytest.mark.slow
def test_an_interrupted_run_continues(tmp_path, toy_folder, toy_text_file):
    """Killed by Ctrl-C after its first record, then run again: only the rest is measured."""
    run = [
        "reproduce",
        str(toy_folder),
        "--tasks",
        "world_wiki_ppl,world_chat_ppl,world_events",
        "--fast",
        "--nsamples",
        "4",
        "--seqlen",
        "64",
        "--calib",
        str(toy_text_file),
        "--methods",
        "fp16,rtn,gptq",
        "--workers",
        "2",
    ]
    process = started(
        [sys.executable, "-m", "suite.cli", *run],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 100
    while not list((tmp_path / "results").rglob("*ppl*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    records = [path.name for path in (tmp_path / "results").rglob("records/*.json")]
    kept = len([name for name in records if "quantization" not in name])
    assert process.returncode == 130 and out == "", (process.returncode, out, err)
    assert re.fullmatch(r"ptq: interrupted: [^\n]*continues from there\n", err), err
    assert 1 <= kept < 9 and not list((tmp_path / "results").rglob("*.tmp"))
    done = ptq_process(*run, cwd=tmp_path)
    assert done.returncode == 0 and f"{9 - kept} results measured, {kept} found" in done.stdout


@pytest.mark.slow
def test_lm_eval_gives_the_numbers_of_reproduce(measured, toy_folder, toy_text_file, tmp_path):
    done = ptq_process(
        "lm-eval",
        "run",
        "--model",
        "ptq",
        "--model_args",
        f"pretrained={toy_folder},method=rtn,wbits=4,abits=8,calib={toy_text_file},nsamples=4,seqlen=64",
        "--tasks",
        "world_wiki_ppl,world_events",
        "--limit",
        "64",
        "--output_path",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    for task in ("world_wiki_ppl", "world_events"):
        record = json.loads(next((measured[0] / "results").rglob(f"rtn-*{task}*.json")).read_text())
        for metric, told in record["result"]["metrics"].items():
            assert found[task][metric] == pytest.approx(told["value"], rel=1e-5)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("lm-eval run --model ptq --model_args pretrained={good},method=gtpq --tasks world_events", "gptq"),
        ("lm-eval run --model ptq --model_args pretrained={good},method=gptq,dmap=1 --tasks world_events", "damp"),
        ("lm-eval run --model ptq --model_args pretrained=tiny-lama-s --tasks world_events", "tiny-llama-s"),
    ],
)
def test_a_mistake_for_lm_eval_is_one_line(ptq, tmp_path, world, line, expected):
    status, out, err = ptq(*line.format(good=world / "good").split())
    assert status == 2 and expected in err
    assert [x for x in err.splitlines() if x.startswith("ptq: error: ")] == err.splitlines()[-1:]
    assert [name for name in left_in(tmp_path) if not name.startswith("out.partial")] == []


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that can be wrong with files, made once."""
    base = tmp_path_factory.mktemp("world")
    good = toys.save_toy(base / "good")
    (base / "text.txt").write_text(toys.make_text(20_000, seed=3))
    (base / "short.txt").write_text("A short text.")
    (base / "empty.txt").write_text(" \n\n")
    (base / "bytes.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)
    (base / "a_file").write_text("not a folder")
    (base / "nothing").mkdir()

    def copy(name):
        return Path(shutil.copytree(good, base / name))

    cut = copy("truncated") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5000])
    head = copy("corrupt") / "model.safetensors"
    head.write_bytes(b"\xff" * 64 + head.read_bytes()[64:])
    (copy("no_weights") / "model.safetensors").unlink()
    (copy("bad_json") / "config.json").write_text("{")
    for path in copy("no_tokenizer").glob("token*"):
        path.unlink()
    config = json.loads((good / "config.json").read_text())
    (copy("other_family") / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    return base


# what is asked for, what the one line must contain
MISTAKES = {
    "unknown command": ("quantise --help", "quantize"),
    "unknown thing to list": ("ls method", "methods"),
    "unknown flag": ("ppl --modle {good} --text {text}", "--model"),
    "unknown experiment": ("ablate tiny-llama-s --experiments pol", "did you mean 'pool'"),
    "missing experiment file": ("ablate tiny-llama-s --experiments ./nowhere.yaml", "nowhere.yaml"),
    "model to ablate twice": ("ablate tiny-llama-s tiny-llama-s", "tiny-llama-s is given twice"),
    "unknown model to ablate": ("ablate tiny-lama-s --experiments pool", "tiny-llama-s"),
    "missing flag": ("ppl --model {good}", "--text"),
    "unknown model": ("ppl --model tiny-lama-s --text {text}", "tiny-llama-s"),
    "unknown embedded model": ("zoo card tiny-lama-s", "tiny-llama-s"),
    "missing model folder": ("ppl --model ./nowhere --text {text}", "./nowhere"),
    "folder without a model": ("ppl --model {nothing} --text {text}", "config.json"),
    "model is a file": ("ppl --model {a_file} --text {text}", "is a file"),
    "unsupported architecture": ("ppl --model {other_family} --text {text}", "gpt2"),
    "truncated checkpoint": ("ppl --model {truncated} --text {text}", "model.safetensors"),
    "corrupt checkpoint": ("ppl --model {corrupt} --text {text}", "model.safetensors"),
    "checkpoint without weights": ("ppl --model {no_weights} --text {text}", "model.safetensors"),
    "config is no JSON": ("ppl --model {bad_json} --text {text}", "config.json"),
    "no tokenizer": ("ppl --model {no_tokenizer} --text {text}", "tokenizer"),
    "outliers not a number": ("ppl --model {good}@outliers=many --text {text}", "outliers"),
    "outliers out of range": ("ppl --model {good}@outliers=-1 --text {text}", "outliers"),
    "missing text": ("ppl --model {good} --text nowhere.txt", "nowhere.txt"),
    "empty text": ("ppl --model {good} --text {empty}", "empty"),
    "text is no text": ("ppl --model {good} --text {bytes}", "UTF-8"),
    "text shorter than a window": ("ppl --model {good} --text {short} --window 128", "128"),
    "window longer than the model": ("ppl --model {good} --text {text} --window 4096", "512"),
    "window too small": ("ppl --model {good} --text {text} --window 1", "from 2"),
    "no token allowed": ("ppl --model {good} --text {text} --max-tokens 0", "max-tokens"),
    "fewer tokens than a window": ("ppl --model {good} --text {text} --window 128 --max-tokens 100", "max-tokens"),
    "unknown method": ("quantize --model {good} --method gtpq --out out", "gptq"),
    "unknown part of a composition": ("quantize --model {good} --method awq+gtpq --out out", "gptq"),
    "composition without a transform": ("quantize --model {good} --method gptq+awq --out out", "transform"),
    "unknown option": ("quantize --model {good} --method gptq --set dmap=0.1 --out out", "damp"),
    "option of another method": ("quantize --model {good} --method gptq --metric cka --out out", "metric"),
    "option without a value": ("quantize --model {good} --method gptq --set damp --out out", "key=value"),
    "option given twice": ("quantize --model {good} --method gptq --wbits 3 --set wbits=4 --out out", "twice"),
    "option of the wrong kind": ("quantize --model {good} --method gptq --set damp=much --out out", "much"),
    "option out of range": ("quantize --model {good} --method gptq --set damp=-1 --out out", "damp"),
    "unknown metric": ("quantize --model {good} --method cka-hybrid --metric ckaa --out out", "cka"),
    "unknown method in the pool": ("quantize --model {good} --method cka-hybrid --pool gptq,awk --out out", "awq"),
    "method twice in the pool": ("quantize --model {good} --method cka-hybrid --pool gptq,gptq --out out", "twice"),
    "block of no layers": ("quantize --model {good} --method cka-hybrid --block 0 --out out", "block"),
    "group does not divide": (
        "quantize --model {good} --method rtn --group-size 96 --calib {text} {small} --out out",
        "96",
    ),
    "negative group": ("quantize --model {good} --method rtn --group-size -3 --out out", "group"),
    "bits too few": ("quantize --model {good} --method rtn --wbits 1 --out out", "2 to 8"),
    "bits too many": ("quantize --model {good} --method rtn --wbits 9 --out out", "2 to 8"),
    "bits of activations": ("quantize --model {good} --method rtn --abits 5 --out out", "abits"),
    "bits no number": ("quantize --model {good} --method rtn --wbits four --out out", "four"),
    "nothing to quantize": ("quantize --model {good} --method fp16 --out out", "nothing"),
    "unknown mode": ("quantize --model {good} --method rtn --mode matchd --out out", "matched"),
    "unknown calibration": ("quantize --model {good} --method rtn --calib wikitxt2 --out out", "wikitext2"),
    "missing calibration": ("quantize --model {good} --method rtn --calib nowhere.txt --out out", "nowhere.txt"),
    "empty calibration": ("quantize --model {good} --method gptq --calib {empty} {small} --out out", "empty"),
    "calibration too short": ("quantize --model {good} --method gptq --calib {short} {small} --out out", "64"),
    "no sample": ("quantize --model {good} --method gptq --calib {text} --nsamples 0 --out out", "nsamples"),
    "negative seed": ("quantize --model {good} --method gptq --calib {text} --seed -1 --out out", "seed"),
    "sequence longer than the model": (
        "quantize --model {good} --method gptq --calib {text} --seqlen 4096 --out out",
        "512",
    ),
    "quantized folder for quantize": ("quantize --model {good} --method rtn --out {good}", "exists"),
    "out is a file": ("quantize --model {good} --method rtn --out {a_file}", "file"),
    "reproduce: unknown model": ("reproduce tiny-lama-s", "tiny-llama-s"),
    "reproduce: unknown method": ("reproduce {good} --methods gtpq --tasks world_events", "gptq"),
    "reproduce: method twice": ("reproduce {good} --methods gptq,gptq --tasks world_events", "twice"),
    "reproduce: unknown task": ("reproduce {good} --tasks world_evnts", "world_events"),
    "reproduce: bits": ("reproduce {good} --tasks world_events --wbits 12", "2 to 8"),
    "reproduce: empty list": ("reproduce {good} --tasks ,", "empty"),
    "reproduce: results below a file": ("reproduce {good} --tasks world_events --results {a_file}/x", "a_file"),
    "reproduce: calibration is evaluated": (
        "reproduce {good} --tasks world_wiki_ppl --calib {evaluated} {small}",
        "--allow-eval-calibration",
    ),
    "reproduce: severity is no number": ("reproduce {good} --severities 2,many", "many"),
    "reproduce: severity out of range": ("reproduce {good} --severities 0.5", "above 1"),
    "plan: unknown device": ("plan {good} --device gpu", "gpu"),
    "plan: unknown model": ("plan tiny-lama-s", "did you mean 'tiny-llama-s'"),
    "quantize: data does not fit together": ("quantize --model {good} --method rtn --load laye --out x", "laye"),
    "reproduce: code without permission": ("reproduce {good} --tasks world_code", "--allow-code-execution"),
    "reproduce: no data folder": ("reproduce {good} --data-dir /nowhere", "/nowhere"),
    "report: no results folder": ("report tiny-llama-s", "results"),
    "report: unknown model": ("report tiny-lama --results {nothing}", "tiny-lama"),
    "out below a file": ("quantize --model {good} --method rtn --out {a_file}/x", "a_file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_line(ptq, tmp_path, world, case):
    line, expected = MISTAKES[case]
    files = {path.stem: path for path in world.iterdir()} | {
        "evaluated": ROOT / "tasks" / "data" / "world_wiki_test.txt"
    }
    before = left_in(world)
    status, out, err = ptq(*line.format(**files, small="--nsamples 4 --seqlen 64").split())
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"ptq: error: [^\n]+\n", err), err
    assert expected in err
    assert [name for name in left_in(tmp_path) if name != "results"] == [] and left_in(world) == before


def test_a_hub_model_without_a_hub_fails_at_once(ptq, tmp_path, world, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of a service that nobody runs
    start = time.perf_counter()
    status, out, err = ptq("ppl", "--model", "qwen1.5-0.5b", "--text", world / "text.txt")
    assert time.perf_counter() - start < 10
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "tiny-llama-s" in err and "127.0.0.1:9" in err


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    """What the tests above see inside this process is what a shell sees, libraries' chatter included."""
    done = ptq_process("quantize", "--model", "tiny-lama-s", "--method", "rtn", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"ptq: error: unknown model [^\n]+\n", done.stderr), done.stderr


def test_a_bug_shows_its_traceback(ptq, monkeypatch, toy_folder, toy_text_file):
    """Only a user's mistake is one line; anything else is not hidden."""
    from suite import windows

    monkeypatch.setattr(windows, "perplexity", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(
            ["ppl", "--model", str(toy_folder), "--text", str(toy_text_file), "--window", "64", "--max-tokens", "640"]
        )


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, toy_folder, toy_text_file):
    process = started(
        [
            sys.executable,
            "-m",
            "suite.cli",
            "quantize",
            "--model",
            str(toy_folder),
            "--method",
            "cka-hybrid",
            "--calib",
            str(toy_text_file),
            "--nsamples",
            "1024",
            "--seqlen",
            "512",
            "--out",
            "out",
        ],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    time.sleep(6)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert re.fullmatch(r"ptq: interrupted[^\n]*\n", err), err
    assert left_in(tmp_path) == []
