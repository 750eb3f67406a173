"""All-reduces of one rank's graph: through PyTorch's symmetric memory where the machine has it, else the group's own.

In symmetric memory every rank reads its peers' buffers itself. One-shot: each rank adds all peers' values, one wait for
the peers before and one after. Two-shot: each rank adds its share, then collects the others' shares; a wait more, less
to read. Which is faster depends on the size: `Machine.symmetric` holds what was measured, NCCL takes the rest. NVLink
multicast is not used.

One buffer serves all calls: a kernel ends only after the same block of every peer has read what it wrote, so the next
kernel of the stream may overwrite it. The buffer is allocated and known to all ranks when the model is loaded, before
any CUDA graph is captured; results are ordinary tensors. Beside it lies a mailbox for the kernel that adds the residual
and norms as well (`norm_op.py`, `kernels/norm.py`); neither knows of the other.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from bdlora_compile.errors import ConfigError
from bdlora_compile.machine import Machine, SymmetricLimits
from bdlora_compile.placement import Mesh
from bdlora_compile.runtime.agreement import Agreement

Wanted = Literal["auto", "nccl", "symmetric"]
"""What ``load(..., all_reduce=)`` takes."""

_ALIGNMENT = 16
"""Bytes that a thread of PyTorch's kernels moves at once; sizes that are no multiple go another way."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """How the ranks of a model add up.

    Attributes:
        text: which transport runs and why, for the report.
        buffer: uint8, this rank's symmetric memory; None where the process group does it all.
        limits: the largest messages of each kind, where there is a buffer.
        mailbox: int64, symmetric memory of the kernel that norms as well; None where the norm stays apart.
    """

    text: str
    buffer: Tensor | None = None
    limits: SymmetricLimits | None = None
    mailbox: Tensor | None = None

    @classmethod
    def choose(
        cls,
        wanted: Wanted,
        mesh: Mesh,
        machine: Machine,
        dtype: torch.dtype,
        device: torch.device,
        agreement: Agreement,
    ) -> "AllReduce":
        """The transport for a model; all ranks come to the same one, and each allocates its buffer.

        Raises:
            ConfigError: ``wanted`` is no transport, or symmetric memory was asked for where it cannot be had.
        """
        if wanted not in get_args(Wanted):
            raise ConfigError(
                f"all_reduce={wanted!r}",
                found="no transport",
                expected=f"one of {', '.join(get_args(Wanted))}",
                remedy="choose one of them",
            )
        if mesh.size == 1:
            return cls("none: one rank")
        if wanted == "nccl":
            return cls(_own_text("asked for", device))
        limits = machine.symmetric_limits(mesh.size)
        own = _obstacle(mesh, limits, dtype, device)
        buffer, obstacle = buffer_on_all(agreement, own, limits.two_shot if limits else 0, mesh.group, device, limits)
        mailbox = None
        if limits is not None and not obstacle:
            apart = _agreed(agreement, _norm_obstacle(mesh, device), limits)
            if not apart:
                mailbox, apart = _on_all(agreement, lambda: new_mailbox(mesh.group, device), limits)
            norms = f"norms apart: {apart}" if apart else "one-shot with residual and norm"
            text = f"{_symmetric_text(limits, machine, mesh.size)}{_of_another(machine, device)}; {norms}"
            return cls(text, buffer, limits, mailbox)
        if wanted == "symmetric":
            raise ConfigError(
                "all_reduce='symmetric'",
                found=obstacle,
                expected="symmetric memory on all ranks",
                remedy="use all_reduce='auto', which falls back to the process group's own all-reduce",
            )
        return cls(_own_text(obstacle, device))


@torch.library.custom_op("bdlora::all_reduce", mutates_args=())
def all_reduce(x: Tensor, buffer: Tensor, one_shot: int, two_shot: int, group: str) -> Tensor:
    """The sum of x over the ranks of a group.

    Args:
        x: this rank's summand; all ranks' have one shape.
        buffer: uint8, symmetric memory of the group: scratch, which nothing else reads.
        one_shot, two_shot: bytes of the largest x that goes each way; larger ones go through the process group.
        group: name of the process group.

    Returns:
        A new contiguous tensor like x.
    """
    x = x.contiguous()
    result: Tensor
    match way(x.numel() * x.element_size(), one_shot, two_shot, _size_of(group)):
        case "one-shot":
            result = torch.ops.symm_mem.one_shot_all_reduce_copy(_view(buffer, x), x, "sum", group)
        case "two-shot":
            shared, result = _view(buffer, x), torch.empty_like(x)
            shared.copy_(x)
            torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", group, result)
        case _:
            pending = torch.ops._c10d_functional.all_reduce(x, "sum", group)
            result = torch.ops._c10d_functional.wait_tensor(pending)
    return result


def way(size: int, one_shot: int, two_shot: int, ranks: int) -> Literal["one-shot", "two-shot", "group"]:
    """How a message of ``size`` bytes goes; every rank comes to the same answer, for the limits are the same."""
    if 0 < size <= one_shot and size % _ALIGNMENT == 0:
        return "one-shot"
    # Each rank adds up an equal share.
    return "two-shot" if 0 < size <= two_shot and size % (_ALIGNMENT * ranks) == 0 else "group"


@all_reduce.register_fake
def _(x: Tensor, buffer: Tensor, one_shot: int, two_shot: int, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _view(buffer: Tensor, x: Tensor) -> Tensor:
    return buffer.view(x.dtype)[: x.numel()].view(x.shape)


def _size_of(group: str) -> int:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]  # not exported
    return int(resolve(group).size())


def _obstacle(mesh: Mesh, limits: SymmetricLimits | None, dtype: torch.dtype, device: torch.device) -> str:
    """Why a model on this rank does not use symmetric memory; empty if it may be able to."""
    if of_group := group_obstacle(device):
        return of_group
    if dtype not in (torch.bfloat16, torch.float32):
        return f"PyTorch's kernels add bfloat16 and float32, not {dtype}"
    return "" if limits is not None else "it was not measured on this machine (`bdlora calibrate --tp N` does that)"


def group_obstacle(device: torch.device) -> str:
    """Why the ranks of this process group cannot use symmetric memory; empty if they may be able to."""
    if not dist.is_available() or not dist.is_initialized():
        return "the ranks are in one process"
    if device.type != "cuda":
        return f"symmetric memory is for GPUs, not {device.type}"
    if (backend := _backend_of(device)) != "nccl":
        return f"the process group is of {backend}, not nccl"
    return ""


def _backend_of(device: torch.device) -> str:
    """What the process group sends a device's tensors by: without a name it has one for each kind of device."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(",") if ":" in entry)
    return backends.get(device.type, dist.get_backend())


