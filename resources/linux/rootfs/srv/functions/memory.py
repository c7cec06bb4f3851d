"""Keeps memory between requests: `memory mib=8 seed=1` fills it and keeps it, `memory` alone digests what is kept.

A snapshot and every clone of it must tell the same digest.
"""

import zlib

kept = bytearray()


def handler(arguments):
    global kept
    if "mib" in arguments:
        pages = int(arguments["mib"]) << 8
        seed = int(arguments.get("seed", "1"))
        block = bytes((i * 2654435761 + seed * 97 >> 11) & 0xFF for i in range(4088))
        kept = bytearray(b"".join(block + page.to_bytes(8, "little") for page in range(pages)))
    return {"bytes": len(kept), "crc": zlib.crc32(kept)}
