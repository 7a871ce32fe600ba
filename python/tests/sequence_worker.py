"""One rank of test_sequence.py.

python sequence_worker.py SCENARIO FOLDER RANK WORLD_SIZE
    cases       every case of sequence_cases.py, and the bytes that calls send
    training    a step of a small model on shards, and what it needs around attention
    compiled    calls in compiled graphs, and central differences
    parallel    two sequence ranks times two of data or heads
    mismatches  calls that differ between ranks
    killed, stopped, late, raising, unheard
                the last rank fails in the second call; `unheard` throws while no other listens
Rank r writes FOLDER/SCENARIO-WORLD_SIZE-r.pt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sequence_cases import TinyModel, cases, longnet, multihead, training_data
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dilated import Unsupported
from dilated.distributed import (
    SequenceGroups,
    dilated_attention,
    mean_loss,
    sum_gradients,
    sum_over_ranks,
    unshard,
)

TRANSPORTS = ("local", "halo", "all_to_all", "all_gather", "ring")
TIMEOUT = 3.0
Attention = Callable[..., Any]


def small_call(groups: SequenceGroups, x: Tensor, **changed: Any) -> Any:
    lists = {"segments": [8, 40], "dilations": [1, 2]}
    return dilated_attention(*x, sequence_groups=groups, **{**lists, **changed})


def run_cases(groups: SequenceGroups) -> list[dict[str, Tensor]]:
    results = []
    for number, sharded in enumerate(cases(groups.size)):
        begin = sum(sharded.shards[: groups.rank])
        rows = sharded.shards[groups.rank]
        shards = sharded.shards if number % 2 else None
        attention = partial(dilated_attention, sequence_groups=groups, shards=shards)
        results.append(sharded.run(attention, lambda x, dim: x.narrow(dim, begin, rows)))
    return results


def run_transports(groups: SequenceGroups) -> list[dict[str, Any]]:
    """Every transport of some cases: results of two runs, or the error."""
    results = []
    for sharded in cases(groups.size)[::3]:
        begin = sum(sharded.shards[: groups.rank])
        rows = sharded.shards[groups.rank]
        result: dict[str, Any] = {}
        for transport in TRANSPORTS:
            own = SequenceGroups(timeout=20)
            attention = partial(dilated_attention, sequence_groups=own, transport=transport)
            try:
                result[transport] = [
                    sharded.run(attention, lambda x, dim: x.narrow(dim, begin, rows))
                    for _ in range(2)
                ]
            except Unsupported as error:
                result[transport] = str(error)
        results.append(result)
    return results


def bytes_sent(groups: SequenceGroups, **call: Any) -> list[int]:
    """Sizes of the messages of forward and backward of one call."""
    sizes = []
    isend = dist.isend

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.nbytes)
        return isend(tensor, *arguments, **options)

    x = torch.randn(3, 1, 96, 4, 8, requires_grad=True)
    dist.isend = counting
    try:
        out = dilated_attention(*x, sequence_groups=groups, **call)
        out.sum().backward()
    finally:
        dist.isend = isend
    return sizes


def volumes(groups: SequenceGroups) -> dict[str, list[int]]:
    local = {"segments": [32, 96], "dilations": [1, 2], "shards": [96] * groups.size}
    far = {"segments": [32, 96 * groups.size], "dilations": [1, 4]}
    sent = {"local": bytes_sent(groups, **local), "far": bytes_sent(groups, **far)}
    for transport in ("all_to_all", "all_gather", "ring"):
        sent[transport] = bytes_sent(groups, **far, is_causal=True, transport=transport)
    return sent


def multihead_step(groups: SequenceGroups, shards: list[int]) -> dict[str, Tensor | None]:
    """Gradients of MultiheadDilatedAttention, summed over ranks, and this rank's output."""
    layer = multihead()
    x = groups.shard(torch.randn(2, sum(shards), 24, generator=torch.Generator().manual_seed(9)),
                     shards=shards)  # fmt: skip
    out, _ = layer(x, is_causal=True, sequence_groups=groups, shards=shards)
    out.square().sum().backward()
    sum_gradients(layer.parameters(), sequence_groups=groups)
    return {"out": out.detach(), **{name: p.grad for name, p in layer.named_parameters()}}