def buffer_on_all(
    agreement: Agreement, own: str, size: int, group: str, device: torch.device, limits: SymmetricLimits | None = None
) -> tuple[Tensor | None, str]:
    """This rank's symmetric memory, uint8 [size], if all ranks of a group have theirs; or None, and why not.

    Args:
        own: what is in this rank's way; empty if nothing is.
        limits: what the ranks go by, which must be the same on all.
    """
    if obstacle := _agreed(agreement, own, limits):
        return None, obstacle
    return _on_all(agreement, lambda: symmetric_buffer(size, group, device), limits)


def _on_all(
    agreement: Agreement, allocate: Callable[[], Tensor], limits: SymmetricLimits | None
) -> tuple[Tensor | None, str]:
    """This rank's memory of something that all ranks have; or nothing, and why some rank has none."""
    memory, obstacle = None, ""
    try:
        memory = allocate()
    except Exception as error:  # whatever the driver, the links or the build lack
        obstacle = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    obstacle = _agreed(agreement, obstacle, limits)
    return (None, obstacle) if obstacle else (memory, "")


def _agreed(agreement: Agreement, own: str, limits: SymmetricLimits | None) -> str:
    """What is in the way on any rank, the same text on all."""
    note = f"{socket.gethostname()}\n{limits}\n{own}"
    told = [text.split("\n") for text in agreement.exchange("all-reduce", note, is_setup=True)]
    for rank, (host, other, obstacle) in enumerate(told):
        if obstacle:
            return f"rank {rank}: {obstacle}" if len(told) > 1 else obstacle
        if host != told[0][0]:
            return "the ranks are on several machines"
        if other != told[0][1]:
            return f"rank {rank} was given another machine's limits than rank 0"
    return ""


