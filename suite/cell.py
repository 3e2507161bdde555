"""What runs inside a cell of `suite.sandbox`: a script for a bare interpreter, never imported by the suite.

A cell confines itself before it reads a line of a program: namespaces of its own (users, processes, mounts, network,
messages), a file system that holds nothing but the interpreter's libraries, read-only, and one small writable folder,
no privileges, and limits on processor time, memory, files and processes. Two roles:

    answer  executes the program of the model and calls the function that the judge asks for
    judge   executes the test; its `candidate` hands arguments to the other cell and gets values back

No code of the model ever runs in the judge's process, so the verdict that it writes is the test's own. Between the two
only plain values pass: None, bool, int, float, complex, str, bytes, and lists, tuples, sets and dicts of them.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import signal
import struct
import sys

LARGEST = 4 * 2**20  # bytes of a message between the cells

# ---------------------------------------------------------------------------------------------- values


def pack(value: object) -> object:
    """A plain value as JSON that keeps its type. Raises TypeError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value if type(value) in (type(None), bool, str) else str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [pack(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    raise TypeError(f"a {type(value).__name__} is no plain value")


def unpack(found: object) -> object:
    """The inverse of `pack`."""
    if not isinstance(found, list):
        return found
    kind, content = found
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](unpack(item) for item in content)


def send(pipe: int, message: object) -> None:
    data = json.dumps(message).encode()
    if len(data) > LARGEST:
        raise ValueError(f"a message of {len(data)} bytes: at most {LARGEST} pass")
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(pipe, data):]


def receive(pipe: int) -> object:
    """The next message. Raises EOFError where the other side is gone, or says more than it may."""
    (length,) = struct.unpack("!I", _exactly(pipe, 4))
    if length > LARGEST:
        raise EOFError("the answer is too long")
    return json.loads(_exactly(pipe, length))


def _exactly(pipe: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = os.read(pipe, min(count - len(found), 2**16))
        if not more:
            raise EOFError("the program ended before it answered")
        found += more
    return found


# ---------------------------------------------------------------------------------------------- the two roles


def answer(program: str, asked: int, told: int) -> None:
    """Executes the program; then, for each call that is asked for, tells the value and what became of the arguments."""
    scope: dict = {"__name__": "__program__"}
    try:
        exec(compile(program, "<program>", "exec"), scope)  # noqa: S102
    except BaseException as error:
        send(told, ["error", type(error).__name__, str(error)[:300]])
        return
    send(told, ["ready"])
    while True:
        try:
            name, positional, named = receive(asked)
        except EOFError:
            return
        positional, named = unpack(positional), unpack(named)
        try:
            value = scope[name](*positional, **named)
            message = ["value", pack(value), pack(positional)]
        except BaseException as error:
            message = ["error", type(error).__name__, str(error)[:300]]
        send(told, message)


def judge(case: dict, ask: int, hear: int, verdict: int) -> None:
    """Executes the test on the other cell's function, and writes the verdict: ["passed"] or ["failed", why]."""

    def candidate(*positional, **named):
        send(ask, [case["entry_point"], pack(list(positional)), pack(named)])
        reply = receive(hear)
        if reply[0] == "error":
            raise _exception(reply)
        for mine, theirs in zip(positional, unpack(reply[2])):  # what the function did to its arguments
            if isinstance(mine, list) and mine != theirs:
                mine[:] = theirs
            elif isinstance(mine, (dict, set)) and mine != theirs:
                mine.clear()
                mine.update(theirs)
        return unpack(reply[1])

    try:
        reply = receive(hear)
        if reply[0] == "error":
            raise _exception(reply)
        scope: dict = {"__name__": "__test__"}
        exec(compile(case["prompt"], "<prompt>", "exec"), scope)  # noqa: S102  helpers that the prompt gives
        scope[case["entry_point"]] = candidate
        exec(compile(case["test"], "<test>", "exec"), scope)  # noqa: S102
        scope["check"](candidate)
        found = ["passed"]
    except BaseException as error:
        found = ["failed", f"{type(error).__name__}: {error}"[:300]]
    send(verdict, found)


def _exception(reply: list) -> BaseException:
    kind = getattr(builtins, str(reply[1]), None)
    usable = isinstance(kind, type) and issubclass(kind, Exception)
    return (kind if usable else RuntimeError)(reply[2] if usable else f"{reply[1]}: {reply[2]}")


# ---------------------------------------------------------------------------------------------- confinement

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_KEPT = 1 | 2 | 4 | 8 | 1024 | 2048 | (1 << 21)  # flags of a mount that a later one may not lose
_DUMPABLE, _NO_NEW_PRIVS, _PDEATHSIG, _CAPBSET_DROP = 4, 38, 1, 24
NOBODY = 65534  # how the user of a cell is called inside it
SPARE_UIDS = 2_000_000_000  # started by root, each cell has a user of its own, beyond those that a machine knows
_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    text = [part and part.encode() for part in (source, target, kind, options)]
    _call("mount", text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])


