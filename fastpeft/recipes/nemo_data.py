"""NeMo's ``data`` -> the section ``data``, and batches.

A ``prompt_template`` becomes the model's chat template, so that `fastpeft generate` lays prompts out as training did:
``"{input} {output}"`` is the plain layout, any other a Jinja template around the same fields.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from fastpeft.recipes.fields import convert, hints_of
from fastpeft.recipes.nemo_settings import NemoSettings
from fastpeft.recipes.sections import DataSection

_TRAIN, _EVAL = "model.data.train_ds", "model.data.validation_ds"
_PREFIX = "model.data.data_prefix"
_PLAIN = "{input} {output}"
_ROW_FIELDS = (("input", "output"), ("prompt", "completion"))  # rows of two keys, in `fastpeft.data.forms`


def translate_data(nemo: NemoSettings) -> None:
    """Put the section ``data``, the template, and batch sizes with the accumulation that they leave.

    Args:
        nemo: the file's settings.
    Raises:
        UserError: files are missing, a batch cannot be divided, or rows are asked for that there are not.
    """
    train, held_out = _file_keys(nemo)
    nemo.put("data.train", _files(nemo, train, f"{_TRAIN}.concat_sampling_probabilities"), train)
    if nemo.kind == "ppo":
        if nemo.has(held_out):
            nemo.note(held_out, "PPO measures nothing on held-out prompts here")
    elif (files := nemo.get(held_out)) is not None and files != []:
        nemo.put("data.eval", _files(nemo, held_out, f"{_EVAL}.concat_sampling_probabilities"), held_out)
    _translate_length(nemo)
    if nemo.kind == "sft":
        _translate_template(nemo)
    _translate_batches(nemo)


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _file_keys(nemo: NemoSettings) -> tuple[str, str]:
    """Keys of the files to train on and to evaluate on."""
    if nemo.has(_PREFIX):
        return _PREFIX, f"{_PREFIX}.validation"
    if nemo.has(f"{_PREFIX}.train"):
        return f"{_PREFIX}.train", f"{_PREFIX}.validation"
    return f"{_TRAIN}.files", f"{_EVAL}.files"


def _files(nemo: NemoSettings, name: str, weights_name: str) -> Any:
    """One path, or several with the shares that they are drawn with."""
    given = nemo.get(name)
    files = [given] if isinstance(given, str) else given
    if not files or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise nemo.refusal(name, "it takes a JSONL file, or a list of them")
    weights = nemo.get(weights_name)
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(files)):
        raise nemo.refusal(weights_name, f"it takes a number for each of the {len(files)} files")
    if len(files) == 1:
        return files[0]
    several: Any = files
    if weights is not None:
        several = [{"path": file, "weight": weight} for file, weight in zip(files, weights, strict=True)]
    try:
        convert(several, hints_of(DataSection)["train"])
    except TypeError:
        raise nemo.refusal(name, "one file is read in this version; join them: cat a.jsonl b.jsonl > c.jsonl") from None
    return several


def _translate_length(nemo: NemoSettings) -> None:
    name = nemo.first(f"{_TRAIN}.max_seq_length", "model.encoder_seq_length", "model.data.seq_length")
    if name is None:
        return
    if nemo.refers_to_nothing(name):
        nemo.note(name, "its reference is to the base model's configuration in NeMo; here it is 1024, or say it")
        return
    length = nemo.whole(name)
    assert length is not None
    if nemo.kind == "ppo":  # the limit of a prompt; the sequence holds the answer too
        length -= nemo.whole("model.ppo.length_params.max_length", length // 2) or 0
    nemo.put("data.max_length", length, name)
    other = f"{_EVAL}.max_seq_length"
    if nemo.has(other) and nemo.whole(other) != nemo.whole(name):
        nemo.note(other, f"rows of both files may have {length} tokens here")


def _translate_template(nemo: NemoSettings) -> None:
    method, name = f"{_TRAIN}.truncation_method", f"{_TRAIN}.prompt_template"
    if nemo.choice(method, ("left", "right"), "right") == "right" and nemo.has(method):
        nemo.note(method, "a row that is too long loses the beginning of its prompt here")
    if nemo.has("model.answer_only_loss") and not nemo.flag("model.answer_only_loss") and not nemo.is_aligner:
        raise nemo.refusal("model.answer_only_loss", "the loss is on answers alone here; set it to true")
    if nemo.flag("model.data.chat"):
        nemo.note("model.data.chat", "dialogues are laid out by the tokenizer's chat template")
        return
    if not nemo.has(name):
        return
    template = nemo.get(name)
    *asked, label = _template_fields(nemo, name)
    if label in str(nemo.get(f"{_TRAIN}.truncation_field", "")).split(","):
        raise nemo.refusal(
            f"{_TRAIN}.truncation_field",
            f"a row that is too long loses prompt here, never its answer; set it to {asked[0]}",
        )
    if (*asked, label) in _ROW_FIELDS:
        chat_template = "none" if template == _PLAIN else jinja_template(template, asked[0], label)
        nemo.put("model.chat_template", chat_template, name)
        return
    before = template.removesuffix(f"{{{label}}}")
    prompt = before.rstrip()  # white space before the answer belongs to it, as in `jinja_template`
    nemo.put("data.prompt_template", prompt, name)
    nemo.put("data.answer_template", f"{before[len(prompt) :]}{{{label}}}", name)
    nemo.put("model.chat_template", "none", name)


def _template_fields(nemo: NemoSettings, name: str) -> list[str]:
    """The fields in a ``prompt_template`` that can be followed: of the prompt, and at the end that of the answer.

    Raises:
        UserError: it cannot, which the message gives a reason for.
    """
    template, label_name = nemo.get(name), f"{_TRAIN}.label_key"
    if not isinstance(template, str) or not (fields := re.findall(r"\{(\w+)\}", template)):
        raise nemo.refusal(name, 'it takes text around the fields of a row, such as "{input} {output}"')
    label = nemo.get(label_name, fields[-1])
    if label != fields[-1] or not template.endswith(f"{{{label}}}"):
        raise nemo.refusal(
            name, f"the answer is what a model learns to write last, so {{{label}}} (label_key) has to end it"
        )
    if label in fields[:-1] or len(fields) < 2:
        raise nemo.refusal(
            name, f"it needs a field for what is asked, before {{{label}}}, which is the answer and stands there once"
        )
    return fields


def jinja_template(template: str, prompt: str = "input", answer: str = "output") -> str:
    """A chat template that lays a prompt and its answer out as NeMo's ``prompt_template`` does.

    White space before the answer belongs to it: a prompt that ends in a space would be tokenised otherwise than with
    the answer behind it.

    Args:
        template: text with the two fields in braces, the answer's last.
        prompt: field of the prompt.
        answer: field of the answer.
    """
    before, _, between = template.removesuffix(f"{{{answer}}}").partition(f"{{{prompt}}}")
    kept = between.rstrip()
    parts = {name: json.dumps(text) for name, text in (("before", before), ("kept", kept))}
    space = json.dumps(between[len(kept) :])
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{{{{ {space} + message['content'] }}}}"
        "{% else %}"
        f"{{{{ {parts['before']} + message['content'] + {parts['kept']} }}}}"
        "{% endif %}{% endfor %}"
    )


def _translate_batches(nemo: NemoSettings) -> None:
    processes = world_size()
    micro_name = nemo.first(f"{_TRAIN}.micro_batch_size", "model.micro_batch_size") or "model.micro_batch_size"
    whole_name = nemo.first(f"{_TRAIN}.global_batch_size", "model.global_batch_size") or "model.global_batch_size"
    micro, whole = nemo.whole(micro_name), nemo.whole(whole_name)
    for name, value in ((micro_name, micro), (whole_name, whole)):
        if value is not None and value < 1:
            raise nemo.refusal(name, "it takes a whole number of 1 or more")
    if nemo.kind == "ppo":
        _translate_rollout(nemo, whole_name, whole, processes)
        return
    if micro is None and whole is None:
        return
    micro = micro or max(1, (whole or 1) // processes)
    whole = whole or micro * processes
    steps, rest = divmod(whole, micro * processes)
    if rest or not steps:
        raise nemo.refusal(
            whole_name,
            f"it has to be a multiple of {nemo.spelt(micro_name)} {micro} times {processes} "
            f"process{'es' if processes > 1 else ''}; {max(1, steps) * micro * processes} would be",
        )
    nemo.put("train.per_device_train_batch_size", micro, micro_name)
    nemo.put("train.gradient_accumulation_steps", steps, whole_name)
    if nemo.value("data.eval") is not None:
        eval_name = f"{_EVAL}.micro_batch_size"
        nemo.put("train.per_device_eval_batch_size", nemo.whole(eval_name, micro), eval_name)


def _translate_rollout(nemo: NemoSettings, whole_name: str, whole: int | None, processes: int) -> None:
    """An update of PPO: so many answers, learnt from in so many steps."""
    name = "model.ppo.num_rollout_samples"
    samples = nemo.whole(name, 512) or 512
    steps, rest = divmod(samples, whole or samples)
    if rest or not steps or samples % processes:
        raise nemo.refusal(
            name, f"it has to be a multiple of {nemo.spelt(whole_name)} {whole} and of {processes} process(es)"
        )
    nemo.put("train.per_device_train_batch_size", samples // processes, name)
    nemo.put("train.num_mini_batches", steps, whole_name)
    nemo.put("train.num_ppo_epochs", 1)
