"""PeftModelForCausalLM: a PeftModel over a language model, which may have virtual tokens before its texts.

Virtual tokens lengthen every sequence by v. What goes in and comes out is that of the text alone: positions in
``logits_to_keep``, labels and logits are those of ``input_ids`` (stock PEFT gives logits for v + t positions). A loss
from ``labels`` is PEFT's: the last virtual token predicts the text's first.

In a packed row (positions that begin anew, and no mask) they stand before each text.

For generation they are read once, into the KV cache, and the text continues from there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.bottleneck import BottleneckAdapterConfig
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.full import FullConfig, train_fully
from fastpeft.methods.ia3 import IA3Config
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.model import PeftModel
from fastpeft.methods.prompts import PromptEncoderConfig, PromptTuningConfig
from fastpeft.methods.virtual import Layout
from fastpeft.nn import Prompts

_Model = TypeVar("_Model", bound=nn.Module)
_Adapters: TypeAlias = LoraConfig | IA3Config | PromptTuningConfig | PromptEncoderConfig | BottleneckAdapterConfig
_CACHES = ("past_key_values", "cache")
_LENGTHS = ("max_length", "min_length")
_IGNORE_INDEX = -100


class PeftModelForCausalLM(PeftModel):
    """A PeftModel over a language model, with the arguments that tools read off its signature.

    transformers' Trainer decides by the names of ``forward``'s parameters which columns of a data set to pass on and
    which of them are labels.
    """

    takes_prompts = True

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the wrapped model with its active adapters; arguments are the wrapped model's.

        Args:
            input_ids: ``(batch, t)`` tokens.
            attention_mask: ``(batch, t)``, 0 at padding.
            position_ids: ``(batch, t)``.
            inputs_embeds: ``(batch, t, hidden)`` instead of ``input_ids``.
            labels: ``(batch, t)``, -100 where there is no target.
            adapter_names: for each sample the one adapter that acts on it (`PeftModel.forward`).
            kwargs: further arguments of the wrapped model.
        """
        optional = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        given = {"input_ids": input_ids, **{name: value for name, value in optional.items() if value is not None}}
        with self._routing(adapter_names):
            tokens = self._tokens(input_ids if inputs_embeds is None else inputs_embeds)
            if tokens is None:
                return self.get_base_model()(**given, **kwargs)
            return self._with_tokens(tokens, {**given, **kwargs})

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the wrapped model and its active adapters, or those named for each sample.

        Args:
            inputs: ``(batch, t)`` tokens; or give them as ``input_ids``.
            args: as for the wrapped model.
            adapter_names: for each sample the one adapter that acts on it.
            kwargs: as for the wrapped model.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        with self._routing(adapter_names):
            tokens = self._tokens(ids)
            if tokens is None:
                return super().generate(*(() if inputs is None else (inputs,)), *args, **kwargs)
            if ids is None:
                raise UserError("generate: virtual tokens need the prompt as input_ids")
            kwargs.pop("input_ids", None)
            return self._generate_after(tokens, ids, args, kwargs)

    def _tokens(self, like: Tensor | None) -> Tensor | None:
        """Virtual tokens for a batch like this one; None where none act."""
        prompts = self._modules.get("prompt_encoder")
        if not isinstance(prompts, Prompts) or (prompts.routing is None and not prompts.working()):
            return None
        return prompts.tokens(1 if like is None else like.shape[0])

    def _with_tokens(self, tokens: Tensor, given: dict[str, Any]) -> Any:
        """Run the model with virtual tokens before the text."""
        base, count = self.get_base_model(), tokens.shape[1]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and mask.dim() != 2:
            raise UserError(
                f"attention_mask has {mask.dim()} dimensions; virtual tokens need it as (batch, t), 0 at padding"
            )
        if any(_is_filled(given.get(name)) for name in _CACHES):  # they are in the cache
            if mask is not None:
                given["attention_mask"] = torch.cat((mask.new_ones(mask.shape[0], count), mask), 1)
            if positions is not None:
                given["position_ids"] = positions + count
            return base(**given)
        ids, embeds = given.pop("input_ids"), given.get("inputs_embeds")
        if embeds is None:
            embeds = base.get_input_embeddings()(ids)  # type: ignore[operator]
        if positions is not None and mask is None:
            layout = Layout.packed(count, positions)
            if layout.virtual.shape[1] > count:
                given.setdefault("use_cache", False)  # with a cache transformers keeps packed texts apart no longer
        else:
            layout = Layout.plain(count, embeds.shape[1], embeds.device)
        given["inputs_embeds"] = layout.insert(embeds, tokens)
        if mask is not None:
            given["attention_mask"] = layout.constant(mask, 1)
        if positions is not None:
            first = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
            given["position_ids"] = layout.insert(positions + count, first)
        strips = self._place_targets(given, layout)
        as_tuple = given.pop("return_dict", None) is False
        outputs = base(**given)
        if strips and outputs.logits is not None:
            outputs.logits = layout.take(outputs.logits)
        return outputs.to_tuple() if as_tuple else outputs

    def _place_targets(self, given: dict[str, Any], layout: Layout) -> bool:
        """Move labels and positions to where the text stands.

        Returns:
            Whether the logits are those of virtual tokens too.
        """
        keep = given.get("logits_to_keep")
        if isinstance(keep, Tensor):
            given["logits_to_keep"] = layout.moved(keep)
            return False
        if keep:
            return False
        targets = [name for name in ("labels", "shift_labels") if given.get(name) is not None]
        for name in targets:
            given[name] = layout.constant(given[name], _IGNORE_INDEX)
        accepts = "logits_to_keep" in inspect.signature(self.get_base_model().forward).parameters
        if targets or not accepts or len(layout.place) > 1:
            return True
        given["logits_to_keep"] = layout.place[0]
        return False

    def _generate_after(self, tokens: Tensor, ids: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Read the virtual tokens into a cache, and generate from there; they are cut off the answer."""
        base: Any = self.get_base_model()
        config = kwargs.get("generation_config") or base.generation_config
        if kwargs.get("use_cache", config.use_cache) is False or kwargs.get("past_key_values") is not None:
            raise UserError(
                "generate: virtual tokens need a KV cache of their own; leave use_cache and past_key_values"
            )
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = _mask_of(ids, kwargs.get("pad_token_id", config.pad_token_id), config.eos_token_id)
        beams = max(kwargs.get(name) or getattr(config, name) or 1 for name in ("num_beams", "num_return_sequences"))
        dtype = base.get_input_embeddings().weight.dtype
        with torch.no_grad():
            embeds = tokens.to(dtype).repeat_interleave(beams, 0)
            cache = base(inputs_embeds=embeds, use_cache=True).past_key_values
        rows, count, _ = tokens.shape
        for name in _LENGTHS:
            if kwargs.get(name) is not None:
                kwargs[name] += count
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = config = copy.deepcopy(config)
            for name in _LENGTHS:
                if getattr(config, name):
                    setattr(config, name, getattr(config, name) + count)
        # What stands for the virtual tokens is never read, but penalties count it: a token that is there anyway.
        before = ids[:, -1:].expand(-1, count)
        answer = base.generate(
            torch.cat((before, ids), 1),
            *args,
            attention_mask=torch.cat((mask.new_ones(rows, count), mask), 1),
            past_key_values=cache,
            **kwargs,
        )
        if isinstance(answer, Tensor):
            return answer[:, count:]
        answer.sequences = answer.sequences[:, count:]
        return answer


def _is_filled(cache: Any) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


def _mask_of(ids: Tensor, pad: int | None, eos: Any) -> Tensor:
    """1 where there is text, told by the padding token as transformers does."""
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ids.ne(pad).long()


@overload
def get_peft_model(model: _Model, peft_config: FullConfig, adapter_name: str = ...) -> _Model: ...


@overload
def get_peft_model(model: nn.Module, peft_config: _Adapters, adapter_name: str = ...) -> PeftModel: ...


@overload
def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = ...) -> nn.Module: ...


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> nn.Module:
    """Make a model trainable by a method: freeze it and add an adapter, or choose which of its weights train.

    Args:
        model: a Hugging Face model or any module with linear layers, dense or quantised; changed in place.
        peft_config: `LoraConfig`, `IA3Config`, `PromptTuningConfig`, `PromptEncoderConfig`, `BottleneckAdapterConfig`,
            or `FullConfig`.
        adapter_name: the adapter's name.
    Returns:
        The wrapped model, a `PeftModel`; its adapter is fp32 and on each layer's device. For `FullConfig`, which adds
        nothing, the model itself.
    Raises:
        UserError: the configuration does not fit the model; the model is left as it was.
    """
    if isinstance(peft_config, FullConfig):
        return train_fully(model, peft_config)
    return wrapper_class(model)(model, peft_config, adapter_name)


def wrapper_class(model: nn.Module) -> type[PeftModel]:
    """The class of wrapper for a model: one with the arguments of a language model, where it is one."""
    arguments = inspect.signature(model.forward).parameters
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return PeftModelForCausalLM if {"input_ids", "labels"} <= set(arguments) and not encoder_decoder else PeftModel
