"""Compresses and decompresses text with zlib: compress kib=256 level=6."""

import zlib


def run(arguments):
    size = int(arguments.get("kib", "256")) * 1024
    words = " ".join(f"word{i * 7919 % 1000}" for i in range(size // 6)).encode()
    data = words[:size]
    packed = zlib.compress(data, int(arguments.get("level", "6")))
    if zlib.decompress(packed) != data:
        raise ValueError("decompressing gave something else")
    return data, {"bytes": len(data), "packed": len(packed)}
