"""The Triton kernels of the loss in Triton's interpreter, which needs no GPU but has to be chosen before the import."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from nemovl_train.model.kernels.cross_entropy import statistics, to_gradient

generator = torch.Generator().manual_seed(0)
whole = torch.randn(5, 9000, generator=generator) * 4
whole[1] += 300  # beyond exp
targets = torch.tensor([0, 8999, 5000, 4499, 4500])
grad = torch.tensor([1.0, -0.5, 0.0, 2.0, 3.0])
reference = whole.clone().requires_grad_()
losses = torch.nn.functional.cross_entropy(reference, targets, reduction="none")
losses.backward(grad)

halves = [whole[:, :4500].contiguous(), whole[:, 4500:].contiguous()]
found = torch.stack([statistics(half, targets - 4500 * rank) for rank, half in enumerate(halves)])
largest = found[:, 0].amax(0)
log_sum = largest + (found[:, 1] * (found[:, 0] - largest).exp()).sum(0).log()
torch.testing.assert_close(log_sum - found[:, 2].sum(0), losses.detach(), rtol=1e-6, atol=1e-4)
for rank, half in enumerate(halves):
    to_gradient(half, targets - 4500 * rank, log_sum, grad)
torch.testing.assert_close(torch.cat(halves, 1), reference.grad, rtol=1e-5, atol=1e-7)

rounded = whole[3:].bfloat16()
exact = statistics(rounded, targets[3:])
torch.testing.assert_close(exact[0], rounded.float().amax(1))
torch.testing.assert_close(exact[1], (rounded.float() - exact[0][:, None]).exp().sum(1), rtol=1e-5, atol=0)
assert statistics(whole[:0], targets[:0]).shape == (3, 0)
print("agree")
"""


def test_they_give_cross_entropy_and_its_gradient_over_a_divided_vocabulary():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agree", done.stderr