def confine(root: str, visible: list[str], limits: dict) -> None:
    """Moves this process into namespaces of its own; afterwards it is a child, in a file system under `root`.

    visible: folders that stay, read-only. Raises OSError where the kernel refuses.
    """
    user, group, privileged = os.getuid(), os.getgid(), os.geteuid() == 0  # unknown once the namespaces are new
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    _call("unshare", flags if privileged else flags | _NEWUSER)
    if not privileged:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"),
                           ("gid_map", f"{NOBODY} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _file_system(root, visible, limits["file_mib"])
    _become_first_process()
    _give_up_privileges(SPARE_UIDS + limits["number"] if privileged else None)


def _file_system(root: str, visible: list[str], file_mib: int) -> None:
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={file_mib}m,mode=1777,nr_inodes=1024")
    for path in visible:  # after the writable folder, below which an interpreter may stand
        target = root + path
        if os.path.islink(path):  # /lib on most systems
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            try:
                _mount(path, target, None, _BIND)
            except OSError:  # there are further mounts below it
                _mount(path, target, None, _BIND | _REC)
            kept = os.statvfs(target).f_flag & _KEPT
            _mount(None, target, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)
    os.makedirs(f"{root}/dev")
    open(f"{root}/dev/null", "w").close()
    _mount("/dev/null", f"{root}/dev/null", None, _BIND)
    os.makedirs(f"{root}/.old")
    _call("pivot_root", root.encode(), f"{root}/.old".encode())
    os.chdir("/")
    _call("umount2", b"/.old", 2)  # detached: it is in use by the rest of the machine
    os.rmdir("/.old")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir("/tmp")


def _become_first_process() -> None:
    """Forks twice: the first child is process 1 of the namespace and ends with the second, which goes on here. When
    process 1 ends, the kernel ends whatever is left in the namespace."""
    parent = os.getpid()
    child = os.fork()
    if child:
        _end_with(child)
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() not in (0, parent):
        os._exit(1)
    child = os.fork()
    if child:
        _end_with(child)


def _end_with(child: int) -> None:
    os.closerange(0, 1024)  # so that the other side of a pipe sees the end of the child alone
    while True:
        try:
            found, status = os.wait()
        except ChildProcessError:
            os._exit(1)
        if found == child:
            os._exit(0 if status == 0 else 1)


def _give_up_privileges(uid: int | None) -> None:
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)  # refused for numbers that the kernel does not know
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, none)
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(limits: dict) -> None:
    """Limits that hold for this process and each of its children."""
    memory, seconds = limits["memory_mib"] * 2**20, limits["cpu_seconds"]
    for kind, soft, hard in (
            (resource.RLIMIT_CPU, seconds, seconds + 1), (resource.RLIMIT_AS, memory, memory),
            (resource.RLIMIT_FSIZE, limits["file_mib"] * 2**20, limits["file_mib"] * 2**20),
            (resource.RLIMIT_NOFILE, 32, 32), (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_NPROC, limits["processes"], limits["processes"])):
        resource.setrlimit(kind, (soft, hard))


def main() -> None:
    """Arguments: the role, the way of confinement ("namespaces", or "bubblewrap" if that was done), pipes by number.
    The case is read from the first pipe: {"limits", "root", "visible", ...}. A first byte "+" says that the cell is
    confined; "-" and a reason that it could not be."""
    role, way = sys.argv[1:3]
    case_pipe, status, *pipes = map(int, sys.argv[3:])
    with open(case_pipe, encoding="utf-8") as file:
        case = json.load(file)
    try:
        if way == "namespaces":
            confine(case["root"], case["visible"], case["limits"])
        limit(case["limits"])
    except (OSError, ValueError) as error:
        os.write(status, f"-{error}".encode())
        os._exit(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.write(status, b"+")
    os.close(status)
    if role == "answer":
        answer(case["program"], *pipes)
    else:
        judge(case, *pipes)


if __name__ == "__main__":
    main()
