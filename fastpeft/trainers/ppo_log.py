"""Sampled completions on disk: what the policy says as it learns, in ``output_dir/completions.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastpeft.trainers.rollout import Rollout

COMPLETIONS_FILE = "completions.jsonl"
_ROWS = 4  # of an update


class CompletionLog(TrainerCallback):
    """Append some completions of every so many updates, one JSON object a line; a resumed run goes on."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._paused = False

    def keep(self, rollout: Rollout) -> None:
        """Take the first samples of an update."""
        if self._paused:
            return
        scores, kl = rollout.scores.tolist(), rollout.kl.sum(1).tolist()
        group = len(rollout.samples) // len(rollout.items)
        self._rows = [
            {
                "prompt": rollout.items[index // group]["prompt"],
                "completion": rollout.texts[index],
                "score": scores[index],
                "kl": kl[index],
                "tokens": len(rollout.samples[index].tokens),
            }
            for index in range(min(_ROWS, len(scores)))
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take nothing inside: an evaluation is no update."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of a course that this run does not continue."""
        path = Path(args.output_dir) / COMPLETIONS_FILE
        if not state.is_world_process_zero or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        path.write_text("".join(kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write, if it is time."""
        every = args.log_completions_steps
        due = every and (state.global_step % every == 0 or state.global_step in (1, state.max_steps))
        if not due or not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / COMPLETIONS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for row in self._rows:
                file.write(json.dumps({"step": state.global_step, **row}, ensure_ascii=False) + "\n")
