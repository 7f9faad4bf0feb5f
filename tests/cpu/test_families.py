"""What is read of a decoder layer's source, by layers that no transformers has."""

from __future__ import annotations

import importlib
import sys

import pytest

from gemma_ar_norm import families

FORWARD = """
class Layer:
    def forward(self, hidden_states, mask=None, *, last=None, **kwargs):
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        {call}
        hidden_states = residual + hidden_states
        return hidden_states
"""
SELF = "hidden_states, _ = self.self_attn(hidden_states=hidden_states, "


def read(call: str, tmp_path, monkeypatch) -> families.Call:
    """The call of the layer's only mixer. Its source must lie in a file to be read."""
    (tmp_path / "a_layer.py").write_text(FORWARD.format(call=call))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_layer", raising=False)
    module = importlib.import_module("a_layer")
    (block,) = families.read_layer(module.Layer.forward)
    (found,) = block.calls.values()
    return found


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("hidden_states = self.mlp(hidden_states)", []),
        (SELF + "attention_mask=mask, **kwargs)", [("attention_mask", "mask")]),
        (SELF + "attention_mask=None, **kwargs)", [("attention_mask", "")]),
    ],
)
def test_calls_that_are_read(call, arguments, tmp_path, monkeypatch):
    found = read(call, tmp_path, monkeypatch)
    assert [(one.keyword, one.name) for one in found.arguments] == arguments
    assert found.takes_first == call.startswith("hidden_states, _")


@pytest.mark.parametrize(
    "call",
    [
        "hidden_states = self.mlp(hidden_states, **kwargs)",  # would not get them
        SELF + "attention_mask=mask)",  # would get **kwargs
        SELF + "output_attentions=False, **kwargs)",  # no argument of the layer
        SELF + "attention_mask=other, **kwargs)",
        SELF + "window=128, **kwargs)",
        SELF + "attention_mask=hidden_states, **kwargs)",
        SELF + "attention_mask=last, **kwargs)",  # not by position: it would be in **kwargs
        SELF + "attention_mask=kwargs, **kwargs)",
        SELF + "attention_mask=mask, **other)",
        "hidden_states = self.mlp(2 * hidden_states)",
    ],
)
def test_calls_that_are_refused(call, tmp_path, monkeypatch):
    """Before anything of the model is changed."""
    with pytest.raises(families.Unknown, match="the statement `hidden_states"):
        read(call, tmp_path, monkeypatch)
