"""Plans by GPU: (tokens, in_features, out_features, width) -> fields of `tiles.OneLaunch` or of a shrink and an expand.

Written by `benchmarks/tune.py`; do not edit.
"""

Key = tuple[int, int, tuple[int, ...], int]
Fields = tuple[int, ...] | tuple[tuple[int, ...], tuple[int, ...]]

TUNED: dict[str, dict[Key, Fields]] = {}
