"""Where a base model is looked for: folders first, then the hub's cache, and the hub only where it answers."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fastpeft.errors import UserError
from fastpeft.recipes import ModelConfig, load_model, load_tokenizer, source

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, on a machine that may ask the hub and gets no answer."""
    cache = tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setattr(source, "getproxies", dict)
    return cache


def complaint(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelConfig(path))
    return str(caught.value)


def test_a_model_that_is_nowhere_is_told_of_at_once(cache: Path, tmp_path: Path):
    """'model.path: nope' without a network gave 50 seconds of 'Retrying in 8s', then a complaint about a tokenizer."""
    start = time.perf_counter()
    ending = f"the hub's local cache {cache} holds no model of that name, and the hub ({constants.ENDPOINT}) cannot be "
    assert complaint("nope") == f"model.path: there is no folder 'nope' here; {ending}reached"
    (tmp_path / "nopee").mkdir()
    assert complaint("nope") == (f"model.path: there is no folder 'nope' here (did you mean 'nopee'?); {ending}reached")
    assert complaint("nobody/nothing").startswith("model.path: there is no folder 'nobody/nothing' here; ")
    assert time.perf_counter() - start < 3


def test_offline_the_hub_is_not_asked(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(source, "_hub_answers", lambda: pytest.fail("asked"))
    assert complaint("nobody/nothing").endswith("and HF_HUB_OFFLINE keeps it from being looked for on the hub")


def test_a_cached_model_loads_while_the_hub_does_not_answer(cache: Path, model_folder: Path):
    repository = cache / "models--tiny--model"
    shutil.copytree(model_folder, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    model, tokenizer = load_model(ModelConfig("tiny/model"), CPU)
    assert model.config.num_hidden_layers == 2 and tokenizer.eos_token == "<|end|>"


def test_a_slow_look_up_of_the_hubs_name_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_PATIENCE", 0.1)
    enough = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        enough.wait(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.perf_counter()
    assert not source._hub_answers()
    assert time.perf_counter() - start < 1
    enough.set()


def test_what_counts_as_an_answer(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert not source._hub_answers()
    for proxies in ({"http": "http://proxy:3128"}, {"all": "socks5://proxy"}):
        monkeypatch.setattr(source, "getproxies", lambda proxies=proxies: proxies)
        assert source._hub_answers(), "behind a proxy the hub's own library has to try"
    monkeypatch.setattr(source, "getproxies", lambda: {"ftp": "http://proxy:3128"})
    assert not source._hub_answers()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert source._hub_answers()


@pytest.mark.parametrize(
    "path", ["a/b/c", "./a", "../a", ".a", "/a/b", "~/a", "a\\b", "a b", "a--b", "here/b", "a.git"]
)
def test_what_can_be_no_hub_id_is_never_asked_of_the_hub(cache: Path, path: str, monkeypatch: pytest.MonkeyPatch):
    Path("here").mkdir()
    monkeypatch.setattr(source, "_ask_hub", lambda config: pytest.fail("asked"))
    assert complaint(path).startswith(f"model.path: there is no folder {path}")
