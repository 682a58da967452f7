"""LightningModules of the kinds that teams bring, each with what engines of data, model or pipeline parallelism get
wrong without a word."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint

from models.plan import ParallelPlan
from models.whole import gradient_norm, parameter_norm
from tests.strategies.own_models import Block, Blocks


def left_out(labels: Tensor) -> Tensor:
    """Half of the targets do not count, unevenly over micro-batches."""
    return labels.masked_fill(labels < 5, -100)


class Masked(Blocks):
    """A mean over the targets that count, as for padding and prompts."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images.flatten(1)), left_out(labels))


class MaskedByHand(Blocks):
    """The same mean, written out, in float64 or whatever the net gives."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images, labels = batch
        losses = cross_entropy(self.net(images.flatten(1)), labels, reduction="none")
        counts = labels >= 5
        return {"loss": (losses * counts).sum() / counts.sum(), "logits": None}


class MaskedBySum(Blocks):
    """The same mean, of a loss that is asked for a sum."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images.flatten(1)), left_out(labels), reduction="sum")
        return loss / (labels >= 5).sum().clamp(min=1)


class SaysNumTargets(Blocks):
    """A mean that autograd's graph does not show; the step says over how many targets it is one."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        images, labels = batch
        losses = cross_entropy(self.net(images.flatten(1)), left_out(labels), reduction="none")
        num_targets = (labels >= 5).sum()
        return {"loss": (losses / num_targets.clamp(min=1)).sum(), "num_targets": num_targets}


class SmoothedAndPenalized(Blocks):
    """Two parts that leave the same targets out, and a constant of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images.flatten(1))
        return cross_entropy(logits, left_out(labels), label_smoothing=0.1) * 0.5 + 0.25


class FewTargets(Blocks):
    """Some micro-batches have no target at all."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images.flatten(1)), labels.masked_fill(labels < 7, -100))


class ValidatesByTrainingStep(Blocks):
    """One hook calls another."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]), sync_dist=True)


def angles() -> Tensor:
    """As of rotary positions far into a sequence: bfloat16 holds the last of them to within 2 radians."""
    return torch.linspace(0, 500, 32)


class Turn(nn.Module):
    """A block that multiplies by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(32)
        self.register_buffer("table", angles(), persistent=False)
        self.register_buffer("narrowed", torch.ones(32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        table: Any = self.table
        narrowed: Any = self.narrowed
        return self.block(x * narrowed) * table.cos().to(x.dtype)


class KeepsAngles(Blocks):
    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",), keep_dtype=("*.table",))

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 32), Turn(), Turn(), nn.Linear(32, 10))


class Scaled(nn.Module):
    """A block with a parameter without dims, as CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(32)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.scale.exp()


class HasScalars(Blocks):
    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Scaled(), Scaled(), nn.Linear(32, 10))


class NoFloat64(Blocks):
    """Does something that there is in float32 alone, as grouped matrix products are."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if next(self.parameters()).dtype == torch.float64:
            raise RuntimeError("expected Float32 or BFloat16, got Double")
        return super().training_step(batch, batch_idx)


class NoFloat64AndHalf(NoFloat64):
    """With a fault of its own: one rank trains on half of its loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (0.5 if self.global_rank == 1 else 1.0)


class Contrastive(Blocks):
    """Looks at the other samples of its batch: what it computes depends on how a batch is cut, for good."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        embedded = normalize(self.net(images.flatten(1)), dim=1)
        return cross_entropy(embedded @ normalize(images.flatten(1)[:, :10], dim=1).T, torch.arange(len(images)))


class Normalized(Blocks):
    """Statistics of the batch."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), Block(32), nn.Linear(32, 10))


class Drops(Blocks):
    """Dropout, as a module and as a function."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.3), Block(32), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(nn.functional.dropout(images.flatten(1), 0.2, self.training)), labels)


class Noisy(Blocks):
    """Noise in the step, as diffusion models draw it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        share = torch.rand(len(labels), 1, dtype=images.dtype)
        noise = torch.randn(len(labels), 64, dtype=images.dtype)
        return cross_entropy(self.net(images.flatten(1) * share + noise * (1 - share)), labels)


