"""Virtual tokens: trained embeddings that stand before a text's own.

``SoftPrompt`` trains them directly (prompt tuning), ``PromptEncoder`` as the output of a small network (P-tuning),
which is only needed for training: what acts afterwards is the same table. Parts are named as in PEFT.

Trained numbers, v virtual tokens of width d:

    prompt tuning        v d
    P-tuning, MLP        v d + h (2 d + h) + 2 h + d
    P-tuning, LSTM       v d + LSTM(d, h, layers, both directions) + 4 h^2 + 2 h + 2 h d + d
    NeMo's bottleneck    v e + e b + b + b d + d
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.adapted import Adapted

NEMO_STD = 0.023  # standard deviation of the virtual tokens in NeMo's P-tuning


class SoftPrompt(nn.Module):
    """Virtual tokens trained as they are.

    Args:
        values: ``(v, d)`` to begin with; fp32.
    Source:
        Prompt tuning, arXiv 2104.08691.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(values.float(), freeze=False)

    def forward(self) -> Tensor:
        """The virtual tokens ``(v, d)``."""
        tokens: Tensor = self.embedding.weight
        return tokens


class PromptEncoder(nn.Module):
    """Virtual tokens as the output of a network over a trained table.

    Args:
        tokens: number v of virtual tokens.
        width: d, the model's hidden size.
        kind: "MLP" or "LSTM" as in PEFT, or "NEMO" (embedding, bottleneck, GELU).
        hidden: size of the network's hidden layers; NeMo's bottleneck.
        layers: of the LSTM.
        dropout: between the layers of the LSTM.
        table_width: width of the table, for "NEMO"; d if None.
    Raises:
        UserError: an unknown kind.
    Source:
        P-tuning, arXiv 2103.10385; NeMo's prompt encoder for the bottleneck form.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        kind: str = "MLP",
        hidden: int | None = None,
        layers: int = 2,
        dropout: float = 0.0,
        table_width: int | None = None,
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        self.kind = kind
        self.embedding = nn.Embedding(tokens, (table_width or width) if kind == "NEMO" else width)
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        elif kind == "MLP":
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
        elif kind == "NEMO":
            nn.init.normal_(self.embedding.weight, std=NEMO_STD)
            self.mlp_head = nn.Sequential(
                nn.Linear(self.embedding.embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, width)
            )
        else:
            raise UserError(f"PromptEncoder: kind is {kind!r}; it must be MLP, LSTM or NEMO")

    def forward(self) -> Tensor:
        """The virtual tokens ``(v, d)``."""
        rows: Tensor = self.embedding.weight
        if self.kind == "LSTM":
            rows = self.lstm_head(rows[None])[0][0]
        tokens: Tensor = self.mlp_head(rows)
        return tokens


class Prompts(Adapted):
    """A model's virtual tokens, by adapter; those of several active ones stand one after the other.

    Attributes:
        prompts: the module of each adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ModuleDict()

    def held(self) -> list[str]:
        """Names of the adapters."""
        return list(self.prompts)

    def add_adapter(self, adapter_name: str, prompt: SoftPrompt | PromptEncoder) -> None:
        """Add an adapter's virtual tokens; they act only once ``active_adapters`` names it."""
        self.prompts[adapter_name] = prompt

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; names without one here are ignored."""
        if adapter_name in self.prompts:
            del self.prompts[adapter_name]

    def prompt(self, adapter_name: str) -> SoftPrompt | PromptEncoder:
        """An adapter's module."""
        return self.prompts[adapter_name]  # type: ignore[return-value]

    def set_dropout(self, p: float) -> None:
        """Give all encoders another dropout."""
        for module in self.modules():
            if isinstance(module, nn.LSTM):
                module.dropout = p

    def parts(self, adapter_name: str) -> dict[str, str]:
        """All tensors of the adapter, the encoder included: what training goes on from."""
        names = [name for name, _ in self.prompt(adapter_name).named_parameters()]
        return {f"prompts.{adapter_name}.{name}": name for name in names}

    def saved(self, adapter_name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The virtual tokens themselves, as PEFT stores them."""
        prompt = self.prompt(adapter_name)
        values = {name: get(f"prompts.{adapter_name}.{name}") for name, _ in prompt.named_parameters()}
        return {"prompt_embeddings": _tokens_by(prompt, values)}

    def encoder(self, adapter_name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What ``saved`` leaves out and training goes on from: table and network of an encoder, else nothing."""
        if isinstance(self.prompt(adapter_name), SoftPrompt):
            return {}
        return {tail: get(name) for name, tail in self.parts(adapter_name).items()}

    @torch.no_grad()
    def check_encoder(
        self, adapter_name: str, encoder: Mapping[str, Tensor], tokens: Tensor | None, where: str
    ) -> None:
        """Refuse an encoder of other sizes, or one that does not give the virtual tokens it was saved with.

        Args:
            adapter_name: an adapter that is held.
            encoder: an encoder's tensors.
            tokens: ``(v, d)``, the virtual tokens of the same file.
            where: the file, for messages.
        Raises:
            UserError: the encoder does not fit.
        """
        prompt = self.prompt(adapter_name)
        here = {name: tuple(p.shape) for name, p in prompt.named_parameters()}
        there = {name: tuple(tensor.shape) for name, tensor in encoder.items()}
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            shown = ", ".join(f"{name} {there.get(name)} (here {here.get(name)})" for name in differing[:3])
            raise UserError(f"{where}: its encoder is another one than this adapter's: {shown}; use the run's settings")
        device = prompt.embedding.weight.device
        values = {name: tensor.to(device) for name, tensor in encoder.items()}
        given = _tokens_by(prompt, values)
        if tokens is not None and not torch.allclose(given, tokens.to(given), rtol=1e-3, atol=1e-4):
            raise UserError(
                f"{where}: the encoder does not give the virtual tokens of the same folder; the two files do not "
                "belong together, take both from one save (or remove the encoder to use the tokens alone)"
            )

    @torch.no_grad()
    def load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take an encoder's tensors; or virtual tokens, which then take the place of an encoder."""
        prompt = self.prompt(adapter_name)
        if "embedding.weight" in tensors:
            super().load(adapter_name, tensors)
        elif "prompt_embeddings" in tensors:
            tokens = tensors["prompt_embeddings"]
            if isinstance(prompt, SoftPrompt):
                prompt.embedding.weight.copy_(tokens)
            else:
                kept = prompt.embedding.weight
                soft = SoftPrompt(tokens.to(kept.device, copy=True)).requires_grad_(kept.requires_grad)
                self.add_adapter(adapter_name, soft.train(prompt.training))

    def tokens(self, samples: int) -> Tensor | None:
        """The virtual tokens of a batch, ``(samples, v, d)`` fp32; None where no prompt acts.

        Args:
            samples: rows of the batch.
        Raises:
            UserError: the routing gives the samples different numbers of virtual tokens.
        """
        if self.routing is not None:
            return self._routed(samples)
        prompts = [self.prompt(name)() for name in self.working()]
        return torch.cat(prompts)[None].expand(samples, -1, -1) if prompts else None

    def _routed(self, samples: int) -> Tensor | None:
        device = next(self.parameters()).device
        routes = list(self.routes(samples, device))
        if not routes:
            return None
        prompts = [self.prompt(name)() for name, _ in routes]
        lengths = {prompt.shape[0] for prompt in prompts}
        if len(lengths) > 1 or sum(len(rows) for _, rows in routes) != samples:
            raise UserError(
                "adapter_names: the samples of a batch must have equally many virtual tokens; put samples of one "
                "number (or of none) into a batch"
            )
        tokens: Tensor = prompts[0].new_zeros(samples, *prompts[0].shape)
        for prompt, (_, rows) in zip(prompts, routes, strict=True):
            tokens = tokens.index_copy(0, rows, prompt.expand(len(rows), -1, -1))
        return tokens


@torch.no_grad()
def _tokens_by(prompt: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """The virtual tokens that an encoder gives with other values than its own, without dropout."""
    training = prompt.training
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights")  # not in one piece: it is called once
            tokens: Tensor = torch.func.functional_call(prompt.eval(), dict(values), ())
    finally:
        prompt.train(training)
    return tokens
