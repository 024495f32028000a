"""Write trl_losses.json: what TRL makes of random numbers. Run by hand; the tests read the file and need no TRL.

    PYTHONPATH=<trl 1.16.0> python tests/trainers/record_trl_losses.py preferences
    PYTHONPATH=<trl 1.12.0> python tests/trainers/record_trl_losses.py ppo

TRL computes these losses inside of its trainers. DPOTrainer's method runs over a model that answers with the recorded
log-probabilities; PPOTrainer's formulas are lines of its ``train``, which are taken from the installed source by the
words they begin and end with, and run. Each command replaces its own part of the file.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

FILE = Path(__file__).with_name("trl_losses.json")
TYPES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"
SMOOTHING = {"robust": 0.1, "exo_pair": 0.01, "aot": 0.1, "aot_unpaired": 0.1}


def preferences() -> dict[str, Any]:
    """Each loss of DPOTrainer on four pairs of up to six tokens, and RewardTrainer's on four scores."""
    import trl
    from trl import DPOTrainer, RewardTrainer

    generator = torch.Generator().manual_seed(0)
    logps, ref = (-3 * torch.rand(8, 6, generator=generator) for _ in range(2))
    lengths = torch.tensor([6, 4, 5, 2, 3, 6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    logps, ref = logps * mask, ref * mask
    completion_mask = torch.cat([torch.zeros(8, 1), mask], 1).long()
    inputs = {
        "input_ids": torch.ones(8, 7, dtype=torch.long),
        "attention_mask": completion_mask,
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref[:4].sum(1),
        "ref_rejected_logps": ref[4:].sum(1),
    }
    zeros = torch.zeros(8, 6)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)
    losses = {}
    for kind in [*TYPES.split(), "sft", "sigmoid_norm"]:
        trainer = object.__new__(DPOTrainer)
        trainer.__dict__.update(
            accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(discopop_tau=0.05),
            beta=0.3,
            label_smoothing=SMOOTHING.get(kind, 0.0),
            loss_types=[kind],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            precompute_ref_logps=True,
            ld_alpha=None,
            use_weighting=False,
            aux_loss_enabled=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        losses[kind] = trainer._compute_loss(lambda **_: outputs, inputs, False).item()

    scores = torch.randn(8, 1, generator=generator)
    margin = torch.rand(4, generator=generator)
    rewards = {}
    for name, extra, center in (("plain", {}, None), ("margin", {"margin": margin}, None), ("center", {}, 0.01)):
        trainer = object.__new__(RewardTrainer)
        trainer.__dict__.update(
            accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(center_rewards_coefficient=center),
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        batch = {"attention_mask": torch.ones(8, 2), **extra}
        rewards[name] = trainer.compute_loss(lambda **_: SimpleNamespace(logits=scores), batch).item()
    return {
        "trl": trl.__version__,
        "logps": logps.tolist(),
        "ref_logps": ref.tolist(),
        "lengths": lengths.tolist(),
        "beta": 0.3,
        "label_smoothing": SMOOTHING,
        "dpo": losses,
        "scores": scores[:, 0].tolist(),
        "margin": margin.tolist(),
        "reward": rewards,
    }


def _lines(source: str, first: str, last: str) -> str:
    """The lines from the one that begins with ``first`` up to the first after it that begins with ``last``."""
    lines = source.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines[begin:], begin) if line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin:end]))


def ppo() -> dict[str, Any]:
    """KL, whitening, GAE and both losses of PPOTrainer on four responses of up to six tokens."""
    import trl
    from trl.experimental.ppo import ppo_trainer

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    generator = torch.Generator().manual_seed(1)
    names = dict(vars(ppo_trainer))
    given = {name: torch.randn(4, 6, generator=generator) for name in ("logprobs", "ref_logprobs", "values", "vpred")}
    given = {name: -x.abs() if "logprobs" in name else x for name, x in given.items()}
    given["new_logprobs"] = given["logprobs"] + 0.3 * torch.randn(4, 6, generator=generator)
    scores = torch.randn(4, generator=generator)
    lengths = torch.tensor([5, 2, 3, 4])  # index of the last token
    recorded: dict[str, Any] = {}
    for estimator in ("k1", "k3"):
        args = SimpleNamespace(
            **{"kl_estimator": estimator, "kl_coef": 0.05, "gamma": 0.99, "lam": 0.95, "whiten_rewards": True},
            **{"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1},
        )
        scope: dict[str, Any] = {k: v.clone() for k, v in given.items()}
        scope |= {"args": args, "scores": scores, "sequence_lengths": lengths, "responses": torch.zeros(4, 6)}
        exec(_lines(source, "response_idxs =", "empty_cache"), names, scope)
        scope |= {f"mb_{n}": scope[n] for n in ("values", "logprobs")}
        scope |= {"mb_return": scope["returns"], "mb_advantage": scope["advantages"]}
        scope |= {"micro_batch_inds": torch.arange(4)}
        exec(_lines(source, "vpred = torch.masked_fill", "loss = pg_loss"), names, scope)
        keys = ("kl", "rewards", "advantages", "returns")
        recorded[estimator] = {key: scope[key].tolist() for key in keys}
        recorded[estimator] |= {"policy_loss": scope["pg_loss"].item(), "value_loss": scope["vf_loss"].item()}
    return {
        "trl": trl.__version__,
        **{name: x.tolist() for name, x in given.items()},
        "scores": scores.tolist(),
        "last_token": lengths.tolist(),
        "recorded": recorded,
    }


if __name__ == "__main__":
    part = sys.argv[1]
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    found[part] = {"preferences": preferences, "ppo": ppo}[part]()
    FILE.write_text(json.dumps(found, sort_keys=True) + "\n")