class NoisyAndMasked(Blocks):
    """Both at once, as masked language models."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        kept = torch.rand(len(labels), 64, dtype=images.dtype) < 0.5
        return cross_entropy(self.net(images.flatten(1) * kept), left_out(labels))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]), sync_dist=True)


def small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.constant_(module.bias, 0.1)


class AppliesInit(Blocks):
    """Initialises its net behind its constructors, and has a parameter that no module resets."""

    def configure_model(self) -> None:
        super().configure_model()
        self.apply(small)
        with torch.device("meta"):
            block: Any = self.net[1]
            block.up.weight = nn.Parameter(torch.eye(32) * torch.tensor(0.5))


class BuildsEagerly(AppliesInit):
    """On the CPU at once, drawing as it goes."""

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10))
        self.apply(small)


class LateNet(nn.Sequential):
    """Leaves its initialisation out on the meta device, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10))
        if not next(self.parameters()).is_meta:
            self.initialize_weights()

    def initialize_weights(self) -> None:
        self.apply(self._init_weights)

    def _init_weights(self, part: nn.Module) -> None:
        small(part)


class InitializesLate(Blocks):
    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = LateNet()


class Taught(Blocks):
    """A teacher that starts as a copy, follows once per step, and is followed."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.device("meta"):
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0].flatten(1)
        with torch.no_grad():
            wanted = self.teacher(images)
        return self.loss(batch) + mse_loss(self.net(images), wanted)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.mul_(0.5).add_(new, alpha=0.5)


class Penalized(Blocks):
    """A penalty on its weights, in the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) + 0.01 * torch.stack([one.square().sum() for one in self.net.parameters()]).sum()


class ReadsGradients(Blocks):
    """Logs a norm in the hook that Lightning's documentation names for it."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norms = [one.grad.norm() for one in self.parameters() if one.grad is not None]
        self.log("norm", torch.stack(norms).norm() if norms else 0.0)


class AsksForNorms(Blocks):
    """Logs the same by what works under every strategy."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norms = {"gradient": float(gradient_norm(self)), "weights": float(parameter_norm(self))}
        if self.global_step == 0:
            print(f"norms {norms}", flush=True)


class PerEpoch(Blocks):
    """A schedule as torch's tutorials return it, stepped at the end of each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1, gamma=0.5)]

    def on_train_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch} ends with step {self.global_step}", flush=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        rate = optimizer.param_groups[0]["lr"]
        print(f"step {self.global_step} epoch {self.current_epoch} rate {rate:.4f}", flush=True)


class DropsInParts(Blocks):
    """Dropout where activations are split over tensor ranks, and where they are whole; tells what was dropped."""

    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("2",), tensor={"1.0": "colwise", "1.2": "rowwise"})

    def configure_model(self) -> None:
        with torch.device("meta"):
            block = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.5))
            self.net = nn.Sequential(nn.Linear(64, 32), block, nn.Linear(32, 10))
        for name, part in (("split", block[1]), ("whole", block[3])):
            part.register_forward_hook(lambda _, __, output, name=name: self.tell(name, output))

    def tell(self, name: str, output: Tensor) -> None:
        if self.training and self._trainer is not None:
            print(f"dropped {name} {[int(number) for number in (output[0, :16] == 0)]}", flush=True)


class TwoTowers(nn.Module):
    """Side by side, not one after the other: the second's input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16))
        self.right = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(32, dim=1)
        return self.head(torch.cat([self.left(left), self.right(right)], dim=1))


