"""Compresses and decompresses text with zlib: compress kib=256 level=6."""

import zlib


def handler(arguments):
    size = int(arguments.get("kib", "256")) << 10
    text = " ".join(f"word{i * i * 7919 % 10007}" for i in range(size // 5)).encode()[:size]
    packed = zlib.compress(text, int(arguments.get("level", "6")))
    if zlib.decompress(packed) != text:
        raise ValueError("decompressing gave something else")
    return {"bytes": len(text), "packed": len(packed), "crc": zlib.crc32(text)}
