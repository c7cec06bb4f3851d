"""Nothing: how long a request takes."""


def run(arguments):
    return b"", {}
