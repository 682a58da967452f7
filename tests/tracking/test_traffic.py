"""What c10d is asked to move is seen, to the byte, and when."""

import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # a dispatch mode imports it when it is first used: here once, not in every rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.harness import run_ranks
from tracking.timeline import counts_of
from tracking.traffic import CollectiveTimer

Counts = Mapping[tuple[str, tuple[int, ...]], tuple[int, int]]

BOTH = (0, 1)
PARAMETER_BYTES = (8 * 16 + 16 + 16 * 4 + 4) * 4  # of small_net


def timer() -> CollectiveTimer:
    return CollectiveTimer(time.perf_counter)


def counts(noted: CollectiveTimer) -> Counts:
    return counts_of(noted.calls, lambda call: (call.collective, call.ranks))


def counted(function: Callable[[], Any]) -> Counts:
    with timer() as noted:
        function()
    return counts(noted)


def vector(length: int = 4) -> Tensor:
    return torch.ones(length)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))


def step(net: nn.Module) -> None:
    net(torch.ones(2, 8)).sum().backward()


def with_gloo(function: Callable[[], None]) -> None:
    dist.init_process_group("gloo")
    function()
    dist.destroy_process_group()


def collectives() -> None:
    at_root = dist.get_rank() == 0
    # A vector is 16 bytes, a list of one per rank 32.
    asked: dict[str, tuple[Callable[[], Any], int]] = {
        "all_reduce": (lambda: dist.all_reduce(vector()), 16),
        "broadcast": (lambda: dist.broadcast(vector(), 1), 16),
        "reduce": (lambda: dist.reduce(vector(), 1), 16),
        "all_gather": (lambda: dist.all_gather([vector(), vector()], vector()), 32),
        "reduce_scatter": (lambda: dist.reduce_scatter(vector(), [vector(), vector()]), 32),
        "all_to_all": (lambda: dist.all_to_all([vector(), vector()], [vector(), vector()]), 32),
        "gather": (lambda: dist.gather(vector(), [vector(), vector()] if at_root else None), 32),
        "scatter": (lambda: dist.scatter(vector(), [vector(), vector()] if at_root else None), 32),
    }
    for collective, (ask, payload_bytes) in asked.items():
        assert counted(ask) == {(collective, BOTH): (1, payload_bytes)}, collective
    # all_gather_into_tensor and reduce_scatter_tensor, which torch 2.13 calls something else.
    group, options = dist.group.WORLD, dist.ReduceScatterOptions()
    assert group is not None
    assert counted(lambda: group._allgather_base(vector(8), vector()).wait()) == {("all_gather", BOTH): (1, 32)}
    assert counted(lambda: group._reduce_scatter_base(vector(), vector(8), options).wait()) == {
        ("reduce_scatter", BOTH): (1, 32)
    }
    uneven = [1, 3] if at_root else [3, 1]
    assert counted(lambda: dist.all_to_all_single(vector(), vector(), [uneven[0], 4 - uneven[0]], uneven)) == {
        ("all_to_all", BOTH): (1, 16)
    }
    assert counted(lambda: dist.all_reduce(vector().bfloat16())) == {("all_reduce", BOTH): (1, 8)}
    assert counted(dist.barrier) == {}
    assert counted(dist.monitored_barrier) == {}


def test_a_collective_counts_its_payload(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, collectives)


def coalesced_collectives() -> None:
    group = dist.group.WORLD
    assert group is not None
    small, large = vector(), vector(8)
    assert counted(lambda: group.allreduce_coalesced([small, large]).wait()) == {("all_reduce", BOTH): (1, 48)}
    assert counted(lambda: group.allgather_into_tensor_coalesced([vector(8), vector(16)], [small, large]).wait()) == {
        ("all_gather", BOTH): (1, 96)
    }
    assert counted(
        lambda: group.reduce_scatter_tensor_coalesced([vector(), vector(8)], [vector(8), vector(16)]).wait()
    ) == {("reduce_scatter", BOTH): (1, 96)}


def test_a_coalesced_collective_is_one_call(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, coalesced_collectives)


