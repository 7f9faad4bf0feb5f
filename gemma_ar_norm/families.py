"""The model families of Hugging Face transformers that `fuse` knows, and how it knows them again.

A family is a line of FAMILIES: its names, and the order of norms in its decoder layer. That alone
would trust names. So what the installed transformers really does is read from its source, statement
by statement, and compared: the decoder layer (`read_layer`), what becomes of a row-parallel
linear's output (`returns_output_of`), the mixture of experts. A version that does it another way is
refused, however it is numbered.

To add a family: add its line; if its layer has statements of a new kind, teach them to
`read_layer`; add a tiny model of it to tests/models.py.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Unknown(Exception):
    """Source that is not what this file knows; the text says which part."""


@dataclass(frozen=True)
class Block:
    """A part of a decoder layer: h = h + post_norm(mixer(norm(h))), in module names.

    mixers: the layer has one of these. post_norm: None where the family has none.
    """

    norm: str
    mixers: tuple[str, ...]
    post_norm: str | None = None


@dataclass(frozen=True)
class Family:
    """name: in words. prefix: of its class names. stacks: the classes that have layers and a norm.

    The norm that follows a block's residual add is the next block's, the next layer's first, or
    behind the last layer the stack's own.
    """

    name: str
    prefix: str
    stacks: tuple[str, ...]
    blocks: tuple[Block, ...]
    layer: str = "DecoderLayer"


RESIDUAL = (
    Block("input_layernorm", ("self_attn",)),
    Block("post_attention_layernorm", ("mlp",)),
)
RESIDUAL_OR_LINEAR = (
    Block("input_layernorm", ("linear_attn", "self_attn")),
    Block("post_attention_layernorm", ("mlp",)),
)
SANDWICH = (
    Block("input_layernorm", ("self_attn",), "post_attention_layernorm"),
    Block("pre_feedforward_layernorm", ("mlp",), "post_feedforward_layernorm"),
)
VAULT = (
    Block("input_layernorm", ("self_attn",)),
    Block("pre_feedforward_layernorm", ("mlp",)),
)
T5_SELF = Block("pre_self_attn_layernorm", ("self_attn",), "post_self_attn_layernorm")
T5_CROSS = Block("pre_cross_attn_layernorm", ("cross_attn",), "post_cross_attn_layernorm")
T5_MLP = Block("pre_feedforward_layernorm", ("mlp",), "post_feedforward_layernorm")

FAMILIES = (
    Family("Gemma", "Gemma", ("GemmaModel",), RESIDUAL),
    Family("VaultGemma", "VaultGemma", ("VaultGemmaModel",), VAULT),
    Family("Gemma 2", "Gemma2", ("Gemma2Model",), SANDWICH),
    Family("Gemma 3", "Gemma3", ("Gemma3TextModel",), SANDWICH),
    Family("Qwen3-Next", "Qwen3Next", ("Qwen3NextModel",), RESIDUAL_OR_LINEAR),
    Family("Qwen3.5", "Qwen3_5", ("Qwen3_5TextModel",), RESIDUAL_OR_LINEAR),
    Family("Qwen3.5 MoE", "Qwen3_5Moe", ("Qwen3_5MoeTextModel",), RESIDUAL_OR_LINEAR),
    Family("MiniMax-M3", "MiniMaxM3VL", ("MiniMaxM3VLTextModel",), RESIDUAL),
    Family("Step 3.7", "Step3p7", ("Step3p7TextModel",), RESIDUAL),
    Family("T5Gemma", "T5Gemma", ("T5GemmaEncoder",), (T5_SELF, T5_MLP), "EncoderLayer"),
    Family("T5Gemma", "T5Gemma", ("T5GemmaDecoder",), (T5_SELF, T5_CROSS, T5_MLP)),
)

# How the names of the other classes end. Each starts with the family's prefix.
NORM, ATTENTION, MLP = "RMSNorm", "Attention", "MLP"

# The row-parallel linear whose output a mixer returns.
LINEARS = {"self_attn": "o_proj", "cross_attn": "o_proj", "mlp": "down_proj"}

# The mixture of experts whose two all-reduces can be one: the gate's factor is the same on all
# ranks, so the sum over ranks may be taken after the two parts were added.
SHARED_EXPERT_BLOCK = """
batch_size, sequence_length, hidden_dim = hidden_states.shape
hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
shared_expert_output = self.shared_expert(hidden_states_reshaped)
_, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
expert_output = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
shared_expert_output = F.sigmoid(self.shared_expert_gate(hidden_states_reshaped)) * shared_expert_output
expert_output = expert_output + shared_expert_output
expert_output = expert_output.reshape(batch_size, sequence_length, hidden_dim)
return expert_output
"""  # noqa: E501

# Gemma's embedding scales what it looks up, and the all-reduce comes after that.
SCALED_EMBEDDING = "return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)"


def family_of(stack: Any) -> Family | None:
    """The family of a module that has layers and a final norm, by its class."""
    name = type(stack).__name__
    if not type(stack).__module__.startswith("transformers.models."):
        return None
    return next((family for family in FAMILIES if name in family.stacks), None)


# ------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Argument:
    """keyword=name, or keyword=name.attribute where name is not None; keyword=None without name."""

    keyword: str
    name: str = ""
    attribute: str = ""

    def value(self, given: dict[str, Any]) -> Any:
        """given: the arguments of the layer."""
        value = given[self.name] if self.name else None
        return getattr(value, self.attribute) if self.attribute and value is not None else value


@dataclass(frozen=True)
class Call:
    """How the layer calls a mixer: with its hidden states, these, and the layer's **kwargs."""

    arguments: tuple[Argument, ...]
    takes_first: bool  # of the tuple that the mixer returns


