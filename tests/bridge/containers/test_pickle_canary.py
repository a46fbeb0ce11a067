"""No payload of a pickle is executed. A child process reads each one under an audit hook that would detect it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.torch_archives import archive, integer, name, pickled, text

CHILD = """
import json, pickle, sys
from pathlib import Path
import bridge
from bridge.containers.torch_zip import read_file

folder, mode = Path(sys.argv[1]), sys.argv[2]
sources = sorted(folder.glob("*"))
try:
    read_file(sources[0])  # everything that reading imports is imported now
except bridge.BridgeError:
    pass

WATCHED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.",
    "import", "exec", "compile", "ctypes.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "shutil.",
    "urllib.Request", "webbrowser.open", "pickle.find_class", "marshal.loads", "code.__new__", "os.putenv", "glob.glob")
events, watching = [], False

def hook(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event.startswith(WATCHED) or writes:
        events.append(event)

sys.addaudithook(hook)
outcomes = []
for source in sources:
    content = source.read_bytes()
    events.clear()
    watching = True
    try:
        if mode == "ours":
            read_file(source)
        else:
            pickle.loads(content)
        outcome = "loaded"
    except bridge.BridgeError:
        outcome = "refused"
    except Exception as error:
        outcome = repr(error)
    watching = False
    outcomes.append([source.name, outcome, list(events)])
print(json.dumps(outcomes))
"""

CALLS: dict[str, tuple[str, str, bytes]] = {
    f"{module}.{attribute}": (module, attribute, arguments)
    for module, attribute, arguments in [
        ("os", "system", text("touch canary")),
        ("posix", "system", text("touch canary")),
        ("nt", "system", text("touch canary")),
        ("os", "popen", text("touch canary")),
        ("os", "remove", text("canary")),
        ("os", "mkdir", text("canary")),
        ("os", "putenv", text("CANARY") + text("1")),
        ("subprocess", "Popen", text("touch canary")),
        ("subprocess", "run", text("touch canary")),
        ("subprocess", "check_output", text("touch canary")),
        ("builtins", "eval", text("__import__('os').system('touch canary')")),
        ("builtins", "exec", text("import this")),
        ("builtins", "compile", text("1") + text("f") + text("eval")),
        ("builtins", "open", text("canary") + text("w")),
        ("builtins", "__import__", text("this")),
        ("builtins", "getattr", text("x") + text("upper")),
        ("builtins", "map", text("x") + text("y")),
        ("__builtin__", "eval", text("1")),
        ("importlib", "import_module", text("this")),
        ("runpy", "run_path", text("canary")),
        ("code", "interact", text("x")),
        ("pty", "spawn", text("sh")),
        ("socket", "socket", b""),
        ("urllib.request", "urlopen", text("http://127.0.0.1")),
        ("webbrowser", "open", text("http://127.0.0.1")),
        ("ctypes", "CDLL", text("libc.so.6")),
        ("pickle", "loads", text("x")),
        ("_pickle", "loads", text("x")),
        ("marshal", "loads", text("x")),
        ("types", "CodeType", text("x")),
        ("types", "FunctionType", text("x")),
        ("functools", "partial", text("x")),
        ("functools", "reduce", text("x")),
        ("operator", "attrgetter", text("system")),
        ("operator", "methodcaller", text("system")),
        ("numpy", "load", text("canary")),
        ("numpy.core.multiarray", "_reconstruct", text("x")),
        ("torch", "load", text("canary")),
        ("torch.hub", "load", text("x")),
        ("torch.jit", "load", text("x")),
        ("torch", "FloatStorage", text("x")),
        ("torch._utils", "_rebuild_wrapper_subclass", text("x")),
        ("torch._utils", "_rebuild_parameter_with_state", text("x")),
        ("shutil", "rmtree", text("canary")),
        ("tempfile", "mktemp", text("x")),
        ("logging.config", "dictConfig", b"}"),
        ("timeit", "timeit", text("x")),
        ("pydoc", "pipepager", text("x") + text("touch canary")),
        ("collections", "namedtuple", text("x") + text("y")),
        ("collections.OrderedDict", "fromkeys", text("x")),
        ("collections", "OrderedDict.fromkeys", text("x")),
        ("bridge.storage.fsync", "flush_to_disk", text("x")),
        ("__main__", "anything", text("x")),
        ("", "", text("x")),
    ]
}
OS_SYSTEM = name("os", "system")
OTHERS: dict[str, bytes] = {
    "a payload before a broken tail": b"\x80\x02" + OS_SYSTEM + b"(" + text("touch canary") + b"tR\xff\xff",
    "a second pickle": pickled(b"N") + pickled(OS_SYSTEM + b"(" + text("touch canary") + b"tR"),
    "hidden by the memo": b"\x80\x04("
    + text("os")
    + b"q\0"
    + text("system")
    + b"q\1th\0h\1\x93("
    + text("touch canary")
    + b"tR.",
    "EXT1": pickled(b"\x82\x01"),
    "EXT2": pickled(b"\x83\x01\x00"),
    "EXT4": pickled(b"\x84\x01\x00\x00\x00"),
    "a state with __setstate__": pickled(b"}}" + text("__setstate__") + OS_SYSTEM + b"sb"),
    "a state with __reduce__": pickled(
        name("collections", "OrderedDict") + b")R}" + text("__reduce__") + OS_SYSTEM + b"sb"
    ),
    "a state with __class__": pickled(name("collections", "OrderedDict") + b")R}" + text("__class__") + b"Nsb"),
    "an OrderedDict of a global": pickled(name("collections", "OrderedDict") + b"(" + OS_SYSTEM + b"tR"),
    "a persistent id that is a global": pickled(OS_SYSTEM + b"Q"),
    "PERSID": pickled(b"Pcanary\n"),
    "buffers": b"\x80\x05\x97.",
    "a parameter of a global": pickled(name("torch._utils", "_rebuild_parameter") + b"(" + OS_SYSTEM + b"\x89NtR"),
    "a global as a value": pickled(name("torch", "FloatStorage")),
    "a set": b"\x80\x04\x8f.",
    "a frozenset": b"\x80\x04(\x91.",
}


def shapes(module: str, attribute: str, arguments: bytes) -> dict[str, bytes]:
    """Return a pickle for each opcode that calls an object."""
    found = name(module, attribute)
    by_stack = text(module) + text(attribute) + b"\x93"
    return {
        "REDUCE": pickled(found + b"(" + arguments + b"tR"),
        "STACK_GLOBAL": b"\x80\x04" + by_stack + b"(" + arguments + b"tR.",
        "INST": pickled(b"(" + arguments + f"i{module}\n{attribute}\n".encode()),
        "OBJ": pickled(b"(" + found + arguments + b"o"),
        "NEWOBJ": pickled(found + b"(" + arguments + b"t\x81"),
        "NEWOBJ_EX": b"\x80\x04" + by_stack + b"(" + arguments + b"t}\x92.",
        "BUILD": pickled(found + b"}" + integer(1) + b"Nsb"),
    }


def payloads() -> dict[str, bytes]:
    built = {f"{call} by {how}": p for call, parts in CALLS.items() for how, p in shapes(*parts).items()}
    return {**built, **OTHERS}


def outcomes(folder: Path, contents: dict[str, bytes], mode: str) -> dict[str, tuple[str, list[str]]]:
    folder.mkdir()
    for number, content in enumerate(contents.values()):
        (folder / f"{number:04}.bin").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folder, mode],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {what: (outcome, events) for what, (_, outcome, events) in zip(contents, found, strict=True)}


def test_every_payload_is_refused_and_none_runs(tmp_path: Path) -> None:
    every = {what: archive(content) for what, content in payloads().items()}
    assert len(every) >= 100
    found = outcomes(tmp_path / "payloads", every, "ours")
    assert {what: of for what, of in found.items() if of != ("refused", [])} == {}
    assert not list(tmp_path.rglob("canary"))
    print(f"{len(found)} payloads")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("call", "event"),
    {
        "os.system": "os.system",
        "os.mkdir": "os.mkdir",
        "os.putenv": "os.putenv",
        "subprocess.Popen": "subprocess.Popen",
        "builtins.eval": "compile",
        "builtins.exec": "exec",
        "builtins.open": "open",
        "importlib.import_module": "exec",
        "builtins.__import__": "import",
        "socket.socket": "socket.__new__",
        "ctypes.CDLL": "ctypes.dlopen",
        "pickle.loads": "pickle.find_class",
        "shutil.rmtree": "shutil.rmtree",
    }.items(),
)
def test_the_audit_hook_detects_payloads(tmp_path: Path, call: str, event: str) -> None:
    """Python's own unpickler executes the less harmful ones of the same payloads, and the hook reports them."""
    found = outcomes(tmp_path / "payloads", {call: shapes(*CALLS[call])["REDUCE"]}, "pickle")
    assert event in found[call][1]
