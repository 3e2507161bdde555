"""What every test stands on: one thread (summation order moves GPTQ's result), no hub, toys, text."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before torch, transformers and datasets read them. A cache of its own: a test never sees what another run left.
_cache = tempfile.mkdtemp(prefix="ptq-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.update(
    HF_HOME=_cache,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)

import pytest  # noqa: E402
import torch  # noqa: E402
import toys  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread and a fixed seed, whatever a test before did."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def make_toy():
    """The factory `toys.make_toy(kind, dtype=..., layers=..., seed=..., **config)`."""
    return toys.make_toy


@pytest.fixture
def toy_llama():
    """Llama, grouped-query attention, untied, float32."""
    return toys.make_toy("llama")


@pytest.fixture
def toy_qwen():
    """Qwen2 as Qwen1.5 uses it: biases on q, k, v, full multi-head, tied, float32."""
    return toys.make_toy("qwen")


@pytest.fixture(scope="session")
def toy_tokenizer():
    return toys.make_tokenizer()


@pytest.fixture(scope="session")
def toy_text() -> str:
    """About 20,000 words, a text that the tokenizer was not trained on."""
    return toys.make_text(seed=1)


@pytest.fixture(scope="session")
def toy_text_file(tmp_path_factory, toy_text):
    """The same text as a file, for `--text` and `--calib`."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(toy_text)
    return path


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A saved toy Llama with its tokenizer. Shared: tests only read it."""
    return toys.save_toy(tmp_path_factory.mktemp("models") / "toy-llama")


@pytest.fixture(scope="session")
def toy_qwen_folder(tmp_path_factory):
    """A saved toy Qwen2 (tied, biased) with the tokenizer. Shared: tests only read it."""
    return toys.save_toy(tmp_path_factory.mktemp("models") / "toy-qwen", "qwen")


@pytest.fixture
def ptq(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder: (status, stdout, stderr)."""
    from suite import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run
