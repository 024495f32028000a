"""The command line: ``fastpeft sft | finetune | reward | dpo | ppo | generate | quantize | merge | export | ...``.

Commands import what they need when they run, so that ``fastpeft --help`` answers at once. A ``UserError`` becomes one
message and exit code 2; anything else that goes wrong is a defect and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import fastpeft
from fastpeft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fastpeft.recipes.generate import Prompt


class _Commands(TyperGroup):
    """The group of commands; Ctrl-C leaves with the shell's code for it under every version of typer."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


_Dtype = Annotated[str | None, typer.Option(help="auto (the default), bfloat16, float32 or float16.")]
_ShardSize = Annotated[str, typer.Option(help="Largest weight file.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model or an adapter that is there.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, say what would be written, and write nothing.")]

app = typer.Typer(
    name="fastpeft",
    cls=_Commands,
    help="Fine-tune language models on one GPU or a CPU, with handwritten 4-bit, LoRA and optimizer kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command ``fastpeft``; leaves through ``SystemExit``.

    Args:
        arguments: what follows the command's name; None takes the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Accepted behind the command too, where it is typed after something has failed.
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="fastpeft")
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastpeft {fastpeft.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of mistakes in what was given too.")] = False,
) -> None:
    pass


_Config = Annotated[Path, typer.Argument(help="YAML with the sections model, peft, data and train.")]
_Resolved = Annotated[
    bool, typer.Option("--dry-run", help="Check, print the settings with defaults and paths filled in, and stop.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that take the place of the file's."),
]


@app.command()
def sft(config: _Config, overrides: _Overrides = None, dry_run: _Resolved = False) -> None:
    """Fine-tune a model on a JSONL file of answered prompts."""
    _run("sft", config, overrides, dry_run)


@app.command()
def finetune(
    config: Annotated[Path, typer.Argument(help="YAML of NeMo 1's tuning or of NeMo-Aligner (SFT, RM, DPO, PPO).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="NeMo's keys; +KEY=VALUE, ~KEY, fastpeft.SECTION.KEY=VALUE too."),
    ] = None,
    dry_run: _Resolved = False,
) -> None:
    """Run a tuning file of NeMo 1 or NeMo-Aligner."""
    from fastpeft.recipes import load_nemo, run_config

    nemo = load_nemo(config, overrides or ())
    for note in nemo.notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"# {note}" if dry_run else note, flush=True)
    if dry_run:
        print(nemo.config.to_yaml(), end="")
    else:
        run_config(nemo.config)


@app.command()
def reward(config: _Config, overrides: _Overrides = None, dry_run: _Resolved = False) -> None:
    """Train a reward model on a JSONL file of preferences or rankings."""
    _run("reward", config, overrides, dry_run)


@app.command()
def dpo(config: _Config, overrides: _Overrides = None, dry_run: _Resolved = False) -> None:
    """Train a policy on a JSONL file of preferences or rankings."""
    _run("dpo", config, overrides, dry_run)


@app.command()
def ppo(config: _Config, overrides: _Overrides = None, dry_run: _Resolved = False) -> None:
    """Train a policy on prompts, by the scores of a reward adapter or function (section reward)."""
    _run("ppo", config, overrides, dry_run)


def _run(kind: str, config: Path, overrides: list[str] | None, dry_run: bool) -> None:
    from fastpeft.recipes import load_config, run_config

    checked = load_config(config, overrides or (), kind=kind)
    if dry_run:
        print(checked.to_yaml(), end="")
    else:
        run_config(checked)


config_app = typer.Typer(help="Files for runs: a JSON schema of them, and commented ones to begin with.")
app.add_typer(config_app, name="config", no_args_is_help=True)
_Kind = Annotated[str, typer.Option(help="sft, reward, dpo or ppo.")]


@config_app.command("schema")
def config_schema(kind: _Kind = "sft") -> None:
    """Print the JSON schema of a kind of run; editors complete keys from it."""
    from fastpeft.recipes import json_schema

    print(json.dumps(json_schema(kind), indent=2))


@config_app.command("init")
def config_init(
    what: Annotated[str, typer.Argument(help="A method (lora, qlora, ia3, ...) or reward, dpo, ppo.")],
    out: Annotated[Path | None, typer.Argument(help="The file to write; without it, it is printed.")] = None,
) -> None:
    """Write a commented file to begin with; an existing file is left as it is."""
    from fastpeft.recipes import starting_file

    text = starting_file(what)
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"config init: {out} is there already; name another file, or move it away") from None
    except OSError as error:
        raise UserError(f"config init: {out} cannot be written: {error.strerror}") from error
    print(f"written: {out}")


