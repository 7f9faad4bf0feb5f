"""Tiny random models of transformers, one of each family, loaded with its tensor parallelism.

No file is downloaded: a configuration makes the model, one rank saves it, and all load it as they
would load a real one.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LAYERS = 2
VOCABULARY = 128

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # No token ends a text, so that all are of one length.
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
HYBRID = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model. sites: {form: fused calls}; all_reduces: that they take the place of; others
    stay. (The embedding's, where transformers shards it, comes on top.)

    alone: whether no other collective is left in the decoder with transformers' own plan.
    compiled_sites: what the torch.compile pass fuses, where that is less than `sites`.
    left: {block: why} of those that `fuse` leaves with transformers' own plan.
    """

    config: str
    model: str
    options: dict[str, Any]
    sites: dict[str, int]
    all_reduces: int
    all_reduces_left: int = 0
    alone: bool = True
    module: str = "transformers"
    stacks: tuple[str, ...] = ("model",)  # what has layers and a norm; "" for the model itself
    compiled_sites: dict[str, int] | None = None
    left: dict[str, str] = field(default_factory=dict)

    @property
    def is_encoder_decoder(self) -> bool:
        return len(self.stacks) > 1

    @property
    def generates(self) -> bool:
        return self.model.endswith(("ForCausalLM", "ForConditionalGeneration"))

    @property
    def has_experts(self) -> bool:
        return "num_experts_per_tok" in self.options

    @property
    def scales_embedding(self) -> bool:
        """Whether what is looked up is scaled before the first norm."""
        return "Gemma" in self.config

    @property
    def one_sum(self) -> bool:
        """Whether each fused call takes the place of one all-reduce: then the bits can be equal."""
        return sum(self.sites.values()) == self.all_reduces


# The pass has no pattern for two all-reduces that are added, of experts and shared expert: of the
# three sites, the attention's alone is fused.
BUT_EXPERTS = {"residual": 1}

LINEAR_ATTENTION = {"model.layers.0.linear_attn": "its output is gathered, not reduced"}
UNSHARDED = "not a linear that transformers made row-parallel"
BETWEEN = "something is done between its all-reduce and the residual add"

TINY = {
    "gemma": Tiny("GemmaConfig", "GemmaForCausalLM", BASE, {"residual": 4}, 4),
    "vaultgemma": Tiny("VaultGemmaConfig", "VaultGemmaForCausalLM", BASE, {"residual": 4}, 4),
    "gemma2": Tiny("Gemma2Config", "Gemma2ForCausalLM", BASE, {"sandwich": 4}, 4),
    "gemma3": Tiny("Gemma3TextConfig", "Gemma3ForCausalLM", BASE, {"sandwich": 4}, 4),
    "qwen3_next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**BASE, **HYBRID, **EXPERTS},
        {"residual": 3},
        5,
        alone=False,
        compiled_sites=BUT_EXPERTS,
        left=LINEAR_ATTENTION,
    ),
    "qwen3_5": Tiny(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {**BASE, **HYBRID},
        {"residual": 3},
        3,
        alone=False,
        module="transformers.models.qwen3_5",
        left=LINEAR_ATTENTION,
    ),
    "qwen3_5_moe": Tiny(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**BASE, **HYBRID, **EXPERTS},
        {"residual": 3},
        5,
        alone=False,
        module="transformers.models.qwen3_5_moe",
        compiled_sites=BUT_EXPERTS,
        left=LINEAR_ATTENTION,
    ),
    # Of these two, the attention's all-reduce alone: behind the experts' comes something else.
    "minimax_m3": Tiny(
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLForCausalLM",
        {
            **BASE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 64,
        },
        {"residual": 2},
        2,
        all_reduces_left=2,
        alone=False,
        module="transformers.models.minimax_m3_vl",
        left={"model.layers.0.mlp": BETWEEN, "model.layers.1.mlp": BETWEEN},
    ),
    "step3p7": Tiny(
        "Step3p7TextConfig",
        "Step3p7TextModel",
        {
            **BASE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
            "mlp_layer_types": ["dense", "sparse"],
            "sliding_window": 16,
        },
        {"residual": 2},
        2,
        all_reduces_left=1,
        alone=False,
        module="transformers.models.step3p7.modeling_step3p7",
        stacks=("",),
        left={"layers.0.mlp": f"down_proj: {UNSHARDED}", "layers.1.mlp": BETWEEN},
    ),
    # The encoder's two layers and the decoder's; the cross-attention is whole on every rank.
    "t5gemma": Tiny(
        "T5GemmaConfig",
        "T5GemmaForConditionalGeneration",
        {
            "encoder": {**BASE, "bos_token_id": 1},
            "decoder": {**BASE, "bos_token_id": 1, "cross_attention_hidden_size": 64},
            "vocab_size": VOCABULARY,
        },
        {"sandwich": 8},
        8,
        module="transformers.models.t5gemma",
        stacks=("model.encoder", "model.decoder"),
        left={f"model.decoder.layers.{n}.cross_attn": f"o_proj: {UNSHARDED}" for n in (0, 1)},
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """The random model, in float32, on the CPU, all of it. Norms have weights that matter."""
    tiny, model_class = TINY[name], type_of(name)
    config = getattr(importlib.import_module(tiny.module), tiny.config, None)
    config = model_class.config_class if config is None else config
    torch.manual_seed(seed)
    model = model_class(config(**tiny.options))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.normal_(0.0, 0.2)
        elif parameter.dim() > 1:
            # Large enough that logits tell tokens apart.
            parameter.data.normal_(0.0, 0.08)
    return model.eval()


def load(
    name: str,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    plan: dict[str, str] | str = "auto",
    experts: str = "eager",
    expert_parallel: bool = False,
    **config: Any,
) -> Any:
    """The model of this name, sharded over the default group by transformers. Collective.

    experts: how they compute. transformers' default has demands on sizes that a tiny model does
        not meet.
    config: values of the configuration that are to be others. Weights that only such a model has
        are as transformers initialises them.
    """
    from transformers.distributed import DistributedConfig

    path = directory / name
    if dist.get_rank() == 0 and not path.exists():
        make(name).save_pretrained(path)
    dist.barrier()
    options: dict[str, Any] = {"experts_implementation": experts} if TINY[name].has_experts else {}
    if device.type == "cuda":
        # Left to itself, torch would make a NCCL group, which refuses several ranks on one GPU.
        from torch.distributed.device_mesh import DeviceMesh

        os.environ["LOCAL_RANK"] = str(device.index)  # transformers binds this device
        options["device_mesh"] = DeviceMesh.from_group(
            dist.group.WORLD, "cuda", mesh_dim_names=("tp",)
        )
    model_class = type_of(name)
    model = model_class.from_pretrained(
        path,
        dtype=dtype,
        distributed_config=DistributedConfig(tp_plan=plan, enable_expert_parallel=expert_parallel),
        **options,
        **config,
    )
    return model.eval()


def part_of_plan(name: str, part: str) -> dict[str, str]:
    """transformers' plan for the modules with this in their names. All others are to be whole: 5.24
    has a style for that, and 5.17 leaves whole what is not named."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    plan = make(name).tp_plan
    chosen = {key: style for key, style in plan.items() if part in key}
    if "replicate" not in ALL_PARALLEL_STYLES:
        return chosen
    return dict.fromkeys(plan, "replicate") | chosen


def type_of(name: str) -> Any:
    return getattr(importlib.import_module(TINY[name].module), TINY[name].model)
