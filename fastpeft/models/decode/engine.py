"""DecodeEngine: continues many prompts at once with a model's own modules.

    prompts -> rows of a batch -> prompt pass (packed, no padding) -> steps (a token a row, a CUDA graph) -> completions

A step runs the model on the last token of each row, attends over the paged cache and draws the next tokens on the
device; the host reads them one step late, so that the device never waits for it. A row whose completion has ended goes
to the next prompt. What a prompt is continued with does not depend on the others but through rounding.

Adapters act as they are: unmerged, whatever their kind. Before the first prompt a short pass is compared with the
model's own forward, so that a model that computes something else is refused and not decoded wrongly.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.models.decode.attention import Pass, Prompts, in_pass, running
from fastpeft.models.decode.cache import PagedCache
from fastpeft.models.decode.graphs import Pool, Steps, fingerprint
from fastpeft.models.decode.options import Completion, DecodeOptions
from fastpeft.models.decode.prompts import PromptGraphs, PromptPass
from fastpeft.models.decode.rows import Request, Rows
from fastpeft.nn import Prompts as VirtualTokens
from fastpeft.ops import sample_

_PROMPT_TOKENS = 8192  # of one prompt pass
_MOST_MADE = 4  # states of a model whose captured steps are kept
_PROBE = (5, 3)  # lengths of the prompts that are compared
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class CannotDecode(UserError):
    """The engine cannot take a model; transformers' ``generate`` can."""


@dataclass(frozen=True)
class Token:
    """A token as it comes.

    Attributes:
        index: of the prompt.
        token: the token.
        logprob: its log-probability (`Completion.logprobs`).
        ends: whether it is the completion's last: a stop token, or the last that was allowed.
        is_stop: whether it is a stop token.
    """

    index: int
    token: int
    logprob: float
    ends: bool
    is_stop: bool


@dataclass(frozen=True)
class _Made:
    """What is made for one state of the model, such as an adapter that is active, and kept for when it comes again.

    Attributes:
        steps: runs steps.
        prompts: runs small prompt passes that come again; None without graphs.
        stop_ids: tokens that end a completion, where a captured step reads them.
    """

    steps: Steps
    prompts: PromptGraphs | None
    stop_ids: Tensor


