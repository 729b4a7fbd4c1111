import pytest
import torch
from opacus.validators import ModuleValidator

from accounting.errors import UserError
from dpml.models import TransformerClassifier


def make(**options):
    torch.manual_seed(0)
    return TransformerClassifier(50, 12, 7, width=32, heads=4, hidden=64, **options)


def tokens(n, length=12):
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 5, 12])
def test_logits_for_any_batch_and_shorter_sequences(n, length):
    assert make()(tokens(n, length)).shape == (n, 7)


def test_number_of_parameters():
    layer = 2 * 256 + 129 * 384 + 129 * 128 + 129 * 512 + 513 * 128
    expected = 128 * (10_000 + 128) + 2 * layer + 256 + 129 * 10
    model = TransformerClassifier(10_000, 128, 10)
    assert sum(p.numel() for p in model.parameters()) == expected == 1_694_474


def test_valid_for_per_example_gradients():
    assert ModuleValidator.validate(make(), strict=True) == []


def test_an_output_does_not_depend_on_its_neighbours():
    model, x = make(), tokens(3)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


def test_the_positions_seen_by_the_layer_have_the_batch_first():
    model, seen = make(), []
    model.positions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(tokens(3, 5))
    assert seen == [(3, 5)]


def test_order_matters_and_every_token_counts():
    model, x = make(), tokens(1)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)
        changed = x.clone()
        changed[0, -1] = (x[0, -1] + 1) % 50
        assert not torch.allclose(model(x), model(changed), atol=1e-4)


def test_attention_is_that_of_vaswani_et_al():
    torch.manual_seed(1)
    layer = make().layers[0]
    projected = torch.randn(2, 5, 96)
    query, key, value = (part.view(2, 5, 4, 8) for part in projected.split(32, dim=2))
    scores = torch.einsum("mihd,mjhd->mhij", query, key) / 8**0.5
    wanted = torch.einsum("mhij,mjhd->mihd", scores.softmax(dim=-1), value).reshape(2, 5, 32)
    torch.testing.assert_close(layer.attention(projected), wanted, atol=1e-5, rtol=1e-5)


def test_parameters_have_gradients():
    model = make()
    torch.nn.functional.cross_entropy(model(tokens(4)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="width must be a multiple"):
        TransformerClassifier(50, 12, 7, width=30, heads=4)
