# Imports a module and answers a line of key=value with a line: "ok key=value ..." or "err message".
import os, runpy, sys

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the module prints is no answer


def word(value):
    return "".join(c if "!" <= c <= "~" else "_" for c in str(value))


handler = runpy.run_path(sys.argv[1])["handler"]
for line in sys.stdin:
    try:
        result = handler(dict(pair.split("=", 1) for pair in line.split())) or {}
        if not isinstance(result, dict):
            result = {"result": result}
        answers.write(" ".join(["ok"] + [f"{word(k)}={word(v)}" for k, v in result.items()]) + "\n")
    except Exception as error:
        answers.write("err " + " ".join(f"{type(error).__name__}: {error}".split()) + "\n")
