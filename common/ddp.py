"""One process or many with the same code: the identity without torchrun, gloo on CPUs, NCCL on GPUs.

    env = start(seed)                     rank, world, device
    model = wrap(model, env)              DistributedDataParallel; raw(model) takes it off again
    z_all = gather_rows(z)                concatenation over ranks, WITH gradient
    s = all_sum(x)                        sum over ranks, with gradient
    mean({"loss": x})                     floats, averaged over ranks

The gradient rule. DDP averages parameter gradients over W ranks. A contrastive loss therefore takes the *local* rows
against the *gathered* columns and averages over its own rows; gather_rows sums the gradients of all ranks on the way
back. Then value and gradient equal those of one process with the whole batch. A gather without gradient also gives the
right value, and a wrong gradient: compare gradients, not losses (tests/test_ddp.py).
"""

from __future__ import annotations

import atexit
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Env:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int, what: str = "batch_size", accum: int = 1) -> int:
        """This process's part of a global count, or of each of its micro-batches."""
        if total % (self.world * accum) and accum > 1:
            raise ValueError(f"{what} {total} on {self.world} processes cannot be cut into --accum {accum} micro-batches")
        if total % self.world:
            raise ValueError(f"{what} {total} cannot be divided by {self.world} processes; choose a multiple of {self.world}")
        return total // (self.world * accum)


def start(seed: int, timeout_s: int = 600) -> Env:
    """Joins the process group if torchrun started us. The device follows LOCAL_RANK (never the global rank)."""
    global _asked
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device, count = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
        if device.index >= count:
            raise ValueError(f"process {device.index} of this machine has no GPU of its own, {count} can be seen: start fewer "
                             "processes, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU")  # fmt: skip
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gave NaN in bfloat16 cross-attention (torch 2.11, H200)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        atexit.register(stop)
    reseed(seed, rank, 0)
    _catch_signals()
    asked, _asked = _on_any_rank(_asked > 0), 0
    if asked:  # while the last arm was evaluated
        raise KeyboardInterrupt
    return Env(rank, world, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def reseed(seed: int, rank: int, step: int) -> None:
    """All of torch's randomness from (seed, rank, step): nothing to save, and any step can be replayed alone."""
    torch.manual_seed(((seed * 1_000_003 + rank) * 2_000_003 + step) % 2**63)


def wrap(model: torch.nn.Module, env: Env) -> torch.nn.Module:
    """DDP with synchronised batch norm. Train through the wrapped model's forward only, or gradients are not shared."""
    if env.world == 1:
        return model
    if env.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[env.device.index])
    for module in model.modules():  # torch's SyncBatchNorm has no CPU kernel
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return torch.nn.parallel.DistributedDataParallel(model)


def raw(model: torch.nn.Module) -> torch.nn.Module:
    model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks, on any device: equal to one process with the whole batch."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not (self.training and world_size() > 1):
            return super().forward(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        n = x.numel() // x.shape[1] * world_size()
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = all_sum(x.sum(dims)) / n
        x = x - mean.view(shape)
        var = all_sum(x.square().sum(dims)) / n  # in a second sum: the mean of squares less the squared mean would cancel
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        x = x * (var.view(shape) + self.eps).rsqrt()
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)  # sum, not mean: see the gradient rule above
        return grad.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # every rank's loss depends on this rank's x
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) on each rank -> (W * B, ...) in rank order, with gradient. B must be equal on all ranks."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, with gradient."""
    return _Sum.apply(x) if world_size() > 1 else x


def mean(values: dict[str, torch.Tensor | float]) -> dict[str, float]:
    """Averages logged scalars over ranks, in one message. One device synchronisation: call it on logging steps only."""
    found = [torch.as_tensor(v, dtype=torch.float32).detach() for v in values.values()]
    device = next((v.device for v in found if v.is_cuda), torch.device("cpu"))
    stack = torch.stack([v.to(device) for v in found])
    if world_size() > 1:
        stack = stack.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(stack)
        stack /= world_size()
    return dict(zip(values, stack.tolist()))


def gather_lists(items: list) -> list:
    """Every process's list, joined in rank order; picklable items. For evaluation."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


def check_finite(values: dict[str, float], step: int) -> None:
    """Stops the run at a non-finite loss or gradient norm. Called before a checkpoint is written: the last one stays good."""
    bad = [k for k, v in values.items() if not torch.isfinite(torch.tensor(v))]
    if bad:
        raise ValueError(f"{', '.join(bad)} is not finite at step {step} on rank {rank()}; the last checkpoint is good: "
                         "lower --lr or use --dtype float32")  # fmt: skip


# Ctrl-C and SIGTERM ask the loop to save and leave; a second one stops at once. All ranks leave at the same step.
_asked = 0


def _catch_signals() -> None:
    def ask(number, frame):
        global _asked
        if _asked:
            raise KeyboardInterrupt
        _asked = number

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            signal.signal(number, ask)
        except ValueError:  # not in the main thread: the caller owns the signals
            return


def _on_any_rank(said: bool) -> bool:
    if world_size() == 1:
        return said
    flag = torch.tensor([float(said)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def asked_to_stop() -> bool:
    """Whether this process was, for loops in which processes do not wait for each other."""
    return _asked > 0


def interrupted(due: bool = True) -> bool:
    """True on every rank as soon as one rank was asked to stop. Several processes: a tiny message, sent where it is due, on
    logging steps; one process looks at each step."""
    global _asked
    if world_size() > 1 and not due:
        return False
    found = _on_any_rank(_asked > 0)
    if found and _asked > 0:  # known; a further signal stops at once. A rank that was not asked yet may be so later
        _asked = -1
    return found
