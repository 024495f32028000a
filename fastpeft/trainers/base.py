"""The one subclass of ``transformers.Trainer``, in which the gaps of that class are closed.

What changes:

- a step with a NaN or infinite loss or gradient never reaches the optimizer, and the loss is reported as it is;
- checkpoints are whole or absent, hold no pickle, and a broken one makes way for an older one (`saving`);
- metrics are summed on the device and read when they are logged (`metrics`);
- a resumed run has the intervals of its options of now, and none of its steps twice (`resume`);
- the last step is always logged, and SIGTERM and Ctrl-C end with a checkpoint (`preemption`);
- where a paged optimizer has state on the GPU, a step that runs out of memory runs again without it (`out_of_memory`);
- progress is a table (`progress`); overfitting (`overfitting`) and a schedule that would teach nothing are told of.

One wait for the device per optimizer step is left: whether the step is finite must be known before the optimizer runs.

The methods whose names begin with an underscore are transformers' own, overridden because it offers no public place.
`checks` looks for them at start, so that a version of transformers without them is refused instead of half obeyed.
"""

from __future__ import annotations

import copy
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from fastpeft.data import ComputedShuffle, LengthGrouped
from fastpeft.errors import UserError
from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from fastpeft.trainers import checkpoint
from fastpeft.trainers.checks import check_model, check_transformers
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.memory import PeakMemory
from fastpeft.trainers.metrics import LogLastStep, Meter, MetricsFile, Stopwatch, memory_bytes
from fastpeft.trainers.out_of_memory import StepAgain
from fastpeft.trainers.overfitting import OverfittingMonitor
from fastpeft.trainers.preemption import StopOnSignal
from fastpeft.trainers.progress import ProgressView
from fastpeft.trainers.resume import AlreadyTrained, ResumeAsAsked, without_mismatch_warning
from fastpeft.trainers.saving import SavingTrainer
from fastpeft.trainers.utilisation import Utilisation

logger = logging.getLogger(__name__)

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
}
_MANY_ROWS = 1 << 22  # of more, a shuffle is computed and not stored: torch's takes 40 bytes a row
_HOPELESS = 20  # skipped steps in a row after which a run is given up: it learns nothing


