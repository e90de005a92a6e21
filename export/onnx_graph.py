"""The Fox graph that ONNX Runtime runs: a configuration and a layout in, a ModelProto without weights out.

Built node by node rather than traced: every operator below (MatMulNBits, GatherBlockQuantized,
GroupQueryAttention, the fused norms) is ONNX Runtime's own and would have to be written by name for a tracer
too, and what a tracer adds around them changes with its version. Tests hold the graph to the reference model,
logit by logit, so the two cannot drift apart. Knows operators and names; no weight's value and no file but
the name of the data file.

    inputs   input_ids (batch_size, sequence_length) int64
             attention_mask (batch_size, past_sequence_length + sequence_length) int64, 1 for every token
             past_key_values.N.key / .value (batch_size, kv_heads, past_sequence_length, head_dim) float32
             logits_to_keep int64 scalar, optional (default 1): logits of this many last positions; 0: of all
    outputs  logits (batch_size, kept, vocab) float32
             present.N.key / .value (batch_size, kv_heads, past_sequence_length + sequence_length, head_dim)
                 float32

The names of the symbolic dimensions are read too: transformers.js makes its empty cache from them, and
Optimum its output buffers.

With `last_only` there is no logits_to_keep, and the logits are declared as (batch_size, 1, vocab): the shape
from which onnxruntime-genai learns that it will get one row.

Of attention_mask only the length and the sum are looked at, so all rows of a batch are of one length. With
`padded` zeros in it are positions that nobody attends to, so that shorter rows can be filled up on the left;
the shift that this gives their positions is nothing to a rotary embedding, which knows differences only.

When a caller binds present.N to the buffer of past_key_values.N, that buffer is as long as the longest
context, attention runs in place, and only attention_mask says how much of it is in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fox_edge
from export.onnx_layout import COS, SIN, Layout, Matrix, Range
from fox_edge.config import FoxConfig
from fox_edge.errors import MissingPackageError
from fox_edge.quant import EMBEDDING, HEAD

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingPackageError("onnx", "onnx") from None

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
# MatMulNBits: 4 lets it quantize its input to int8 row by row, which more than doubles its speed.
INT8_ACTIVATIONS = 4
# A session packs each constant matrix anew when it loads, and holds old and new pages meanwhile. The head is
# half of an int4 model: cut into slices of this size, the most that is held twice is one slice. What glibc
# allocates in one piece above 32 MB, it maps anew every time, so a packed slice stays below.
HEAD_SLICE_BYTES = 24 << 20
INT64_MAX = 2**63 - 1
# Added to a score, leaves nothing of its weight in a softmax.
NO_ATTENTION = -1e9
# Symbolic dimensions, by the names that Optimum and transformers.js give them.
BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"

_ELEMENT = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


def build_graph(
    config: FoxConfig, layout: Layout, data_file: str, *, last_only: bool = False, padded: bool = False
) -> onnx.ModelProto:
    """The whole model; its initializers name ranges of `data_file`, a plain file name beside the model."""
    return _Graph(config, layout, data_file, last_only, padded).build()


class _Graph:
    """Collects nodes and initializers; every method that adds operators returns the name of their result."""

    def __init__(
        self, config: FoxConfig, layout: Layout, data_file: str, last_only: bool, padded: bool
    ) -> None:
        self.config, self.layout, self.data_file = config, layout, data_file
        self.last_only, self.padded = last_only, padded
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def build(self) -> onnx.ModelProto:
        """Add every operator in the order of a forward pass."""
        config = self.config
        used, total = self.lengths()
        bias = self.padding_bias() if self.padded else None
        x = self.embed("input_ids")
        h = self.node(
            "SimplifiedLayerNormalization",
            [x, self.norm("model.layers.0.input_layernorm.weight")],
            "model.layers.0.input_layernorm",
            domain="",
            axis=-1,
            epsilon=config.rms_norm_eps,
            stash_type=1,
        )
        for n in range(config.num_layers):
            layer = f"model.layers.{n}"
            h = self.attention(f"{layer}.self_attn", n, h, used, total, bias)
            h, x = self.add_and_norm(x, h, f"{layer}.post_attention_layernorm")
            h = self.feed_forward(f"{layer}.mlp", h)
            last = n + 1 == config.num_layers
            h, x = self.add_and_norm(
                x, h, "model.norm" if last else f"model.layers.{n + 1}.input_layernorm", last
            )
        self.head(self.keep_last(h))
        return self.model()

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        domain: str = CONTRIB,
        out: str = "",
        **attributes: Any,
    ) -> str:
        """One operator with one output, called `out` or after the node."""
        result = out or f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [result], name=name, domain=domain, **attributes))
        return result

    def constant(self, name: str, value: np.ndarray) -> str:
        """A small initializer kept inside the model file."""
        self.initializers.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def stored(self, at: Range, name: str = "", shape: tuple[int, ...] = ()) -> str:
        """An initializer that names a range of the data file, under another name and shape if given."""
        name = name or at.name
        tensor = TensorProto(name=name, data_type=_ELEMENT[at.dtype], dims=shape or at.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", self.data_file),
            ("offset", str(at.offset)),
            ("length", str(at.nbytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        self.initializers.setdefault(name, tensor)
        return name

    def norm(self, name: str) -> str:
        """A norm's weights."""
        return self.stored(self.layout.vectors[name])

    def lengths(self) -> tuple[str, str]:
        """For GroupQueryAttention: the last position in use (batch,) and the mask's length (), int32."""
        one = self.constant("one", np.array([1], np.int64))
        total = self.node("Shape", ["attention_mask"], "lengths/shape", "", start=1, end=2)
        if self.padded:  # padding takes its place in the cache
            batch = self.node("Shape", ["attention_mask"], "padding/batch", "", start=0, end=1)
            used = self.node("Expand", [total, batch], "padding/used", "")
        else:
            used = self.node("ReduceSum", ["attention_mask", one], "lengths/used", "", keepdims=0)
        used = self.node("Sub", [used, one], "lengths/last", "")
        used = self.node("Cast", [used], "lengths/seqlens_k", "", to=TensorProto.INT32)
        total = self.node("Squeeze", [total], "lengths/scalar", "")
        return used, self.node("Cast", [total], "lengths/total", "", to=TensorProto.INT32)

    def padding_bias(self) -> str:
        """What padding adds to attention's scores: (batch, 1, sequence, total), 0 or very negative.

        Not minus infinity: a padded position attends to padding alone, and its softmax must stay a number.
        """
        ends = self.constant("padding/axes", np.array([1, 2], np.int64))
        off = self.constant("padding/off", np.array(NO_ATTENTION, np.float32))
        span = self.constant("padding/span", np.array(-NO_ATTENTION, np.float32))
        mask = self.node("Cast", ["attention_mask"], "padding/mask", "", to=TensorProto.FLOAT)
        row = self.node("Mul", [mask, span], "padding/scaled", "")
        row = self.node("Add", [row, off], "padding/row", "")
        row = self.node("Unsqueeze", [row, ends], "padding/row/4d", "")
        size = self.node("Shape", ["input_ids"], "padding/sequence", "", start=1, end=2)
        one = self.constant("one", np.array([1], np.int64))
        shape = self.node("Concat", [one, one, size, one], "padding/shape", "", axis=0)
        return self.node("Expand", [row, shape], "padding/bias", "")

    def embed(self, tokens: str) -> str:
        """(batch, sequence) -> (batch, sequence, C)."""
        matrix = self.layout.matrices[EMBEDDING]
        if matrix.scales is None:
            return self.node("Gather", [self.stored(matrix.weight), tokens], "model.embed_tokens", "", axis=0)
        # Flat rows here, blocks in the head: two names and shapes for one byte range. (A Reshape between the
        # two would be folded into a second copy when the session loads.)
        rows, blocks, blob = matrix.weight.shape
        inputs = [self.stored(matrix.weight, shape=(rows, blocks * blob)), tokens, self.stored(matrix.scales)]
        if matrix.zero_points is not None:
            inputs.append(self.stored(matrix.zero_points))
        x = self.node(
            "GatherBlockQuantized",
            inputs,
            "model.embed_tokens",
            bits=matrix.type.bits,
            block_size=matrix.type.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return self.scale_columns(x, EMBEDDING, "model.embed_tokens.columns")

    def scale_columns(self, x: str, matrix: str, name: str) -> str:
        """x (..., C) times the column scales of a matrix that has any."""
        scales = self.layout.column_scales.get(matrix)
        return x if scales is None else self.node("Mul", [x, self.stored(scales)], name, "")

    def linear(self, x: str, matrix: Matrix, name: str, weight: str = "", out: str = "") -> str:
        """x (..., columns) times the transposed matrix -> (..., rows)."""
        if matrix.scales is None:
            return self.node("FusedMatMul", [x, self.stored(matrix.weight)], name, transB=1, out=out)
        inputs = [x, self.stored(matrix.weight, weight), self.stored(matrix.scales)]
        if matrix.zero_points is not None:
            inputs.append(self.stored(matrix.zero_points))
        return self.node(
            "MatMulNBits",
            inputs,
            name,
            out=out,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.type.bits,
            block_size=matrix.type.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def stacked(self, x: str, layer: str, name: str) -> str | None:
        """The product with a stack of projections; None when they are stored apart."""
        matrix = self.layout.matrices.get(f"{layer}.{name}.weight")
        return self.linear(x, matrix, f"{layer}.{name}") if matrix else None

    def projections(self, x: str, layer: str, names: list[str]) -> list[str]:
        """The products with projections that are stored apart."""
        return [
            self.linear(x, self.layout.matrices[f"{layer}.{name}.weight"], f"{layer}.{name}")
            for name in names
        ]

    def attention(self, layer: str, n: int, x: str, used: str, total: str, bias: str | None) -> str:
        """Rotary grouped-query attention over past and new positions, and the output projection."""
        qkv = self.stacked(x, layer, "qkv_proj")
        if qkv is None:
            parts = self.projections(x, layer, ["q_proj", "k_proj", "v_proj"])
            qkv = self.node("Concat", parts, f"{layer}.qkv", "", axis=-1)
        past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        tables = [self.stored(self.layout.tables[name]) for name in (COS, SIN)]
        out = f"{layer}.attention.out"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", *past, used, total, *tables, *(["", bias] if bias else [])],
                [out, f"present.{n}.key", f"present.{n}.value"],
                name=f"{layer}.attention",
                domain=CONTRIB,
                num_heads=self.config.num_heads,
                kv_num_heads=self.config.num_kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        return self.linear(out, self.layout.matrices[f"{layer}.o_proj.weight"], f"{layer}.o_proj")

    def feed_forward(self, layer: str, x: str) -> str:
        """SwiGLU: down(silu(gate) * up); QuickGelu with alpha 1 is silu."""
        both = self.stacked(x, layer, "gate_up_proj")
        if both is None:
            gate, up = self.projections(x, layer, ["gate_proj", "up_proj"])
        else:
            gate, up = f"{layer}.gate", f"{layer}.up"
            self.nodes.append(
                helper.make_node("Split", [both], [gate, up], name=f"{layer}.split", axis=-1, num_outputs=2)
            )
        active = self.node("QuickGelu", [gate], f"{layer}.silu", alpha=1.0)
        product = self.node("Mul", [active, up], f"{layer}.product", "")
        return self.linear(product, self.layout.matrices[f"{layer}.down_proj.weight"], f"{layer}.down_proj")

    def add_and_norm(self, x: str, y: str, name: str, last: bool = False) -> tuple[str, str]:
        """The norm of x + y, and x + y itself (unused, and not computed, after the last layer)."""
        out, total = f"{name}.out", "" if last else f"{name}.sum"
        outputs = [out] if last else [out, "", "", total]
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, y, self.norm(f"{name}.weight")],
                outputs,
                name=name,
                domain=CONTRIB,
                epsilon=self.config.rms_norm_eps,
            )
        )
        return out, total

    def keep_last(self, h: str) -> str:
        """The last `logits_to_keep` positions of (batch, sequence, C); -0 = 0 starts at the first."""
        self.constant("logits_to_keep", np.array(1, np.int64))
        axes = self.constant("one", np.array([1], np.int64))
        zero = self.constant("zero", np.array([0], np.int64))
        end = self.constant("end", np.array([INT64_MAX], np.int64))
        start = self.node("Neg", ["logits_to_keep"], "keep/start", "")
        start = self.node("Unsqueeze", [start, zero], "keep/starts", "")
        return self.node("Slice", [h, start, end, axes], "keep/slice", "")

    def head(self, h: str) -> str:
        """(batch, kept, C) -> logits (batch, kept, V)."""
        matrix = self.layout.matrices[EMBEDDING if self.config.tied else HEAD]
        h = self.scale_columns(h, matrix.name, "lm_head.columns")
        parts = matrix.slices(HEAD_SLICE_BYTES)
        if len(parts) == 1:
            return self.linear(h, matrix, "lm_head", weight=HEAD, out="logits")
        logits = [self.linear(h, part, f"lm_head.{i}") for i, part in enumerate(parts)]
        return self.node("Concat", logits, "lm_head", "", out="logits", axis=-1)

    def model(self) -> onnx.ModelProto:
        """Inputs, outputs and versions around what was collected."""
        cache, width = (BATCH, self.config.num_kv_heads), self.config.head_dim
        floats, ints = TensorProto.FLOAT, TensorProto.INT64
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", ints, (BATCH, SEQUENCE)),
            info("attention_mask", ints, (BATCH, TOTAL)),
        ]
        kept = 1 if self.last_only else "kept"
        outputs = [info("logits", floats, (BATCH, kept, self.config.vocab_size))]
        for n in range(self.config.num_layers):
            for part in ("key", "value"):
                inputs.append(info(f"past_key_values.{n}.{part}", floats, (*cache, PAST, width)))
                outputs.append(info(f"present.{n}.{part}", floats, (*cache, TOTAL, width)))
        if not self.last_only:
            inputs.append(info("logits_to_keep", ints, ()))
        graph = helper.make_graph(self.nodes, "fox", inputs, outputs, list(self.initializers.values()))
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            producer_name="fox-edge",
            producer_version=fox_edge.__version__,
        )
