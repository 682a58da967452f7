"""What goes between pipeline stages on different ranks, and how: activations forward, their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = tuple[Tensor, ...]

# What goes ahead of tensors that another rank sends: rows of the micro-batch, whether they are a tuple, their number,
# and format, number of dims and dims of each. Nothing else tells their shapes: a step may trim or crop as it likes.
HEADER_WORDS = 64
FORMATS = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


class Passed(NamedTuple):
    """What one stage hands to the next for one micro-batch."""

    tensors: Tensors
    is_tuple: bool  # or else the one tensor itself
    rows: int  # of what the net was called with

    @classmethod
    def of(cls, output: Any, rows: int, names: Sequence[str]) -> Passed:
        """ValueError naming the module if the output of a stage, whose units are `names`, cannot be sent."""
        tensors = output if isinstance(output, tuple) else (output,)
        gives = f"strategy.mesh.pipe: module {names[-1]} gives"
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(
                f"{gives} {type(output).__name__}, but only a tensor or a tuple of tensors can go from one pipeline "
                f"stage to the next; change what it returns, or choose strategy=fsdp."
            )
        for tensor in tensors:
            if tensor.dtype not in FORMATS:
                raise ValueError(
                    f"{gives} {tensor.dtype}, which cannot go from one pipeline stage to the next; convert it there, "
                    f"or choose strategy=fsdp."
                )
        passed = cls(tensors, isinstance(output, tuple), rows)
        if len(passed.header) > HEADER_WORDS:
            raise ValueError(
                f"{gives} {len(tensors)} tensors of {sum(tensor.dim() for tensor in tensors)} dims together, more than "
                f"can go from one pipeline stage to the next; stack some, or choose strategy=fsdp."
            )
        return passed

    @property
    def header(self) -> list[int]:
        words = [self.rows, int(self.is_tuple), len(self.tensors)]
        for tensor in self.tensors:
            words += [FORMATS.index(tensor.dtype), tensor.dim(), *tensor.shape]
        return words


Shapes = list[tuple[torch.Size, torch.dtype]]
Coming = list[tuple[dist.Work | None, Tensor]]  # no work where there is nothing to wait for


class Transfer(NamedTuple):
    """Outputs (F) or gradients of inputs (B) of one stage, which go to the next or to the one before."""

    kind: Literal["F", "B"]
    stage: int
    micro: int

    @property
    def tag(self) -> int:
        """Keeps apart what goes between two ranks at once; the one after it is that of the header."""
        return (self.stage << 16 | self.micro) << 2 | (self.kind == "B") << 1


class Arrival:
    """A `Passed` of another rank: its header is under way, and its tensors are received once that is read."""

    def __init__(self, transfer: Transfer, work: dist.Work, header: Tensor) -> None:
        self.transfer, self.work, self.header = transfer, work, header
        self.coming: Coming | None = None

    def read(self) -> Shapes:
        self.work.wait()
        self.rows, is_tuple, count, *rest = self.header.tolist()
        self.is_tuple = bool(is_tuple)
        words = iter(rest)
        shapes = []
        for _ in range(count):
            dtype, dims = FORMATS[next(words)], next(words)
            shapes.append((torch.Size(next(words) for _ in range(dims)), dtype))
        return shapes


class Link:
    """Sends to and receives from the ranks of neighbouring stages.

    Headers are read by the CPU and go through gloo: through NCCL, each would make the CPU wait for the GPU. NCCL knows
    no tags, and two ranks must start whatever passes between them in one order; so there, but only there, a header is
    read before its tensors are needed: when something else is to go between the same ranks.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, rank_of_stage: Callable[[int], int]) -> None:
        self.group, self.device, self.rank_of_stage = group, device, rank_of_stage
        self.in_order = dist.get_backend(group) == "nccl"
        self.header_group = group
        if self.in_order:
            ranks = dist.get_process_group_ranks(group)
            self.header_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.headers: Coming = []  # being sent
        self.sending: dict[Transfer, Coming] = {}
        self.unread: dict[int, list[Arrival]] = {}  # by rank, in the order of their sends

    def peer(self, stage: int) -> int:
        return dist.get_global_rank(self.group, self.rank_of_stage(stage))

    def send(self, transfer: Transfer, tensors: Sequence[Tensor], to: int, header: Sequence[int] = ()) -> None:
        """Start to send; `arrived(transfer)` lets go of what is sent, if it is over no earlier."""
        for over in [key for key, parts in self.sending.items() if all(map(is_over, parts))]:
            del self.sending[over]
        rank = self.peer(to)
        self.keep_order(rank)
        sent = self.sending.setdefault(transfer, [])  # it must live until it is sent
        if header:
            words = torch.tensor([*header, *[0] * (HEADER_WORDS - len(header))])
            self.headers.append((dist.isend(words, rank, group=self.header_group, tag=transfer.tag + 1), words))
        for tensor in tensors:
            whole_tensor = tensor.detach().contiguous()
            if tensor.numel():
                work = dist.isend(in_bytes(whole_tensor), rank, group=self.group, tag=transfer.tag)
                sent.append((work, whole_tensor))

    def arrived(self, transfer: Transfer) -> None:
        """An answer to what was sent is there."""
        wait(self.sending.pop(transfer, []))

    def expect(self, transfer: Transfer) -> Arrival:
        """A stage's outputs, whose header will tell their shapes."""
        rank, header = self.peer(transfer.stage), torch.empty(HEADER_WORDS, dtype=torch.int64)
        work = dist.irecv(header, rank, group=self.header_group, tag=transfer.tag + 1)
        arrival = Arrival(transfer, cast(dist.Work, work), header)
        if self.in_order:
            self.unread.setdefault(rank, []).append(arrival)
        return arrival

    def take(self, arrival: Arrival) -> Passed:
        """What has been expected, once it is there."""
        self.keep_order(self.peer(arrival.transfer.stage))
        if arrival.coming is None:
            arrival.coming = self.start(arrival.transfer, arrival.read())
        return Passed(landed(arrival.coming), arrival.is_tuple, arrival.rows)

    def receive(self, transfer: Transfer, shapes: Shapes) -> Coming:
        """Start to receive a stage's gradients."""
        self.keep_order(self.peer(transfer.stage))
        return self.start(transfer, shapes)

    def keep_order(self, rank: int) -> None:
        """Start to receive all that has been expected of a rank, where what comes next would otherwise overtake it."""
        for arrival in self.unread.pop(rank, []):
            arrival.coming = self.start(arrival.transfer, arrival.read())

    def start(self, transfer: Transfer, shapes: Shapes) -> Coming:
        coming: Coming = []
        for shape, dtype in shapes:
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
            if buffer.numel():
                rank = self.peer(transfer.stage)
                work = dist.irecv(in_bytes(buffer), rank, group=self.group, tag=transfer.tag)
                coming.append((work, buffer))
            else:
                coming.append((None, buffer))
        return coming

    def finish(self) -> None:
        for parts in (self.headers, *self.sending.values()):
            wait(parts)
        self.headers.clear()
        self.sending.clear()


def in_bytes(tensor: Tensor) -> Tensor:
    """Backends know some formats only, and need to know none."""
    return tensor.view(-1).view(torch.uint8)


def is_over(part: tuple[dist.Work | None, Tensor]) -> bool:
    """Gloo's works are, only once they have been waited for."""
    return part[0] is None or part[0].is_completed()


def wait(parts: Coming) -> None:
    for work, _ in parts:
        if work is not None:
            work.wait()


def landed(parts: Coming) -> Tensors:
    wait(parts)
    return tuple(tensor for _, tensor in parts)
