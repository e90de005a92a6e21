"""The plain operations of a decode step against the reference model, the quantizer, and a block by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.model import Block, KVCache, RMSNorm, rotary_tables
from runtimes.cuda import ops, ops_torch
from runtimes.cuda.ops_matrix import Dense, Packed

# The shapes of heads: Fox-1's and the embedded model's, with less around them.
HEADS = {"fox-1": (16, 4, 128), "nano": (4, 1, 64)}
EPS = 1e-5


def error(found: Tensor, due: Tensor) -> float:
    """||found - due|| / ||due||; NaN for NaN, which is below no bound."""
    return float((found.double() - due.double()).norm() / due.double().norm())


def config_of(heads: int, kv_heads: int, head_dim: int, positions: int = 64) -> FoxConfig:
    hidden = heads * head_dim // 2  # so that nothing is square by chance
    return FoxConfig(512, hidden, 96, 1, heads, kv_heads, head_dim, positions)


def block_of(config: FoxConfig) -> Block:
    block = Block(config, 0)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=0.05 if weight.dim() == 2 else 1.0)
    return block


def fused(*projections: torch.nn.Linear) -> Dense:
    return Dense(torch.cat([projection.weight for projection in projections]))


def test_a_block_by_hand_4_bits():
    integers = torch.tensor([[0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F]], dtype=torch.uint8)
    matrix = Packed(integers, torch.tensor([[0.5]]), torch.tensor([[-2.0]]), 4, 16)
    assert (matrix.rows, matrix.columns, matrix.nbytes) == (1, 16, 16)
    due = [i * 0.5 - 2 for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0)]
    assert ops.dequantize(matrix, torch.full((1, 16), torch.nan)).tolist() == [due]
    symmetric = matrix._replace(offsets=None, factors=torch.full((16,), 2.0))
    assert ops.dequantize(symmetric, torch.empty(1, 16)).tolist() == [[2 * (v + 2 - 4) for v in due]]


def test_a_block_by_hand_8_bits():
    integers = torch.arange(120, 152, dtype=torch.uint8)[None]
    scales = torch.tensor([[0.25, 2.0]], dtype=torch.float16)
    matrix = Packed(integers, scales, None, 8, 16)
    due = [(i - 128) * 0.25 for i in range(120, 136)] + [(i - 128) * 2.0 for i in range(136, 152)]
    assert ops.dequantize(matrix, torch.empty(1, 32)).tolist() == [due]
    assert ops.embed(matrix, torch.tensor([0, 0]), torch.float32).tolist() == [due, due]


@pytest.mark.parametrize("shape", HEADS)
def test_a_layer_is_the_reference_s(shape):
    """Attention, feed-forward and residuals, position by position, against one call on all of them."""
    torch.manual_seed(0)
    config = config_of(*HEADS[shape])
    block, T = block_of(config), 9
    x = torch.randn(2, T, config.hidden_size)
    cos, sin = rotary_tables(config, torch.arange(config.max_positions))
    with torch.no_grad():
        due = block(x, cos[:T], sin[:T], KVCache(config, batch=2))
    attn, mlp = block.self_attn, block.mlp
    keys = torch.full((3, config.num_kv_heads, config.max_positions, config.head_dim), torch.nan)
    values = torch.full_like(keys, torch.nan)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    with torch.no_grad():
        for t in range(T):
            h = x[:, t].clone()
            qkv = ops.norm_linear(
                h, block.input_layernorm.weight, EPS, fused(attn.q_proj, attn.k_proj, attn.v_proj)
            )
            positions = torch.full((2,), t, dtype=torch.int32)
            y = ops.attend(qkv, keys, values, slots, positions, cos, sin)
            ops.linear_add(y, Dense(attn.o_proj.weight), h)
            gate_up = fused(mlp.gate_proj, mlp.up_proj)
            z = ops.norm_gate_up(h, block.post_attention_layernorm.weight, EPS, gate_up)
            ops.linear_add(z, Dense(mlp.down_proj.weight), h)
            assert error(h, due[:, t]) < 1e-5


def test_conversations_at_different_positions_do_not_see_each_other():
    torch.manual_seed(1)
    config = config_of(4, 2, 16)
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = rotary_tables(config, torch.arange(64))
    keys, values = torch.randn(4, K, 64, D), torch.randn(4, K, 64, D)
    qkv = torch.randn(3, (H + 2 * K) * D)
    slots, positions = (torch.tensor(v, dtype=torch.int32) for v in ([3, 0, 1], [63, 0, 17]))
    for slot, position in zip(slots, positions, strict=True):
        keys[slot, :, position:] = torch.nan
        values[slot, :, position:] = torch.nan
    alone = [
        ops.attend(
            qkv[i : i + 1], keys.clone(), values.clone(), slots[i : i + 1], positions[i : i + 1], cos, sin
        )
        for i in range(3)
    ]
    untouched = keys[2].clone()
    together = ops.attend(qkv, keys, values, slots, positions, cos, sin)
    assert error(together, torch.cat(alone)) < 1e-6
    assert torch.equal(keys[2], untouched)
    first_v = qkv[1].view(-1, D)[H + K :]  # position 0 sees itself alone: its own values come out
    assert error(together[1].view(K, -1, D), first_v[:, None].expand(K, H // K, D)) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_integers_are_those_of_the_values_that_our_quantizer_means(bits, symmetric):
    from fox_edge.blockwise import dequantize, quantize, unpack
    from fox_edge.quant import ONNX, TYPES

    torch.manual_seed(2)
    type_ = TYPES[ONNX, f"q{bits}{'s' if symmetric else 'a'}32"]
    rows, x, norm = torch.randn(24, 96), torch.randn(3, 96), torch.rand(96) + 0.5
    blocks = quantize(rows, type_)
    meant = dequantize(blocks, type_)
    offsets = None
    if blocks.zero_points is not None:
        offsets = -unpack(blocks.zero_points, bits)[:, :3].float() * blocks.scales
    matrix = Packed(blocks.packed.flatten(1), blocks.scales, offsets, bits, 32)
    assert error(ops.dequantize(matrix, torch.empty(24, 96)), meant) < 1e-6
    reference = RMSNorm(96, EPS)
    reference.weight.data = norm
    h = reference(x).detach()
    assert error(ops.norm_linear(x, norm, EPS, matrix), F.linear(h, meant)) < 1e-5
    assert error(ops.head(x, norm, EPS, matrix), F.linear(h, meant)) < 1e-5
    gate, up = F.linear(h, meant).chunk(2, dim=1)
    assert error(ops.norm_gate_up(x, norm, EPS, matrix), gate * torch.sigmoid(gate) * up) < 1e-5
    residual = torch.randn(3, 24)
    due = residual + F.linear(x, meant)
    ops.linear_add(x, matrix, residual)
    assert error(residual, due) < 1e-5


def test_a_long_matrix_is_taken_in_steps(monkeypatch):
    torch.manual_seed(3)
    matrix = Packed(torch.randint(0, 256, (11, 32), dtype=torch.uint8), torch.rand(11, 2), None, 8, 16)
    x, norm = torch.randn(2, 32), torch.ones(32)
    whole = ops.head(x, norm, EPS, matrix), ops.dequantize(matrix, torch.empty(11, 32))
    monkeypatch.setattr(ops_torch, "_STEP_WEIGHTS", 96)
    assert error(ops.head(x, norm, EPS, matrix), whole[0]) < 1e-6
    assert torch.equal(ops.dequantize(matrix, torch.empty(11, 32)), whole[1])


def test_results_have_the_type_of_the_input():
    x, norm = torch.randn(2, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    for matrix in (
        Dense(torch.randn(8, 32, dtype=torch.bfloat16)),
        Packed(torch.randint(0, 256, (8, 16), dtype=torch.uint8), torch.rand(8, 1), None, 4, 32),
    ):
        assert ops.norm_linear(x, norm, EPS, matrix).dtype == torch.bfloat16
        assert ops.norm_gate_up(x, norm, EPS, matrix).dtype == torch.bfloat16
        assert ops.head(x, norm, EPS, matrix).dtype == torch.float32
        assert ops.embed(matrix, torch.tensor([7]), torch.bfloat16).dtype == torch.bfloat16


def test_without_triton_a_cuda_device_is_refused_in_one_sentence(monkeypatch):
    import sys

    monkeypatch.setattr(ops, "kernels_on_cpu", True)  # as if the tensors were on the device
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [
        n for n in sys.modules if (n.startswith("runtimes.cuda.") and "triton" in n) or "kernels" in n
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("runtimes.cuda.ops_triton", raising=False)
    with pytest.raises(FoxEdgeError, match="need Triton, which is not installed"):
        ops.embed(Dense(torch.ones(2, 2)), torch.tensor([1]), torch.float32)
