"""What the ranks of a test have imported when they start."""

import torch._dynamo
import torch.distributed
import torch.nn.parallel

from mmfast.commands._torchvision import declare_torchvision_ops

declare_torchvision_ops()

import open_clip  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401

import mmfast  # noqa: E402

mmfast.ops, mmfast.nn, mmfast.reference  # noqa: B018

# Compiling anything loads the compiler, which takes as long as all tests of a rank.
torch.compile(torch.sin, backend="aot_eager")(torch.ones(1, requires_grad=True))
torch._dynamo.reset()
