"""A speaker network as in docs/audio.md: SimAM at the end of the branch, padded batches."""

import pytest
import torch
from torch import Tensor, nn

import simam


class Block(nn.Module):
    def __init__(self, channels: int, stride: int, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.attention = attention
        changes = stride > 1 or channels != 8
        self.shortcut = nn.Conv2d(channels, 8, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.attention is not None:
            y = self.attention(y, mask)
        return (self.shortcut(x) + y).relu()


class Speaker(nn.Module):
    """Mean pooling over the valid frames, and a linear embedding."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block1, self.block2 = Block(1, 1, attention), Block(8, 2, attention)
        self.embedding = nn.Linear(8 * 5, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.block1(x, mask)
        mask = None if mask is None else mask[..., ::2]
        x = self.block2(x, mask)
        valid = torch.ones_like(x[:, :1, :1]) if mask is None else mask.to(x.dtype)
        pooled = (x * valid).sum(-1) / valid.sum(-1)
        return self.embedding(pooled.flatten(1))


@pytest.fixture
def utterances() -> Tensor:
    return torch.randn(2, 1, 10, 24, generator=torch.Generator().manual_seed(0))


def test_attach_at_the_end_of_the_branch_is_the_speaker_network(utterances: Tensor) -> None:
    trained = Speaker(simam.SimAM(e_lambda=1e-4)).eval()
    network = simam.attach(Speaker().eval(), place="branch", e_lambda=1e-4)
    assert simam.attached(network).keys() == {"block1.bn2", "block2.bn2"}
    assert network.load_state_dict(trained.state_dict(), strict=True) == ([], [])
    assert torch.equal(network(utterances), trained(utterances))


def test_mask_of_docs_keeps_padding_out_of_the_statistics(utterances: Tensor) -> None:
    layer = simam.SimAM(e_lambda=1e-4)
    padded = torch.nn.functional.pad(utterances[1:, ..., :18], (0, 6), value=5.0)
    batch = torch.cat([utterances[:1], padded])
    mask = (torch.arange(24) < torch.tensor([24, 18])[:, None])[:, None, None]
    output = layer(batch, mask)
    torch.testing.assert_close(output[:1], layer(batch[:1]))
    torch.testing.assert_close(output[1:, ..., :18], layer(batch[1:, ..., :18]))
    assert (layer(batch)[1:, ..., :18] - output[1:, ..., :18]).abs().max() > 0.1
