"""Who is who in PPO: policy, reference, value and reward, as adapters and heads of one model, or as models.

| role | one model for all | by itself |
| --- | --- | --- |
| policy | the active adapter, or the whole model | |
| reference | no adapter, or `ref_adapter_name` | `ref_model` |
| value | an adapter with a score layer; without adapters a score layer on the policy's hidden states | `value_model` |
| reward | `reward_adapter_name`, an adapter with a score layer | `reward_model` |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.trainers.forward import SCORE, attention_of, base_of, batch_hidden, role
from fastpeft.trainers.heads import LogprobHead, attach_score, scores_of, with_score
from fastpeft.trainers.ppo_config import PPOConfig
from fastpeft.trainers.weights import load_weights, save_weights

_VALUE_FOLDER = "value_model"


class Roles:
    """The four roles, and what each makes of a batch of `PreferenceCollator`.

    Args:
        model: the policy.
        args: the options.
        ref_model: the reference, if it is a model by itself.
        reward_model: the reward model, likewise.
        value_model: the value model, likewise; it is trained.
    Raises:
        UserError: a role is missing, or is named twice.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PPOConfig,
        ref_model: nn.Module | None,
        reward_model: nn.Module | None,
        value_model: nn.Module | None,
    ) -> None:
        self._model = model
        self._args = args
        self._ref_model = ref_model
        self._reward_model = reward_model
        self._value_model = value_model
        self.has_value = args.advantage == "gae"
        self.has_reward = reward_model is not None or args.reward_adapter_name is not None
        self._policy_adapter = model.active_adapters[0] if isinstance(model, PeftModel) else None
        self._check()
        self._value_adapter = self._make_value() if self.has_value else None
        self._head = LogprobHead(model, "PPOTrainer")
        self._ref_head = None if ref_model is None else LogprobHead(ref_model, "PPOTrainer")
        self.shares_prompts = args.num_generations > 1 and attention_of(model) == "masked"
        for other in (ref_model, reward_model):
            if other is not None:
                other.requires_grad_(False).eval()

    def _check(self) -> None:
        args, model = self._args, self._model
        names = list(model.peft_config) if isinstance(model, PeftModel) else []
        for key, other in (("ref_adapter_name", self._ref_model), ("reward_adapter_name", self._reward_model)):
            name = getattr(args, key)
            if name is None:
                continue
            if other is not None:
                raise UserError(f"PPOTrainer: {key} is {name!r} and a model is given for that role; give one of them")
            if name not in names:
                raise UserError(f"PPOTrainer: {key} is {name!r}; the model has {', '.join(names) or 'no adapter'}")
            if name == self._policy_adapter:
                raise UserError(
                    f"PPOTrainer: {key} is {name!r}, which is the policy's; load the adapter a second time under "
                    "another name"
                )
        name = args.reward_adapter_name
        if (
            name is not None
            and isinstance(model, PeftModel)
            and SCORE not in (model.peft_config[name].modules_to_save or ())
        ):
            raise UserError(f"PPOTrainer: the adapter {name!r} has no score layer; RewardTrainer makes ones that have")
        if isinstance(model, PeftModel) and len(model.active_adapters) > 1:
            raise UserError(
                f"PPOTrainer: {', '.join(model.active_adapters)} are active; the policy is one adapter: set_adapter it"
            )
        if not names and self._ref_model is None:
            raise UserError(
                "PPOTrainer: the model has no adapter to leave out, so it cannot be its own reference; give ref_model= "
                "or peft_config="
            )
        for other, key in ((self._reward_model, "reward_model"), (self._value_model, "value_model")):
            if other is not None and SCORE not in base_of(other)._modules:
                raise UserError(
                    f"PPOTrainer: {key} has no score layer; make it with fastpeft.get_reward_model, or load one "
                    "for sequence classification"
                )

    def _make_value(self) -> str | None:
        """Make what computes values; gives the name of its adapter, if it is one. Values begin at 0."""
        model, args = self._model, self._args
        if self._value_model is not None:
            self._value_model.requires_grad_(True) if not isinstance(self._value_model, PeftModel) else None
            return None
        base, name = base_of(model), args.value_adapter_name
        attach_score(model, args.seed)
        if not isinstance(model, PeftModel):
            nn.init.zeros_(base.score.weight)  # type: ignore[union-attr,arg-type]
            return None
        assert self._policy_adapter is not None
        if name in (self._policy_adapter, args.ref_adapter_name, args.reward_adapter_name):
            raise UserError(f"PPOTrainer: value_adapter_name is {name!r}, which has another role; name another")
        if name not in model.peft_config:
            config = copy.deepcopy(model.peft_config[self._policy_adapter])
            config.inference_mode = False
            config.modules_to_save = None
            model.add_adapter(name, with_score(config))
            with role(model, name), torch.no_grad():
                base.score.weight.zero_()  # type: ignore[union-attr,operator]
        return name

    # Parameters.

    @contextmanager
    def all_trainable(self) -> Iterator[None]:
        """Let policy and value train at once, as the optimizer has to see them."""
        model = self._model
        if self._value_adapter is None or not isinstance(model, PeftModel):
            yield
            return
        assert self._policy_adapter is not None
        model.set_adapter([self._policy_adapter, self._value_adapter])
        try:
            yield
        finally:
            model.set_adapter(self._policy_adapter)

    def value_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of a value model by itself, by name."""
        if self._value_model is None:
            return []
        return [(f"value_model.{name}", p) for name, p in self._value_model.named_parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of policy and value."""
        with self.all_trainable():
            own = [p for p in self._model.parameters() if p.requires_grad]
        return own + [p for _, p in self.value_parameters()]

    def each_model(self, change: Callable[[nn.Module], None]) -> None:
        """Do something to every model there is."""
        for model in (self._model, self._ref_model, self._reward_model, self._value_model):
            if model is not None:
                change(model)

    def to(self, device: torch.device) -> None:
        """Move the models that transformers' trainer does not know of."""
        for model in (self._ref_model, self._reward_model, self._value_model):
            if model is not None:
                model.to(device)

    # What each role makes of a batch: a number a token of its answers, (n,), or a score an answer, (s,).

    def policy(self) -> AbstractContextManager[None]:
        """The model as the policy."""
        return role(self._model, self._policy_adapter) if self._policy_adapter is not None else nullcontext()

    def value(self) -> AbstractContextManager[None]:
        """The model as what computes values."""
        return role(self._model, self._value_adapter) if self._value_adapter is not None else nullcontext()

    def logprobs(self, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the policy, and entropies."""
        with self.policy():
            return self._logprobs(self._model, self._head, batch, temperature)

    def ref_logprobs(self, batch: dict[str, Tensor], temperature: float) -> Tensor:
        """Log-probabilities under the reference."""
        if self._ref_model is not None:
            assert self._ref_head is not None
            return self._logprobs(self._ref_model, self._ref_head, batch, temperature)[0]
        with role(self._model, self._args.ref_adapter_name):
            return self._logprobs(self._model, self._head, batch, temperature)[0]

    def logprobs_and_values(self, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Under the policy: log-probabilities, entropies, and values where they share its hidden states."""
        hidden = batch_hidden(self._model, batch)[batch["sources"]]
        logprobs, entropies = self._head(hidden, batch["targets"], temperature, entropy=True)
        shared = self.has_value and self._value_adapter is None and self._value_model is None
        return logprobs, entropies, scores_of(self._model, hidden) if shared else None

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """The value before each token."""
        model = self._model if self._value_model is None else self._value_model
        with self.value():
            return scores_of(model, batch_hidden(model, batch)[batch["sources"]])

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """The reward model's score of each answer."""
        model = self._model if self._reward_model is None else self._reward_model
        with role(self._model, self._args.reward_adapter_name) if self._reward_model is None else nullcontext():
            return scores_of(model, batch_hidden(model, batch)[batch["ends"]])

    def _logprobs(
        self, model: nn.Module, head: LogprobHead, batch: dict[str, Tensor], temperature: float
    ) -> tuple[Tensor, Tensor]:
        hidden = batch_hidden(model, batch)[batch["sources"]]
        return head(hidden, batch["targets"], temperature, entropy=True)

    # Files.

    def save(self, folder: Path) -> None:
        """Write a value model of its own; everything else is saved with the policy."""
        if self._value_model is not None:
            (folder / _VALUE_FOLDER).mkdir(exist_ok=True)
            save_weights(self._value_model, folder / _VALUE_FOLDER)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        if self._value_model is not None:
            load_weights(self._value_model, folder / _VALUE_FOLDER)
