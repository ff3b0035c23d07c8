import math

import numpy as np
import pytest
import torch

from sslcli.backbones import resnet
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.methods import rotation

FACTS = RunFacts(images=8, batch_size=4, part_size=4, steps_per_epoch=2, total_steps=4)
AT = Progress(step=0, total=4, steps_per_epoch=2, seed=0)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["rotation_batch_n1", "rotation_batch_n2", "rotation_batch_n3"])
def test_what_the_network_gets(golden, name):
    case = np.load(golden / "pretext" / f"{name}.npz")
    images = torch.from_numpy(case["images"]).permute(0, 3, 1, 2)
    turned, labels = rotation.rows_of([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
    np.testing.assert_array_equal(turned.numpy(), case["model_input"])
    np.testing.assert_array_equal(labels.numpy(), case["model_labels"])


def test_the_loss_is_the_cross_entropy_of_turns():
    torch.manual_seed(0)
    method = rotation.build(rotation.Config(), resnet.build(resnet.Config(depth=10, width=8, stem="small")), FACTS)
    method.eval()
    images = torch.randn(4, 3, 16, 16)
    views = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
    found = method(Batch(views=views, index=torch.arange(4)), AT)
    chances = [method.head(method.backbone(view)).softmax(dim=1) for view in views]
    wanted = -torch.stack([chance[:, turns].log() for turns, chance in enumerate(chances)]).mean()
    right = torch.stack([(chance.argmax(dim=1) == turns).float() for turns, chance in enumerate(chances)]).mean()
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.scalars["top1"], right)
    assert abs(found.loss.item() - math.log(4)) < 0.05


def test_turns_can_be_learned():
    torch.manual_seed(0)
    method = rotation.build(rotation.Config(), resnet.build(resnet.Config(depth=10, width=8, stem="small")), FACTS)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    ramp = torch.linspace(-1, 1, 16).expand(4, 3, 16, 16)  # brighter to the right: every turn looks different
    views = [torch.rot90(ramp, turns, (2, 3)) for turns in range(4)]
    for _ in range(15):
        result = method(Batch(views=views, index=torch.arange(4)), AT)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert result.loss < 0.1
    assert result.scalars["top1"] == 1