class BaseTrainer(SavingTrainer):
    """What all trainers share; a subclass says what its rows are, how they make a batch, and what the loss is.

    Args:
        model: a transformers model, or one with adapters from `fastpeft.get_peft_model`.
        args: training options.
        train_dataset: what `prepare_dataset` takes.
        eval_dataset: the same, for evaluation.
        processing_class: the tokenizer.
        data_collator: takes the place of `default_collator`.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler to use in place of those that ``args`` describe.
    Raises:
        UserError: nothing in the model can be trained, or an evaluation is asked for without data.
    """

    args: BaseConfig

    def __init__(
        self,
        model: nn.Module,
        args: BaseConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_transformers()
        check_model(model, type(self).__name__)
        if not isinstance(args, BaseConfig):
            raise UserError(
                f"{type(self).__name__}: args is a {type(args).__name__}; it must be the trainer's own config, which "
                "takes every field of transformers.TrainingArguments"
            )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError(
                f"{type(self).__name__}: eval_strategy is '{args.eval_strategy.value}' and there is no eval_dataset; "
                "give one, or set eval_strategy: 'no'"
            )
        self.args = args
        self.processing_class = processing_class
        super().__init__(
            model,
            args,
            train_dataset=self.prepare_dataset(train_dataset, "train_dataset"),
            eval_dataset=self.prepare_dataset(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            data_collator=data_collator or self.default_collator(),
            callbacks=[ResumeAsAsked(), *(callbacks or ())],  # first: the others see a state that is settled
            optimizers=optimizers,
            optimizer_cls_and_kwargs=_optimizer(args) if optimizers[0] is None else None,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch itself
        self.meter = Meter(args.device)
        self._eval_meter = Meter(args.device)
        self.nothing_to_do = False
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._step_loss: Tensor | None = None
        self._stopwatch: Stopwatch | None = None
        self.largest_batch: tuple[int, int] | None = None  # rows and tokens, in trainers that look at their batches
        self._peak_memory = PeakMemory(args.device)
        self._utilisation: Utilisation | None = None
        self._step_again = StepAgain(self.meter, self.accelerator.num_processes)
        self._stop_signal = StopOnSignal()
        self._progress = ProgressView()
        self.remove_callback(PrinterCallback)
        self.add_callback(self._stop_signal)
        self.add_callback(LogLastStep())
        self.add_callback(MetricsFile())
        self.add_callback(OverfittingMonitor())
        if args.progress:
            self.add_callback(self._progress)

    def prepare_dataset(self, source: Any, argument: str) -> Any:
        """Make a data set of what the user gave as ``argument``; None stays None."""
        raise NotImplementedError

    def default_collator(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        """Give the function that makes a batch of a list of items."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows; see `fastpeft.data.order` for what is not transformers'."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy, args = self.args.train_sampling_strategy, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if strategy == "group_by_length" and hasattr(dataset, "lengths"):
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return LengthGrouped(dataset.lengths, rows, seed)
        if strategy == "random" and hasattr(dataset, "__len__") and len(dataset) > _MANY_ROWS:
            return ComputedShuffle(len(dataset), seed)
        return super()._get_train_sampler(train_dataset)

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in ``output_dir``, or a checkpoint's folder.
            trial: as in transformers.
            ignore_keys_for_eval: as in transformers.
        Returns:
            transformers' ``TrainOutput``. If the checkpoint is at the run's last step already, its weights are loaded,
            a warning says so, and `nothing_to_do` is true afterwards.
        Raises:
            UserError: there is no checkpoint to resume from, or the one named is broken.
            SystemExit: SIGTERM came; the checkpoint is saved and the code is 143.
            KeyboardInterrupt: Ctrl-C (SIGINT) came; the checkpoint is saved.
        """
        folder: str | None = None
        if resume_from_checkpoint is True:
            folder = str(checkpoint.newest_valid(self.args.output_dir))
        elif resume_from_checkpoint:
            folder = str(resume_from_checkpoint)
            checkpoint.verify(Path(folder), resumable=True)
        set_seed(self.args.seed)  # so that the run does not depend on what happened since the trainer was made
        self.meter.reset()
        self.skipped_steps = self._skipped_in_a_row = 0
        self._step_loss = self._stopwatch = None
        self.nothing_to_do = False
        self.largest_batch = None
        self._peak_memory.start()
        self._utilisation = self.create_utilisation()
        try:
            with without_mismatch_warning():
                result = super().train(folder, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        except AlreadyTrained as finished:
            result = self._end_as_trained(finished)
        finally:
            self._progress.close()
            self._stop_signal.close()
        if self._stop_signal.received:
            self._leave(self._stop_signal.received)
        return result

    def _end_as_trained(self, finished: AlreadyTrained) -> TrainOutput:
        """Leave the model as the finished run left it."""
        self.nothing_to_do = True
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        option = "max_steps" if self.args.max_steps > 0 else "num_train_epochs"
        if self.args.process_index == 0:
            logger.warning("%s; raise %s to go on", finished, option)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _leave(self, received: signal.Signals) -> NoReturn:
        """Say how to go on, and end as the signal would have: a script that is interrupted has to stop."""
        step = self.state.global_step
        folder = checkpoint.checkpoint_path(self.args.output_dir, step)
        if self._stop_signal.saved_step != step:  # the signal came while the run was being wrapped up
            told = "after the last step, of which there is no checkpoint"
        elif self.args.save_only_model:
            told = f"after step {step}; {folder} holds the weights alone (save_only_model)"
        else:
            told = (
                f"after step {step}; saved {folder}; to go on from there, run again with train.resume=true "
                "(in Python: trainer.train(resume_from_checkpoint=True))"
            )
        logger.warning("%s: stopped %s", received.name, told)
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer; its messages name parameters as the model does.

        Args:
            model: whose parameters to take; the trainer's own if None.
        Returns:
            The optimizer.
        """
        optimizer = super().create_optimizer(model)
        if type(optimizer) in _OPTIMIZERS.values():
            names = {id(p): name for name, p in (self.model if model is None else model).named_parameters()}
            for group in optimizer.param_groups:
                if "param_names" not in group and all(id(p) in names for p in group["params"]):
                    group["param_names"] = [names[id(p)] for p in group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate's schedule; a fraction of warm-up never takes up a short run as a whole.

        transformers rounds the fraction up, and the first step of a warm-up has a learning rate of 0: with the default
        of 3%, the only step of a one-step run would change nothing.

        Args:
            num_training_steps: steps of the whole run.
            optimizer: as in transformers.
        Returns:
            The scheduler.
        """
        args = self.args
        if 0 < args.warmup_steps < 1 and args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args = copy.copy(args)
            self.args.warmup_steps = num_training_steps - 1
        try:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args = args
        if args.process_index == 0 and _is_always_zero(scheduler, num_training_steps):
            logger.warning(
                "the learning rate is 0 in every step of the run (steps: %d, warmup_steps: %g, learning_rate: %g), so "
                "nothing will be learnt; lower warmup_steps or train for more steps",
                *(num_training_steps, args.warmup_steps, args.learning_rate),
            )
        return scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward of one micro-batch; once more if memory runs out and there is some to be had."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch()
        micro_batch = partial(super().training_step, model, inputs, num_items_in_batch)
        loss = self._step_again.run(micro_batch, model, self.optimizer, first=self._step_loss is None)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        # transformers keeps a running sum that a single NaN would spoil for the rest of the run; ours is what is logged
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, between clipping and the optimizer."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        assert self._step_loss is not None
        self.meter.add("loss", self._step_loss, 1)
        self._skip_unless_finite(self._step_loss, grad_norm)
        self._step_loss = None
        return grad_norm

    def _skip_unless_finite(self, loss: Tensor, grad_norm: Any) -> None:
        """Take the gradients away from the optimizer if they must not be used: it passes over parameters without."""
        finite = torch.isfinite(loss + grad_norm)
        if self.accelerator.num_processes > 1:  # all have the same gradients, each its own loss
            finite = self.accelerator.reduce(finite.float(), reduction="sum") == self.accelerator.num_processes
        if bool(finite):
            self._skipped_in_a_row = 0
            return
        step = self.state.global_step + 1
        told = f"step {step}: the loss is {float(loss):g} and the gradient norm {float(grad_norm):g}"
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_steps += 1
        if self.accelerator.scaler is not None:
            return  # float16: overflow is how the scaler finds its scale
        self._skipped_in_a_row += 1
        advice = "lower learning_rate, look at the data of this step, or train in bfloat16 or float32"
        if self.args.on_nonfinite == "raise":
            raise UserError(f"{told}; the weights are as they were before it; {advice}")
        if self._skipped_in_a_row == _HOPELESS:
            raise UserError(f"{told}, as in the {_HOPELESS - 1} steps before; the run learns nothing; {advice}")
        logger.warning("%s; the step was skipped, the weights did not change", told)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter gathered to a training log line, and pass the line to every callback."""
        logs.pop("total_flos", None)
        if "loss" in logs:
            logs.update(self._training_metrics())
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        """Loss, accuracy and speed since the last log line; the only transfer from the device."""
        metrics = self.meter.read(self._sum_over_processes)
        self.meter.reset()
        seconds = self._stopwatch.lap() if self._stopwatch else 0.0
        tokens, targets, pairs = (round(metrics.pop(name, 0)) for name in ("tokens", "targets", "pairs"))
        self.state.num_input_tokens_seen += tokens
        metrics["num_tokens"] = self.state.num_input_tokens_seen
        metrics["tokens_per_second"] = tokens / seconds if seconds else 0.0
        if self._utilisation is not None and seconds and pairs:
            metrics["mfu"] = self._utilisation.share(tokens, targets, pairs, seconds)
        metrics["memory_bytes"] = self._peak_memory.read()
        metrics["skipped_steps"] = self.skipped_steps
        return metrics

    def peak_memory(self) -> int | None:
        """The most bytes that training steps had allocated on the GPU; None on a CPU."""
        return self._peak_memory.read() if self.args.device.type == "cuda" else None

    def create_utilisation(self) -> Utilisation | None:
        """What the metric ``mfu`` is reckoned by; None in a trainer whose steps are more than one pass each way."""
        return None

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(values, reduction="sum")
        return reduced

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Give the mean loss and the metrics of a data set; the time does not count in ``tokens_per_second``.

        Args:
            eval_dataset: anything the constructor takes; its own evaluation set if None.
            args: as in transformers.
            kwargs: as in transformers.
        """
        with (self._stopwatch or Stopwatch()).paused(), self._peak_memory.apart():
            dataset = self.prepare_dataset(eval_dataset, "eval_dataset")
            metrics: dict[str, float] = super().evaluate(dataset, *args, **kwargs)
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Weigh by what the loss counts, tokens or pairs, what transformers would average by batches."""
        self._eval_meter.reset()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self._eval_meter.read(self._sum_over_processes).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        if self.args.device.type == "cuda":
            output.metrics[f"{metric_key_prefix}_memory_bytes"] = memory_bytes(self.args.device)
        return output

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: transformers' estimate walks over every parameter in every micro-step."""
        return 0


def _optimizer(args: BaseConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer that the options name, with its arguments; None for one of transformers' own."""
    if args.optimizer not in _OPTIMIZERS:
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    options: dict[str, Any] = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    if args.optim_device_budget_gb is not None:
        options["device_budget_bytes"] = round(args.optim_device_budget_gb * 1e9)
    return _OPTIMIZERS[args.optimizer], options


def _is_always_zero(scheduler: Any, steps: int) -> bool:
    """Whether a schedule gives every step a learning rate of 0; False where that cannot be told beforehand."""
    if not isinstance(scheduler, LambdaLR):
        return False
    groups = list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
    return not any(rate * factor(step) for step in range(steps) for rate, factor in groups)