def longnet_step(groups: SequenceGroups, shards: list[int]) -> dict[str, Tensor | None]:
    """Gradients of LongNetLM with recomputed layers, summed over ranks, and this rank's logits."""
    model = longnet()
    tokens = groups.shard(training_data()[0], shards=shards)
    out = model(tokens, seqused=[37, 20], sequence_groups=groups, shards=shards)
    real = groups.positions(shards) < torch.tensor([[37], [20]])
    out[real].square().sum().backward()
    sum_gradients(model.parameters(), sequence_groups=groups)
    return {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def compiled(groups: SequenceGroups) -> dict[str, Any]:
    """Whole graphs, with what the eager calls give."""
    shards = [20, 17]
    x = torch.randn(3, 2, shards[groups.rank], 4, 6)
    pairs: dict[str, Any] = {}
    calls: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "torchscale": {"preset": "torchscale"},
        "all_gather": {"transport": "all_gather", "scale": 0.3},
        "dropout": {"dropout_p": 0.5, "dropout_seed": 3},
        "local": {"segments": [10], "dilations": [3], "shards": [20, 17]},
        "packed": {"x": x[:, 0].contiguous(), "layout": "shd", "cu_seqlens": [0, 5, 30, 37]},
        "summed": {"merge": "sum", "seqused": [37, 9]},
    }
    for name, changed in calls.items():
        given = changed.pop("x", x)

        def call(x: Tensor) -> Any:
            return small_call(groups, x.unbind(), **{"shards": shards, **changed}) * 2

        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            inputs = given.clone().requires_grad_()
            out = function(inputs)
            out.square().sum().backward()
            results.append((out.detach(), inputs.grad))
        pairs[name] = results
    model = longnet()
    tokens = groups.shard(training_data()[0], shards=shards)
    results = []
    for module in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = module(tokens, sequence_groups=groups, shards=shards)
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad for p in model.parameters())))
    pairs["longnet"] = results

    def drawn(x: Tensor) -> Any:
        return small_call(groups, x.unbind(), shards=shards, dropout_p=0.5)

    out = torch.compile(drawn, fullgraph=True, backend="aot_eager")(x.expand_as(x))
    return {"pairs": pairs, "drawn": out.isfinite().all(), "slopes": slopes(groups, shards)}


def slopes(groups: SequenceGroups, shards: list[int]) -> list[tuple[float, float]]:
    """Gradients and central differences: one rank moves a number, all of them see."""
    x = torch.randn(3, 2, shards[groups.rank], 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, shards[groups.rank], 4, 6, dtype=torch.float64)

    def loss() -> Tensor:
        out, lse = small_call(groups, x, return_lse=True)
        return (out * weight).sum() + lse.square().sum()

    (gradient,) = torch.autograd.grad(loss(), x)
    pairs, step = [], 1e-6
    for number in range(18):
        owner, at = number % groups.size, (number % 3, 0, 5 * number % 17, number % 4, number % 6)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                if owner == groups.rank:
                    x[at] += sign * step
                values.append(float(sum_over_ranks(loss(), sequence_groups=groups)))
                if owner == groups.rank:
                    x[at] -= sign * step
        if owner == groups.rank:
            pairs.append((float(gradient[at]), (values[0] - values[1]) / (2 * step)))
    return pairs


