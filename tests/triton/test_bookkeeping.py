"""The Triton kernels around matching cost and point loss, against plain PyTorch in float64."""

import pytest
import torch

from m2f_kernels.ops.points import bookkeeping
from tests.numerics import relative_error

F32 = torch.float32
#: Classes that fit a block, a row of one block, and several blocks.
CLASSES = (6, 134, 5000)


@pytest.fixture(scope="module")
def kernels():
    from m2f_kernels.ops.points import triton_loss

    return triton_loss


@pytest.mark.parametrize("classes", CLASSES)
def test_matching_costs(kernels, device, generator, classes):
    """Blocks of queries, images of several counts, one of them 0; labels out of range are sent as they are."""
    outputs, queries, counts = 3, 7, (4, 0, 19)
    logits = torch.randn(outputs, 3, queries, classes, generator=generator).to(device)
    labels = [torch.randint(0, classes - 1, (t,), generator=generator).to(device) for t in counts]
    labels[0][1], labels[0][2] = classes + 3, -1
    sizes = [(8, 4), (13, 4), (21, 19)]
    blocks = [[torch.rand(size, generator=generator).to(device) for size in sizes] for _ in range(2)]
    found = kernels.matching_costs(logits, labels, *blocks, 2.0, 5.0, 3.0)
    exact = [[x.double() for x in part] for part in blocks]
    expected = bookkeeping.matching_costs(logits.double(), labels, *exact, 2.0, 5.0, 3.0)
    assert relative_error(found, expected) < 1e-6
    assert torch.equal(found[-23:], torch.cat(labels).float())
    plain = torch.ops.m2f.matching_costs(
        logits.cpu(), [x.cpu() for x in labels], *([x.cpu() for x in y] for y in blocks), 2.0, 5.0, 3.0
    )
    assert relative_error(plain.to(device), expected) < 1e-6


def test_labels_are_sent_without_queries(kernels, device, monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **how: empty(self, *size, **how).fill_(7e7))
    labels = [torch.tensor([2, 0], device=device)]
    found = kernels.matching_costs(torch.zeros(3, 1, 0, 6, device=device), labels, [], [], 2.0, 5.0, 3.0)
    assert found.tolist() == [2, 0]


def inputs(generator, device, classes, masks=300):
    outputs, rows = 3, 14
    logits = 3 * torch.randn(outputs, rows, classes, generator=generator)
    labels = torch.randint(0, classes, (outputs, rows), generator=generator)
    weights = torch.rand(classes, generator=generator) + 0.1
    losses = torch.rand(2, masks, generator=generator)
    of_output = torch.randint(0, outputs, (masks,), generator=generator)
    return [x.to(device) for x in (logits, labels, weights, *losses, of_output)]


@pytest.mark.parametrize("masks", [0, 300])
@pytest.mark.parametrize("classes", CLASSES)
def test_losses_and_gradients(kernels, device, generator, classes, masks):
    given = inputs(generator, device, classes, masks)
    found = kernels.criterion_losses(*given)
    exact = [x.double() if x.dtype == F32 else x for x in given]
    leaves = [exact[i].requires_grad_() for i in (0, 3, 4)]
    expected = bookkeeping.criterion_losses(*exact)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b.detach()) < 1e-6 or masks == 0
    upstream = torch.randn(3, 3, generator=generator).to(device)
    truth = torch.autograd.grad(expected[:3], leaves, list(upstream.double()))
    own = kernels.criterion_losses_backward(*upstream, *given[:3], found[3], given[5])
    plain = bookkeeping.criterion_losses_backward(*upstream, *given[:3], found[3], given[5])
    for a, b, c in zip(own, plain, truth, strict=True):
        assert a.shape == b.shape == c.shape
        for x in (a, b):
            assert x.numel() == 0 or relative_error(x, c) < 1e-5
    again = (
        kernels.criterion_losses(*given),
        kernels.criterion_losses_backward(*upstream, *given[:3], found[3], given[5]),
    )
    assert all(torch.equal(a, b) for x, y in zip(again, (found, own), strict=True) for a, b in zip(x, y, strict=True))


def test_what_is_not_finite_stays_so(kernels, device, generator):
    logits, *rest = inputs(generator, device, 6)
    logits[1, 2, 3] = float("nan")
    classes, _, _, weights = kernels.criterion_losses(logits, *rest)
    assert classes.isfinite().tolist() == [True, False, True]
    upstream = torch.ones(3, 3, device=device)
    gradient, *_ = kernels.criterion_losses_backward(*upstream, logits, *rest[:2], weights, rest[-1])
    assert gradient.isnan().any(2).sum() == 1


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [4, 300])
def test_rows(kernels, device, generator, channels, dtype):
    """Rows that were chosen never, once and several times, over more than one block."""
    rows = torch.cat([torch.randint(0, 9, (300,), generator=generator), torch.tensor([11])]).to(device)
    grad, out = torch.randn(301, channels, generator=generator).to(device), torch.full((12, channels), torch.nan)
    out = out.to(device, dtype)
    kernels.rows_backward(grad, rows, out)
    expected = torch.zeros(12, channels, dtype=torch.float64, device=device).index_add_(0, rows, grad.double())
    assert relative_error(out, expected) < (1e-6 if dtype == F32 else 2**-8)
    assert torch.equal(out[11], grad[300].to(dtype))
    assert not out[9:11].any()
