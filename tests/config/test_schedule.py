from math import cos, pi, sqrt
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from sslcli.config.schedule import AnySchedule, Constant, Cosine, Cyclic, Linear, Poly, Step, Warmup, factor

Recording = dict[str, np.ndarray]


@pytest.fixture
def recorded(golden: Path):
    def load(case: str) -> Recording:
        with np.load(golden / "schedules" / f"{case}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    return load


def curve(schedule: AnySchedule, total: int, steps_per_epoch: int, steps=None) -> np.ndarray:
    return np.array(
        [factor(schedule, int(s), total, steps_per_epoch) for s in (range(total) if steps is None else steps)]
    )


def assert_equal(ours: np.ndarray, theirs: np.ndarray, rtol: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-15)


MMCV = {
    "mmcv_cosine_plain": Cosine(by="epoch"),
    "mmcv_cosine_by_epoch_warmup_by_epoch": Cosine(by="epoch", warmup=Warmup(epochs=3, start=1e-4)),
    "mmcv_cosine_by_epoch_warmup_iters_exp": Cosine(
        by="epoch", end=0.01, warmup=Warmup(steps=9, start=0.1, shape="exp")
    ),
    "mmcv_cosine_by_iter_warmup_iters": Cosine(end=0.0006 / 0.6, warmup=Warmup(steps=10, start=0.01)),
    "mmcv_step": Step(at=(4, 7)),
    "mmcv_step_int_warmup_constant": Step(
        every=3, gamma=0.5, end=0.02 / 0.1, warmup=Warmup(steps=5, start=0.2, shape="constant")
    ),
    "mmselfsup_stepfix_cosine_epoch": Cosine(
        by="epoch", end=0.001 / 1.6, warmup=Warmup(epochs=2, subtract=True, mirror=True)
    ),
    "mmselfsup_stepfix_cosine_iter": Cosine(warmup=Warmup(steps=10, subtract=True, mirror=True)),
}


@pytest.mark.golden
@pytest.mark.parametrize("case", MMCV)
def test_equals_mmcv_and_mmselfsup(recorded, case: str) -> None:
    seen = recorded(case)
    per_epoch = int(seen["param_iters_per_epoch"])
    ours = curve(MMCV[case], int(seen["param_epochs"]) * per_epoch, per_epoch)
    assert_equal(ours[:, None] * seen["param_base_lr"], seen["out_lr"])


@pytest.mark.golden
@pytest.mark.parametrize(("case", "schedule"), [("moco_cos", Cosine()), ("moco_step", Step(at=(120, 160)))])
def test_equals_moco(recorded, case: str, schedule: AnySchedule) -> None:
    seen = recorded(case)
    assert_equal(0.03 * curve(schedule, 200, 1, seen["in_x"]), seen["out_value"])


@pytest.mark.golden
def test_equals_moco_v3(recorded) -> None:
    seen = recorded("mocov3_lr")
    schedule = Cosine(warmup=Warmup(epochs=40, subtract=True))
    assert_equal(0.0024 * curve(schedule, 300 * 4, 4, seen["in_x"] * 4), seen["out_value"])


@pytest.mark.golden
def test_moco_v3_momentum_is_one_minus_a_falling_cosine(recorded) -> None:
    seen = recorded("mocov3_momentum")
    assert_equal(1 - (1 - 0.99) * curve(Cosine(), 300 * 4, 4, seen["in_x"] * 4), seen["out_value"])


@pytest.mark.golden
@pytest.mark.parametrize("case", ["swav_lr", "swav_lr_nowarmup"])
def test_equals_swav(recorded, case: str) -> None:
    seen = recorded(case)
    base, per_epoch, epochs = (
        float(seen["param_base_lr"]),
        int(seen["param_iters_per_epoch"]),
        int(seen["param_epochs"]),
    )
    warmup = Warmup(epochs=10, start=0.3 / 4.8, subtract=True, reach=True) if case == "swav_lr" else None
    schedule = Cosine(end=float(seen["param_final_lr"]) / base, warmup=warmup)
    assert_equal(base * curve(schedule, epochs * per_epoch, per_epoch), seen["out_value"])


@pytest.mark.golden
def test_equals_barlow_twins(recorded) -> None:
    seen = recorded("barlowtwins_lr")
    schedule = Cosine(end=0.001, warmup=Warmup(epochs=10, subtract=True))
    bases = np.array([0.2, 0.0048]) * 2048 / 256
    assert_equal(curve(schedule, 20 * 7, 7, seen["in_x"])[:, None] * bases, seen["out_value"])


@pytest.mark.golden
def test_equals_vicreg(recorded) -> None:
    seen = recorded("vicreg_lr")
    base = 0.2 * 1024 / 256
    schedule = Cosine(end=0.001, warmup=Warmup(epochs=10, subtract=True))
    assert_equal(base * curve(schedule, 15 * 6, 6, seen["in_x"]), seen["out_value"])


@pytest.mark.golden
def test_equals_deepmind_byol(recorded) -> None:
    seen = recorded("deepmind_byol_lr")
    schedule = Cosine(warmup=Warmup(steps=100, subtract=True))
    assert_equal(0.2 * 4096 / 256 * curve(schedule, 1000, 10, seen["in_x"]), seen["out_value"], rtol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_equals_google_simclr(recorded, scaling: str) -> None:
    seen = recorded(f"google_simclr_lr_{scaling}")
    batch, images = int(seen["param_train_batch_size"]), int(seen["param_num_examples"])
    lr = float(seen["param_base_lr"]) * (batch / 256 if scaling == "linear" else sqrt(batch))
    total = images * int(seen["param_train_epochs"]) // batch + 1
    schedule = Cosine(warmup=Warmup(steps=int(seen["param_warmup_epochs"]) * images // batch, subtract=True))
    ours = lr * curve(schedule, total, images // batch, seen["in_x"])
    np.testing.assert_allclose(ours, seen["out_value"], rtol=1e-6, atol=1e-7)  # TensorFlow computes in float32


@pytest.mark.golden
def test_equals_simsiam(recorded) -> None:
    seen = recorded("simsiam_fix_lr")
    assert_equal(0.1 * curve(Cosine(by="epoch"), 100, 1, seen["in_x"]), seen["out_value"][:, 0])


def test_constant_stays() -> None:
    assert set(curve(Constant(), 10, 3)) == {1.0}


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_linear_and_poly_follow_their_formulas(end: float) -> None:
    t = np.arange(20) / 20
    assert_equal(curve(Linear(end=end), 20, 4), 1 - (1 - end) * t)
    assert_equal(curve(Poly(power=0.9, end=end), 20, 4), end + (1 - end) * (1 - t) ** 0.9)
    assert_equal(curve(Poly(power=1, end=end), 20, 4), curve(Linear(end=end), 20, 4))


def test_by_epoch_samples_the_curve_at_the_start_of_each_epoch() -> None:
    smooth, stairs = curve(Poly(power=2), 20, 5), curve(Poly(power=2, by="epoch"), 20, 5)
    assert_equal(stairs, np.repeat(smooth[::5], 5))


def test_cyclic_repeats_the_cosine() -> None:
    once = curve(Cosine(end=0.1), 10, 5)
    assert_equal(curve(Cyclic(cycles=3, end=0.1), 30, 5), np.tile(once, 3))
    assert factor(Cyclic(cycles=3, end=0.1), 30, 30, 5) == pytest.approx(0.1)


def test_warm_up_by_epoch_climbs_in_stairs() -> None:
    ours = curve(Constant(warmup=Warmup(epochs=4, by="epoch")), 20, 4)
    assert_equal(ours, np.repeat([0, 0.25, 0.5, 0.75, 1], 4))
    reached = curve(Constant(warmup=Warmup(epochs=3, by="epoch", reach=True)), 16, 4)
    assert_equal(reached, np.repeat([0, 0.5, 1, 1], 4))


def test_warm_up_of_part_of_an_epoch() -> None:
    assert_equal(curve(Constant(warmup=Warmup(epochs=0.5)), 8, 4), np.array([0, 0.5, 1, 1, 1, 1, 1, 1]))


def test_exponential_warm_up_is_a_straight_line_in_the_logarithm() -> None:
    ours = curve(Constant(warmup=Warmup(steps=4, start=1e-4, shape="exp")), 6, 6)
    assert_equal(ours, np.array([1e-4, 1e-3, 1e-2, 1e-1, 1, 1]))


def test_a_run_shorter_than_its_warm_up_ends_inside_it() -> None:
    assert_equal(curve(Cosine(warmup=Warmup(steps=10, subtract=True)), 5, 5), np.arange(5) / 10)
    running = curve(Cosine(warmup=Warmup(steps=10)), 5, 5)
    assert_equal(running, np.arange(5) / 10 * [(1 + cos(pi * t / 5)) / 2 for t in range(5)])


def test_a_warm_up_of_one_step_that_reaches_starts_at_its_start() -> None:
    assert_equal(curve(Constant(warmup=Warmup(steps=1, start=0.5, reach=True)), 3, 3), np.array([0.5, 1, 1]))


def test_time_past_the_end_keeps_the_last_factor() -> None:
    for schedule in (Cosine(end=0.2), Linear(end=0.2), Poly(end=0.2), Cyclic(end=0.2)):
        assert factor(schedule, 25, 20, 5) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"name": "step"}, "either with `at` or with `every`"),
        ({"name": "step", "at": [1], "every": 2}, "either with `at` or with `every`"),
        ({"name": "step", "at": [3], "warmup": {"epochs": 1, "subtract": True}}, "count from the start of the run"),
        ({"name": "cosine", "warmup": {}}, "either in `epochs` or in `steps`"),
        ({"name": "cosine", "warmup": {"epochs": 1, "steps": 5}}, "either in `epochs` or in `steps`"),
        ({"name": "cosine", "warmup": {"steps": 5, "shape": "exp"}}, "cannot start from 0"),
        ({"name": "cosine", "warmup": {"steps": 5, "mirror": True}}, "needs `subtract: true`"),
    ],
)
def test_contradictions_are_refused(words: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TypeAdapter(AnySchedule).validate_python(words)