def functional_collectives() -> None:
    group = dist.group.WORLD
    assert group is not None
    functional, name = torch.ops._c10d_functional, group.group_name
    asked: dict[str, tuple[Callable[[], Any], int]] = {
        "all_reduce": (lambda: functional.all_reduce(vector(), "sum", name), 16),
        "all_gather": (lambda: functional.all_gather_into_tensor(vector(), 2, name), 32),
        "reduce_scatter": (lambda: functional.reduce_scatter_tensor(vector(8), "sum", 2, name), 32),
        "broadcast": (lambda: functional.broadcast(vector(), 0, name), 16),
        "all_to_all": (lambda: functional.all_to_all_single(vector(), [2, 2], [2, 2], name), 16),
    }
    for collective, (ask, payload_bytes) in asked.items():
        assert counted(lambda: functional.wait_tensor(ask())) == {(collective, BOTH): (1, payload_bytes)}, collective  # noqa: B023
    both = functional.all_reduce_coalesced
    assert counted(lambda: [functional.wait_tensor(part) for part in both([vector(), vector(8)], "sum", name)]) == {
        ("all_reduce", BOTH): (1, 48)
    }
    # Only an operator of its own shows that DTensor moves a shard's dim.
    assert counted(lambda: torch.ops._dtensor.shard_dim_alltoall(torch.ones(4, 4), 0, 1, name)) == {
        ("all_to_all", BOTH): (1, 64)
    }


def test_a_functional_collective_counts_its_payload(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, functional_collectives)


