"""Writes records as JSON and reads them back: json records=1000 rounds=1."""

import json
import zlib


def handler(arguments):
    count = int(arguments.get("records", "1000"))
    records = [
        {"id": i, "name": f"user{i}", "tags": ["a", "b", str(i % 7)], "score": i * 0.5, "active": i % 3 == 0}
        for i in range(count)
    ]
    text = json.dumps(records)
    for _ in range(int(arguments.get("rounds", "1"))):
        text = json.dumps(json.loads(text))
    return {"bytes": len(text), "crc": zlib.crc32(text.encode())}
