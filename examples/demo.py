"""The demo: what a small model makes of order e-mails before and after a 4-bit LoRA fine-tune.

    python examples/demo.py [--steps N] [--rows N] [--out FOLDER] [section.key=value ...]

It loads the model that examples/orders_sft.yaml names, asks it about held-out e-mails, trains it through the public
Python API, asks again, and leaves a run folder: the adapter, metrics, the loss curve, and demo.json with the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from orders.generate import INSTRUCTION, UNSEEN
from orders.score import Row, answer, read_rows, score
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import fastpeft
from fastpeft.recipes import RunConfig, load_config, load_model, plot_run
from fastpeft.recipes.plot import can_plot
from fastpeft.recipes.run_folder import BeginRunFolder, check_run_folder

HERE = Path(__file__).parent
SHOWN = 2  # e-mails whose answers are shown, one of a known wording and one of an unseen
console = Console(highlight=False, soft_wrap=False)


class Stopwatch:
    """Seconds of each phase, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)

    def total(self) -> float:
        """Seconds since the start."""
        return round(time.perf_counter() - self._begin, 1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a small model on order e-mails and show the difference.")
    parser.add_argument("--config", type=Path, default=HERE / "orders_sft.yaml", help="the run's YAML")
    parser.add_argument("--test", type=Path, default=HERE / "data" / "orders_test.jsonl", help="held-out rows")
    parser.add_argument("--steps", type=int, help="training steps, instead of the YAML's")
    parser.add_argument("--rows", type=int, help="score only so many held-out rows")
    parser.add_argument("--out", default="runs/demo", help="run folder; an earlier run in it is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the YAML")
    return parser.parse_intermixed_args(arguments)


def read_config(options: argparse.Namespace) -> RunConfig:
    overrides = [*options.overrides, f"train.output_dir={options.out}", "train.overwrite=true"]
    if options.steps is not None:
        overrides.append(f"train.max_steps={options.steps}")
    config = load_config(options.config, overrides)
    if not isinstance(config.peft.config, fastpeft.LoraConfig):
        raise fastpeft.UserError("demo: it trains a LoRA adapter; peft.method has to be lora")
    return config


def choose_rows(path: Path, count: int | None) -> tuple[list[Row], list[Row]]:
    """The rows to score, and among them those to show: one of a known wording, one of an unseen."""
    rows = read_rows(path)[:count]
    known = [row for row in rows if row["template"] not in UNSEEN]
    unseen = [row for row in rows if row["template"] in UNSEEN]
    # The shortest fit on a screen.
    shown = [min(group, key=lambda row: len(row["input"])) for group in (known, unseen) if group]
    return rows, shown[:SHOWN]


def show_answers(title: str, rows: Sequence[Row], answers: Sequence[str], expected: bool) -> None:
    for row, given in zip(rows, answers, strict=True):
        note = " (a wording that training never sees)" if row["template"] in UNSEEN else ""
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("e-mail", style="dim"), Text(row["input"].removeprefix(INSTRUCTION)))
        table.add_row(Text(title, style="dim"), Text(given.strip() or "(nothing)", style="bold"))
        if expected:
            right = given == row["output"]
            verdict = ("the same", "green") if right else (row["output"], "red")
            table.add_row(Text("expected", style="dim"), Text(*verdict))
        console.print(Panel(table, title=f"held-out e-mail{note}", title_align="left", border_style="dim"))


def size_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def train(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, config: RunConfig
) -> torch.nn.Module:
    """Put an adapter on the model, train it, and fill the run folder as ``fastpeft sft`` does."""
    transformers.set_seed(config.train.args.seed)
    model = fastpeft.get_peft_model(model, config.peft.config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(f"{trainable:,} parameters to train, {config.train.args.max_steps} steps")
    trainer = fastpeft.SFTTrainer(
        model,
        args=config.train.args,
        train_dataset=config.data.train,
        eval_dataset=config.data.eval,
        processing_class=tokenizer,
        callbacks=[BeginRunFolder(config, resume=False)],
    )
    trainer.train()
    model.save_pretrained(config.output_dir / "adapter")
    return model


def run(options: argparse.Namespace) -> Path:
    config = read_config(options)
    check_run_folder(config)
    rows, shown = choose_rows(options.test, options.rows)
    out = config.output_dir
    watch = Stopwatch()

    console.rule("[bold]1. A small model, untuned", align="left")
    with watch.phase("load"), console.status("loading and quantising"):
        model, tokenizer = load_model(config.model)
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} cores"
    console.print(f"{config.model.path}, {config.model.quantize}, {size_of(model) / 1e6:,.0f} MB on {name}")
    with watch.phase("score_before"), console.status(f"answering {len(rows)} held-out e-mails"):
        first = answer(model, tokenizer, shown, max_new_tokens=64)
        before = score(answer(model, tokenizer, rows, until_wrong=True), rows, UNSEEN)
    show_answers("untuned", shown, first, expected=False)
    console.print(f"exact match: [bold]{before}")

    console.rule("[bold]2. Fine-tuning", align="left")
    with watch.phase("train"):
        model = train(model, tokenizer, config)
    picture = plot_run(out) if can_plot() else None
    console.print(f"loss curve: {picture or 'needs matplotlib'}\nmetrics:    {out / 'metrics.jsonl'}")

    console.rule("[bold]3. The same model, tuned", align="left")
    with watch.phase("score_after"), console.status(f"answering {len(rows)} held-out e-mails"):
        answers = answer(model, tokenizer, rows)
        after = score(answers, rows, UNSEEN)
    last = [answers[rows.index(row)] for row in shown]
    show_answers("tuned", shown, last, expected=True)

    seconds = {**watch.seconds, "total": watch.total()}
    result = {
        "model": config.model.path,
        "quantize": config.model.quantize,
        "device": name,
        "steps": config.train.args.max_steps,
        "exact_match_before": asdict(before),
        "exact_match_after": asdict(after),
        "seconds": seconds,
        "wrong": [
            {"input": row["input"], "output": row["output"], "answer": given}
            for row, given in zip(rows, answers, strict=True)
            if given != row["output"]
        ],
    }
    path = out / "demo.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("exact match before", f"[bold]{before}")
    table.add_row("exact match after", f"[bold]{after}")
    table.add_row("seconds", ", ".join(f"{phase} {spent:g}" for phase, spent in seconds.items()))
    table.add_row("adapter", str(out / "adapter"))
    table.add_row("figures", str(path))
    console.print(table)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except fastpeft.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
