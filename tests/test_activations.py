"""Units of a model as features: what is averaged, in which order, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastunlearn.activations import unit_activations
from fastunlearn.data import Batch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.line = nn.Conv1d(3, 2, 1)
        self.head = nn.Linear(2, 4)
        self.unused = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.drop(self.conv(x)).relu().flatten(2))
        return self.head(h.mean(2)) + self.head(-h.mean(2)).relu_()


def test_units_are_means_over_positions_and_calls_in_model_order() -> None:
    model, x = Net(), torch.randn(5, 1, 4, 4)
    found = unit_activations(model, x)
    assert found.units == [(name, i) for name, n in (("conv", 3), ("line", 2), ("head", 4)) for i in range(n)]
    model.eval()
    conv = model.conv(x)
    line = model.line(conv.relu().flatten(2))
    head = (model.head(line.mean(2)) + model.head(-line.mean(2))) / 2
    expected = torch.cat([conv.mean((2, 3)), line.mean(2), head], 1)
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert torch.equal(found.outputs, model(x))
    assert unit_activations(model, x, ["line"]).units == [("line", 0), ("line", 1)]


def test_units_of_a_sequence_are_means_over_its_positions() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 6, 3)
    assert torch.allclose(unit_activations(model, x).values, model(x).mean(1), atol=1e-6)


def test_unit_activations_put_modes_hooks_and_random_state_back_after_an_exception() -> None:
    model = Net().train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        unit_activations(model, torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert model.training and model.drop.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_that_the_forward_pass_makes_of_a_layer_is_not_the_layer() -> None:
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y + copy.deepcopy(self.layer)(2 * x).detach()

    model, x = Copying(), torch.randn(4, 3)
    assert torch.equal(unit_activations(model, x).values, model.layer(x))


def test_unit_activations_refuse_what_they_cannot_attribute() -> None:
    with pytest.raises(ValueError, match="'drop' is not a Linear"):
        unit_activations(Net(), torch.zeros(2, 1, 4, 4), ["drop"])
    with pytest.raises(ValueError, match="called none"):
        unit_activations(Net(), torch.zeros(2, 1, 4, 4), ["unused"])

    class Merged(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, -1, 3))

    with pytest.raises(ValueError, match="samples along its first axis"):
        unit_activations(Merged(3, 2), torch.zeros(4, 3))


class Conv1D(nn.Module):
    """The transformers library's linear layer of GPT-2: weight [in, out], known by its name and ``nf``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def test_a_transposed_linear_has_its_outputs_for_units() -> None:
    layer, x = Conv1D(5, 3), torch.randn(4, 6, 3)
    found = unit_activations(layer, x)
    assert found.units == [("", i) for i in range(5)]
    assert torch.allclose(found.values, layer(x).mean(1), atol=1e-6)


def test_filters_in_three_dimensions() -> None:
    layer, x = nn.Conv3d(2, 3, 2), torch.randn(4, 2, 3, 4, 5)
    assert torch.allclose(unit_activations(layer, x).values, layer(x).mean((2, 3, 4)), atol=1e-6)


class Text(nn.Module):
    """A small encoder that takes ids and a mask, as BERT does."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)[:, 0])


def padded() -> Batch:
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    return Batch((), {"input_ids": ids, "attention_mask": mask}, None, 3)


def test_only_attended_positions_count_in_an_encoder_with_fused_attention() -> None:
    """Each sample alone, cut to its attended positions, has the same units."""
    torch.manual_seed(0)
    model, batch = Text(), padded()
    found = unit_activations(model, batch)
    names = list(dict.fromkeys(name for name, _ in found.units))
    inner = [f"encoder.layers.{i}.{name}" for i in (0, 1)
             for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")]  # fmt: skip
    assert names == [*inner, "head"]
    assert [sum(n == name for n, _ in found.units) for name in names] == [24, 8, 12, 8] * 2 + [3]
    for i, length in enumerate((7, 4, 1)):
        alone = {key: value[i : i + 1, :length] for key, value in batch.kwargs.items()}
        single = unit_activations(model, Batch((), alone, None, 1))
        assert torch.allclose(single.values[0], found.values[i], atol=1e-6)
        assert torch.allclose(single.outputs[0], found.outputs[i], atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 3}])
def test_attention_projections_are_their_own_layers(batch_first: bool, sizes: dict[str, int]) -> None:
    """Queries, keys, values and the output projection, from the formulas."""
    torch.manual_seed(0)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **sizes)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if not batch_first:
                query, key, value = (t.transpose(0, 1) for t in (query, key, value))
            output: Tensor = self.attention(query, key, value)[0]
            return output if batch_first else output.transpose(0, 1)

    model = Cross()
    nn.init.normal_(model.attention.in_proj_bias)
    shapes = ((6, 5, 4), (6, 2, sizes.get("kdim", 4)), (6, 2, sizes.get("vdim", 4)))
    inputs = dict(zip(("query", "key", "value"), (torch.randn(s) for s in shapes), strict=True))
    found = unit_activations(model, Batch((), inputs, None, 6))
    assert found.units == [("attention.in_proj", i) for i in range(12)] + [("attention.out_proj", i) for i in range(4)]
    a = model.attention
    weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight) if sizes else a.in_proj_weight.chunk(3)
    parts = [x @ w.mT + b for x, w, b in zip(inputs.values(), weights, a.in_proj_bias.chunk(3), strict=True)]
    expected = torch.cat([*(p.mean(1) for p in parts), found.outputs.mean(1)], 1)
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert unit_activations(model, Batch((), inputs, None, 6), ["attention.out_proj"]).units == found.units[12:]
