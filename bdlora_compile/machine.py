"""What a machine costs: the constants of the time model (`cost.py`), shipped as a table or measured by `calibrate`.

A collective over N ranks takes ``latency + wire bytes / bandwidth``, wire bytes as `collective_cost.py` counts them.
Where N was not measured the nearest measured number of ranks stands in: its latency is taken to grow with the fourth
root of N, and the bandwidth of a rank to stay. From two to four H200 that is 1.19 times, and was 1.07 to 1.26; beyond,
it is a guess. Whoever prints such a number says that it is extrapolated.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import pydantic
import torch

from bdlora_compile.errors import ConfigError

CollectiveKind = Literal["all_reduce", "all_gather_into_tensor"]
"""Operators that graphs hold."""
LinkKind = Literal["all_reduce", "all_gather_into_tensor", "one_shot", "two_shot"]
"""What has a cost of its own: those through the process group, and both ways through symmetric memory."""


@dataclass(frozen=True, slots=True)
class Link:
    """The cost of one kind of collective over a number of ranks.

    Attributes:
        latency: seconds of a collective that moves nothing.
        bandwidth: wire bytes that a rank sends in a second.
    """

    latency: pydantic.PositiveFloat
    bandwidth: pydantic.PositiveFloat

    def seconds(self, wire_bytes: float) -> float:
        """Time of one collective."""
        return self.latency + wire_bytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class SymmetricLimits:
    """Up to which size all-reduces through symmetric memory are the fastest (`runtime/all_reduce.py`).

    Attributes:
        one_shot: bytes of the largest message for which one-shot is.
        two_shot: bytes of the largest for which two-shot is, beyond those; larger ones go through NCCL.
    """

    one_shot: pydantic.NonNegativeInt
    two_shot: pydantic.NonNegativeInt


@dataclass(frozen=True, slots=True)
class Machine:
    """Constants of one kind of machine.

    Attributes:
        name: what reports call it.
        source: how, when and on what it was measured, and what was not.
        memory_bandwidth: bytes that a kernel reads in a second.
        flops: multiplications and additions of a large matrix product in a second.
        launch: seconds that a kernel costs beyond its bytes and FLOPs: a node of a CUDA graph that starts as LoRA's do
            (early, where a GPU can), an operator on a CPU.
        all_reduce, all_gather: by number of ranks, those that were measured.
        symmetric: which sizes go through symmetric memory, by number of ranks; empty where there is none.
        one_shot, two_shot: costs of those, by number of ranks; where they are empty they cost what ``all_reduce`` does.
    """

    name: str
    source: str
    memory_bandwidth: pydantic.PositiveFloat
    flops: pydantic.PositiveFloat
    launch: pydantic.NonNegativeFloat
    all_reduce: Mapping[int, Link]
    all_gather: Mapping[int, Link]
    symmetric: Mapping[int, SymmetricLimits] = field(default_factory=dict)
    one_shot: Mapping[int, Link] = field(default_factory=dict)
    two_shot: Mapping[int, Link] = field(default_factory=dict)

    def symmetric_limits(self, ranks: int) -> SymmetricLimits | None:
        """The limits for a number of ranks, or from those of the nearest measured one; None if none was measured.

        What a rank reads is what counts: one-shot that is N - 1 times the message, two-shot nearly the same for all N.
        """
        if not self.symmetric:
            return None
        nearest = _nearest(self.symmetric, ranks)
        known = self.symmetric[nearest]
        one_shot = known.one_shot * (nearest - 1) // max(ranks - 1, 1)
        return SymmetricLimits(min(one_shot, known.two_shot), known.two_shot)

    def without_symmetric_memory(self) -> "Machine":
        """The same, with every collective through the process group."""
        return replace(self, symmetric={}, one_shot={}, two_shot={})

    def link(self, kind: LinkKind, ranks: int) -> Link:
        """The cost of a collective over ``ranks``, extrapolated where that number was not measured.

        Raises:
            ConfigError: none was measured.
        """
        measured = self._links(kind)
        if not measured:
            raise ConfigError(
                f"machine {self.name!r}",
                found="one rank's constants, measured without collectives",
                expected=f"{kind} over some ranks",
                remedy="run `bdlora calibrate --tp N` on the ranks that serve",
            )
        if ranks in measured:
            return measured[ranks]
        nearest = _nearest(measured, ranks)
        known = measured[nearest]
        return Link(known.latency * (ranks / nearest) ** 0.25, known.bandwidth)

    def is_measured(self, ranks: int) -> bool:
        """Whether both collectives were measured over this number of ranks."""
        return ranks == 1 or (ranks in self.all_reduce and ranks in self.all_gather)

    def to_json(self) -> str:
        """The file that ``machine=`` accepts."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def _links(self, kind: LinkKind) -> Mapping[int, Link]:
        if kind == "all_gather_into_tensor":
            return self.all_gather
        own = {"one_shot": self.one_shot, "two_shot": self.two_shot}.get(kind)
        return own or self.all_reduce