@app.command()
def check(
    config: _Config,
    overrides: _Overrides = None,
    kind: Annotated[
        str | None, typer.Option(help="sft, reward, dpo or ppo; by default as sections and rows tell.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Look at about so many rows of each file, in place of all.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each processor.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Look for mistakes in a configuration and its data, without training and without the model's weights.

    Exit code 0: nothing would stop a run; 1: something would, such as bad rows; 2: it cannot be read.
    """
    from rich.console import Console

    from fastpeft.recipes import run_check
    from fastpeft.recipes.check import described

    report = run_check(config, overrides or (), kind=kind, sample=sample, workers=workers)
    if as_json:
        print(report.as_json())
    else:
        console = Console(highlight=False, soft_wrap=True)
        for line in described(report):
            console.print(line)
    if report.errors or (strict and report.findings):
        raise typer.Exit(1)


@app.command()
def generate(
    run: Annotated[Path | None, typer.Argument(help="A run folder of 'fastpeft sft'.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of a run: folder, hub id or package:NAME.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="With --model: the GGUF file in it.")] = None,
    quantize: Annotated[str | None, typer.Option(help="With --model: nf4 or none (the default).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --model: auto (the default), bfloat16, float32 or float16.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="An adapter folder; a run brings its own. Several answer side by side."),
    ] = None,
    untuned: Annotated[
        bool, typer.Option("--untuned", help="Answer with the base model alone; with --adapter, beside it.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="The prompt; without it, prompts come line by line.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="Prompts: .jsonl rows as in training (answered as JSONL), else one a line."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above 0, tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this mass.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that are there already less likely.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the draws, with a temperature above 0.")] = 0,
) -> None:
    """Answer prompts with a tuned model, or several; on a terminal without a prompt, a chat."""
    import torch

    from fastpeft.recipes import Chat, converse, generate_answers, load_for_generation, read_model_config, read_prompts
    from fastpeft.recipes.run_folder import run_template
    from fastpeft.recipes.side_by_side import load_side_by_side, print_answers
    from fastpeft.recipes.yaml_file import Settings

    of_model = {"gguf_file": gguf_file, "quantize": quantize, "dtype": dtype}
    stated = {name: value for name, value in of_model.items() if value is not None}
    _refuse_ignored(run, stated, prompt=prompt, input_file=input_file)
    template = None if run is None else run_template(run, "generate")
    prompts: list[Prompt] | None = None
    if prompt is not None:
        prompts = [prompt]
    elif input_file is not None:
        prompts = read_prompts(input_file, template)
    elif not sys.stdin.isatty():
        prompts = [line.strip() for line in sys.stdin if line.strip()]
        if not prompts:
            raise UserError("generate: there is no prompt; give --prompt, --input, or lines on standard input")

    base = None
    if model is not None:
        base = read_model_config(Settings("command line", {"model": {"path": model, **stated}}, {}))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "batch_size": batch_size,
    }
    adapters = adapter or []
    if len(adapters) + untuned > 1:
        several = load_side_by_side(run, model=base, adapters=adapters, untuned=untuned)
        torch.manual_seed(seed)
        print_answers(several, prompts, template=template, **options)
        return
    loaded, tokenizer = load_for_generation(run, model=base, adapter=adapters[0] if adapters else None, untuned=untuned)
    torch.manual_seed(seed)
    if prompts is None:
        del options["batch_size"]
        chat = Chat(loaded, tokenizer, **options)
        converse(chat.say, chat.begin_anew if chat.remembers else None)
        return
    for asked, answer in zip(
        prompts, generate_answers(loaded, tokenizer, prompts, template=template, **options), strict=True
    ):
        line = answer if isinstance(asked, str) else json.dumps({**asked, "generated": answer}, ensure_ascii=False)
        print(line, flush=True)


def _refuse_ignored(run: Path | None, of_model: dict[str, str], *, prompt: str | None, input_file: Path | None) -> None:
    """Raise UserError for options of ``generate`` of which one would silently take no effect."""
    if run is not None and of_model:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in of_model)
        raise UserError(
            f"generate: {options} cannot go with a run, whose config.yaml says how its model is loaded; leave it out, "
            "or give --model and --adapter in place of the run"
        )
    if prompt is not None and input_file is not None:
        raise UserError("generate: --prompt and --input exclude each other; give one of them")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder, hub id or package:NAME.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in it.")] = None,
    dtype: _Dtype = None,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantise the scales too.")] = True,
    skip: Annotated[list[str] | None, typer.Option(help="A module to leave dense; may be repeated.")] = None,
    max_shard_size: _ShardSize = "5GB",
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
) -> None:
    """Pack a model into 4 bits (NF4) and write it as a bitsandbytes checkpoint."""
    from fastpeft.recipes import Export

    packing = {"block_size": block_size, "double_quant": double_quant, "skip_modules": skip}
    base = _base(path=model, gguf_file=gguf_file, dtype=dtype, **packing)
    _export(Export("quantize", out, "nf4", base, None, max_shard_size, overwrite), dry_run)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, ours or PEFT's.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[str | None, typer.Option(help="Its base model; by default the one the adapter names.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in the base model.")] = None,
    dtype: _Dtype = None,
    quantize: Annotated[str, typer.Option(help="How the base was held in training: nf4 or none.")] = "none",
    to: Annotated[str, typer.Option(help="What to write: dense or nf4.")] = "dense",
    max_shard_size: _ShardSize = "5GB",
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
) -> None:
    """Fold an adapter into its base model and write a model that needs no adapter."""
    from fastpeft.recipes import Export, base_of_adapter

    form = _form("merge", to, "dense", "nf4")
    path = model or base_of_adapter(adapter, "merge")
    base = _base(path=path, gguf_file=gguf_file, dtype=dtype, quantize=quantize)
    _export(Export("merge", out, form, base, adapter, max_shard_size, overwrite), dry_run)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder of 'fastpeft sft'.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="What to write: dense (merged), nf4 (merged) or adapter (alone).")] = "dense",
    original_base: Annotated[
        bool, typer.Option("--original-base", help="Merge into the base as it was before it was packed.")
    ] = False,
    max_shard_size: _ShardSize = "5GB",
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
) -> None:
    """Write the result of a run for other programs."""
    from dataclasses import replace

    from fastpeft.recipes import Export, run_sources

    form = _form("export", to, "dense", "nf4", "adapter")
    base, adapter = run_sources(run, "export")
    base = replace(base, quantize="none") if original_base else base
    _export(Export("export", out, form, base, adapter, max_shard_size, overwrite), dry_run)


def _base(**given: Any) -> Any:
    """The ``model`` section that options of a command make."""
    from fastpeft.recipes import read_model_config
    from fastpeft.recipes.yaml_file import Settings

    stated = {name: value for name, value in given.items() if value is not None}
    return read_model_config(Settings("command line", {"model": stated}, {}))


def _form(command: str, given: str, *known: str) -> Any:
    if given not in known:
        raise UserError(f"{command}: --to {given}{did_you_mean(given, known)}; it must be {' or '.join(known)}")
    return given


def _export(export: Any, dry_run: bool) -> None:
    from fastpeft.recipes import run_export

    for line in run_export(export, dry_run):
        print(line, flush=True)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are drawn into one picture.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The PNG; by default loss.png in the run folder, for several runs in the current one."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page too, with curves, last values, settings and samples; it stands alone."),
    ] = None,
) -> None:
    """Draw the curves of runs (loss, learning rate, gradient norm, memory) as a PNG, or tell of them on a page."""
    from fastpeft.recipes import plot_run
    from fastpeft.recipes.plot import can_plot
    from fastpeft.recipes.report import write_report

    if html is not None:
        print(write_report(runs, html))
        if out is None and not can_plot():  # the page draws by itself
            return
    print(plot_run(runs, out))


@app.command()
def estimate(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML, or its folder; its data is not opened.")] = None,
    overrides: _Overrides = None,
    model: Annotated[str | None, typer.Option(help="Instead of a YAML: folder, hub id or package:NAME.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Instead of a model: its number of parameters, such as 65B.")
    ] = None,
    method: Annotated[str, typer.Option(help="full, lora, qlora, ia3, prompt_tuning, p_tuning or adapter.")] = "qlora",
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 2048,
    checkpointing: Annotated[str, typer.Option(help="none, selective, full or offload.")] = "full",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, paged_adamw or paged_adamw_8bit.")] = "adamw",
    gpu_gb: Annotated[float | None, typer.Option(help="Memory of the GPU; by default of the one here.")] = None,
    kind: Annotated[str, typer.Option(help="With a YAML: sft, reward or dpo.")] = "sft",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say how much memory a run will take, and whether it fits, before anything is loaded."""
    from fastpeft.recipes import estimate_report as page

    gpu_bytes = page.gpu_memory(gpu_gb)
    if config is not None:
        if model is not None or params is not None:
            raise UserError("estimate: a YAML says which model; leave --model and --params out, or give no YAML")
        shape, setting = page.read_run(config, overrides or (), kind)
    else:
        options: dict[str, Any] = {"rank": rank, "batch": batch, "length": length}
        shape, setting = page.setting_of_options(
            model, params, method, checkpointing=checkpointing, optimizer=optimizer, **options
        )
    if as_json:
        print(page.as_json(shape, setting, gpu_bytes))
        return
    print(page.report(shape, setting, gpu_bytes, None if config is None else page.measured_peak(config)))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, how the native core was built, the GPU found and which optional packages are there."""
    from fastpeft.recipes.info import described, environment

    found = environment()
    print(json.dumps(found, indent=2) if as_json else described(found))
