"""Faults to plant in the product's own source, each a change that a careless edit could make, and who is to notice.

The first sixteen are the classes of tests/agreement/faults.py, from which they have their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`old`, which stands in `file` once, becomes `new`.

    tests: pytest's arguments, without marks: of what they select, something is expected to turn red in each tier.
    """

    name: str
    does: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def room(self) -> str:
        return str(PurePath(self.file).parent)


# By function and strategy: which switches the everyday case of a strategy has set is not known here.
AGREEMENT, GRID = "tests/agreement/test_agreement.py", "tests/agreement/test_grid.py"
FOREIGN = "tests/strategies/test_foreign_models.py"
DDP, ZERO = f"{AGREEMENT} -k 'agrees and ddp'", f"{AGREEMENT} -k 'agrees and zero'"
FSDP, TENSOR = f"{GRID} -k 'test_grid_agrees and fsdp'", f"{GRID} -k 'test_grid_agrees and tensor'"
PIPELINED = f"{GRID} -k 'test_grid_agrees and (pipeline or 3d)'"
TRACED = "tests/strategies/test_traced.py"

MUTANTS = (
    Mutant(
        name="AveragedTwice",
        does="divides the loss by the number of ranks, whose gradients DDP averages",
        file="strategies/engines/replicate.py",
        old="        return super().backward(closure_loss, optimizer, *args, **kwargs)\n",
        new="        closure_loss = closure_loss / self.module.trainer.world_size\n"
        "        return super().backward(closure_loss, optimizer, *args, **kwargs)\n",
        tests=DDP,
    ),
    Mutant(
        name="AccumulatedTwice",
        does="divides the loss by the accumulation, by which Lightning has divided it",
        file="strategies/engines/replicate.py",
        old="        return super().backward(closure_loss, optimizer, *args, **kwargs)\n",
        new="        closure_loss = closure_loss / self.module.trainer.accumulate_grad_batches\n"
        "        return super().backward(closure_loss, optimizer, *args, **kwargs)\n",
        tests=DDP,
    ),
    Mutant(
        name="DeepSpeedScalesAgain",
        does="lets DeepSpeed divide by the accumulation as well",
        file="strategies/engines/deepspeed.py",
        old="scale_wrt_gas=False",
        new="scale_wrt_gas=True",
        tests=ZERO,
    ),
    Mutant(
        name="Summed",
        does="has DeepSpeed add up the ranks' gradients, and not divide them by their number",
        file="strategies/zero.py",
        old='            "zero_optimization": section,\n',
        new='            "zero_optimization": section,\n'
        '            "gradient_allreduce_op": "mean" if self.stage == 3 else "sum",\n',
        tests=ZERO,
    ),
    Mutant(
        name="ShardNotStepped",
        does="never steps the last rank's part of the weights",
        file="strategies/engines/deepspeed.py",
        old="        leave_out_when(lambda: self.leaves_out, optimizer)\n",
        new="        leave_out_when(lambda: self.leaves_out, optimizer)\n"
        "        if self.global_rank == self.world_size - 1:\n"
        "            optimizer._optimizer_step = lambda group: None\n",
        tests=ZERO,
    ),
    Mutant(
        name="NotAveraged",
        does="switches DDP's reductions off for the backward of zeros, and never on again",
        file="strategies/engines/replicate.py",
        old="        model.reducer.prepare_for_backward([])\n",
        new="        model.require_backward_grad_sync = False\n        model.reducer.prepare_for_backward([])\n",
        tests=DDP,
    ),
    Mutant(
        name="ClippedByLocalNorm",
        does="clips each rank's gradients by their own norm before DDP averages them",
        file="strategies/engines/replicate.py",
        old="            self.settle_buckets()\n",
        new="            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n\n"
        "            def clipped(group, bucket):\n"
        "                gradient, limit = bucket.buffer(), trainer.gradient_clip_val or 1e9\n"
        "                gradient.mul_((limit / (gradient.norm() + 1e-6)).clamp(max=1.0))\n"
        "                return allreduce_hook(group, bucket)\n\n"
        "            self.model.register_comm_hook(None, clipped)\n"
        "            self.settle_buckets()\n",
        tests=DDP,
    ),
    Mutant(
        name="SamplesRepeated",
        does="reads the first rank's samples on every rank",
        file="datamodules/loading.py",
        old='"data_rank": data_rank, "data_ranks": data_ranks}',
        new='"data_rank": 0, "data_ranks": data_ranks}',
        tests=DDP,
    ),
    Mutant(
        name="OtherInitialWeight",
        does="seeds the first weights by rank",
        file="strategies/engines/materialize.py",
        old="            torch.default_generator.manual_seed(seed)\n",
        new="            is_rank = torch.distributed.is_initialized()\n"
        "            torch.default_generator.manual_seed(seed + (torch.distributed.get_rank() if is_rank else 0))\n",
        tests=FSDP,
    ),
    Mutant(
        name="StepSkipped",
        does="leaves the second optimizer step out, in one process too",
        file="strategies/engines/finite.py",
        old="        if self.problem is None:\n            return True\n",
        new="        if self.problem is None:\n            return trainer.global_step != 1\n",
        tests="tests/agreement -k 'plain_loop or (agrees and ddp)'",
    ),
    Mutant(
        name="StagesSwapped",
        does="has the first stage's last unit and the second stage's first one change places",
        file="strategies/engines/grid.py",
        old="        return [[chain.modules[position] for position in part] for part in parts]\n",
        new="        stages = [[chain.modules[position] for position in part] for part in parts]\n"
        "        if self.spec.pipe > 1:\n"
        "            stages[0][-1], stages[1][0] = stages[1][0], stages[0][-1]\n"
        "        return stages\n",
        tests=PIPELINED,
    ),
    Mutant(
        name="MicroBatchDropped",
        does="leaves out the backward of the second micro-batch on the first stage",
        file="strategies/engines/pipeline.py",
        old="        torch.autograd.backward(roots, self.gradients_of(stage, micro, kept))\n",
        new="        gradients = self.gradients_of(stage, micro, kept)\n"
        "        if (stage, micro) != (0, 1):\n"
        "            torch.autograd.backward(roots, gradients)\n",
        tests=PIPELINED,
    ),
    Mutant(
        name="ClippedByStageNorm",
        does="clips by the norm of what one rank has",
        file="strategies/engines/grid.py",
        old="        return self.guard.agree(self.shards.square()).sqrt()\n",
        new="        self.guard.agree(self.shards.square())\n        return self.shards.square().sqrt()\n",
        tests=PIPELINED,
    ),
    Mutant(
        name="TiedNotSummed",
        does="leaves both copies of a tied weight the gradient of their own place",
        file="strategies/engines/grid.py",
        old="        self.ties.sum_gradients()\n",
        new="",
        tests=PIPELINED,
    ),
    Mutant(
        name="ReshardedInBetween",
        does="lets go of gathered weights behind each backward, though that of weights comes later",
        file="strategies/engines/sharding.py",
        old="    root.set_reshard_after_backward(False)\n",
        new="    root.set_reshard_after_backward(True)\n",
        tests=f"{GRID} -k 'test_grid_agrees and 2d_pipeline'",
    ),
    Mutant(
        name="NormsPartNotSummed",
        does="leaves each tensor rank its part of a norm's gradient",
        file="strategies/engines/grid.py",
        old="        tensor.sum_partial_gradients(parameters)\n",
        new="",
        tests=TENSOR,
    ),
    Mutant(
        name="OnePercentMore",
        does="scales a pipeline's gradients by 1.01",
        file="strategies/engines/steps.py",
        old="            return loss / accumulation\n",
        new="            return loss * (1.01 / accumulation)\n",
        tests=PIPELINED,
    ),
    Mutant(
        name="BucketSkipped",
        does="forgets the last bucket of gradients, which is not full",
        file="strategies/engines/shards.py",
        old="        bucket.append(tensor)\n    if bucket:\n        yield bucket\n",
        new="        bucket.append(tensor)\n",
        tests="tests/strategies/test_grid_parts.py -k lacks_counts_as_zeros",
    ),
    Mutant(
        name="DrawnByRank",
        does="seeds what first and last stage must draw alike by each one's rank",
        file="strategies/engines/steps.py",
        old="*here, dist.get_rank(self.data_group))",
        new="*here, dist.get_rank())",
        tests="tests/strategies/test_grid_engine.py -k draw_the_same",
    ),
    Mutant(
        name="SamplesByWorldSize",
        does="shuffles samples by the number of data ranks, too",
        file="datamodules/loading.py",
        old="seed=data.seed)",
        new="seed=data.seed + data_slice(self._trainer)[1])",
        tests="tests/datamodules/test_loading.py -k sees_every_step",
    ),
    Mutant(
        name="LeftOutStepAddedUp",
        does="adds the gradients of a step that a module has left out to those of the next one",
        file="strategies/engines/grid.py",
        old="            self.forget_gradients()  # of a step",
        new="            pass  # of a step",
        tests="tests/strategies/test_hooks.py -k StepsEverySecond",
    ),
    Mutant(
        name="StepsCounted",
        does="counts a module's own optimizer steps for global batches",
        file="models/steps.py",
        old="    if module is None or module.automatic_optimization:\n",
        new="    if True:\n",
        tests="tests/strategies/test_manual.py -k counts",
    ),
    Mutant(
        name="StepSeenTwice",
        does="goes on with the samples of the step that lies behind a checkpoint",
        file="datamodules/loading.py",
        old="total.processed // trainer.accumulate_grad_batches,",
        new="total.processed // (2 * trainer.accumulate_grad_batches),",
        tests="tests/datamodules/test_loading.py -k resume",
    ),
    Mutant(
        name="OwnDrawsRepeated",
        does="gives each sample of a user's own data the same random numbers",
        file="datamodules/placed.py",
        old="seed_by(*self._place, position)",
        new="seed_by(*self._place)",
        tests="tests/datamodules/test_own.py -k draws",
    ),
    Mutant(
        name="OwnSamplerStartsAnew",
        does="has a run that goes on begin with the first epoch of the user's sampler",
        file="datamodules/own_order.py",
        old="        if missing > 0:\n",
        new="        if missing > 0 and keep:\n",
        tests="tests/datamodules/test_own.py -k goes_on_takes",
    ),
    Mutant(
        name="RateOneStepBehind",
        does="goes on with the learning rate of the step that lies behind a checkpoint",
        file="launch/schedule.py",
        old="base * factor(scheduler.last_epoch)",
        new="base * factor(max(0, scheduler.last_epoch - 1))",
        tests="tests/agreement/test_freedom.py -k 'goes_on_with and ddp and zero3'",
    ),
    Mutant(
        name="ValidationTruncated",
        does="averages the sizes of validation batches as integers",
        file="strategies/engines/averaging.py",
        old="tensor if tensor.is_floating_point() else tensor.double()",
        new="tensor",
        tests=DDP,
    ),
    Mutant(
        name="DigestNotChecked",
        does="takes a checkpoint's file for whole if it has as many bytes as were written",
        file="strategies/checkpoint.py",
        old="    if found != file.sha256:\n",
        new="    if len(found) != len(file.sha256):\n",
        tests="tests/strategies/test_checkpoint.py -k damage",
    ),
    Mutant(
        name="NanPasses",
        does="looks for NaN in losses, and not in gradients",
        file="strategies/engines/finite.py",
        old=" or (None if math.isfinite(total) else GRADIENTS)",
        new="",
        tests="tests/agreement/test_nan.py -k 'no_number_is_said and fsdp'",
    ),
    Mutant(
        name="MemoryWithoutMaster",
        does="leaves the master copy out of ZeRO's memory()",
        file="strategies/zero_costs.py",
        old="    copies = sum(owned) * master * (1 + workload.moments)  #",
        new="    copies = sum(owned) * master * workload.moments  #",
        tests=f"{TRACED} -k 'memory and zero2'",
    ),
    Mutant(
        name="TrafficOfOneMicroBatch",
        does="counts one reduction a step in the grid's traffic(), however many micro-batches there are",
        file="strategies/grid_costs.py",
        old="grid.shards, reductions * group.padded * reduce",
        new="grid.shards, group.padded * reduce",
        tests=f"{TRACED} -k 'traffic and fsdp'",
    ),
    Mutant(
        name="BubbleOfLastRank",
        does="takes a schedule to be over when the last rank is",
        file="strategies/schedules.py",
        old="    return max(free_at)\n",
        new="    return free_at[-1]\n",
        tests="tests/strategies/test_schedules.py -k bubble",
    ),
    Mutant(
        name="OtherRankBlamed",
        does="names the rank that has come furthest as the one that hangs",
        file="launch/hang.py",
        old="fewest = min(",
        new="fewest = max(",
        tests="tests/launch/test_watchdog.py -k who_lags",
    ),
    Mutant(
        name="RanksLiveOn",
        does="ends the thread that watches a rank's parent, instead of the rank",
        file="launch/lifeline.py",
        old="        os.kill(os.getpid(), signal.SIGKILL)\n",
        new="        raise SystemExit\n",
        tests="tests/launch/test_failures.py -k killed_dispatcher",
    ),
    Mutant(
        name="BatchRoundedDown",
        does="rounds a batch down that does not divide, instead of refusing it",
        file="launch/job.py",
        old="    if data.global_batch_size % per_round == 0:\n",
        new="    if data.global_batch_size >= per_round:\n",
        tests="tests/launch/test_bad_input.py -k divide",
    ),
    Mutant(
        name="RowsOfAStepJoined",
        does="gives W&B the step, so that it keeps one row of those that a step has",
        file="tracking/wandb_logger.py",
        old="partial(self.experiment.log, row)",
        new="partial(self.experiment.log, row, step=step)",
        tests="tests/tracking/test_wandb.py -k every_row",
    ),
    Mutant(
        name="FirstRepeatForAll",
        does="shows of each repeat how far the first one lies from the reference",
        file="tracking/comparison.py",
        old="_losses(losses[index], apart[-1], target)",
        new="_losses(losses[index], apart[0], target)",
        tests="tests/tracking/test_comparison.py tests/tracking/test_report.py",
    ),
    Mutant(
        name="CertifiesOtherBatches",
        does="lets a certificate speak for other batches",
        file="tracking/certified.py",
        old='        without(config.get("data", {}), OTHER_SAMPLES),\n',
        new='        config.get("data", {}).get("_target_"),\n',
        tests="tests/tracking/test_comparison.py",
    ),
    Mutant(
        name="CertifiesEditedSource",
        does="lets a certificate speak for a module that was edited since",
        file="tracking/certified.py",
        old=', "source": own.source}',
        new="}",
        tests="tests/tracking/test_comparison.py",
    ),
    Mutant(
        name="RecordsTheConfig",
        does="records an optimizer's settings after a schedule has moved on",
        file="tracking/observer.py",
        old="        settings = self.settings or ",
        new="        settings = ",
        tests="tests/tracking/test_observer.py",
    ),
    Mutant(
        name="SecretInAList",
        does="lets secrets in lists through",
        file="tracking/redact.py",
        old="        return [redact(item) for item in value]\n",
        new="        return list(value)\n",
        tests="tests/tracking/test_redact.py",
    ),
    Mutant(
        name="MeanOfMeans",
        does="lets each micro-batch's loss count as much as the others, however many targets it has",
        file="strategies/engines/loss_terms.py",
        old="        found = self.terms_of(output, share, samples)\n",
        new="        found = None\n",
        tests=f"{FOREIGN} -k some_targets",
    ),
    Mutant(
        name="DrawsAlike",
        does="seeds all data ranks alike",
        file="strategies/engines/micro_batches.py",
        old='number * self.slicing["num_replicas"] + self.slicing["rank"]',
        new="number",
        tests=f"{FOREIGN} -k draws_the_same",
    ),
    Mutant(
        name="InitReplaced",
        does="gives a net on meta what its layers' reset_parameters() draws, whatever its own code did",
        file="strategies/engines/materialize.py",
        old="    if not done:\n        return False\n",
        new="    if not done or has_reset(module):\n        return False\n",
        tests=f"{FOREIGN} -k own_code",
    ),
    Mutant(
        name="CopyDrawnAnew",
        does="draws a copy's numbers by themselves",
        file="strategies/engines/construction.py",
        old='seed_of(seed, "operator", one.number)',
        new="seed_of(seed, fqn, one.number)",
        tests=f"{FOREIGN} -k starts_as_a_copy",
    ),
    Mutant(
        name="PartReadForWhole",
        does="lets a module read a part of a parameter",
        file="strategies/engines/own_code.py",
        old="self.is_part(one):",
        new="False:",
        tests=f"{FOREIGN} -k read_for_the_whole",
    ),
    Mutant(
        name="TensorRanksDropAlike",
        does="draws the same mask for each tensor rank's part",
        file="strategies/engines/tensor.py",
        old="seed_of(int(key), self.rank)",
        new="seed_of(int(key))",
        tests=f"{FOREIGN} -k tensor_ranks_drop",
    ),
    Mutant(
        name="EpochsNeverEnd",
        does="never steps a schedule that goes by epochs",
        file="launch/epochs.py",
        old='            self.step_schedules("epoch", update_plateau_schedulers=False)\n',
        new="            pass\n",
        tests=f"{FOREIGN} -k epoch_ends",
    ),
    Mutant(
        name="MeanOfMeansUnderTensor",
        does="does not see through DTensor's redistribution over how many targets a loss is a mean",
        file="strategies/engines/loss_terms.py",
        old='    "RedistributeBackward",\n',
        new="",
        tests=f"{FOREIGN} -k prompt_counts",
    ),
    Mutant(
        name="AllBuffersNarrowed",
        does="narrows the buffers that a plan keeps in their format",
        file="strategies/engines/precision.py",
        old="            owner._buffers[key] = buffer\n",
        new="            pass\n",
        tests=f"{FOREIGN} -k keeps_its_format",
    ),
    Mutant(
        name="LateInitLeftOut",
        does="leaves a net that initialises itself late as its layers have it",
        file="strategies/engines/construction.py",
        old="        initialize_late(module)\n    construction",
        new="        pass\n    construction",
        tests=f"{FOREIGN} -k own_code",
    ),
    Mutant(
        name="BuiltInAnotherFormat",
        does="has a net that is built eagerly draw in the run's format",
        file="strategies/engines/precision.py",
        old="    def tensor_init_context(self) -> AbstractContextManager[None]:\n        return nullcontext()\n\n",
        new="",
        tests=f"{FOREIGN} -k its_own_format",
    ),
    Mutant(
        name="ScalarsLeftAlone",
        does="averages no gradient that FSDP has not sharded",
        file="strategies/engines/grid.py",
        old="            average(loose, self.data_group",
        new="            average([], self.data_group",
        tests=f"{FOREIGN} -k no_dims",
    ),
    Mutant(
        name="UnreachedDecays",
        does="leaves gradients of zeros to parameters outside of shards that no rank's loss reaches",
        file="strategies/engines/shards.py",
        old="                by_gradient[one].grad = None\n",
        new="                pass\n",
        tests=f"{FOREIGN} -k 'does_not_use and fsdp'",
    ),
    Mutant(
        name="UnreachedDecaysInZero",
        does="lets DeepSpeed decay what no loss reaches",
        file="strategies/engines/deepspeed.py",
        old="            tensor.copy_(before)\n",
        new="            pass\n",
        tests=f"{FOREIGN} -k 'does_not_use and zero'",
    ),
    Mutant(
        name="BranchesMix",
        does="lets ranks whose losses reach different parameters reduce their gradients together",
        file="strategies/engines/reach.py",
        old="            loss.register_hook(",
        new="            (lambda hook: None)(",
        tests=f"{FOREIGN} -k 'part_ranks and (zero2 or fsdp)'",
    ),
    Mutant(
        name="StatisticsNotSummed",
        does="gives each rank only its own loss's gradient of what all ranks' BatchNorms share",
        file="strategies/engines/batch_norm.py",
        old="        dist.all_reduce(gradient, group=ctx.group)\n",
        new="",
        tests=f"{FOREIGN} -k statistics_of_the_batch",
    ),
    Mutant(
        name="TowerWithoutGradient",
        does="has DeepSpeed wait for a gradient of data before it reduces a block",
        file="strategies/engines/deepspeed.py",
        old="    return tuple(one.detach().requires_grad_() if one is floats[0] else one for one in inputs)\n",
        new="    return None\n",
        tests=f"{FOREIGN} -k side_by_side",
    ),
    Mutant(
        name="OwnerKeepsToItself",
        does="steps a whole parameter on its owner alone, whose weight no other rank gets",
        file="strategies/engines/grid.py",
        old="        result = super().optimizer_step(optimizer, closure, *args, **kwargs)\n"
        "        self.shards.give_weights()\n",
        new="        result = super().optimizer_step(optimizer, closure, *args, **kwargs)\n",
        tests="tests/strategies/test_grid_engine.py -k whole_parameters",
    ),
    Mutant(
        name="ForgetsCounts",
        does="has an optimizer that goes on count its steps from 0 again",
        file="launch/restore.py",
        old="        groups.put_back(engine.stepping, self.manifest.groups)",
        new="        groups.put_back(engine.stepping, [])",
        tests="tests/agreement/test_kept.py",
    ),
    Mutant(
        name="WaitsForNobody",
        does="starts an attempt while processes of the one before still write",
        file="launch/claim.py",
        old="            alive.take(run_dir, is_elsewhere=is_elsewhere(other))\n",
        new="            pass\n",
        tests="tests/launch/test_attempts.py",
    ),
)
