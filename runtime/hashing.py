"""SHA-256 of much data, on several cores."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_THREADS = 4
"""A core hashes 2 GB/s, and Python lets go of its lock meanwhile. Ranks of one host share its cores."""

Part = Sequence[bytes | torch.Tensor]


def sha256_of(parts: Sequence[Part]) -> str:
    """SHA-256, in hexadecimal, of the SHA-256 of each part; a part is what its members hold, one after the other.

    Args:
        parts: bytes, and tensors of the CPU.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="bdlora-sha256") as pool:
        # A thread takes every so many parts: handing them over one by one would take as long as hashing them.
        shares = list(pool.map(lambda first: [_sha256(part) for part in parts[first::_THREADS]], range(_THREADS)))
    in_order = (shares[place % _THREADS][place // _THREADS] for place in range(len(parts)))
    return hashlib.sha256(b"".join(in_order)).hexdigest()


def _sha256(part: Part) -> bytes:
    digest = hashlib.sha256()
    for member in part:
        if isinstance(member, torch.Tensor):
            digest.update(member.contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(member)
    return digest.digest()
