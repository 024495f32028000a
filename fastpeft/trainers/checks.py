"""What must hold before a trainer starts."""

from __future__ import annotations

import logging

import torch
import transformers
from torch import nn
from transformers import Trainer

from fastpeft.errors import FastpeftError, UserError
from fastpeft.nn import NF4Module

logger = logging.getLogger(__name__)

# Methods of transformers.Trainer, not part of its public interface, that our trainers override.
_HOOKS = (
    "_get_grad_norm",
    "_get_train_sampler",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_save_checkpoint",
)


def check_transformers() -> None:
    """Refuse a transformers without the methods that `fastpeft.trainers.base` overrides.

    Raises:
        FastpeftError: one of them is gone.
    """
    gone = [name for name in _HOOKS if not hasattr(Trainer, name)]
    if gone:
        raise FastpeftError(
            f"transformers {transformers.__version__} has no Trainer.{gone[0]}, on which safe checkpoints and steps "
            "rest; install transformers>=5.23"
        )


def check_model(model: nn.Module, trainer: str) -> None:
    """Refuse a model in which nothing can be trained; warn of weights too coarse to be trained well.

    Args:
        model: what the user gave.
        trainer: name of the trainer, for messages.
    Raises:
        UserError: it is no model, or has no trainable parameter, or is quantised and has no adapter.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{trainer}: model is a {type(model).__name__}; it must be a loaded model, for example from "
            "AutoModelForCausalLM.from_pretrained"
        )
    if not hasattr(model, "peft_config") and any(isinstance(module, NF4Module) for module in model.modules()):
        raise UserError(
            f"{trainer}: the model's layers are quantised to NF4, so nothing in them can be trained; add an adapter "
            "with fastpeft.get_peft_model (in YAML: peft.method: lora)"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UserError(
            f"{trainer}: no parameter of the model is trainable (requires_grad is off everywhere); add an adapter with "
            "fastpeft.get_peft_model, load one with is_trainable=True, or call model.requires_grad_()"
        )
    half = sum(p.numel() for p in trainable if p.dtype in (torch.bfloat16, torch.float16))
    if half:
        logger.warning(
            "%s: %s trainable parameters are held in 16 bits, where small updates round to nothing; load the model "
            "with dtype=torch.float32 and set bf16: true",
            trainer,
            f"{half:,}",
        )


@torch.no_grad()
def check_packing(model: nn.Module, trainer: str) -> None:
    """Refuse a model in which rows that share a sequence would see each other, by looking.

    Two sequences of two rows each differ in the first row alone; what the model says of the second has to be the same.

    Args:
        model: a causal language model, where it will be trained.
        trainer: name of the trainer, for messages.
    Raises:
        UserError: the second row saw the first, or the model has virtual tokens, which begin a sequence only.
    """
    virtual = getattr(model, "num_virtual_tokens", 0)
    if virtual:
        raise UserError(
            f"{trainer}: packing puts several rows into one sequence, and the adapter's {virtual} virtual tokens begin "
            "only the first of them; leave packing out"
        )
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [4, 3, 2, 1, 5, 6, 7]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device).expand(2, -1)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
    finally:
        model.train(was_training)
    if not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2 * float(logits.std())):
        raise UserError(
            f"{trainer}: with packing, the rows of a sequence see each other in this model (its layers do not go by "
            "position_ids: state-space and convolution layers, or attention of their own); leave packing out"
        )
