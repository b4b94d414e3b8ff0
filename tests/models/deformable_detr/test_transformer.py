import pytest
import torch

from lightning_convnext_det.models.deformable_detr.levels import Levels, flatten_levels
from lightning_convnext_det.models.deformable_detr.transformer import EncoderLayer
from lightning_convnext_det.ops import token_blocks


def create_levels(padded: bool) -> Levels:
    maps = [torch.randn(2, 16, 6, 8), torch.randn(2, 16, 3, 4)]
    valid = torch.tensor([[[6, 8], [3, 4]], [[4, 6], [2, 3]]]) if padded else None
    return flatten_levels(maps, valid, torch.randn(2, 16), position_offset=0.5)


def create_layer() -> EncoderLayer:
    torch.manual_seed(0)
    return EncoderLayer(16, 4, 2, 32, 0.1, 3).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer__in_blocks(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, levels, queries = create_layer(), create_levels(padded), []
    attend = layer.attention.attend

    def count(tokens: torch.Tensor, *given: object) -> torch.Tensor:
        queries.append(tuple(tokens.shape[:2]))
        return attend(tokens, *given)

    monkeypatch.setattr(layer.attention, "attend", count)
    whole = layer(levels.tokens, levels)  # gradients may be asked for
    for name, size in [("_MIN_HIDDEN", 0), ("_BLOCK", 0), ("_MIN_TOKENS", 25)]:
        monkeypatch.setattr(token_blocks, name, size)
    with torch.no_grad():
        torch.testing.assert_close(layer(levels.tokens, levels), whole, rtol=0, atol=1e-6)
    assert queries == [(2, 60), *([(1, 25), (1, 25), (1, 10)] * 2)]


def test_encoder_layer__hooks_see_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_blocks, "_MIN_HIDDEN", 0)
    layer, levels, seen = create_layer(), create_levels(False), []
    layer.attention.sampling_offsets.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    with torch.no_grad():
        layer(levels.tokens, levels)
    assert seen == [(2, 60, 16)]
