"""Multiplies two matrices of integers in pure Python: matmul n=64 seed=1."""

import zlib


def matrix(n, seed):
    """n x n small integers from a linear congruential generator (Numerical Recipes)."""
    rows = []
    for _ in range(n):
        row = []
        for _ in range(n):
            seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
            row.append(seed >> 24)
        rows.append(row)
    return rows


def handler(arguments):
    n = int(arguments.get("n", "64"))
    seed = int(arguments.get("seed", "1"))
    a, b = matrix(n, seed), list(zip(*matrix(n, seed + 1)))
    product = [[sum(x * y for x, y in zip(row, column)) for column in b] for row in a]
    trace = sum(product[i][i] for i in range(n))
    return {"n": n, "trace": trace, "crc": zlib.crc32(repr(product).encode())}
