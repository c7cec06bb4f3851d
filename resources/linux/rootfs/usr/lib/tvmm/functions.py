"""Python functions for a microVM: those in /srv/functions, imported once, called by lines.

    functions.py PORT     listens on a vsock port
    functions.py -        reads standard input, for a program that listens itself

Protocol, as of the tiny guest (resources/guest/README.md):

    run <id> <function> <key=value>...    ->    ok <id> <digest> <guest us> <key=value>...
                                                err <id, or -> <message>

One answer per line, in order; connections are served side by side, functions run one at a time. A function is a module
with `run(arguments)`: it takes a dict of strings and returns (result, answers): bytes whose BLAKE2 digest is told, and a
dict of what else to tell. An exception is an `err`.
"""

import importlib.util
import re
import socket
import sys
import threading
import time
from hashlib import blake2b
from pathlib import Path

FUNCTIONS = Path("/srv/functions")
LINE_MAX = 4096
IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]{1,32}")


class Refused(Exception):
    """A request that cannot be carried out, and why."""


def load(folder):
    """Every function there is, by name."""
    functions = {}
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"functions.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        functions[path.stem] = module.run
    return functions


def parse(words):
    """Arguments by key. Words without `=` and doubled keys are refused."""
    arguments = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise Refused(f"'{word}' is not key=value")
        if key in arguments:
            raise Refused(f"the key '{key}' is there twice")
        arguments[key] = value
    return arguments


def call(functions, words):
    """What a function says to a request's words: digest, microseconds, key=value words."""
    if not words:
        raise Refused("a request is run <id> <function> <key=value>...")
    run = functions.get(words[0])
    if run is None:
        raise Refused(f"no function '{words[0]}'; there are {' '.join(sorted(functions))}")
    arguments = parse(words[1:])
    began = time.perf_counter_ns()
    result, answers = run(arguments)
    spent = (time.perf_counter_ns() - began) // 1000
    digest = blake2b(result, digest_size=8).hexdigest()
    return " ".join([digest, str(spent), *(f"{key}={value}" for key, value in answers.items())])


def answer(functions, line):
    """The answer to one line, without its newline."""
    words = line.split()
    identifier = "-"
    try:
        if len(line) > LINE_MAX or not line.isascii() or not line.isprintable():
            raise Refused(f"a request is one line of printable ASCII, {LINE_MAX} bytes at most")
        if words[0] != "run" or len(words) < 2 or not IDENTIFIER.fullmatch(words[1]):
            raise Refused("a request is run <id> <function> <key=value>...")
        identifier = words[1]
        return f"ok {identifier} {call(functions, words[2:])}"
    except Exception as error:  # whatever a function does, the next request is served
        said = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        return f"err {identifier} {' '.join(said.split()) or 'failed'}"


def serve(functions, lock, lines, send):
    """Answers lines until there are no more."""
    while line := lines.readline(LINE_MAX + 2):
        if not line.endswith(b"\n"):
            send(f"err - a request is one line of at most {LINE_MAX} bytes\n".encode())
            return
        text = line.decode("latin-1").strip("\r\n")
        if text.strip():
            with lock:
                said = answer(functions, text)
            send(f"{said}\n".encode("ascii", "replace"))


def serve_connection(functions, lock, connection):
    with connection, connection.makefile("rb") as lines:
        try:
            serve(functions, lock, lines, connection.sendall)
        except OSError:
            pass  # the host went away, or this is a clone of a snapshot: connections do not survive that


def listen(functions, port):
    lock = threading.Lock()
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve_connection, args=(functions, lock, connection), daemon=True).start()


def send(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    known = load(FUNCTIONS)
    if sys.argv[1:] == ["-"]:
        serve(known, threading.Lock(), sys.stdin.buffer, send)
    else:
        listen(known, int(sys.argv[1]))