def point_to_point() -> None:
    rank = dist.get_rank()
    other = 1 - rank
    sent, received = {("send", BOTH): (1, 16)}, {("recv", BOTH): (1, 16)}

    def blocking() -> None:
        dist.send(vector(), 1) if rank == 0 else dist.recv(vector())

    def asynchronous() -> None:
        work = dist.isend(vector(), 1) if rank == 0 else dist.irecv(vector(), 0)
        assert work is not None
        work.wait()

    def batched() -> None:
        operations = [dist.P2POp(dist.isend, vector(), other), dist.P2POp(dist.irecv, vector(), other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def functional() -> None:
        group = dist.group.WORLD
        assert group is not None
        directions = ["isend", "irecv"] if rank == 0 else ["irecv", "isend"]
        tensors = torch.ops._c10d_functional.batch_p2p_ops(
            directions, [other, other], [0, 0], [vector(), vector()], group.group_name
        )
        for tensor in tensors:
            torch.ops._c10d_functional.wait_tensor(tensor)

    assert counted(blocking) == (sent if rank == 0 else received)
    assert counted(asynchronous) == (sent if rank == 0 else received)
    assert counted(batched) == {**sent, **received}
    assert counted(functional) == {**sent, **received}


def test_sent_and_received_bytes_count_apart(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, point_to_point)


def ddp_steps() -> None:
    plain = DistributedDataParallel(small_net())
    with timer() as start:
        net = DistributedDataParallel(small_net(), gradient_as_bucket_view=True)
    _, broadcast_bytes = counts(start)["broadcast", BOTH]
    assert broadcast_bytes >= PARAMETER_BYTES  # and what DDP checks beforehand
    assert ("all_reduce", BOTH) not in counts(start)
    for _ in range(3):
        step(plain)
        sent = counted(lambda: step(net))
        assert sent["all_reduce", BOTH][1] == PARAMETER_BYTES
    # Before, DDP still agreed on its buckets.
    assert sent == {("all_reduce", BOTH): (1, PARAMETER_BYTES)}
    for parameter, same in zip(net.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and same.grad is not None
        assert torch.equal(parameter.grad, same.grad)


def test_ddp_reduces_its_parameters_bytes_and_computes_the_same(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, ddp_steps)


def fsdp_steps() -> None:
    net = small_net()
    mesh = init_device_mesh("cpu", (2,))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for _ in range(2):
        # Each layer is gathered in forward and again in backward; its gradient is reduced once.
        assert counted(lambda: step(net)) == {
            ("all_gather", BOTH): (4, 2 * PARAMETER_BYTES),
            ("reduce_scatter", BOTH): (2, PARAMETER_BYTES),
        }


def test_fsdp_gathers_twice_and_reduces_once(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, fsdp_steps)


def dtensor_product() -> None:
    rows = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    # rows @ rows needs the second factor whole: 16 numbers.
    assert counted(lambda: rows @ rows) == {("all_gather", BOTH): (1, 64)}


def test_what_a_dtensor_moves_is_seen(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, dtensor_product)


def subgroup_of_four() -> None:
    odd = dist.new_group([1, 3])
    even = dist.new_group([2, 0])
    mine, ranks = (odd, (1, 3)) if dist.get_rank() % 2 else (even, (0, 2))
    with timer() as noted:
        dist.all_reduce(vector())
        dist.all_gather([vector(), vector()], vector(), group=mine)
        dist.all_gather([vector(), vector()], vector(), group=mine)
    assert counts(noted) == {("all_reduce", (0, 1, 2, 3)): (1, 16), ("all_gather", ranks): (2, 64)}


def test_each_group_counts_by_its_global_ranks(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, with_gloo, subgroup_of_four)


LATE_S = 0.2


def late_rank() -> None:
    at_root, wait = dist.get_rank() == 0, dist.Work.wait
    with timer() as noted:
        dist.barrier()
        time.sleep(0 if at_root else LATE_S)
        dist.all_reduce(vector())
        work = dist.all_reduce(vector(8), async_op=True)
        time.sleep(LATE_S)
        assert work is not None
        work.wait()
        dist.send(vector(), 1) if at_root else dist.recv(vector(), 0)
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(vector(), "sum", name))
    assert dist.Work.wait is wait
    blocking, overlapped, message, functional = noted.calls
    assert [one.payload_bytes for one in noted.calls] == [16, 32, 16, 16]
    assert all(one.ranks == BOTH and one.called <= one.returned <= one.done for one in noted.calls)
    # The barrier's, and one for each call.
    _, for_late, for_overlapped, *_ = [end - begin for begin, end in noted.waits]
    assert len(noted.waits) == 5
    assert for_late > LATE_S / 2 if at_root else for_late < LATE_S / 2
    assert abs(blocking.done - blocking.called - for_late) < LATE_S / 2
    assert for_overlapped < LATE_S / 2 and overlapped.done - overlapped.called < LATE_S / 2
    assert message.peer == (0, 1, 0) and message.waited_since is not None
    assert (blocking.peer, overlapped.waited_since, functional.group) == (None, None, name)
    assert list(noted.unwaited(0, 4)) == []


def test_calls_are_timed_until_they_are_done_and_so_are_waits_for_them(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, late_rank)


def ddp_waits_in_cpp() -> None:
    net = DistributedDataParallel(small_net())
    for _ in range(2):  # in its second step it agrees on its buckets
        step(net)
    with timer() as noted:
        time.sleep(LATE_S * dist.get_rank())
        step(net)
    (reduced,) = [one for one in noted.calls if one.collective == "all_reduce"]
    assert noted.waits == [] and list(noted.unwaited(0, len(noted.calls))) == noted.calls
    assert (reduced.done - reduced.returned > LATE_S / 2) is (dist.get_rank() == 0)


def callback_is_late() -> None:
    with timer() as noted:
        end, noted._end = noted._end, lambda call: (time.sleep(LATE_S), end(call))  # type: ignore[method-assign,assignment,func-returns-value]
        step(DistributedDataParallel(small_net()))
    assert [one for one in noted.calls if one.collective == "all_reduce" and one.done is None] == []


def test_a_call_that_is_over_has_its_end_noted_before_the_timer_is_left(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, callback_is_late)


def test_what_ddp_waits_for_is_told_apart(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, with_gloo, ddp_waits_in_cpp)


def odd_cases() -> None:
    # A sparse tensor: two indices of 8 bytes, two rows of three numbers.
    embedding = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 3), (100, 3), check_invariants=True)
    assert counted(lambda: dist.all_reduce(embedding)) == {("all_reduce", (0,)): (1, 40)}

    library = torch.library.Library("c10d", "FRAGMENT")
    library.define("teleport(Tensor a, Tensor[] b, str group_name) -> Tensor")
    library.impl("teleport", lambda a, b, group_name: a.clone(), "CPU")
    library.define("lost(Tensor a) -> Tensor")
    library.impl("lost", lambda a: a.clone(), "CPU")
    group = dist.group.WORLD
    assert group is not None
    assert counted(lambda: torch.ops.c10d.teleport(vector(), [vector(), vector(8)], group.group_name)) == {
        ("c10d::teleport", (0,)): (1, 64)
    }
    assert counted(lambda: torch.ops.c10d.lost(vector())) == {("c10d::lost", ()): (1, 16)}

    parameter = nn.Parameter(vector())
    assert counted(lambda: dist.all_reduce(parameter.data)) == {("all_reduce", (0,)): (1, 16)}

    tensor = vector()
    kept = weakref.ref(tensor)
    with timer() as noted:
        dist.all_reduce(tensor)
        first = counts(noted)
        del tensor
        assert kept() is None
    dist.all_reduce(vector())
    with noted:
        dist.all_reduce(vector())
    assert first == {("all_reduce", (0,)): (1, 16)}
    assert counts(noted) == {("all_reduce", (0,)): (2, 32)}


def test_nothing_is_left_out_or_kept(tmp_path: Path) -> None:
    run_ranks(1, tmp_path, with_gloo, odd_cases)
