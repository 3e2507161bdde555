"""A file imports only from what stands above it in the table, and only the outside packages of its row.

Checked from the syntax trees, imports inside functions included.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# floor, module (a package stands for all its files), outside packages that it may import beside the standard library.
# Within a floor a file may import those in the rows above its own; files of one row (a package) may import each other,
# except methods: each is a file of its own.
LAYOUT = [
    (0, "suite", "lm_eval"),  # the package's own __init__: registers the model by name
    (0, "suite.errors", ""),
    (0, "suite.paths", ""),
    (0, "suite.tokens", "torch"),
    (0, "suite.progress", "tqdm"),
    (0, "suite.stats", "numpy scipy"),
    (0, "suite.verdict", "numpy scipy statsmodels"),
    (0, "suite.provenance", "torch"),
    (0, "suite.trust", ""),
    (0, "suite.hub", "huggingface_hub datasets"),
    (0, "suite.grid", "torch"),
    (0, "suite.cka", "torch"),
    (0, "suite.hadamard", "torch"),
    (0, "suite.stiefel", "torch"),
    (0, "suite.resume", "torch"),
    (0, "suite.depot", "torch"),
    (0, "suite.cell", ""),  # a script that a bare interpreter runs: it imports nothing of the suite
    (0, "suite.sandbox", ""),
    (1, "suite.conformance", ""),
    (1, "suite.method", "torch"),
    (1, "suite.plugins", ""),
    (1, "suite.linear", "torch"),
    (1, "suite.arch", "torch transformers"),
    (1, "suite.rounding", "torch"),
    (1, "suite.layer_state", "torch"),
    (1, "suite.zoo", "torch transformers tokenizers numpy safetensors tqdm"),
    (2, "suite.calib", "torch datasets"),
    (2, "suite.fold", "torch"),
    (2, "suite.walk", "torch"),
    (2, "suite.kv", "torch transformers"),
    (2, "suite.rotate", "torch"),
    (2, "suite.nll", "torch"),
    (3, "suite.metrics", "torch"),
    (3, "suite.candidates", "torch"),
    (3, "suite.search", "torch"),
    (3, "suite.select", "torch"),
    (3, "baselines", "torch numpy scipy"),
    (4, "suite.testing", "torch transformers tokenizers numpy lm_eval pytest"),
    (3, "suite.checkpoint", "torch transformers safetensors"),
    (2, "suite.stream", "torch transformers safetensors accelerate"),
    (3, "suite.schemes", "compressed_tensors"),
    (3, "suite.importing", "torch transformers safetensors compressed_tensors"),
    (3, "suite.models", "torch transformers safetensors huggingface_hub"),
    (3, "suite.preflight", "torch"),
    (3, "suite.windows", "torch"),
    (4, "suite.adapter", "torch transformers lm_eval datasets accelerate"),
    (4, "suite.store", ""),
    (4, "suite.baseline", ""),
    (4, "suite.card", ""),
    (4, "suite.recipe", "yaml"),
    (4, "suite.export", "torch transformers safetensors compressed_tensors huggingface_hub"),
    (5, "suite.variants", ""),
    (5, "suite.evaluation", "torch lm_eval numpy"),
    (5, "suite.measuring", "torch"),
    (5, "suite.experiments", "torch"),
    (5, "suite.checkpoints", ""),
    (5, "suite.report", "pandas matplotlib tabulate numpy"),
    (6, "suite.compare", ""),
    (6, "suite.ablate", "torch yaml"),
    (6, "suite.bench", "torch numpy"),
    (6, "suite.bench_shapes", "torch transformers"),
    (6, "suite.cli", "click torch"),
]
ROWS = [module for _, module, _ in LAYOUT]
OUTSIDE = {module: set(packages.split()) for _, module, packages in LAYOUT}


def row(module: str) -> int:
    """The place of a module in the table: its own row, or that of the package it belongs to."""
    for end in range(module.count(".") + 1, 0, -1):
        prefix = ".".join(module.split(".")[:end])
        if prefix in ROWS and (prefix != "suite" or module == "suite"):
            return ROWS.index(prefix)
    raise LookupError(f"{module} has no row in the layout: add it to LAYOUT in {Path(__file__).name}")


def imports(path: Path, root: Path) -> set[str]:
    """The modules that a file imports; `from package import module` counts as the module where there is such a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write the full name"
            base = root / node.module.replace(".", "/")
            for name in node.names:
                is_module = (base / f"{name.name}.py").exists() or (base / name.name / "__init__.py").exists()
                found.add(f"{node.module}.{name.name}" if is_module else node.module)
    return found


def violations(path: Path, root: Path = ROOT) -> list[str]:
    relative = path.relative_to(root).with_suffix("")
    module = ".".join(part for part in relative.parts if part != "__init__")
    mine, found = row(module), []
    for name in sorted(imports(path, root)):
        top = name.partition(".")[0]
        if top in ("suite", "baselines"):
            other = row(name)
            if top == "baselines" and not module.startswith("baselines"):
                found.append(f"{module} imports {name}: methods are reached through the registry alone")
            elif other > mine or (other == mine and top == "baselines" and name not in ("baselines", module)):
                found.append(f"{module} (floor {LAYOUT[mine][0]}) imports {name} (floor {LAYOUT[other][0]})")
        elif top not in sys.stdlib_module_names and top not in OUTSIDE[ROWS[mine]]:
            found.append(f"{module} imports {top}: allowed outside packages are {sorted(OUTSIDE[ROWS[mine]])}")
    return found


FILES = sorted(p for package in ("suite", "baselines") for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    assert violations(path) == []


@pytest.mark.parametrize("source", [
    "import suite.walk", "from suite import walk", "from suite.walk import commit",
    "def f():\n    from suite import walk",
    "import baselines.gptq", "import pandas", "from suite.grid import Grid\nimport lm_eval.tasks",
])
def test_a_violation_is_found(tmp_path, source):
    (tmp_path / "suite").mkdir()
    for name in ("walk", "grid"):
        (tmp_path / "suite" / f"{name}.py").touch()
    broken = tmp_path / "suite" / "method.py"
    broken.write_text(source)
    assert len(violations(broken, tmp_path)) == 1


def test_methods_do_not_import_each_other(tmp_path):
    (tmp_path / "baselines").mkdir()
    for name in ("gptq", "awq"):
        (tmp_path / "baselines" / f"{name}.py").write_text("from baselines.gptq import GPTQ\n")
    assert violations(tmp_path / "baselines" / "awq.py", tmp_path)


def test_a_file_without_a_row_is_found(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "surprise.py").touch()
    with pytest.raises(LookupError, match="suite.surprise"):
        violations(tmp_path / "suite" / "surprise.py", tmp_path)


@pytest.mark.parametrize("module", ["suite", "suite.cli", "suite.store", "suite.report"])
def test_needs_no_torch(module):
    """Tables and plots are drawn from files alone, and help is instant: neither loads torch, by whatever path."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
