"""The second stream starts behind the current one, which waits for it in any case; on GPUs `test_gpu_operators`."""

from unittest.mock import MagicMock

import pytest
import torch

from bdlora_compile.runtime import beside


@pytest.mark.parametrize("fails", [False, True])
def test_streams_meet_again_also_where_something_fails(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Memory that the second one uses is given back to the current one."""
    current, second = MagicMock(), MagicMock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(beside, "_stream_beside", {current: second}.get)

    def use() -> None:
        with beside._second_stream(torch.device("cuda")) as found:
            assert found is second
            second.wait_stream.assert_called_once_with(current)
            current.wait_stream.assert_not_called()
            if fails:
                raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            use()
    else:
        use()
    current.wait_stream.assert_called_once_with(second)


def test_each_stream_has_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording's is not that of plain forwards, and stays the same."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    plain, recording = MagicMock(), MagicMock()
    assert beside._stream_beside(plain) is beside._stream_beside(plain)
    assert beside._stream_beside(plain) is not beside._stream_beside(recording)
