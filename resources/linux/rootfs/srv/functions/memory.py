"""Keeps memory between requests: memory mib=8 seed=1 fills and keeps it, memory alone tells the digest of what is kept.

A snapshot and every clone of it must tell the same digest.
"""

kept = bytearray()


def run(arguments):
    global kept
    if "mib" in arguments:
        size = int(arguments["mib"]) << 20
        seed = int(arguments.get("seed", "1"))
        block = bytes((i * 2654435761 + seed * 97 >> 11) & 0xFF for i in range(4096))
        kept = bytearray()
        for page in range(size // 4096):
            kept += block[:4088] + page.to_bytes(8, "little")
    return bytes(kept), {"bytes": len(kept)}