@dataclass
class ReadBlock:
    norm: str
    calls: dict[str, Call] = field(default_factory=dict)
    post_norm: str | None = None
    dropout: bool = False


def statements_of(function: Callable[..., Any]) -> list[ast.stmt]:
    """The body of a function as its source has it, without the docstring; decorators aside."""
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise Unknown(f"its source cannot be read ({error})") from None
    definition = tree.body[0]
    if len(tree.body) != 1 or not isinstance(definition, ast.FunctionDef):
        raise Unknown("its source is not that of a function")
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return body


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def has_body(function: Callable[..., Any], source: str) -> bool:
    """Whether the function's statements are these, comments and layout aside."""
    wanted = [_text(statement) for statement in ast.parse(source).body]
    return [_text(statement) for statement in statements_of(function)] == wanted


def returns_output_of(function: Callable[..., Any], linear: str) -> bool:
    """Whether the function ends by returning what self.<linear>(...) returned, untouched."""
    *_, before, last = [None, *statements_of(function)]
    value = last.value if isinstance(last, ast.Return) else None
    if isinstance(value, ast.Tuple) and value.elts:
        value = value.elts[0]
    if isinstance(before, ast.Assign) and isinstance(value, ast.Name):
        if [_text(target) for target in before.targets] != [value.id]:
            return False
        value = before.value
    return isinstance(value, ast.Call) and _text(value.func) == f"self.{linear}"


def read_layer(forward: Callable[..., Any]) -> list[ReadBlock]:
    """What a decoder layer's forward does, where it is blocks h = h + post_norm(mixer(norm(h))).

    Raises Unknown with the first statement that is of no kind known here.
    """
    known = {"", *(parameter.name for parameter in parameters_of(forward))}
    blocks: list[ReadBlock] = []
    state = "between"  # blocks; then "residual" kept, "normed", "mixed"
    for statement in statements_of(forward):
        text = _text(statement)
        if state == "between" and text == "residual = hidden_states":
            state = "residual"
        elif state == "residual" and (norm := _norm_of(text)):
            blocks.append(ReadBlock(norm))
            state = "normed"
        elif state == "normed" and (calls := _calls_of(statement)) and _names(calls) <= known:
            blocks[-1].calls = calls
            state = "mixed"
        elif state == "mixed" and text == _UNPACK:
            pass  # some MoE blocks return a tuple
        elif state == "mixed" and blocks[-1].post_norm is None and (norm := _norm_of(text)):
            blocks[-1].post_norm = norm
        elif state == "mixed" and text in _ADD:
            blocks[-1].dropout = text == _ADD[1]
            state = "between"
        elif state == "between" and text == "return hidden_states":
            return blocks
        else:
            raise Unknown(f"the statement `{text.splitlines()[0]}` in its place")
    raise Unknown("no `return hidden_states` at its end")