class Towers(Blocks):
    plan = ParallelPlan(blocks=("0.left", "0.right"), head=("0.head",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(TwoTowers())


def by_branch(x: Tensor, is_few: Tensor, few: nn.Module, others: nn.Module) -> Tensor:
    """Rows by one branch or the other; one that no row takes is not called, as routers do."""
    out = x.new_zeros(len(x), 10)
    for rows, branch in ((is_few, few), (~is_few, others)):
        if rows.any():
            out[rows] = branch(x[rows])
    return out


class BranchesOutside(Blocks):
    """Heads beside the plan's net, of which some micro-batches, and some steps, reach one alone; one is for nothing."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.device("meta"):
            self.few, self.others, self.spare = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(by_branch(self.net(images.flatten(1)), labels == 3, self.few, self.others), labels)


class Branching(nn.Module):
    """A head of two branches of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.others = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return by_branch(x, x[:, 0] > x[:, 1] + 1.5, self.few, self.others)


class BranchesInside(Blocks):
    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Block(32), Branching())


class LeavesSpare(nn.Module):
    """A head with a part that is for nothing, as the pooler of a model that is fine-tuned without it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class HasSpare(Blocks):
    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Block(32), LeavesSpare())


def again(block: nn.Module, x: Tensor) -> Any:
    """A block that computes its activations again in backward."""
    return checkpoint(block, x, use_reentrant=True) if torch.is_grad_enabled() else block(x)


class Reentrant(Blocks):
    """Its blocks are checkpointed the old way: a backward of their own, inside of the loss's, reaches them."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        x = self.net[0](images.flatten(1))
        for block in (self.net[1], self.net[2]):
            x = again(block, x)
        return cross_entropy(self.net[3](x), labels)


class ReentrantBranches(BranchesInside):
    """Branches that only such a backward reaches, one or the other in turn."""

    plan = ParallelPlan(stem=("0",), blocks=("1", "2"), head=("3",))

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), Swaps(), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        x = again(self.net[2], self.net[1](self.net[0](images.flatten(1))))
        return cross_entropy(self.net[3](x), labels)


class Swaps(nn.Module):
    """Takes one of two matrices of one size, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.others = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(x) if x[0, 0] > x[0, 1] else self.others(x)


class Freezes(Blocks):
    """Freezes its first layer when the run is under way."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(self.trainer.global_step < 1)


class LateHead(Blocks):
    """A head that nothing uses before the third step."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.device("meta"):
            self.late = nn.Linear(10, 10)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        out = self.net(images.flatten(1))
        return cross_entropy(self.late(out) if self.global_step >= 2 else out, labels)


class NormsABranch(Blocks):
    """A BatchNorm that only some micro-batches come to."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.device("meta"):
            self.norm = nn.BatchNorm1d(10)

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        out = self.net(images.flatten(1))
        return cross_entropy(self.norm(out) if int(labels.sum()) % 2 else out, labels)


class FusedBlock(nn.Module):
    """Takes the parts of a fused product by their whole sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.fused(x).split(32, dim=-1)
        return x + self.out((query * key).softmax(-1) * value)


class Fused(Blocks):
    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("2",), tensor={"1.fused": "colwise", "1.out": "rowwise"})

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), FusedBlock(), nn.Linear(32, 10))


class Transposed(nn.Module):
    """A matrix [inputs, outputs], as GPT-2's in transformers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Adapted(nn.Module):
    """A Linear inside of something else, as an adapter wraps it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 2


class SplitsTransposed(Blocks):
    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("2",), tensor={"1": "colwise"})
    block: Callable[[int], nn.Module] = Transposed

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), self.block(32), nn.Linear(32, 10))


class SplitsAdapted(SplitsTransposed):
    block = Adapted


class SplitsParametrized(SplitsTransposed):
    @staticmethod
    def block(size: int) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(size, size))


class NeedsPairs(Fused):
    """Cannot be tried on one sample; what is split of it works."""

    plan = ParallelPlan(stem=("0",), blocks=("1",), head=("2",), tensor={"1.up": "colwise", "1.down": "rowwise"})

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(64, 32), Block(32), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert len(batch[1]) > 1
        return super().training_step(batch, batch_idx)