def parallel() -> dict[str, Any]:
    """Two sequence ranks times two of data: DDP and FSDP2; of heads: tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "sequence"))
    groups, everyone = SequenceGroups(mesh["sequence"], timeout=60), SequenceGroups(timeout=60)
    row, shards = mesh.get_local_rank("other"), [20, 17]
    tokens, targets = (
        groups.shard(x[row : row + 1], shards=shards).contiguous() for x in training_data()
    )
    gradients = {}
    for name in ("ddp", "fsdp"):
        model: Any = longnet()
        if name == "ddp":
            model = DistributedDataParallel(model, process_group=mesh["other"].get_group())
        else:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh["other"])
            fully_shard(model, mesh=mesh["other"])
        logits = model(tokens, sequence_groups=groups, shards=shards)
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        )
        count = int((targets >= 0).sum())
        # Both average over the ranks of other sequences.
        (2 * mean_loss(total, count, sequence_groups=everyone)).backward()
        sum_gradients(model.parameters(), sequence_groups=groups)
        gradients[name] = [
            p.grad.full_tensor() if name == "fsdp" else p.grad for p in model.parameters()
        ]
    x = torch.randn(3, 1, 37, 4, 6, generator=torch.Generator().manual_seed(4))
    mine = groups.shard(x[:, :, :, 2 * row : 2 * row + 2], 2, shards=shards)
    heads = {"head_offset": 2 * row, "total_heads": 4, "total_kv_heads": 4}
    with torch.autocast("cpu", torch.bfloat16):
        autocast = small_call(groups, mine, **heads)
    return {
        "gradients": gradients,
        "heads": small_call(groups, mine, **heads),
        "autocast": autocast,
    }


def training(groups: SequenceGroups) -> dict[str, Any]:
    """One step with uneven shards, maybe an empty one; some tokens have no target."""
    tokens, targets = training_data()
    shards = {2: [20, 17], 3: [22, 15, 0], 4: [20, 5, 12, 0]}[groups.size]
    model = TinyModel()
    attention = partial(dilated_attention, sequence_groups=groups, shards=shards)
    mine = groups.shard(tokens, shards=shards)
    out, losses = model(
        mine, groups.shard(targets, shards=shards), attention, begins=groups.rank == 0
    )
    count = int((groups.shard(targets, shards=shards) >= 0).sum())
    loss = mean_loss(losses.sum(), count, sequence_groups=groups)
    loss.backward()
    sum_gradients(model.parameters(), sequence_groups=groups)
    return {
        "loss": sum_over_ranks(loss, sequence_groups=groups),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "out": unshard(out.detach(), sequence_groups=groups, shards=shards),
        "tokens": unshard(mine, sequence_groups=groups),
        "bfloat16": sum_over_ranks(
            torch.tensor([256.0, 1.0, groups.rank]).bfloat16(), sequence_groups=groups
        ),
        "other": error_of(
            lambda: sum_over_ranks(
                torch.zeros(3 if groups.rank else 2),
                sequence_groups=SequenceGroups(timeout=TIMEOUT),
            )
        ),
        "recorded": error_of(
            lambda: unshard(
                out if groups.rank else out.detach(),
                sequence_groups=SequenceGroups(timeout=TIMEOUT),
            )
        ),
        "multihead": multihead_step(groups, shards),
        "longnet": longnet_step(groups, shards),
        "masked": error_of(
            lambda: multihead()(
                out.new_zeros(1, 4, 24),
                key_padding_mask=torch.zeros(1, 4, dtype=torch.bool) if groups.rank else None,
                sequence_groups=SequenceGroups(timeout=TIMEOUT),
            )
        ),
        "empty": error_of(
            lambda: mean_loss(losses.sum(), 0, sequence_groups=SequenceGroups(timeout=TIMEOUT))
        ),
    }


def error_of(call: Callable[[], Any]) -> tuple[str, str, float]:
    """Type and text of what a call raises, and the seconds until then."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def mismatches(rank: int, size: int) -> dict[str, Any]:
    """The last rank calls differently."""
    x = torch.randn(3, 1, 12, 2, 4)
    odd = rank == size - 1
    calls: dict[str, dict[str, Any]] = {
        "option": {"is_causal": odd},
        "branches": {"segments": [8, 41 if odd else 40]},
        "dtype": {"x": x.double() if odd else x},
        "error": {"dilations": [1, 0 if odd else 2]},
        "shards": {"shards": None if odd else [12] * size},
        "seqused": {"seqused": [30 + odd]},
    }
    errors = {}
    for name, changed in calls.items():
        groups = SequenceGroups(timeout=TIMEOUT)
        errors[name] = error_of(lambda: small_call(groups, **{"x": x, **changed}))

    def other_number_of_calls(groups: SequenceGroups) -> None:
        inputs = x.clone().requires_grad_()
        out = small_call(groups, inputs)
        if odd:
            small_call(groups, inputs)
        else:
            out.sum().backward()

    def step(groups: SequenceGroups, moment: str) -> None:
        """A training step in which a rank throws what is none of ours."""
        with groups:
            inputs = x.clone().requires_grad_()
            if odd and moment == "data":
                raise ZeroDivisionError
            out = small_call(groups, small_call(groups, inputs).expand(3, *x.shape[1:]))
            if odd and moment == "loss":
                raise ZeroDivisionError
            out.register_hook(lambda _: 1 / 0 if odd and moment == "backward" else None)
            out.sum().backward()

    for moment in ("data", "loss", "backward"):
        groups = SequenceGroups(timeout=60)
        errors[f"throws:{moment}"] = error_of(lambda: step(groups, moment))

    def module(groups: SequenceGroups) -> None:
        longnet()(torch.zeros(1, 4 if odd else 12, dtype=torch.float32 if odd else torch.int64),
                  sequence_groups=groups, shards=[12] * size)  # fmt: skip

    groups = SequenceGroups(timeout=60)
    errors["throws:module"] = error_of(lambda: module(groups))

    groups = SequenceGroups(timeout=TIMEOUT)
    errors["calls"] = error_of(lambda: other_number_of_calls(groups))
    errors["after"] = error_of(lambda: small_call(groups, x))
    return errors


def failure(scenario: str, rank: int, size: int) -> dict[str, Any]:
    groups = SequenceGroups(timeout=TIMEOUT)
    x = torch.randn(3, 1, 12, 2, 4)
    small_call(groups, x)
    if rank == size - 1:
        if scenario == "raising":
            raise SystemExit(3)
        if scenario == "late":
            time.sleep(2.5 * TIMEOUT)
        elif scenario == "unheard":
            error_of(lambda: small_call(groups, x[:2]))
            time.sleep(2.5 * TIMEOUT)
            return {}
        else:
            os.kill(os.getpid(), signal.SIGKILL if scenario == "killed" else signal.SIGSTOP)
    if scenario == "unheard":
        time.sleep(TIMEOUT)
    return {"call": error_of(lambda: small_call(groups, x))}


def main(scenario: str, folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/{scenario}-{size}.store"
    dist.init_process_group("gloo", store, rank=rank, world_size=size)
    torch.manual_seed(rank)
    result: dict[str, Any]
    if scenario == "cases":
        groups = SequenceGroups(timeout=60)
        result = {
            "cases": run_cases(groups),
            "volumes": volumes(groups),
            "transports": run_transports(groups),
        }
    elif scenario == "compiled":
        result = compiled(SequenceGroups(timeout=60))
    elif scenario == "parallel":
        result = parallel()
    elif scenario == "training":
        result = training(SequenceGroups(timeout=60))
    elif scenario == "mismatches":
        result = mismatches(rank, size)
    else:
        result = failure(scenario, rank, size)
    torch.save(result, folder / f"{scenario}-{size}-{rank}.pt")
    if scenario in ("cases", "compiled", "parallel", "training", "mismatches"):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
