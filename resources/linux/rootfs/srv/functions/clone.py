"""What tells one clone of a snapshot from another: random numbers, clocks, and the metadata the host gave it."""

import os
import time

METADATA = "/sys/firmware/qemu_fw_cfg/by_name/opt/tvmm/metadata/raw"


def run(arguments):
    try:
        with open(METADATA, "rb") as file:
            metadata = file.read().strip().replace(b" ", b"")
    except FileNotFoundError:
        metadata = b"-"
    answers = {
        "random": os.urandom(16).hex(),
        "mono_ns": time.monotonic_ns(),
        "wall_ns": time.time_ns(),
        "metadata": metadata.decode("ascii", "backslashreplace"),
    }
    return b"", answers