class DecodeEngine:
    """Continues prompts.

    Args:
        model: a causal language model of transformers, with or without adapters; it is not changed.
        max_batch: rows at a time.
        use_graphs: capture steps, and small prompt passes that come again, into CUDA graphs; None does so on a GPU.
    Raises:
        CannotDecode: the engine computes something else than the model, and the message says by how much; transformers'
            ``generate`` works on it then.
    """

    def __init__(self, model: nn.Module, *, max_batch: int = 64, use_graphs: bool | None = None) -> None:
        if max_batch < 1:
            raise UserError(f"generate: max_batch is {max_batch}; it must be at least 1")
        self._model = model
        get_base: Any = getattr(model, "get_base_model", None)
        self._base = cast(Any, get_base() if callable(get_base) else model)
        parameters = inspect.signature(self._base.forward).parameters
        if not {"input_ids", "position_ids", "logits_to_keep"} <= set(parameters):
            raise CannotDecode(
                f"generate: {type(self._base).__name__} takes no input_ids, position_ids and logits_to_keep, as the "
                "decoding engine gives them; use transformers' generate"
            )
        self._embeddings: Any = self._base.get_input_embeddings()
        self._device = self._embeddings.weight.device
        self._max_batch = max_batch
        self._use_graphs = self._device.type == "cuda" if use_graphs is None else use_graphs
        self._cache = PagedCache(0)
        self._rows = Rows(0, 0, self._device, 0)
        self._made: OrderedDict[Any, _Made] = OrderedDict()  # the one in use last
        self._confirm()

    # --- what users call ---
    def generate(
        self, prompts: Sequence[Sequence[int]], options: DecodeOptions | Sequence[DecodeOptions]
    ) -> list[Completion]:
        """Continue prompts.

        Args:
            prompts: tokens, without padding, of any lengths.
            options: for all, or one for each; their stop tokens must be the same.
        Returns:
            The completions, in the prompts' order.
        Raises:
            UserError: an empty prompt, an option out of range, a prompt too long for the model, or logits that are no
                numbers.
        """
        found: list[tuple[list[int], list[float], bool]] = [([], [], False) for _ in prompts]
        for token in self.stream(prompts, options):
            tokens, logprobs, _ = found[token.index]
            tokens.append(token.token)
            logprobs.append(token.logprob)
            found[token.index] = (tokens, logprobs, token.is_stop)
        return [Completion(*each) for each in found]

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[Sequence[int]], options: DecodeOptions | Sequence[DecodeOptions]
    ) -> Iterator[Token]:
        """Continue prompts, and give each token as it comes; arguments and errors as for `generate`."""
        requests = self._requests(prompts, options)
        if not requests:
            return
        self._prepare(requests)
        with running(self._base):
            try:
                yield from self._run(deque(requests))
            finally:
                active = self._rows.active
                if active:  # the caller has left, or something failed
                    self._rows.end(active, self._cache)

    @property
    def kept_bytes(self) -> int:
        """Memory of the cache, which is kept for the next call."""
        return self._cache.nbytes

    def release(self) -> None:
        """Give the cache and captured steps back; the next call makes them anew."""
        self._made.clear()
        self._cache = PagedCache(0)
        self._rows = Rows(0, 0, self._device, 0)

    # --- requests ---
    def _requests(
        self, prompts: Sequence[Sequence[int]], options: DecodeOptions | Sequence[DecodeOptions]
    ) -> list[Request]:
        each = [options] * len(prompts) if isinstance(options, DecodeOptions) else list(options)
        if len(each) != len(prompts):
            raise UserError(f"generate: {len(prompts)} prompts with {len(each)} options; give one for each, or one")
        for one in each:
            one.check()
        if len({one.stop_ids for one in each}) > 1:
            raise UserError("generate: stop_ids differ between prompts of one call; call once for each set")
        if not prompts:
            return []
        drawn = torch.randint(2**62, (len(prompts),)).tolist()  # as many as prompts, used or not: the state moves alike
        seeds = [s if one.seed is None else one.seed + i for i, (one, s) in enumerate(zip(each, drawn, strict=True))]
        virtual = self._virtual_tokens(1)
        count = 0 if virtual is None else virtual.shape[1]
        requests = [
            Request(index, list(prompt), one, seed, count)
            for index, (prompt, one, seed) in enumerate(zip(prompts, each, seeds, strict=True))
        ]
        limit = getattr(self._base.config.get_text_config(), "max_position_embeddings", None) or math.inf
        for request in requests:
            if not request.prompt:
                raise UserError(f"generate: prompt {request.index} is empty; it needs at least one token")
            if request.length + request.options.max_new_tokens > limit:
                raise UserError(
                    f"generate: prompt {request.index} has {request.length} tokens and may get "
                    f"{request.options.max_new_tokens}; the model has {limit} positions. Shorten it, or lower "
                    "max_new_tokens"
                )
        return requests

    def _virtual_tokens(self, count: int) -> Tensor | None:
        """Embeddings that a prompt adapter puts before each of some prompts, ``(count, v, hidden)``."""
        prompts = self._model._modules.get("prompt_encoder")
        if not isinstance(prompts, VirtualTokens) or not prompts.working():
            return None
        return prompts.tokens(count)

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Make room for as many of the requests at a time as there are rows, and steps if those there do not fit."""
        size = min(self._max_batch, len(requests))
        wanted = sorted((request.page_count for request in requests), reverse=True)
        pages, row_pages = sum(wanted[:size]), wanted[0]
        penalised = any(request.options.repetition_penalty != 1 for request in requests)
        vocabulary = self._base.get_output_embeddings().weight.shape[0] if penalised else 0
        has_room = self._rows.size >= size and self._rows.row_pages >= row_pages and self._cache.pages >= pages
        if not has_room or vocabulary != self._rows.vocabulary:
            self.release()
            self._cache = PagedCache(pages)
            self._rows = Rows(size, row_pages, self._device, vocabulary)
        stop_ids = requests[0].options.stop_ids
        key = (fingerprint(self._model), stop_ids)
        made = self._made.pop(key, None)
        if made is None:
            pool = Pool() if self._use_graphs else None
            made = _Made(
                Steps(self._step, self._rows.size, pool),
                None if pool is None else PromptGraphs(self._forward_prompts, pool),
                torch.tensor(stop_ids, dtype=torch.int64, device=self._device),
            )
            if len(self._made) == _MOST_MADE:
                self._made.popitem(last=False)
        self._made[key] = made

    def _in_use(self) -> _Made:
        return next(reversed(self._made.values()))

    # --- the loop ---
    def _run(self, waiting: deque[Request]) -> Iterator[Token]:
        rows, made = self._rows, self._in_use()
        steps, stop_ids = made.steps, made.stop_ids
        while waiting or rows.active:
            if waiting and self._should_begin(len(waiting)):
                yield from self._begin(waiting, stop_ids)
            if not rows.active:
                continue
            if steps.size(len(rows.active)) < steps.size(rows.active[-1] + 1):
                rows.close_up()
            yield from self._decode(waiting, steps, stop_ids)

    def _should_begin(self, waiting: int) -> bool:
        """A prompt pass stops all rows, so it waits for some room; the last prompts do not wait."""
        rows = self._rows
        free = rows.size - len(rows.active)
        return free >= min(waiting, max(1, rows.size // 8))

    def _decode(self, waiting: deque[Request], steps: Steps, stop_ids: Tensor) -> Iterator[Token]:
        """Steps until requests can begin, or rows have emptied enough for a smaller batch."""
        rows = self._rows
        size = steps.size(rows.active[-1] + 1)
        before = steps.run(size, rows, stop_ids)
        while True:
            after = steps.run(size, rows, stop_ids)
            yield from self._read(*before.read())
            before = after
            active = len(rows.active)
            if not active or steps.size(active) < size or (waiting and self._should_begin(len(waiting))):
                break
        yield from self._read(*before.read())

    def _read(self, tokens: list[int], logprobs: list[float], rows: Sequence[int] | None = None) -> Iterator[Token]:
        """Hand out what was drawn, and let rows go whose completion has ended."""
        ended = []
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            row = place if rows is None else rows[place]
            request = self._rows.requests[row]
            if request is None:
                continue
            if math.isnan(logprob):
                raise UserError(
                    f"generate: the logits after {request.length + request.count} tokens of prompt {request.index} are "
                    "no numbers: the model's weights, an adapter or the dtype make it overflow"
                )
            request.count += 1
            is_stop = token in request.options.stop_ids
            ends = is_stop or request.count == request.options.max_new_tokens
            if ends:
                ended.append(row)
            yield Token(request.index, token, logprob, ends, is_stop)
        if ended:
            self._rows.end(ended, self._cache)

    # --- passes ---
    def _begin(self, waiting: deque[Request], stop_ids: Tensor) -> Iterator[Token]:
        """A prompt pass for as many requests as fit."""
        group: list[Request] = []
        tokens, pages = 0, self._cache.free
        while waiting and len(group) < self._rows.size - len(self._rows.active):
            request = waiting[0]
            if (group and tokens + request.length > _PROMPT_TOKENS) or request.page_count > pages:
                break
            tokens, pages = tokens + request.length, pages - request.page_count
            group.append(waiting.popleft())
        if not group:
            return
        rows, table, state = self._rows.begin(group, self._cache)
        logits = self._prompt_logits([request.prompt for request in group], table)
        sample_(logits, state, stop_ids)
        self._rows.settle(rows, state)
        yield from self._read(state.token.tolist(), state.logprob.tolist(), rows)

    def _prompt_logits(self, prompts: Sequence[Sequence[int]], table: Tensor) -> Tensor:
        """Fill the cache with prompts, and give the logits behind them, ``(b, v)``."""
        virtual = self._virtual_tokens(len(prompts))
        graphs = self._in_use().prompts
        if virtual is None and graphs is not None:
            captured = graphs.run(prompts, table)
            if captured is not None:
                return captured
        before = 0 if virtual is None else virtual.shape[1]
        lengths = [before + len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self._device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        last = torch.tensor(lengths).cumsum(0).to(self._device) - 1
        embeddings = None
        if virtual is not None:
            texts = self._embeddings(ids).split([len(prompt) for prompt in prompts])
            parts = [part for both in zip(virtual.to(texts[0].dtype), texts, strict=True) for part in both]
            embeddings = torch.cat(parts)
        return self._forward_prompts(PromptPass(ids, positions, last, Prompts.of(lengths, table)), embeddings)

    def _forward_prompts(self, given: PromptPass, embeddings: Tensor | None = None) -> Tensor:
        """Run the model on prompts, or on embeddings in place of their tokens."""
        first = {"input_ids": given.ids[None]} if embeddings is None else {"inputs_embeds": embeddings[None]}
        needed = self._base.config.get_text_config().num_hidden_layers - 1, given.last
        with in_pass(Pass(self._cache, torch.zeros(0), torch.zeros(0), given.prompts, needed)):
            out = self._base(**first, position_ids=given.positions[None], use_cache=False, logits_to_keep=given.last)
        logits: Tensor = out.logits[0]
        return logits

    def _step_logits(self, token: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        """Feed one token a row, and give the logits behind it, ``(rows, v)``."""
        positions = lengths.clamp(min=0).long()[:, None]
        with in_pass(Pass(self._cache, table, lengths)):
            out = self._base(input_ids=token[:, None], position_ids=positions, use_cache=False)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _step(self, size: int, rows: Rows, stop_ids: Tensor) -> None:
        """One step of the first rows."""
        state = rows.state.rows(size)
        sample_(self._step_logits(state.token, state.lengths, rows.table[:size]), state, stop_ids)

    # --- whether it is the model's own ---
    @torch.no_grad()
    def _confirm(self) -> None:
        """Compare a prompt pass and a step with the model's own forward, for prompts of different lengths."""
        vocabulary = self._embeddings.weight.shape[0]
        texts = [[(7 * i + 3 * n) % vocabulary for i in range(n + 1)] for n in _PROBE[: self._max_batch]]
        requests = [Request(i, text[:-1], DecodeOptions(1), 0, 0) for i, text in enumerate(texts)]
        virtual = self._virtual_tokens(1)
        requests = [replace(request, virtual=0 if virtual is None else virtual.shape[1]) for request in requests]
        self._prepare(requests)
        mode = self._model.training
        try:
            with running(self._base):
                _, table, state = self._rows.begin(requests, self._cache)
                prompt = self._prompt_logits([request.prompt for request in requests], table)
                last = torch.tensor([text[-1] for text in texts], device=self._device)
                step = self._step_logits(last, state.lengths + 1, table)
            self._model.eval()
            for ours, cut in ((prompt, -1), (step, None)):
                for row, text in zip(ours, texts, strict=True):
                    own = self._model(input_ids=torch.tensor([text[:cut]], device=self._device), use_cache=False)
                    self._compare(row, own.logits[0, -1])
        finally:
            self._model.train(mode)
            self.release()

    def _compare(self, ours: Tensor, own: Tensor) -> None:
        difference = float((ours.float() - own.float()).norm() / own.float().norm().clamp_min(1e-30))
        allowed = _TOLERANCE[own.dtype]
        if not difference <= allowed and bool(own.isfinite().all()):
            raise CannotDecode(
                f"generate: the decoding engine's logits differ from those of {type(self._base).__name__} by "
                f"{difference:.2g} of their norm; at most {allowed:g} is rounding. Use transformers' generate"
            )
