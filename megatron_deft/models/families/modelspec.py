"""ModelSpec: the architecture of a decoder, in one vocabulary for every family. Knows no torch."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from megatron_deft.errors import UserError


class Matrix(NamedTuple):
    """A weight [outputs, inputs] of a layer, and by how many of its kind a token is multiplied."""

    name: str  # of the module, as megatron-core has it
    inputs: int
    outputs: int
    times: int = 1


@dataclass(frozen=True)
class ModelSpec:
    """A pre-norm decoder: RMSNorm, rotary positions, a gated MLP or experts.

    Sizes are of the whole model, not of a tensor-parallel shard.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # rows of the Hugging Face embedding, without Megatron's padding
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # {"rope_type": one of rope.PARAMETERS, its parameters}
    tied_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    initializer_range: float
    # What follows came after the first manifests were written: each has a default.
    activation: str = "silu"  # of the gated MLP: "silu" or "gelu_tanh"
    qk_norm: bool = False  # RMSNorm of each head's query and key
    post_norms: bool = False  # attention and MLP are normalised before the residual sum too
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of query . key; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # cap * tanh(score / cap)
    logits_softcap: float | None = None
    window: int | None = None  # tokens that a token attends to, itself among them
    window_layers: tuple[int, ...] = ()  # layers that have the window
    rotary_fraction: float = 1.0  # of the head dimensions, the first ones
    rotary_interleaved: bool = False  # pairs are neighbours, not halves apart
    experts: int = 0  # of each layer in expert_layers
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    expert_layers: tuple[int, ...] = ()  # the other layers have an MLP
    normalise_expert_weights: bool = True  # a token's expert weights sum to 1

    @property
    def rotary_dim(self) -> int:
        """Head dimensions that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def context_length(self) -> int:
        """Positions the model is made for.

        max_position_embeddings, or what yarn stretches it to: published recipes leave that field
        at the length of the pretraining (Qwen2.5's model card) or change it (DeepSeek).
        """
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") != "yarn":
            return self.max_position_embeddings
        stretched = int(scaling["factor"] * scaling["original_max_position_embeddings"])
        return max(self.max_position_embeddings, stretched)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, the tokens that a token attends to; None: all before it."""
        return tuple(
            self.window if i in self.window_layers else None for i in range(self.num_layers)
        )

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """Of that layer, in the order they are used; attention's scores follow the first."""
        hidden, heads, inner = self.hidden_size, self.num_attention_heads, self.ffn_hidden_size
        router: tuple[Matrix, ...] = ()
        times = 1
        if layer in self.expert_layers:
            router = (Matrix("router", hidden, self.experts),)
            inner, times = self.expert_ffn_hidden_size, self.experts_per_token
        return (
            Matrix("linear_qkv", hidden, (heads + 2 * self.num_query_groups) * self.head_dim),
            Matrix("linear_proj", heads * self.head_dim, hidden),
            *router,
            Matrix("linear_fc1", hidden, 2 * inner, times),  # gate and up
            Matrix("linear_fc2", inner, hidden, times),
        )

    @property
    def uniform_layers(self) -> bool:
        """Whether every layer has the same parameters: Megatron then stacks them in checkpoints."""
        return len(self.expert_layers) in (0, self.num_layers)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that json can write."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ModelSpec":
        """The spec that to_json() wrote, of this version or an earlier one.

        Errors: UserError on a missing or unknown field, or a value of another type.
        """
        known = {field.name: field for field in fields(ModelSpec)}
        required = {name for name, field in known.items() if field.default is MISSING}
        if not required <= set(data) <= set(known):
            raise UserError(
                f"model spec: missing fields {sorted(required - set(data))}, unknown fields "
                f"{sorted(set(data) - set(known))}: convert the model again with this version"
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        wrong = [f"{k} {v!r}" for k, v in values.items() if not _fits(v, known[k].type)]
        if wrong:
            raise UserError(
                f"model spec: {', '.join(wrong)} cannot be: the folder is damaged, use another "
                "checkpoint or convert the model again"
            )
        return ModelSpec(**values)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether `value`, as json read it, may be of a field with that annotation."""
    if isinstance(annotation, UnionType):
        return any(_fits(value, each) for each in get_args(annotation))
    kind = get_origin(annotation) or annotation
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(each, int) for each in value)
    if kind in (int, float):  # a whole float may come back as an int
        return type(value) in (int, kind) and 0 <= value < inf
    return isinstance(value, kind)