_ADD = (
    "hidden_states = residual + hidden_states",
    "hidden_states = residual + self.dropout(hidden_states)",
)
_UNPACK = "if isinstance(hidden_states, tuple):\n    hidden_states, _ = hidden_states"


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """Of a layer's forward: what may be given to it by position behind the hidden states."""
    parameters = list(inspect.signature(inspect.unwrap(forward)).parameters.values())[2:]
    return [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _names(calls: dict[str, Call]) -> set[str]:
    return {argument.name for call in calls.values() for argument in call.arguments}


def _norm_of(text: str) -> str | None:
    match = re.fullmatch(r"hidden_states = self\.(\w+)\(hidden_states\)", text)
    return match[1] if match else None


def _calls_of(statement: ast.stmt) -> dict[str, Call]:
    """{mixer: its call} of a statement that calls one, or one of several; empty if it does not."""
    if isinstance(statement, ast.If):
        calls: dict[str, Call] = {}
        for branch in _branches(statement):
            if len(branch) != 1:
                return {}
            calls |= _calls_of(branch[0])
        return calls
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
        return {}
    call = statement.value
    match = re.fullmatch(r"self\.(\w+)", _text(call.func))
    target = _text(statement.targets[0])
    if match is None or not re.fullmatch(r"hidden_states|\(?hidden_states(, _)+\)?", target):
        return {}
    arguments: list[Argument] = []
    given = [_text(argument) for argument in call.args]
    for keyword in call.keywords:
        if keyword.arg is None:
            if _text(keyword.value) != "kwargs":
                return {}
        elif keyword.arg == "hidden_states":
            given.append(_text(keyword.value))
        elif match_value := _VALUE.fullmatch(_text(keyword.value)):
            name, _, attribute = (match_value["name"] or match_value["whole"]).partition(".")
            arguments.append(Argument(keyword.arg, "" if name == "None" else name, attribute))
        else:
            return {}
    passes_on = any(keyword.arg is None for keyword in call.keywords)
    # All of **kwargs goes to a mixer with arguments of its own, and nothing to one without.
    if given != ["hidden_states"] or bool(arguments) != passes_on:
        return {}
    return {match[1]: Call(tuple(arguments), target != "hidden_states")}


_VALUE = re.compile(r"(?P<whole>\w+)|(?P<name>(\w+)\.\w+) if \3 is not None else None")


def _branches(statement: ast.If) -> list[list[ast.stmt]]:
    """The bodies of an if/elif/else whose tests compare an attribute of the layer with a name."""
    bodies: list[list[ast.stmt]] = []
    rest: list[ast.stmt] = [statement]
    while len(rest) == 1 and isinstance(rest[0], ast.If):
        if not re.fullmatch(r"self\.\w+ == '\w+'", _text(rest[0].test)):
            return [[]]
        bodies.append(rest[0].body)
        rest = rest[0].orelse
    return [*bodies, rest] if rest else bodies


def check_layer(family: Family, layer: Any) -> list[tuple[str, ReadBlock]]:
    """For each block of this layer: (its mixer, what was read). Raises Unknown."""
    read = read_layer(type(layer).forward)
    found = [Block(block.norm, tuple(block.calls), block.post_norm) for block in read]
    if found != list(family.blocks):
        raise Unknown(f"blocks {found} instead of {list(family.blocks)}")
    mixers = []
    for block in read:
        there = [name for name in block.calls if hasattr(layer, name)]
        if len(there) != 1:
            raise Unknown(f"{len(there)} of {', '.join(block.calls)}, where one is required,")
        mixers.append((there[0], block))
    return mixers
