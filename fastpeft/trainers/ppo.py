"""Proximal policy optimisation: a policy learns from scores of what it says, held to a reference.

The four roles of PPO can be one frozen model, dense or quantised. The policy is an adapter; the reference is the model
without it, or with another; value and reward are adapters with a score layer each. So training takes the memory of one
base, where four models took four. Each role can be a model of its own instead.

One step of transformers' trainer is one update: sample, score, and go over the samples a few times. The optimizer runs
inside of it, and is empty-handed when transformers calls it once more; schedule, checkpoints and logging stay its.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastpeft.data import MixedDataset, PreferenceCollator, PromptDataset, build_prompt_dataset, stop_token_ids
from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.models.decode import DecodeOptions
from fastpeft.trainers.base import BaseTrainer
from fastpeft.trainers.forward import disable_dropout
from fastpeft.trainers.losses import (
    gae,
    group_advantages,
    kl_estimate,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    whiten,
)
from fastpeft.trainers.metrics import Meter, Stopwatch
from fastpeft.trainers.ppo_config import PPOConfig
from fastpeft.trainers.ppo_log import CompletionLog
from fastpeft.trainers.ppo_rewards import RewardFunction, call_reward_function, check_scores
from fastpeft.trainers.ppo_roles import Roles
from fastpeft.trainers.rollout import Rollout
from fastpeft.trainers.sampling import EngineSampler, Sampler, context_limit
from fastpeft.trainers.state import capture_rng, load_state, restore_rng, save_state

_KL_ERROR = 0.2  # bound of the relative error that the adaptive controller answers to
_STATE = "ppo"

Source = str | Path | Iterable[Mapping[str, Any]] | Dataset[Any]


class PPOTrainer(BaseTrainer):
    """Train a policy by PPO, or by GRPO with ``advantage="group"``.

    Metrics have TRL's names: ``objective/{kl,entropy,non_score_reward,rlhf_reward,scores}``,
    ``policy/{approxkl_avg,clipfrac_avg,entropy_avg}``, ``loss/{policy,value}_avg``,
    ``val/{clipfrac_avg,ratio,num_eos_tokens}``, ``episode``; and ``objective/kl_coef``, ``completions/mean_length``,
    ``completions/skipped``.

    Args:
        model: the policy, a causal language model with an adapter or without.
        args: options; ``PPOConfig()`` if None.
        train_dataset: prompts: a JSON Lines file, rows in memory, or a `PromptDataset`.
        eval_dataset: the same.
        processing_class: the tokenizer.
        reward_funcs: a function or several, see `fastpeft.trainers.ppo_rewards.call_reward_function`; scores add up.
        reward_model: a model with a score layer. ``args.reward_adapter_name`` names an adapter of ``model`` instead.
        ref_model: the reference; None takes the model itself without its adapter, or with ``args.ref_adapter_name``.
        value_model: a model with a score layer, which is trained; None takes an adapter beside the policy's, or, for a
            policy without adapter, a layer on the policy's own hidden states.
        sampler: draws completions; None takes the decoding engine.
        callbacks: further transformers callbacks.
        optimizers: as in transformers; the optimizer has to know the value head's parameters too.
        peft_config: an adapter to make for the policy.
    Raises:
        UserError: data, tokenizer or a model cannot be used; the message says what to do.
    """

    args: PPOConfig

    def __init__(
        self,
        model: nn.Module,
        args: PPOConfig | None = None,
        train_dataset: Source | None = None,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        reward_model: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        value_model: nn.Module | None = None,
        sampler: Sampler | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        args = PPOConfig() if args is None else args
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError(
                    "PPOTrainer: the model has an adapter and peft_config asks for another; give one of them"
                )
            model = get_peft_model(model, peft_config)
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or ())
        if not functions and reward_model is None and args.reward_adapter_name is None:
            raise UserError(
                "PPOTrainer: there is nothing to score completions with; give reward_funcs=, reward_model=, or the "
                "name of a reward adapter as reward_adapter_name"
            )
        self.reward_funcs: list[RewardFunction] = functions
        self.roles = Roles(model, args, ref_model, reward_model, value_model)
        self._completions = CompletionLog()
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or ()), self._completions],
            optimizers=optimizers,
        )
        if args.disable_dropout:
            self.roles.each_model(disable_dropout)
        self.roles.to(args.device)
        tokenizer = self._tokenizer()
        stops = tuple(stop_token_ids(tokenizer))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        self._sampling = DecodeOptions(args.response_length, args.temperature, stop_ids=stops)
        self._check_context(model)
        self._sampler = sampler or EngineSampler(args.forward_batch_size)
        self._collate = PreferenceCollator(pad, "shared" if self.roles.shares_prompts else "padded")
        self.kl_coef = args.kl_coef
        self.episodes = 0
        self._update_norm = torch.zeros((), device=args.device)

    def _check_context(self, model: nn.Module) -> None:
        limit = context_limit(model)
        needed = self.args.response_length
        if isinstance(self.train_dataset, (PromptDataset, MixedDataset)):
            needed += self.train_dataset.report.longest
        if limit is not None and needed > limit:
            raise UserError(
                f"PPOTrainer: the longest prompt and response_length ({self.args.response_length}) come to {needed} "
                f"tokens, and the model has {limit} positions; lower response_length or max_prompt_length"
            )

    # Data.

    def prepare_dataset(self, source: Source | None, argument: str) -> Dataset[Any] | None:
        """Tokenise the prompts; the report on them is printed once."""
        if source is None or isinstance(source, (PromptDataset, MixedDataset)):
            return source
        if isinstance(source, Dataset) or not isinstance(source, (str, Path, Iterable)) or isinstance(source, Mapping):
            raise UserError(
                f"PPOTrainer: {argument} is a {type(source).__name__}; give the path of a JSONL file, a list of rows, "
                "a PromptDataset or a MixedDataset of them"
            )
        dataset = build_prompt_dataset(
            source,  # type: ignore[arg-type]
            self._tokenizer(),
            max_length=self.args.max_prompt_length,
            on_bad_row=self.args.on_bad_row,  # type: ignore[arg-type]
            name=None if isinstance(source, (str, Path)) else argument,
        )
        if self.args.progress and self.args.process_index == 0:
            print(dataset.report.summary(), flush=True)
        return dataset

    def default_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """A batch is a list of prompts."""
        return lambda items: {"items": items}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processing_class is None:
            raise UserError("PPOTrainer: the tokenizer is missing; give it as processing_class=")
        return self.processing_class

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Fetch the prompts of one update."""
        return list(islice(epoch_iterator, num_batches)), None

    # The update.

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer of the policy and the value head."""
        with self.roles.all_trainable():
            optimizer = super().create_optimizer(model)
        extra = self.roles.value_parameters()
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if new := [(name, p) for name, p in extra if id(p) not in known]:
            named = "param_names" in optimizer.param_groups[0]  # all groups have names, or none has
            optimizer.add_param_group({"params": new if named else [p for _, p in new]})
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Do one update."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch()
        self.model.train()
        rollout = self.roll_out(inputs["items"], self.meter)
        loss = self._learn(rollout)
        self.episodes += len(rollout.scores) * self.args.world_size
        if self.args.target_kl is not None:
            error = min(max(float(rollout.mean_kl()) / self.args.target_kl - 1, -_KL_ERROR), _KL_ERROR)
            self.kl_coef *= 1 + error * len(rollout.scores) / self.args.kl_horizon
        self._step_loss = loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Report the update's own gradient norm: what transformers clips here has no gradients any more."""
        assert self._step_loss is not None
        self.meter.add("loss", self._step_loss, 1)
        self._step_loss = None
        return self._update_norm

    @torch.no_grad()
    def roll_out(self, items: Sequence[Mapping[str, Any]], meter: Meter) -> Rollout:
        """Sample completions of prompts, and let every role look at them.

        Args:
            items: items of a `PromptDataset`.
            meter: gets the metrics.
        """
        args, roles = self.args, self.roles
        repeated = [item for item in items for _ in range(args.num_generations)]
        with roles.policy():
            samples = self._sampler(self.model, [item["input_ids"] for item in repeated], self._sampling)
        tokenizer = self._tokenizer()
        texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in samples]
        rollout = Rollout(items, samples, texts, args.num_generations, args.device)
        scores = torch.zeros(len(samples), device=args.device)
        for function in self.reward_funcs:
            prompts, columns = [item["prompt"] for item in repeated], [item["columns"] for item in repeated]
            scores += torch.tensor(call_reward_function(function, prompts, texts, columns), device=args.device)
        for index, batch in rollout.batches(self._collate, self._items_at_a_time()):
            rollout.put("logprobs", index, roles.logprobs(batch, args.temperature)[0])
            rollout.put("ref_logprobs", index, roles.ref_logprobs(batch, args.temperature))
            if roles.has_value:
                rollout.put("values", index, roles.values(batch))
            if roles.has_reward:
                scores[index] += roles.scores(batch).to(scores.dtype)
        good = check_scores(scores, texts, args.on_bad_reward)
        finished = torch.tensor([sample.finished for sample in samples], device=args.device)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~finished
        rollout.scores, rollout.mask = scores, rollout.mask & good[:, None]
        self._advantages(rollout)
        self._report(rollout, good, finished, meter)
        return rollout

    def _items_at_a_time(self) -> int:
        return max(1, self.args.forward_batch_size // self.args.num_generations)

    def _advantages(self, rollout: Rollout) -> None:
        args, mask = self.args, rollout.mask
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)  # type: ignore[arg-type]
        rollout.kl = torch.where(mask, kl, 0.0)
        if args.advantage == "group":
            scores = torch.where(mask[:, 0], rollout.scores, math.nan)
            advantages = group_advantages(scores, args.num_generations, args.scale_group)
            rollout.advantages = torch.where(mask, advantages[:, None], 0.0)
            return
        rewards = -self.kl_coef * rollout.kl
        last = rollout.lengths[:, None] - 1
        rewards = rewards.scatter_add(1, last, torch.where(mask[:, 0], rollout.scores, 0.0)[:, None])
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, rollout.returns = gae(rewards, rollout.values, mask, args.gamma, args.lam)
        rollout.advantages = whiten(advantages, mask)

    def _report(self, rollout: Rollout, good: Tensor, finished: Tensor, meter: Meter) -> None:
        count = good.sum()
        known = torch.where(good, rollout.scores, 0.0).sum()
        non_score = -self.kl_coef * rollout.kl.sum()
        meter.add("objective/kl", rollout.kl.sum(), count)
        meter.add("objective/entropy", -torch.where(rollout.mask, rollout.logprobs, 0.0).sum(), count)
        meter.add("objective/non_score_reward", non_score, count)
        meter.add("objective/scores", known, count)
        meter.add("objective/rlhf_reward", known + non_score, count)
        meter.add("objective/kl_coef", self.kl_coef, 1)
        meter.add("val/num_eos_tokens", finished.sum(), 1)
        meter.add("completions/mean_length", rollout.lengths.sum(), len(good))
        meter.add("completions/skipped", (~good).sum())
        meter.add("tokens", rollout.token_count)
        self._completions.keep(rollout)

    def _learn(self, rollout: Rollout) -> Tensor:
        """Go over the samples; gives the mean loss."""
        args = self.args
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        parameters = self.roles.trainable_parameters()
        for _ in range(args.num_ppo_epochs):
            order = torch.randperm(len(rollout.items))
            for part in order.tensor_split(args.num_mini_batches):
                if not bool(rollout.mask[rollout.samples_of(part)].any()):
                    continue  # every sample of it was left out
                loss = self._backward(rollout, part)
                self._average_gradients(parameters)
                norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                self._skip_unless_finite(loss, norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss)
                norms.append(norm)
        if not losses:
            self._update_norm = torch.zeros((), device=args.device)
            return torch.zeros((), device=args.device)
        self._update_norm = torch.stack(norms).nan_to_num(posinf=0.0).mean()
        return torch.stack(losses).nan_to_num(posinf=0.0, neginf=0.0).mean()

    def _backward(self, rollout: Rollout, part: Tensor) -> Tensor:
        """Add up the gradients of a minibatch; gives its loss."""
        args, roles, meter = self.args, self.roles, self.meter
        tokens = rollout.mask[rollout.samples_of(part)].sum()
        total = torch.zeros((), device=args.device)
        for index, batch in rollout.batches(self._collate, self._items_at_a_time(), part):
            mask = rollout.mask[index]
            share = mask.sum() / tokens  # each loss is a mean over its tokens
            old, advantages = rollout.logprobs[index], rollout.advantages[index]
            with roles.policy():
                flat, entropy, values = roles.logprobs_and_values(batch, args.temperature)
                logprobs = rollout.padded(index, flat)
                policy_loss = ppo_policy_loss(logprobs, old, advantages, mask, args.cliprange)
                loss = policy_loss
                if args.advantage == "group" and self.kl_coef:
                    kl = kl_estimate(logprobs, rollout.ref_logprobs[index], "k3")
                    loss = loss + self.kl_coef * masked_mean(kl, mask)
                if values is not None:
                    loss = loss + args.vf_coef * self._value_loss(rollout, index, values, share)
                (loss * share).backward()
            total += loss.detach() * share
            if roles.has_value and values is None:
                with roles.value():
                    value_loss = args.vf_coef * self._value_loss(rollout, index, roles.values(batch), share)
                    (value_loss * share).backward()
                total += value_loss.detach() * share
            with torch.no_grad():
                difference = torch.where(mask, logprobs - old, 0.0)
                ratio = difference.exp()
                clipped = -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange) > -advantages * ratio
                meter.add("policy/approxkl_avg", 0.5 * masked_mean(difference**2, mask) * share, share)
                meter.add("policy/clipfrac_avg", masked_mean(clipped.float(), mask) * share, share)
                entropies = rollout.padded(index, entropy)
                meter.add("policy/entropy_avg", masked_mean(entropies, mask) * share, share)
                meter.add("loss/policy_avg", policy_loss.detach() * share, share)
                meter.add("val/ratio", masked_mean(ratio, mask) * share, share)
        return total

    def _value_loss(self, rollout: Rollout, index: Tensor, flat: Tensor, share: Tensor) -> Tensor:
        args, mask = self.args, rollout.mask[index]
        values, old, returns = rollout.padded(index, flat), rollout.values[index], rollout.returns[index]
        loss = ppo_value_loss(values, old, returns, mask, args.cliprange_value)
        with torch.no_grad():
            limited = old + (values - old).clamp(-args.cliprange_value, args.cliprange_value)
            clipped = (limited - returns) ** 2 > (values - returns) ** 2
            self.meter.add("val/clipfrac_avg", masked_mean(clipped.float(), mask) * share, share)
            self.meter.add("loss/value_avg", loss.detach() * share, share)
        return loss

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average over the processes: DDP would want every parameter in every forward, and the roles take turns."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _training_metrics(self) -> dict[str, float]:
        metrics = super()._training_metrics()
        metrics["episode"] = self.episodes
        return metrics

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the prompts of a data set once, and give the metrics of the answers.

        Args:
            eval_dataset: anything the constructor takes; its own evaluation set if None.
            ignore_keys: not used.
            metric_key_prefix: goes before the metrics' names.
        """
        dataset = self.prepare_dataset(eval_dataset, "eval_dataset") or self.eval_dataset
        if dataset is None:
            raise UserError("PPOTrainer: evaluate needs prompts; give eval_dataset")
        meter, state = Meter(self.args.device), capture_rng()
        size = self.args.per_device_eval_batch_size
        rows: Any = dataset
        items = list(rows)[self.args.process_index :: self.args.world_size]
        torch.manual_seed(self.args.seed)  # equal draws at every evaluation
        try:
            with (self._stopwatch or Stopwatch()).paused(), self._completions.paused():
                for begin in range(0, len(items), size):
                    self.roll_out(items[begin : begin + size], meter)
        finally:
            restore_rng(state)
        found = meter.read(self._sum_over_processes)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items() if name != "tokens"}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Saving: what the base class saves, the value model, and where the update stands.

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Save the policy with its adapters, and a value model of its own in ``value_model/``."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.roles.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.roles.load(Path(resume_from_checkpoint))

    def _save_resume_state(self, folder: Path) -> None:
        super()._save_resume_state(folder)
        if self.args.should_save:
            save_state({"kl_coef": self.kl_coef, "episodes": self.episodes}, folder, _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            own = load_state(Path(checkpoint_dir), _STATE)
            self.kl_coef, self.episodes = own["kl_coef"], own["episodes"]