def _nearest(measured: Iterable[int], ranks: int) -> int:
    return min(measured, key=lambda known: (abs(math.log2(known / ranks)), known))


def find_machine(machine: Machine | str | Path | None, device: torch.device | None = None) -> Machine:
    """A machine by its name in the shipped table, from a file of `bdlora calibrate`, or the default for a device.

    Raises:
        ConfigError: there is no such name or file, or the file is not that of a machine.
    """
    if isinstance(machine, Machine):
        return machine
    if machine is None:
        machine = _default_for(device)
    known = known_machines()
    if str(machine) in known:
        return _parse((_folder() / f"{machine}.json").read_text(), str(machine))
    path = Path(machine)
    if not path.is_file():
        raise ConfigError(
            f"machine {str(machine)!r}",
            found="neither a known name nor a file",
            expected=f"one of {', '.join(known)}, or a file that `bdlora calibrate --out` wrote",
            remedy="choose one of them, or run `bdlora calibrate`",
        )
    return _parse(path.read_text(), str(path))


def _default_for(device: torch.device | None) -> str:
    if device is not None and device.type == "cpu":
        return "cpu-gloo"
    has_gpu = device is not None and torch.cuda.is_available()
    return "h200-nvlink" if has_gpu and "H200" in torch.cuda.get_device_name(device) else "h100-nvlink"


def known_machines() -> Sequence[str]:
    """Names in the shipped table."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def fit_link(points: Sequence[tuple[float, float]], what: str) -> Link:
    """Latency and bandwidth from measured (wire bytes, seconds), by least squares of relative errors.

    Relative errors, so that a collective of a few bytes counts as much as a large one. ``what`` is named by errors.

    Raises:
        ConfigError: fewer than two sizes, or times that do not grow with size.
    """
    rows = torch.tensor([[1.0 / seconds, size / seconds] for size, seconds in points], dtype=torch.float64)
    # Bytes are counted in units of the largest size: the system is then well conditioned.
    unit = max((size for size, _ in points), default=0.0)
    if unit <= 0 or len({size for size, _ in points}) < 2:
        raise ConfigError(
            f"fit of {what}",
            found=f"sizes {[size for size, _ in points]}",
            expected="two or more",
            remedy="add sizes",
        )
    rows[:, 1] /= unit
    solution = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    latency, per_unit = solution
    if per_unit <= 0:
        raise ConfigError(
            f"fit of {what}",
            found=f"times that do not grow with size: {[round(seconds * 1e6, 1) for _, seconds in points]} us",
            expected="a line with a positive slope",
            remedy="end other work on this machine and run it again, or try --quick",
        )
    # A negative latency is noise of the largest sizes: the smallest measured time bounds it.
    return Link(max(latency, min(seconds for _, seconds in points) / 10), unit / per_unit)


def _folder() -> "resources.abc.Traversable":
    return resources.files("bdlora_compile") / "machines"


def _parse(text: str, where: str) -> Machine:
    try:
        machine = pydantic.TypeAdapter(Machine).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{where}: {'.'.join(map(str, first['loc'])) or 'file'}",
            found=f"{first['input']!r:.60} ({first['msg']})",
            expected="the JSON of a machine",
            remedy="write it with `bdlora calibrate --out`",
        ) from None
    measured = [*machine.all_reduce, *machine.all_gather]
    if bool(machine.all_reduce) != bool(machine.all_gather) or min(measured, default=2) < 2:
        raise ConfigError(
            where,
            found="one kind of collective without the other, or one of fewer than 2 ranks",
            expected="all_reduce and all_gather over 2 or more ranks, or neither",
            remedy="write it with `bdlora calibrate --tp 2 --out`",
        )
    return machine
