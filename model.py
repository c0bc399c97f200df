"""Qwen3, Qwen2/2.5 and Llama as one decoder, and the one attention concept of this project.

    Config, FAMILIES        config.json, and how the families differ
    Layout, visible         who sees whom, as a predicate over three integers a token
    attention, KVCache      the kernels that compute it, and keys and values kept between forwards
    LanguageModel           the decoder; module names equal Hugging Face names, so a state dict is the checkpoint

Causal, bidirectional and block-causal attention, the two streams of BD3LM training, packed documents and padding are
all values of these three integers, never another definition; only the kernel differs.

B batch, T tokens, Q queries, K keys (elsewhere tokens of a block), N selected tokens, D hidden, H heads, G key/value
heads, C head width, V vocabulary, L layers.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OBJECTIVES = ("ar", "mdlm", "bd3lm")
CONTEXTS = ("block", "causal")


@dataclass
class Config:
    """A checkpoint's config.json, under Hugging Face's names; the defaults are the shape of `builtin/tiny`."""

    model_type: str = "qwen3"  # a key of FAMILIES
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32  # independent of hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    rope_scaling: dict | None = None  # None, or rope_type llama3 with its four numbers
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    initializer_range: float = 0.02
    dtype: str = "float32"  # of the stored weights
    objective: str | None = None  # one of OBJECTIVES; None: the checkpoint does not declare one
    block_length: int | None = None  # K of bd3lm
    mask_token_id: int | None = None
    right_shift: bool | None = None  # position i predicts token i + 1, as in the AR model
    context: str | None = None  # of bd3lm, one of CONTEXTS: what clean tokens see; None: block
    extra: dict = field(default_factory=dict)  # the source's other fields, unread, kept to be written back

    # Not in config.json: what checkpoint.load_config found out besides.
    reason: str = field(default="declared", compare=False)  # why it is of this objective; empty: nothing says which
    assumed: tuple = field(default=(), compare=False)  # fields that no file declares, so that an option may differ
    answer_length: int | None = field(default=None, compare=False)  # tokens of the longest answer it was trained on
    adapter: dict | None = field(default=None, compare=False)  # adapter_config.json, where only that much is its own

    @property
    def causal(self) -> bool:
        """Clean tokens see only those before them: the model is an AR model as well."""
        return self.objective == "ar" or self.context == "causal"

    @property
    def shift(self) -> int:
        """From how many positions before its own a token is predicted: 0 or 1."""
        return int(self.objective == "ar" or bool(self.right_shift))

    @property
    def family(self) -> "Family":
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias if self.family.qkv_bias is None else self.family.qkv_bias

    @property
    def output_bias(self) -> bool:
        return self.attention_bias if self.family.output_bias is None else self.family.output_bias


class Family(NamedTuple):
    """How a family differs from the others, whose layers have the same order."""

    name: str  # in transformers' class names
    qk_norm: bool = False  # queries and keys are normed, head by head
    qkv_bias: bool | None = None  # None: as config.json's attention_bias says
    output_bias: bool | None = None


FAMILIES = {
    "qwen3": Family("Qwen3", qk_norm=True),
    "qwen2": Family("Qwen2", qkv_bias=True, output_bias=False),
    "llama": Family("Llama"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Attention: who sees whom


class Layout(NamedTuple):
    """Four integers a token, each (B, T) int64. `position` drives RoPE and nothing else; the other three, `visible`.

    document: tokens see only their own; -1 for padding, -2 for a cache column nobody has written.
    block: the diffusion block, counted within the document.
    noisy: 0 for a clean token, else the number of its noisy copy.
    kind: "full" or "causal" where that is known without looking at the values (no mask is built then), else "any".
    """

    position: Tensor
    document: Tensor
    block: Tensor
    noisy: Tensor
    kind: str = "any"

    @classmethod
    def of(cls, position: Tensor, document=None, block_length: int | None = None, offset=None) -> "Layout":
        """The clean layout of tokens at `position` (B, T), which rises along each document.

        document (B, T), None: all one. block_length None: one block, bidirectional; 1: causal; K: block-causal.
        offset (B,): block = (position + offset) // K, so that blocks need not start at position 0.
        """
        block = zeros = torch.zeros_like(position)
        if block_length is not None:
            block = (position if offset is None else position + offset[:, None]) // block_length

        # What needs no mask is known here, where no value has to be looked at.
        kind = "any"
        if document is None and block_length is None:
            kind = "full"
        elif document is None and block_length == 1:
            kind = "causal"
        return cls(position, zeros if document is None else document, block, zeros, kind)

    def two_stream(self) -> "Layout":
        """(B, 2T): a noisy copy of every token, then the clean ones (arXiv 2503.09573, section 3.2). The plain
        form that tests compare with: bd3lm_example leaves out the copies that nobody needs."""
        position, document, block, noisy = (torch.cat([field, field], dim=1) for field in self[:4])
        noisy[:, : self.noisy.shape[1]] = 1
        return Layout(position, document, block, noisy)

    def map(self, function) -> "Layout":
        """`function` applied to each of the four tensors; nothing is known statically of the result."""
        return Layout(*(function(field) for field in self[:4]))


def visible(q: Layout, k: Layout) -> Tensor:
    """True where query q sees key k; the fields broadcast against each other."""
    # A noisy key is seen by its own block of its own copy.
    noisy_key = (k.noisy == q.noisy) & (k.block == q.block)
    # A clean key is seen by clean queries of its block and later ones, and by noisy queries of strictly later blocks.
    clean_key = k.block < q.block + (q.noisy == 0)
    return (q.document == k.document) & torch.where(k.noisy > 0, noisy_key, clean_key)


TILE = 128  # queries, and keys, of a tile of FlexAttention's


def attention_mask(q: Layout, k: Layout):
    """What `LanguageModel` takes as `mask`, built once a forward (or once for many) and shared by all layers: "full",
    "causal", a FlexAttention BlockMask, or a (B, 1, Q, K) bool tensor for SDPA."""
    # Everything visible, or plainly causal: no mask at all, so that SDPA's flash kernel runs.
    if q is k and q.kind != "any":
        return q.kind

    # On CUDA FlexAttention skips the tiles in which nothing is visible. Not within one tile (nothing to skip, and torch
    # 2.13 lacks some kernels for grouped heads), with a cache (few queries), or on a CPU (no backward).
    if q.position.is_cuda and q is k and q.position.shape[1] > TILE:
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(b, _, i, j):
            return visible(q.map(lambda field: field[b, i]), k.map(lambda field: field[b, j]))

        B, T = q.position.shape
        return _compiled(create_block_mask)(mask_mod, B, None, T, T, device=q.position.device)
    return visible(q.map(lambda field: field[:, :, None]), k.map(lambda field: field[:, None, :]))[:, None]


@functools.cache
def _compiled(function):
    return torch.compile(function)


def folded(mask: Tensor, share: int, dtype: torch.dtype) -> Tensor:
    """A bool mask (B, 1, Q, K) as 0 and -inf, repeated for the `share` query heads of a group: (B, 1, share * Q, K)."""
    # On CUDA only the flash kernel, which takes no mask, and the slow one know groups of heads (torch's manual). So a
    # group's queries stand in one row, as if of one head; exact, and as fast on a CPU.
    return mask[:, :, None].expand(-1, -1, share, -1, -1).to(dtype).log_().flatten(2, 3)


def attention(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Softmax attention (B, Q, H * C) of q (B, H, Q, C) over k, v (B, G, K, C), H a multiple of G.

    mask: from `attention_mask`; if it is a tensor, `folded`.
    """
    Q, G = q.shape[2], k.shape[1]
    if isinstance(mask, Tensor):
        rows = q.reshape(len(q), G, -1, q.shape[3])  # (B, G, share * Q, C)
        heads = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).unflatten(2, (-1, Q))
        # Kernels return different memory orders, so flatten copies where no view will do.
        return heads.permute(0, 3, 1, 2, 4).flatten(2)  # (B, Q, G, share, C) before
    if isinstance(mask, str):  # full or causal
        # In float32 CUDA has a fast kernel (the others keep Q x K scores) only for heads with keys of their own.
        if q.is_cuda and q.dtype == torch.float32:
            k, v = (x.repeat_interleave(q.shape[1] // G, dim=1) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal", enable_gqa=grouped)
    else:
        from torch.nn.attention.flex_attention import flex_attention

        heads = _compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True)
    return heads.transpose(1, 2).flatten(2)


class KVCache:
    """Preallocated keys and values of `length` columns for B rows, with the layout of what was written in them."""

    def __init__(self, config: Config, batch: int, length: int, *, dtype: torch.dtype, device="cpu"):
        # A few columns more than asked for: kernels want a mask's rows to begin at multiples of 16 bytes.
        length = -(-length // 16) * 16
        # Zeros, not empty: a masked weight of 0 times NaN is NaN.
        shape = (config.num_hidden_layers, batch, length, 2 * config.num_key_value_heads, config.head_dim)
        self.pairs = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self.pairs.chunk(2, dim=3)  # (L, B, length, G, C) each
        self.fields = torch.zeros(4, batch, length, dtype=torch.int64, device=device)
        self.fields[1] = -2  # columns that nobody has written belong to document -2, as no query does
        self.layout = Layout(*self.fields)
        self.rows = torch.arange(batch, device=device)[:, None]

    def write_layout(self, columns: Tensor, layout: Layout) -> None:
        self.fields[:, self.rows, columns] = torch.stack(layout[:4])

    def layer(self, i: int, columns: Tensor) -> tuple[Tensor, ...]:
        """What layer i needs in order to write at columns (B, T)."""
        # Tensors alone, since a layer that is told its number, or given all layers', would be compiled for that number.
        return self.pairs[i], self.rows, columns


def write(kept: tuple[Tensor, ...], kv: Tensor) -> Tensor:
    """Puts kv (B, T, 2G, C), keys and then values, into the layer of a KVCache that `kept` is; returns all of that."""
    pairs, rows, columns = kept
    pairs[rows, columns] = kv.to(pairs.dtype)
    return pairs  # (B, length, 2G, C)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


def rotary(config: Config, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, and sin with its first half negated, (B, T, 1, C) in `dtype`, of the rotary angles at `position` (B, T),
    which are float32. RoPE, arXiv 2104.09864, in the half-split form of the published checkpoints."""
    C = config.head_dim
    frequency = config.rope_theta ** (torch.arange(0, -C, -2, dtype=torch.float32, device=position.device) / C)

    # rope_type llama3 stretches the long wavelengths by `factor`, leaves the short ones, and interpolates between
    # (Llama 3.1's published rule).
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / s["factor"])
    angle = position[:, :, None, None] * torch.cat([-frequency, frequency])  # (B, T, 1, C); cos ignores the sign
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """x (B, T, H, C) turned by the angles of `rotary`; feature c pairs with c + C/2: (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, out=out)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """Computes in its input's dtype, whatever that of its weights: float32 where a model trains in bfloat16."""

    in_place = False  # see LanguageModel.join

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """With `onto`, what it gives is added to that."""
        if self.in_place and onto is not None:
            return onto.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.T).view_as(onto)
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if onto is None else onto + y


def joined(parts: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight (and bias) for several products of the same input, theirs being views of it from now on."""
    sizes, whole = [part.out_features for part in parts], []
    for name in ("weight", "bias"):
        parameters = [getattr(part, name) for part in parts]
        whole.append(None if parameters[0] is None else torch.cat([parameter.data for parameter in parameters]))
        for parameter, view in zip(parameters, () if whole[-1] is None else whole[-1].split(sizes)):
            parameter.data = view
    return tuple(whole)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.heads = C, (H, G)
        self.q_proj = Linear(D, H * C, bias=config.qkv_bias)
        self.k_proj = Linear(D, G * C, bias=config.qkv_bias)
        self.v_proj = Linear(D, G * C, bias=config.qkv_bias)
        self.o_proj = Linear(H * C, D, bias=config.output_bias)
        self.q_norm = RMSNorm(C, config.rms_norm_eps) if config.family.qk_norm else None
        self.k_norm = RMSNorm(C, config.rms_norm_eps) if config.family.qk_norm else None
        self.joined = None  # LanguageModel.join: q_proj's, k_proj's and v_proj's weight and bias, and the norms'
        self.in_place = False

    def join(self, in_place: bool) -> None:
        norms = (self.q_norm, self.k_norm) if self.q_norm is not None else ()
        norm = torch.cat([x.weight.data.expand(n, -1) for x, n in zip(norms, self.heads)]) if norms else None
        self.joined = *joined([self.q_proj, self.k_proj, self.v_proj]), norm
        self.in_place, self.o_proj.in_place = in_place, in_place and self.o_proj.bias is None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, kept) -> Tensor:
        """(B, T, H * C), which is for o_proj."""
        B, T, _ = x.shape
        if self.joined is None:
            q, k, v = (  # each (B, T, heads, C)
                projection(x).view(B, T, -1, self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
            if self.q_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            # The same by few kernels, each over the heads of q and k together.
            weight, bias, norm = self.joined
            heads = F.linear(x, weight, bias).view(B, T, -1, self.head_dim)  # (B, T, H + 2G, C)
            qk, v = heads.split([sum(self.heads), self.heads[1]], dim=2)
            out = qk if self.in_place else None
            if norm is not None:  # of v too, in vain, since what is contiguous is normed without a copy
                qk = F.rms_norm(heads, (self.head_dim,), None, self.q_norm.eps)[:, :, : sum(self.heads)] * norm
            q, k = rotate(qk, cos, sin, out).split(self.heads, dim=2)

        # With a cache the new keys and values go into it, and attention is over all that it holds.
        if kept is not None:
            kv = heads[:, :, self.heads[0] :] if self.in_place else torch.cat([k, v], dim=2)
            k, v = write(kept, kv).chunk(2, dim=2)
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=False)
        self.up_proj = Linear(D, inner, bias=False)
        self.down_proj = Linear(inner, D, bias=False)
        self.joined = None  # LanguageModel.join: gate_proj's weight and up_proj's

    def join(self, in_place: bool) -> None:
        self.joined, self.down_proj.in_place = joined([self.gate_proj, self.up_proj]), in_place

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        if self.joined is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, *self.joined).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, onto)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, kept=None, index=None) -> Tensor:
        """x (B, T, D) to the same; with `index` (N,), flat positions in B*T, to those of them alone, (N, D)."""
        heads = self.self_attn(self.input_layernorm(x), cos, sin, mask, kept)
        if index is not None:
            heads, x = heads.flatten(0, 1)[index], x.flatten(0, 1)[index]
        x = self.self_attn.o_proj(heads, onto=x)
        return self.mlp(self.post_attention_layernorm(x), onto=x)


class Decoder(nn.Module):
    """A container that gives Hugging Face's names; `LanguageModel.forward` runs it."""

    def __init__(self, config: Config):
        super().__init__()
        # Not drawn here: `init_weights` does that, and torch's own draw imports the compiler, which takes seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Tokens and a layout in, logits (or what `head` makes of the hidden states) out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # what weights are cast to where they are used; None: theirs
        self.known_ids: int = config.vocab_size  # the tokenizer has no id from here on, so none is generated
        self.compiled = False  # cli.compile_layers: the layers, and what the sampler does before and after them
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output embedding, which is the input embedding where they are tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def size(self) -> int:
        """Parameters; the input embedding and a head that is tied to it count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the hidden states, and so of keys and values."""
        return self.compute_dtype or self.head_weight.dtype

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights: matrices and embeddings N(0, initializer_range), norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def join(self, in_place: bool = False) -> None:
        """Gives each layer one matrix product in the place of three, and of two, of the same input; no memory, as the
        weights become views. For sampling, once the model is where and in what dtype it stays: rounding may differ.

        in_place: without gradients, too, q and k are turned where they lie, and products added where the sum belongs;
        fewer kernels, unless torch.compile makes them."""
        for layer in self.model.layers:
            layer.self_attn.join(in_place)
            layer.mlp.join(in_place)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        cache: KVCache | None = None,
        columns: Tensor | None = None,
        mask=None,
        index: Tensor | None = None,
        head=None,
    ):
        """Logits (B, T, V) of tokens (B, T); with `index` (N,), flat positions in B*T, only those: (N, V).

        cache, columns (B, T): keys and values are written to these columns of the cache, and attention is over all of
        its columns. mask: one that `attention_mask` built before, to reuse. head: called here, on hidden (N, D) or
        (B, T, D) and the weight (V, D), and its result returned in the logits' place (under FSDP2 the weight is whole
        only inside `forward`).
        """
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        x = x.to(self.compute_dtype or x.dtype)

        # What all layers share is made once: the rotary angles, and the mask, which only needs the layouts.
        cos, sin = rotary(self.config, layout.position, x.dtype)
        if cache is not None:
            cache.write_layout(columns, layout)
        if mask is None:
            mask = attention_mask(layout, layout if cache is None else cache.layout)
        if isinstance(mask, Tensor):
            mask = folded(mask, self.config.num_attention_heads // self.config.num_key_value_heads, x.dtype)

        x = self.model.norm(self.through_layers(x, cos, sin, mask, cache, columns, index))  # (B, T, D), or (N, D)
        return F.linear(x, self.head_weight.to(x.dtype)) if head is None else head(x, self.head_weight)

    def through_layers(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache, columns, index) -> Tensor:
        # The last layer's output projection and MLP run only on what is asked for: nothing reads its other outputs,
        # BD3LM's clean stream above all.
        for i, layer in enumerate(self.model.layers):
            kept = None if cache is None else cache.layer(i, columns)
            x = layer(x, cos, sin, mask, kept, index if i == len(self.model.layers) - 1 else None)
        return x
