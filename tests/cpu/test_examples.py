"""The examples, on tiny random models: no weights are downloaded here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import models_runs

models_runs.need_transformers()

ROOT = Path(__file__).parents[2]
GEMMA3 = ROOT / "examples" / "gemma3_tensor_parallel.py"


def test_gemma3_tensor_parallel(tmp_path):
    """Its plan, the fusion and the comparison, on two CPU ranks."""
    options = ["--tiny", "--ranks", "2", "--tokens", "8", "--no-compile", "--time-limit", "150"]
    done = subprocess.run(
        [sys.executable, str(GEMMA3), *options, "--directory", str(tmp_path / "tiny")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 sandwiches fused\nthe same 8 tokens: True" in done.stdout
    assert done.stdout.count("ms a token") == 2
    texts = [line for line in done.stdout.splitlines() if line.startswith("Once upon a time")]
    assert len(texts) == 2, done.stdout
    assert len(set(texts)) == 1, texts
    assert len(set(texts[0].split(",")[-1].split())) > 4, "words that say nothing"


def test_the_tokenizer_merges_the_best_pair_first(tmp_path):
    spec = importlib.util.spec_from_file_location("gemma3_tensor_parallel", GEMMA3)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
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
