"""Our aggregators with torchmil's weights against torchmil 1.0.2, where that is installed.

torchmil's models give one logit, ours one for each class: that of class 1 is theirs, and that of
class 0 is set to zero. Its TransMIL has neither the convolution of the values nor the output
projection of the published code, so ours is given weights with which they do nothing. Embeddings
are handed to theirs as a feature extractor.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xmag.mil import aggregator, training_loss

torchmil = pytest.importorskip("torchmil.models")

D, E, TOLERANCE = 5, 8, 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ours_and_embedding(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    ours = aggregator(name, in_dim=D, classes=2, embed_dim=E, **options).eval()
    with torch.no_grad():
        ours.head.weight[0] = 0
        ours.head.bias[0] = 0
    return ours, ours.embed


def last(layer: nn.Module) -> nn.Module:
    """The linear layer in torchmil's lazy one."""
    inner: nn.Module = getattr(layer, "module", layer)
    return inner


def copy_attention(theirs: nn.Module, ours: nn.Module) -> None:
    with torch.no_grad():
        ours.attention.score.bias.zero_()  # theirs has none; a softmax does not see it
        for mine, other in (("content", "fc1"), ("gate", "fc_gated"), ("score", "fc2")):
            for key, value in getattr(theirs.pool, other).state_dict().items():
                getattr(ours.attention, mine).get_parameter(key.removeprefix("module.")).copy_(
                    value
                )
        for key in ("weight", "bias"):
            ours.head.get_parameter(key)[1] = last(theirs.classifier).get_parameter(key)[0]


def same_gradients(ours: Tensor, theirs: Tensor, shared: list[Tensor]) -> None:
    mine = torch.autograd.grad(ours, shared, retain_graph=True)
    other = torch.autograd.grad(theirs, shared)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


class ColumnCrossEntropy(nn.Module):
    """Cross-entropy for targets (2k, 1)."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets[:, 0].long())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 40, D, requires_grad=True), torch.arange(40) < torch.tensor(
        [[40], [20], [33]]
    )


def test_abmil() -> None:
    ours, embed = ours_and_embedding("abmil", attention_dim=4)
    theirs = torchmil.ABMIL(in_shape=(D,), att_dim=4, gated=True, feat_ext=embed).eval()
    copy_attention(theirs, ours)
    features, mask = batch()
    output = ours(features, mask)
    logits, scores = theirs(features, mask, return_att=True)
    torch.testing.assert_close(output.logits[:, 1], logits, atol=TOLERANCE, rtol=0)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(output.attention, weights, atol=TOLERANCE, rtol=0)
    same_gradients(
        output.logits[:, 1].square().sum(), logits.square().sum(),
        [features, *embed.parameters()],
    )  # fmt: skip


@pytest.mark.parametrize("label", [0, 1])
def test_clam_sb(label: int) -> None:
    """Their instance loss is that of mutually exclusive classes, a sum where CLAM has a mean.

    With cross-entropy on both sides: torchmil 1.0.2 hands its smooth SVM loss targets of shape
    (2k, 1), which broadcast to a comparison of each tile with all the others.
    """
    ours, embed = ours_and_embedding("clam_sb", attention_dim=4, subtyping=True, instance_loss="ce")
    theirs = torchmil.CLAM_SB(
        in_shape=(D,), att_dim=4, k_sample=8, gated=True, feat_ext=embed
    ).eval()
    theirs.inst_loss_fn = ColumnCrossEntropy()
    copy_attention(theirs, ours)
    with torch.no_grad():
        for mine, other in zip(ours.instance_heads, theirs.inst_classifiers, strict=True):
            for key in ("weight", "bias"):
                mine.get_parameter(key).copy_(other.module.get_parameter(key))
    features = torch.randn(1, 40, D, requires_grad=True)
    labels = torch.tensor([label])
    output = ours(features, torch.ones(1, 40, dtype=torch.bool), labels)
    logit, losses = theirs.compute_loss(labels, features)
    torch.testing.assert_close(output.logits[:, 1], logit, atol=TOLERANCE, rtol=0)
    bag, instances = losses["BCEWithLogitsLoss"], losses["InstLoss"]
    expected = 0.7 * bag + 0.3 * instances / 2
    loss = training_loss(output, labels)
    torch.testing.assert_close(loss, expected, atol=TOLERANCE, rtol=0)
    same_gradients(loss, expected, [features, *embed.parameters()])


@pytest.mark.parametrize("tiles", [1, 7, 60])
def test_transmil(tiles: int) -> None:
    ours, embed = ours_and_embedding("transmil", heads=2, landmarks=4)
    theirs = torchmil.TransMIL(
        in_shape=(D,), att_dim=E, n_heads=2, n_landmarks=4, feat_ext=embed
    ).eval()
    with torch.no_grad():
        ours.class_token.copy_(theirs.cls_token)
        ours.final_norm.load_state_dict(theirs.norm.state_dict())
        for mine, norm, other in zip(ours.layers, ours.norms, theirs.layers, strict=True):
            norm.load_state_dict(other.norm1.state_dict())
            mine.qkv.weight.copy_(other.att_module.qkv_nn.weight)
            mine.residual.weight.zero_()
            mine.out[0].weight.copy_(torch.eye(E))
            mine.out[0].bias.zero_()
        positions = (theirs.pos_layer.proj, theirs.pos_layer.proj1, theirs.pos_layer.proj2)
        for mine, other in zip(ours.positions.convolutions, positions, strict=True):
            mine.load_state_dict(other.state_dict())
        for key in ("weight", "bias"):
            ours.head.get_parameter(key)[1] = last(theirs.classifier).get_parameter(key)[0]
    features = torch.randn(1, tiles, D, requires_grad=True)
    output = ours(features, torch.ones(1, tiles, dtype=torch.bool))
    logit = theirs(features)
    torch.testing.assert_close(output.logits[:, 1], logit, atol=TOLERANCE, rtol=0)
    same_gradients(output.logits[0, 1], logit[0], [features, *embed.parameters()])