def symmetric_buffer(size: int, group: str, device: torch.device) -> Tensor:
    """uint8 [size] of this rank, which its peers read; all ranks of the group, given by name, call this together.

    Raises:
        RuntimeError: what PyTorch, the driver or the links lack.
    """
    from torch.distributed import _symmetric_memory  # needs CUDA's driver

    symmetric_memory: Any = _symmetric_memory
    buffer: Tensor = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    symmetric_memory.rendezvous(buffer, group)
    return buffer


def new_mailbox(group: str, device: torch.device) -> Tensor:
    """This rank's mailbox (see `kernels/norm.py`); ranks may use theirs when all of them have one.

    Args:
        group: name of the process group; all its ranks call this together.

    Raises:
        RuntimeError: what PyTorch or the driver lack.
    """
    from torch.distributed import _symmetric_memory  # needs CUDA's driver

    from bdlora_compile.runtime.kernels.norm import MAILBOX_WORDS, MAX_RANKS  # Triton is there on GPUs only

    symmetric_memory: Any = _symmetric_memory
    mailbox: Tensor = symmetric_memory.empty(MAILBOX_WORDS, dtype=torch.int64, device=device)
    shared = symmetric_memory.rendezvous(mailbox, group)
    addresses = [int(address) for address in shared.buffer_ptrs]
    if addresses[shared.rank] != mailbox.data_ptr():
        raise RuntimeError("symmetric memory does not begin where its tensor does")
    mailbox.zero_()
    known = min(len(addresses), MAX_RANKS.value)
    mailbox[:known].copy_(torch.tensor(addresses[:known]))
    torch.cuda.synchronize(device)
    return mailbox


def _norm_obstacle(mesh: Mesh, device: torch.device) -> str:
    """Why this rank cannot run the kernel that norms as well; empty if it can."""
    from bdlora_compile.runtime.kernels.norm import MAX_RANKS, MAX_ROWS

    if mesh.size > MAX_RANKS.value:
        return f"the kernel is for up to {MAX_RANKS.value} ranks"
    # Each program waits for one of each peer: all must be on the device at once.
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return "" if processors >= MAX_ROWS.value else f"a GPU has {processors} multiprocessors, {MAX_ROWS.value} wanted"


def _symmetric_text(limits: SymmetricLimits, machine: Machine, ranks: int) -> str:
    basis = (
        "measured"
        if ranks in machine.symmetric
        else f"not measured on {ranks} ranks, by what those of the nearest read"
    )
    return (
        f"symmetric memory, one-shot to {limits.one_shot} bytes, two-shot to {limits.two_shot}, "
        f"nccl above ({machine.name}, {basis})"
    )


def _of_another(machine: Machine, device: torch.device) -> str:
    """That the limits are another GPU's, if they are."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f", of another GPU than this {name}: `bdlora calibrate` measures it" if name not in machine.source else ""


def _own_text(reason: str, device: torch.device) -> str:
    """The process group's own all-reduce, or that of the lock-step interpreter."""
    backend = _backend_of(device) if dist.is_available() and dist.is_initialized() else "lock-step"
    return f"{backend}: {reason}"
