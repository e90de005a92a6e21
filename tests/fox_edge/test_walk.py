"""The reference model walked through matrix by matrix, in one stream and in two."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import EMBEDDING
from fox_edge.walk import native_product, original, walk


def windows_of(checkpoint: Checkpoint, count: int = 3, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, checkpoint.config.vocab_size, (count, length), generator=generator)


def embedded(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.tensor(EMBEDDING)[windows_of(checkpoint)].float()


@pytest.mark.parametrize("which", ["tiny", "tiny_untied"])
def test_a_walk_is_a_forward_pass(which: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    seen: dict[str, torch.Tensor] = {}

    def visit(name: str, read: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (seen[name],) = read
        return [original(checkpoint, name)]

    (got,) = walk(checkpoint, embedded(checkpoint)[None], visit)
    model = checkpoint.load_model()
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.__setitem__(f"{name}.weight", x[0].flatten(0, 1))
            )
    with torch.inference_mode():
        want = model.hidden(windows_of(checkpoint))
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert list(seen) == list(inputs)
    for name, x in inputs.items():
        torch.testing.assert_close(seen[name], x, rtol=1e-4, atol=1e-5)
    first = "model.layers.0.self_attn."
    assert seen[f"{first}q_proj.weight"].data_ptr() == seen[f"{first}v_proj.weight"].data_ptr()


def test_streams_do_not_mix(tiny: Checkpoint) -> None:
    x = embedded(tiny)

    def alone(weight: float, stream: torch.Tensor) -> torch.Tensor:
        return walk(tiny, stream[None], lambda name, _: [weight * original(tiny, name)])[0]

    def both(name: str, read: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        rows = original(tiny, name)
        return [rows, 0.5 * rows]

    first, second = walk(tiny, torch.stack([x, 2 * x]), both)
    torch.testing.assert_close(first, alone(1.0, x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, alone(0.5, 2 * x), rtol=1e-5, atol=1e-6)


def test_a_walk_goes_on_with_what_it_is_given(tiny: Checkpoint) -> None:
    x = embedded(tiny)
    (silenced,) = walk(tiny, x[None], lambda name, _: [torch.zeros(tiny.shapes()[name])])
    with torch.inference_mode():
        torch.testing.assert_close(silenced, tiny.load_model().model.norm(x).flatten(0, 1))


def test_a_walk_can_begin_where_another_stopped(tiny: Checkpoint) -> None:
    kept: dict[int, torch.Tensor] = {}

    def visit(name: str, _: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [original(tiny, name)]

    whole = walk(
        tiny, embedded(tiny)[None], visit, after_layer=lambda layer, x: kept.__setitem__(layer, x.clone())
    )
    assert list(kept) == [1, 2]
    assert torch.equal(walk(tiny, kept[1], visit, first_layer=1), whole)


def test_a_native_product_is_near_the_exact_one() -> None:
    x, weight = torch.randn(40, 64), torch.randn(30, 64)
    exact = x @ weight.T
    torch.testing.assert_close(native_product(x, weight), exact, rtol=0, atol=0.02 * float(exact.abs().max()))
