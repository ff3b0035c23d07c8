"""What methods say of their own health, as a run records it."""

import json
from pathlib import Path

import pytest

from sslcli.config.load import load
from sslcli.engine.pretrain import pretrain

SMALL = (
    "data.source.count=64",
    "data.batch_size=16",
    "run.epochs=1",
    "run.views=fast",
    "run.tensorboard=false",
    "backbone.width=8",
    "run.monitor={images: 32, knn: false}",
)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("{name: swav, prototypes: 20, hidden: 16, dim: 8}", {"method_cluster_use", "method_cluster_certainty"}),
        ("{name: dino, prototypes: 20, hidden: 16, bottleneck: 8}", {"method_cluster_use", "method_cluster_certainty"}),
        ("{name: byol, hidden: 16, dim: 8}", {"method_agreement"}),
        ("{name: moco, queue: 32, dim: 8}", {"method_agreement"}),
        ("{name: mocov3, hidden: 16, dim: 8}", {"method_agreement"}),
        (
            "{name: interclr, queue: 32, dim: 8, clusters: 4, min_cluster: 3, negatives: 8, pool: 16}",
            {"method_agreement"},
        ),
        ("{name: deepcluster, clusters: 6, components: 4}", {"method_cluster_use", "method_cluster_certainty"}),
        (
            "{name: odc, hidden: 16, dim: 8, clusters: 4, min_cluster: 3}",
            {"method_cluster_use", "method_cluster_certainty"},
        ),
    ],
    ids=["swav", "dino", "byol", "moco", "mocov3", "interclr", "deepcluster", "odc"],
)
def test_a_run_records_them(tmp_path: Path, method: str, names: set[str]):
    one = ("views.groups=[{size: 32}]",) if "deepcluster" in method or "odc" in method else ()
    pretrain(load("pretrain", "demo-digits", (*SMALL, *one, f"method={method}"), {}).preset, tmp_path)
    row = json.loads((tmp_path / "health.jsonl").read_text().splitlines()[-1])
    found = {name: value for name, value in row.items() if name in names}
    assert found.keys() == names, row
    low = -1.0 if "method_agreement" in names else 0.0
    assert all(low <= value <= 1.0 for value in found.values())
