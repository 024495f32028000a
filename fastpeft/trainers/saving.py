"""How a trainer saves and loads: checkpoints that are whole or absent, hold no pickle, and resume exactly.

The methods whose names begin with an underscore are transformers' own, as in `base`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from fastpeft.errors import UserError
from fastpeft.trainers import checkpoint
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.metrics import Meter, Stopwatch
from fastpeft.trainers.state import capture_rng, load_state, restore_rng, save_state
from fastpeft.trainers.weights import load_weights, save_weights


class SavingTrainer(Trainer):
    """The part of `BaseTrainer` that deals with files."""

    args: BaseConfig
    meter: Meter
    skipped_steps: int
    _stopwatch: Stopwatch | None

    # Saving.

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, or the whole model where there is none, with the tokenizer and the options as JSON.

        Args:
            output_dir: the folder; ``args.output_dir`` if None.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        options = json.dumps(self.args.to_dict(), indent=1, sort_keys=True, default=str)
        (folder / "training_args.json").write_text(options + "\n", encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        target = checkpoint.checkpoint_path(run_dir, step)
        with (self._stopwatch or Stopwatch()).paused():
            if self.args.should_save:
                checkpoint.stage(target)
            self.accelerator.wait_for_everyone()
            staging = checkpoint.staging_path(target)
            if self.args.should_save:
                self.save_model(staging)
                self._save_trainer_state(staging)
            if not self.args.save_only_model:
                self._save_resume_state(staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.commit(staging, target, resumable=not self.args.save_only_model)
                best = self.state.best_global_step
                checkpoint.rotate(run_dir, step, self.args.save_total_limit, [] if best is None else [best])
            self.accelerator.wait_for_everyone()

    def _save_trainer_state(self, folder: Path) -> None:
        best = self.state.best_global_step
        if best is not None and self.args.load_best_model_at_end:  # else transformers would delete the last one for it
            best_path = checkpoint.checkpoint_path(self.args.output_dir, best)
            if best == self.state.global_step or best_path.exists():
                self.state.best_model_checkpoint = str(best_path)
        exported: dict[str, list[Any]] = {}
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                exported.setdefault(type(part).__name__, []).append(part.state())
        self.state.stateful_callbacks = {name: s if len(s) > 1 else s[0] for name, s in exported.items()}
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save_resume_state(self, folder: Path) -> None:
        if self.args.should_save:
            save_state(self.optimizer.state_dict(), folder, "optimizer")
            save_state(self.lr_scheduler.state_dict(), folder, "scheduler")
            if self.accelerator.scaler is not None:
                save_state(self.accelerator.scaler.state_dict(), folder, "scaler")
        own = {"rng": capture_rng(), "meter": self.meter.state_dict(), "skipped_steps": self.skipped_steps}
        save_state(own, folder, f"process-{self.args.process_index}")

    # Loading. transformers calls these in the order weights, optimizer, scaler, and the generators at the first batch.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        folder = Path(checkpoint_dir)
        self.optimizer.load_state_dict(load_state(folder, "optimizer"))
        self.lr_scheduler.load_state_dict(load_state(folder, "scheduler"))
        own = self._load_process_state(folder)
        self.meter.load_state_dict(own["meter"])
        self.skipped_steps = own["skipped_steps"]

    def _load_scaler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint_dir), "scaler"))

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            restore_rng(self._load_process_state(Path(checkpoint_dir))["rng"])

    def _load_process_state(self, folder: Path) -> dict[str, Any]:
        name = f"process-{self.args.process_index}"
        if not (folder / f"{name}.json").exists():
            raise UserError(
                f"{folder}: it has no {name}.json, so it was saved by fewer processes than the {self.args.world_size} "
                "of now; resume with as many as before"
            )
        state: dict[str, Any] = load_state(folder, name)
        return state

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        checkpoint.verify(folder)
        load_weights(self.model, folder)
