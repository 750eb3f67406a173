"""Forwards on a device that never end are noticed, and none that ends."""

import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from bdlora_compile.errors import AgreementError
from bdlora_compile.runtime.step_watch import StepWatch

LIMIT = 0.2


@dataclass
class Device:
    """Marks that are passed when the test says so."""

    passed: set[int] = field(default_factory=set)
    count: int = 0
    broken: bool = False
    captures: bool = False

    def mark(self) -> "DeviceMark | None":
        if self.captures:
            return None
        self.count += 1
        return DeviceMark(self, self.count)


@dataclass(frozen=True)
class DeviceMark:
    device: Device
    number: int

    def query(self) -> bool:
        if self.device.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self.number in self.device.passed


@dataclass
class Watched:
    device: Device
    watch: StepWatch
    ended: threading.Event
    errors: list[AgreementError]


@pytest.fixture
def watched() -> Watched:
    device, ended, errors = Device(), threading.Event(), list[AgreementError]()

    def end(error: AgreementError) -> None:
        errors.append(error)
        ended.set()

    def give_up(reason: str) -> AgreementError:
        return AgreementError("forward", found=reason, expected="all ranks", remedy="look at rank 1")

    return Watched(
        device,
        StepWatch(timedelta(seconds=LIMIT), timedelta(seconds=4 * LIMIT), give_up, device.mark, end),
        ended,
        errors,
    )


def test_a_forward_that_never_ends_is_noticed(watched: Watched) -> None:
    watched.watch.launched()
    assert watched.ended.wait(10)
    assert "a forward that was not over after 0.2 s" in str(watched.errors[0])


def test_forwards_that_end_are_none(watched: Watched) -> None:
    """More of them than fit into the limit, several under way at a time."""
    for _ in range(8):
        watched.watch.launched()
        watched.watch.launched()
        assert not watched.ended.wait(LIMIT / 4)
        watched.device.passed.update(range(watched.device.count + 1))
    assert not watched.ended.wait(2 * LIMIT), "nothing runs: nothing is late"
    watched.device.broken = True
    assert not watched.ended.wait(LIMIT), "nothing runs: nothing is asked"


def test_the_last_of_several_forwards_is_noticed(watched: Watched) -> None:
    """Nobody launches another: whoever would is waiting for it."""
    watched.watch.launched()
    watched.watch.launched()
    assert not watched.ended.wait(LIMIT / 2)
    watched.device.passed.add(1)
    assert watched.ended.wait(10)


def test_a_host_that_is_far_ahead_is_no_loss(watched: Watched) -> None:
    """The device passes one forward after the other; all that are launched take it ten times the limit."""
    for _ in range(40):
        watched.watch.launched()
    for number in range(1, 40):
        assert not watched.ended.wait(LIMIT / 4)
        watched.device.passed.add(number)
    assert watched.ended.wait(10), "the last one does not end"


def test_the_first_forward_of_a_graph_has_more_time(watched: Watched) -> None:
    watched.watch.launched(is_first=True)
    assert not watched.ended.wait(2 * LIMIT)
    assert watched.ended.wait(10)
    assert "not over after 0.8 s" in str(watched.errors[0])


def test_what_is_captured_is_not_watched(watched: Watched) -> None:
    """It does not run before it is replayed, and asking for it would spoil the capture."""
    watched.device.captures = True
    watched.watch.launched()
    assert not watched.ended.wait(2 * LIMIT)


def test_a_device_that_fails_is_noticed(watched: Watched) -> None:
    watched.watch.launched()
    watched.device.broken = True
    assert watched.ended.wait(10)
    assert "the device failed: CUDA error" in str(watched.errors[0])


def test_a_watch_that_was_stopped_ends_nothing(watched: Watched) -> None:
    watched.watch.launched()
    watched.watch.stop()
    watched.watch.launched()
    assert not watched.ended.wait(3 * LIMIT)


def test_the_process_ends_although_its_main_thread_waits() -> None:
    """As one that waits for a device does, in a call that lets nothing in."""
    program = (
        "import datetime, time\n"
        "from bdlora_compile.errors import AgreementError\n"
        "from bdlora_compile.runtime.step_watch import StepWatch\n"
        "class Never:\n"
        "    def query(self): return False\n"
        "give_up = lambda reason: AgreementError('forward', found=reason, expected='all', remedy='look at rank 1')\n"
        "StepWatch(*[datetime.timedelta(seconds=0.2)] * 2, give_up, Never).launched()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "bdlora_compile: AgreementError: forward: found a forward that was not over after 0.2 s" in done.stderr
