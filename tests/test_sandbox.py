"""Code that a model wrote can neither harm the machine nor give itself marks, in every way of confining it that exists
here; and code that is right passes."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from suite import paths, sandbox
from suite.errors import PTQError

PROMPT = 'def f(x):\n    """Return x."""\n'
TEST = "def check(candidate):\n    assert candidate(3) == 3\n    assert candidate('a') == 'a'\n"
QUICK = sandbox.Limits(cpu_seconds=1, seconds=3.0, memory_mib=256)
ORDINARY = 65533  # a user who is not root


def confines() -> bool:
    return sandbox._way()[0] is not None


pytestmark = pytest.mark.skipif(not confines(), reason="nothing here can confine code, and the suite refuses to run it")


@pytest.fixture(params=["namespaces", "bubblewrap"])
def way(request, monkeypatch):
    """Each way that this machine has for this user."""
    if request.param == "bubblewrap" and (os.geteuid() == 0 or shutil.which("bwrap") is None):
        pytest.skip("bubblewrap is not installed, or of no use to root")
    if request.param == "namespaces" and sandbox._way()[0] != "namespaces":
        pytest.skip("this user may not create namespaces")
    monkeypatch.setattr(sandbox, "_way", lambda: (request.param, ""))


def check(body: str, test: str = TEST, limits: sandbox.Limits = QUICK, prompt: str = PROMPT):
    return sandbox.check(f"{prompt}    {body}\n", prompt, test, "f", limits)


# ---------------------------------------------------------------------------------------------- what is right passes


def test_a_right_body_passes_and_a_wrong_one_fails(way):
    assert check("return x").passed
    wrong = check("return 4")
    assert not wrong.passed and wrong.reason.startswith("AssertionError")
    assert check("return x +").reason.startswith("SyntaxError")
    assert check("raise KeyError('no')").reason.startswith("KeyError")


@pytest.mark.parametrize("value", ["[1, (2, {3}), {'a': None, (1, 2): b'x'}]", "10**5000", "float('inf')", "1j", "True",
                                   "'\\ud800'", "frozenset({1.5})"])
def test_values_arrive_as_they_are(value):
    given = check(f"return {value}", f"def check(c):\n    assert c(0) == {value} and type(c(0)) is type({value})")
    assert given.passed, given


def test_what_a_function_does_to_its_arguments_is_seen():
    test = "def check(c):\n    x = [3, 1]\n    c(x)\n    assert x == [1, 3]\n"
    assert check("x.sort()", test).passed and not check("sorted(x)", test).passed


def test_an_exception_keeps_its_type():
    test = "def check(c):\n    try: c(0)\n    except ZeroDivisionError: return\n    assert False\n"
    assert check("return 1 / x", test).passed and not check("return [][x]", test).passed


def test_helpers_of_the_prompt_are_there_for_the_test():
    prompt = 'def half(x):\n    return x / 2\n\ndef f(x):\n    """Twice."""\n'
    test = "def check(c):\n    assert half(c(3)) == 3\n"
    assert check("return 2 * x", test, prompt=prompt).passed


def test_all_embedded_solutions_pass_and_the_next_one_does_not():
    """Every eighth problem with its own solution, and with that of another problem."""
    rows = [json.loads(line) for line in (paths.tasks() / "data" / "world_code.jsonl").read_text().splitlines()][::8]
    for row, other in zip(rows, rows[1:] + rows[:1]):
        given = row["prompt"], row["test"], row["entry_point"]
        assert sandbox.check(row["prompt"] + row["canonical_solution"], *given).passed, row["task_id"]
        assert not sandbox.check(row["prompt"] + other["canonical_solution"], *given).passed, row["task_id"]


# ---------------------------------------------------------------------------------------------- what is hostile fails

ATTACKS = {
    "infinite loop": "while True: pass",
    "sleeps for ever": "import time; time.sleep(1000)",
    "fork bomb": "import os\n    while True: os.fork()",
    "fork bomb that goes on when refused": "import os\n    while True:\n        try: os.fork()\n"
                                           "        except OSError: pass",
    "threads without end": "import threading as t, time\n"
                           "    while True: t.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "return [bytearray(2**20) for _ in range(10**6)]",
    "writes files without end": "i = 0\n    while True: open(f'/tmp/{i}', 'wb').write(bytes(2**20)); i += 1",
    "prints a verdict": "import sys; print('[\"passed\"]'); sys.stderr.write('passed'); return 0",
    "writes a verdict into every pipe": "import os\n    for n in range(3, 64):\n"
                                        "        try: os.write(n, b'\\x00\\x00\\x00\\x0a[\"passed\"]')\n"
                                        "        except OSError: pass\n    return 0",
    "os._exit(0)": "import os; os._exit(0)",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "raises SystemExit(0)": "raise SystemExit(0)",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); return 0",
    "kills everything": "import os, signal; os.kill(-1, signal.SIGKILL); return 0",
    "huge output": "import os\n    while True: os.write(1, bytes(2**20))",
    "a huge value": "return 'a' * 2**27",
    "a value equal to everything": "return type('E', (), {'__eq__': lambda *_: True})()",
    "an int equal to everything": "return type('E', (int,), {'__eq__': lambda *_: True, '__hash__': int.__hash__})(4)",
    "redefines assertions": "import builtins; builtins.AssertionError = type('A', (BaseException,), {}); return 0",
    "looks for the test in its callers": "import sys\n    frame = sys._getframe()\n    while frame:\n"
                                         "        for v in list(frame.f_globals.values()):\n"
                                         "            if callable(v) and getattr(v, '__name__', '') == 'judge': "
                                         "v.__code__ = (lambda *a: None).__code__\n        frame = frame.f_back\n"
                                         "    return 0",
    "ends a process outside": "import os\n    for n in range(2, 70000):\n        try: os.kill(n, 9)\n"
                              "        except OSError: pass\n    return 0",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "recursion without end": "return f(x)",
    "crashes the interpreter": "import ctypes; ctypes.string_at(0)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails_and_leaves_nothing(attack):
    _attack_fails(attack)


@pytest.mark.parametrize("attack", ["fork bomb", "kills everything", "prints a verdict", "os._exit(0)", "memory bomb"])
def test_an_attack_fails_in_every_way(attack, way):
    _attack_fails(attack)


def _attack_fails(attack: str) -> None:
    before, start = set(os.listdir("/tmp")), time.monotonic()
    verdict = check(ATTACKS[attack])
    assert not verdict.passed and verdict.reason
    assert time.monotonic() - start < QUICK.seconds + 3
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("ptq-cell")]
    assert check("return x").passed  # and the next sample is scored as if nothing had been


@pytest.mark.parametrize("top", [False, True])
def test_attacks_before_the_function_is_called(top):
    """The module level of the program runs too, before any test."""
    line = "import os; os._exit(0)" if top else "raise SystemExit(0)"
    assert not sandbox.check(f"{PROMPT}    return x\n{line}\n", PROMPT, TEST, "f", QUICK).passed


def test_nothing_outside_can_be_written(way, tmp_path):
    targets = [str(tmp_path / "x"), "/x", "/usr/lib/x", "/var/tmp/x", "/dev/shm/x", str(Path.home() / "ptq-x")]
    os.chmod(tmp_path, 0o777)
    for target in targets:
        verdict = check(f"open({target!r}, 'w').write('x')\n    return True", "def check(c):\n    assert c(0)\n")
        assert not verdict.passed and "Error" in verdict.reason, target
        assert not os.path.exists(target)
    own = f"/tmp/{tmp_path.name}-{time.time_ns()}"
    assert check(f"open({own!r}, 'w').write('x')\n    return x").passed  # its own folder it may use,
    assert not os.path.exists(own)  # which is not the machine's


def test_nothing_outside_can_be_read(way, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("s")
    monkeypatch.setenv("PTQ_SECRET", "s")
    test = "def check(c):\n    assert c(0)\n"
    with tempfile.NamedTemporaryFile(dir=Path.home()) as at_home:
        for source in (str(secret), at_home.name, "/etc/passwd", "/proc/1/environ", "/proc/self/environ"):
            assert not check(f"return len(open({source!r}, 'rb').read()) >= 0", test).passed, source
        assert not check(f"import os\n    return {at_home.name!r}.split('/')[-1] in os.listdir({str(Path.home())!r})",
                         test).passed
    names = "import os\n    return sorted(set(os.environ) - {'LC_CTYPE', 'PWD'})"
    assert check(names, "def check(c):\n    assert c(0) == []\n").passed


def test_there_is_no_network(way):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = server.getsockname()
        connect = f"import socket\n    socket.create_connection({address!r}, 1)\n    return True"
        assert not check(connect, "def check(c):\n    assert c(0)\n").passed
        with pytest.raises(TimeoutError):
            server.accept()
        with socket.create_connection(address, 1):  # there was somebody to be reached
            server.accept()[0].close()


def test_there_are_no_privileges(way):
    test = "def check(c):\n    assert c(0)\n"
    for body in ("os.setuid(0)\n    return True", "os.chroot('/tmp')\n    return True", "os.nice(-1)\n    return True",
                 "os.sethostname(b'x') if hasattr(os, 'sethostname') else 1 / 0\n    return True",
                 "import ctypes\n    return ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
                 "import ctypes\n    return ctypes.CDLL(None).umount2(b'/usr/lib', 2) == 0",
                 "return os.getuid() == 0"):
        assert not check(f"import os\n    {body}", test).passed, body


def test_what_it_started_ends_with_it(way):
    """A child in a session of its own is ended too."""
    mark = f"ptq{time.time_ns() % 10**9}"
    body = (f"import ctypes, os, time\n    ctypes.CDLL(None).prctl(15, {mark.encode()!r})\n    if os.fork() == 0:\n"
            f"        os.setsid()\n        time.sleep(1000)\n    return open('/tmp/x', 'w').write('x')")

    def alive():
        return mark in {p.read_text().strip() for p in Path("/proc").glob("[0-9]*/comm") if p.exists()}

    assert check(body, "import time\ndef check(c):\n    assert c(0) == 1\n").passed
    end = time.monotonic() + 2
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive()


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an ordinary user already")
@pytest.mark.parametrize("chosen_way", ["namespaces", "bubblewrap"])
def test_an_ordinary_user_is_confined_as_well(tmp_path, chosen_way):
    """With an interpreter that everybody may read, outside of any user's folders."""
    python = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), None)
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("no interpreter that another user may read")
    here = Path(sandbox.__file__).parent
    package = tmp_path / "suite"
    package.mkdir()
    for name in ("sandbox.py", "cell.py", "errors.py"):
        shutil.copy(here / name, package / name)
    (package / "__init__.py").touch()
    for folder in (package, tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(0o755)
    if chosen_way == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    chosen = ["fork bomb", "kills everything", "os._exit(0)", "memory bomb", "ends a process outside"]
    code = ("import json, os, sys\nfrom suite import sandbox\n"
            "if sandbox._way()[0] is None: print(json.dumps(sandbox._way())); sys.exit(0)\n"
            f"sandbox._way = lambda: ({chosen_way!r}, '')\n"
            f"limits = sandbox.Limits(1, 3.0, 256)\n"
            f"run = lambda body: sandbox.check({PROMPT!r} + '    ' + body, {PROMPT!r}, {TEST!r}, 'f', limits).passed\n"
            f"print(json.dumps([os.getuid(), run('return x'), [run(b) for b in {[ATTACKS[a] for a in chosen]!r}],\n"
            f"    run('return x')]))\n")
    done = subprocess.run([python, "-c", code], cwd=tmp_path, user=ORDINARY, group=ORDINARY, extra_groups=[],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found[0] is None:
        pytest.skip(f"an ordinary user may not create namespaces here: {found[1]}")
    assert found == [ORDINARY, True, [False] * len(chosen), True]


# ---------------------------------------------------------------------------------------------- where nothing confines


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_way", lambda: (None, "no namespaces"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(PTQError, match="cannot be confined on this machine .no namespaces., so it is not run: install"):
        check("return x")


def test_what_the_kernel_refuses_is_told():
    with pytest.raises(PTQError, match=r"code cannot be confined on this machine \(.*mount.*\): install bubblewrap"):
        check("return x", limits=sandbox.Limits(file_mib=-1))
