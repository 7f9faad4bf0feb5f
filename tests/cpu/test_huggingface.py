"""`fuse` on tiny models of transformers, one of each family, on two CPU ranks.

models_worker.py runs the cases. One run has all of them, and each is a test.
"""

from __future__ import annotations

import importlib

import checks
import models
import models_runs
import pytest

import gemma_ar_norm

models_runs.need_transformers()

# Generating code on the CPU takes long, and test_fusion_inductor.py does it. Tracing takes seconds:
# families of a form that another has go through the pass on GPUs alone.
TRACED = ("gemma", "gemma3", "qwen3_5", "qwen3_5_moe")
GPU_ONLY = {f"through_the_pass-{name}" for name in models.TINY if name not in TRACED}
CASES = tuple(
    case for case in models_runs.CASES if not case.startswith("compiled-") and case not in GPU_ONLY
)


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    models_runs.expect_passed(case, *models_runs.run(2, CASES, gpus=0))


def test_the_ranks_ended_well():
    result, _ = models_runs.run(2, CASES, gpus=0)
    assert result.exit_code == 0, f"{result.reason}\n{result.transcript()[-4000:]}"


# ------------------------------------------------------------------------- families of another kind

OF_TWO_KINDS = {**models.BASE, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": models.VOCABULARY, "hidden_size_per_layer_input": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OTHER_FAMILIES = {
    "LlamaForCausalLM": models.BASE,
    "Gemma3nForCausalLM": {
        **OF_TWO_KINDS,
        **PER_LAYER,
        "intermediate_size": [128] * models.LAYERS,
        "activation_sparsity_pattern": [0.0] * models.LAYERS,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
    },
    "Gemma4ForCausalLM": {**OF_TWO_KINDS, **PER_LAYER, "global_head_dim": 16},
    "RecurrentGemmaForCausalLM": models.BASE,
    "T5Gemma2ForConditionalGeneration": {
        "encoder": {"text_config": models.BASE, "vision_config": VISION},
        "decoder": models.BASE,
    },
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families_are_refused_in_words(name):
    """By their classes' names, before anything else of them is looked at; nothing is changed."""
    model_class = getattr(importlib.import_module("transformers"), name)
    model = model_class(model_class.config_class(**OTHER_FAMILIES[name])).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    words = (
        rf"model: one of a family that fuse\(\) knows \(Gemma, .*\) is required; got {name}; put"
    )
    with pytest.raises(ValueError, match=words):
        gemma_ar_norm.fuse(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        checks.assert_bit_equal(after[key], value, key)
