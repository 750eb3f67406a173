"""What all tests of the kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _empty_is_nan() -> Iterator[None]:
    """Memory that nobody writes is NaN, and not by chance what was right in a call before.

    In the interpreter alone: on GPUs the same switch warns of cuBLAS.
    """
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
