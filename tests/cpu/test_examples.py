"""The examples, on tiny random models: no weights are downloaded here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import models_runs
import pytest

models_runs.need_transformers()

ROOT = Path(__file__).parents[2]
GEMMA3 = ROOT / "examples" / "gemma3_tensor_parallel.py"


def test_gemma3_tensor_parallel(tmp_path):
    """Its plan, the fusion, the compile step and the comparisons, on two CPU ranks.

    torch.compile is called with the options, and told to leave the model as it is: generating code
    for it took 66 s on two busy cores (22 s from Inductor's cache). The pass on such a model is
    tested by `through_the_pass` of models_compiled.py, and code from it by its `compiled` on GPUs.
    """
    options = ["--tiny", "--ranks", "2", "--tokens", "8", "--time-limit", "150"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(GEMMA3), *options, "--directory", str(tmp_path / "tiny")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 sandwiches fused\nthe same 8 tokens: True" in done.stdout
    assert "--- torch.compile with inductor_options(): " in done.stdout
    assert done.stdout.count("the same 8 tokens: True") == 2
    assert done.stdout.count("ms a token") == 3
    texts = [line for line in done.stdout.splitlines() if line.startswith("Once upon a time")]
    assert len(texts) == 3, done.stdout
    assert len(set(texts)) == 1, texts
    assert len(set(texts[0].split(",")[-1].split())) > 4, "words that say nothing"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("gemma3_tensor_parallel", GEMMA3)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ranks", ["1", "3", "8"])
def test_other_numbers_of_ranks_are_refused(example, ranks, monkeypatch, capsys):
    """Before anything starts or is loaded: by --ranks, and as torchrun says it."""
    for function in ("prepare", "rank_main"):
        monkeypatch.setattr(example, function, lambda *_: pytest.fail("it went on"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [str(GEMMA3), "--tiny", "--ranks", ranks])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert (
        f"argument --ranks: invalid choice: {ranks} (choose from 2, 4)" in capsys.readouterr().err
    )

    monkeypatch.setattr(sys, "argv", [str(GEMMA3), "--tiny"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    words = f"WORLD_SIZE: 2 or 4 ranks are required, .*; got {ranks}; pass --nproc-per-node 2"
    with pytest.raises(SystemExit, match=words):
        example.main()


def test_the_tokenizer_merges_the_best_pair_first(example, tmp_path):
    pieces = ["<bos>", "a", "b", "c", "\u2581", "ab", "bc", "abc", "\u2581a", "bb"]
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, -3.0, -2.0, -4.0, -5.0, -1.0]
    (tmp_path / "tokens.json").write_text(json.dumps({"pieces": pieces, "scores": scores}))
    tokenizer = example.Tokenizer(tmp_path)

    def cut(text):
        first, *rest = tokenizer.encode(text)
        assert pieces[first] == "<bos>"
        assert tokenizer.decode(rest) == text
        return [pieces[i] for i in rest]

    assert cut("abc") == ["abc"]  # bc, and then a + bc
    assert cut("ab") == ["ab"]
    assert cut("abbc") == ["a", "bb", "c"]
    assert cut("bcbc") == ["bc", "bc"]
    assert cut("b a") == ["b", "\u2581a"]
    assert cut(" ab") == ["\u2581", "ab"]  # better than \u2581a and b
