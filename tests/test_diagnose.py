"""Verdicts on layers: hand-made gradients, states of guards, and networks at initialisation."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import optax_guard as og

PARAMS = {"dense": {"bias": jnp.ones(2), "kernel": jnp.full((3, 2), 2.0)}, "scale": jnp.ones(())}
GRADIENTS = {
    "dense": {"bias": jnp.array([30.0, 0.0]), "kernel": jnp.full((3, 2), 0.5)},
    "scale": jnp.array(0.5),
}
SGD = optax.sgd(0.1)


def weights(**values: Any) -> dict[str, jax.Array]:
    """A weight of four equal elements under each name."""
    return {name: jnp.full((2, 2), value) for name, value in values.items()}


def verdicts(diagnosis: og.Diagnosis) -> dict[str, str]:
    return {row.path: row.verdict for row in diagnosis.rows}


def state_after(tx: Any, gradients: Any, params: Any = PARAMS) -> Any:
    return jax.jit(tx.update)(gradients, tx.init(params), params)[1]


# Numbers


def test_rows_hold_the_numbers_of_each_array_in_order():
    diagnosis = og.diagnose(GRADIENTS, PARAMS)
    total = 900 + 6 * 0.25 + 0.25
    expected = [
        ("dense/bias", (2,), 30.0, 30 / 2**0.5, 900 / total, 30 / 2**0.5, "exploding"),
        ("dense/kernel", (3, 2), 1.5**0.5, 0.5, 1.5 / total, 0.25, "ok"),
        ("scale", (), 0.5, 0.5, 0.25 / total, 0.5, "ok"),
    ]
    assert isinstance(diagnosis.rows, list)
    for row, values in zip(diagnosis.rows, expected, strict=True):
        assert row._fields == ("path", "shape", "norm", "rms", "share", "ratio", "verdict")
        assert (row.path, row.shape, row.verdict) == (*values[:2], values[-1])
        assert all(type(number) is float for number in row[2:6])
        np.testing.assert_allclose(row[2:6], values[2:6], rtol=1e-6)  # float32 norms
    assert diagnosis.zeros == (0.5, 0.0, 0.0)
    np.testing.assert_allclose(diagnosis.norm, total**0.5, rtol=1e-6)
    assert diagnosis.verdict == "exploding"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_norms_match_float64_in_every_dtype(dtype):
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(300, 40)) * 300, dtype)  # a norm past float16
    params = jnp.asarray(rng.normal(size=(300, 40)), dtype)
    (row,) = og.diagnose(gradients, params).rows
    exact = np.asarray(gradients).astype(np.complex128), np.asarray(params).astype(np.complex128)
    norm, param_norm = map(np.linalg.norm, exact)
    np.testing.assert_allclose(row.norm, norm, rtol=1e-6)
    np.testing.assert_allclose(row.rms, norm / 12000**0.5, rtol=1e-6)
    np.testing.assert_allclose(row.ratio, norm / param_norm, rtol=1e-6)
    assert row.path == "params" and row.shape == (300, 40)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e20, 1e30, 3e38])
def test_norms_are_right_over_the_full_range(scale):
    gradients = {"other": jnp.full((10, 10), scale), "unit": jnp.ones((2, 2))}
    diagnosis = og.diagnose(gradients, jax.tree.map(jnp.ones_like, gradients))
    other, _ = diagnosis.rows
    exact = float(np.float32(scale))
    np.testing.assert_allclose(other.norm, 10 * exact, rtol=1e-6)  # 3e39, past float32, at last
    np.testing.assert_allclose(other.rms, exact, rtol=1e-6)
    np.testing.assert_allclose(other.ratio, exact, rtol=1e-6)
    np.testing.assert_allclose(diagnosis.norm, math.hypot(10 * exact, 2), rtol=1e-6)
    assert other.verdict == ("exploding" if scale > 1 else "vanishing")


def test_float64_keeps_its_range_beside_float32(x64):
    gradients = {"double": jnp.full((2, 2), 1e200), "single": jnp.full((2, 2), 3e38, jnp.float32)}
    diagnosis = og.diagnose(gradients, jax.tree.map(jnp.ones_like, gradients))
    np.testing.assert_allclose([row.norm for row in diagnosis.rows], [2e200, 6e38], rtol=1e-6)
    np.testing.assert_allclose(diagnosis.rows[0].share, 1.0, rtol=1e-12)


def test_arrays_without_gradients_are_unused():
    params = PARAMS | {"steps": jnp.zeros((), jnp.int32), "frozen": jnp.ones(3), "none": None}
    gradients = GRADIENTS | {"steps": np.zeros((), jax.dtypes.float0), "frozen": None, "none": None}
    expected = og.diagnose(GRADIENTS, PARAMS)
    for missing in (None, optax.MaskedNode()):
        found = og.diagnose(gradients | {"frozen": missing}, params)
        assert [row for row in found.rows if row.path != "frozen"] == expected.rows
        assert verdicts(found)["frozen"] == "unused"
        assert found.verdict == expected.verdict


def test_empty_arrays_and_trees_are_ok():
    empty = {"nothing": jnp.zeros((0, 3)), "weight": jnp.ones((2, 2))}
    diagnosis = og.diagnose(empty, empty)
    assert verdicts(diagnosis) == {"nothing": "ok", "weight": "ok"}
    assert diagnosis.rows[0][2:5] == (0.0, 0.0, 0.0)
    assert og.diagnose({}, {}).verdict == "ok"
    assert str(og.diagnose({}, {})).startswith("ok: none of 0 arrays, norm 0\n")


@given(st.lists(st.integers(-100, 100), min_size=3, max_size=3), st.integers(0, 2**31))
def test_shares_add_up_and_a_common_scale_changes_no_verdict(exponents, seed):
    rng = np.random.default_rng(seed)
    params, gradients = {}, {}
    for exponent, shape in zip(exponents, [(3, 5), (4, 1), (1, 1)], strict=True):
        name = str(shape)
        params[name] = rng.normal(size=shape).astype(np.float32)
        gradients[name] = (rng.normal(size=shape) * 2.0**exponent).astype(np.float32)
    diagnosis = og.diagnose(gradients, params)
    np.testing.assert_allclose(sum(row.share for row in diagnosis.rows), 1.0, rtol=1e-6)
    for row in diagnosis.rows:
        exact = np.linalg.norm(gradients[row.path].astype(float))
        np.testing.assert_allclose(row.norm, exact, rtol=1e-6)  # a sum of 15 terms in float32
    larger = og.diagnose(*jax.tree.map(lambda leaf: leaf * np.float32(4), (gradients, params)))
    assert verdicts(larger) == verdicts(diagnosis)


# Verdicts


def test_each_verdict_has_its_branch_and_the_worst_is_that_of_the_whole():
    params = weights(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0)
    gradients = weights(a=0.1, b=1e-8, c=0.0, d=1e3, e=1.0)
    gradients["e"] = gradients["e"].at[1, 0].set(jnp.inf)
    order = ["ok", "vanishing", "dead", "exploding", "nonfinite"]
    assert list(verdicts(og.diagnose(gradients, params)).values()) == order
    for number in range(1, 6):
        part = dict(list(gradients.items())[:number])
        assert og.diagnose(part, params).verdict == order[number - 1]


def test_vectors_without_weights_are_judged_by_themselves():
    params = dict.fromkeys("abcd", jnp.full(3, 0.5))
    values = {"a": 0.1, "b": 1e-9, "c": 0.0, "d": 1.1}
    gradients = {name: jnp.full(3, value) for name, value in values.items()}
    assert list(verdicts(og.diagnose(gradients, params)).values()) == [
        "ok",
        "vanishing",
        "dead",
        "exploding",
    ]


def test_a_nonfinite_gradient_spoils_no_other_row():
    diagnosis = og.diagnose(weights(a=1.0, b=jnp.nan), weights(a=1.0, b=1.0))
    good, bad = diagnosis.rows
    assert good == og.diagnose(weights(a=1.0), weights(a=1.0)).rows[0]
    assert all(map(math.isnan, bad[2:6]))
    assert diagnosis.norm == 2.0


def test_nonfinite_parameters_spoil_only_their_own_ratio():
    good, bad = og.diagnose(weights(a=1.0, b=1.0), weights(a=1.0, b=jnp.inf)).rows
    assert good.verdict == bad.verdict == "ok"
    assert good.ratio == 1.0 and math.isnan(bad.ratio)


def test_limits_are_exclusive_and_can_be_set():
    params = weights(a=1.0, b=1.0)
    both = functools.partial(og.diagnose, weights(a=2.0, b=0.25), params)
    assert both().verdict == "ok"
    assert verdicts(both(exploding_ratio=1.9)) == {"a": "exploding", "b": "ok"}
    assert verdicts(both(vanishing_ratio=0.25)) == {"a": "ok", "b": "ok"}
    assert verdicts(both(vanishing_ratio=0.26)) == {"a": "ok", "b": "vanishing"}
    assert both(exploding_ratio=math.inf).verdict == "ok"
    slightly_more = np.nextafter(np.float32(2), np.float32(3))
    assert og.diagnose(weights(a=slightly_more), weights(a=1.0)).verdict == "exploding"


def test_mostly_zero_gradients_are_dead_if_one_says_so():
    gradients = {"embedding": jnp.zeros((10, 4)).at[0].set(1.0)}
    params = {"embedding": jnp.ones((10, 4))}
    assert og.diagnose(gradients, params).verdict == "ok"
    np.testing.assert_allclose(og.diagnose(gradients, params).zeros, [0.9], rtol=1e-6)
    assert og.diagnose(gradients, params, dead_fraction=0.89).verdict == "dead"
    assert og.diagnose(gradients, params, dead_fraction=0.91).verdict == "ok"


@pytest.mark.parametrize("start", [0.0, 1e-4])
def test_parameters_at_or_near_zero_are_compared_with_what_is_usual(start):
    params = {
        "bias": jnp.full(4, start),
        "first": jnp.ones((4, 4)),
        "last": jnp.full((4, 4), start),
        "middle": jnp.ones((4, 4)),
    }

    def diagnose(weight, bias):
        gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, weight), params)
        return og.diagnose(gradients | {"bias": jnp.full(4, bias)}, params)

    healthy = diagnose(1.9, 19.0)
    assert healthy.verdict == "ok"
    expected = math.inf if start == 0 else 1.9 / start
    np.testing.assert_allclose(healthy.rows[2].ratio, expected, rtol=1e-6)
    assert set(verdicts(diagnose(2.1, 21.0)).values()) == {"exploding"}
    assert verdicts(diagnose(1.0, 21.0))["bias"] == "exploding"
    assert set(verdicts(diagnose(1e-11, 1e-11)).values()) == {"vanishing"}


def test_the_ratio_of_zeros_to_zeros_is_nan():
    (row,) = og.diagnose(weights(a=0.0), weights(a=0.0)).rows
    assert math.isnan(row.ratio) and row.verdict == "dead" and row.share == 0.0


@pytest.mark.parametrize(
    ("kernel", "bias", "expected"),
    [
        (1.0, 1e-8, {"layer/bias": "ok", "layer/kernel": "ok"}),
        (9.0, 1e-8, {"layer/bias": "ok", "layer/kernel": "exploding"}),
        (1e-8, 1e-8, {"layer/bias": "vanishing", "layer/kernel": "vanishing"}),
        (1.0, 1e-12, {"layer/bias": "vanishing", "layer/kernel": "ok"}),  # too small for rounding
    ],
)
def test_a_bias_that_cancels_is_not_vanishing_beside_its_kernel(kernel, bias, expected):
    params = {"layer": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}, "other": jnp.ones(2)}
    layer = {"bias": jnp.full(2, bias), "kernel": jnp.full((2, 2), kernel)}
    diagnosis = og.diagnose({"layer": layer, "other": jnp.full(2, 1e-8)}, params)
    assert verdicts(diagnosis) == expected | {"other": "vanishing"}


# At initialisation: networks of an initialisation clinic, on their very first gradients


INITIALIZERS = {
    "he": nn.initializers.he_normal(),
    "xavier": nn.initializers.xavier_normal(),
    "normal": nn.initializers.normal(1.0),
    "uniform": lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -0.05, 0.05
    ),
}


class Network(nn.Module):
    """A classifier of digits; ``activation`` may be "prelu"."""

    widths: tuple[int, ...]
    kernel_init: str
    activation: str = "relu"
    is_normalized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = INITIALIZERS[self.kernel_init]
        for width in self.widths:
            x = nn.Dense(width, kernel_init=kernel_init)(x)
            if self.is_normalized:
                x = nn.BatchNorm(use_running_average=False)(x)
            is_prelu = self.activation == "prelu"
            x = nn.PReLU()(x) if is_prelu else getattr(nn, self.activation)(x)
        return nn.Dense(10, kernel_init=kernel_init)(x)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.data / 16).astype(np.float32), data.target


@functools.cache
def gradient_function(network: Network) -> Any:
    """Compiled once for networks that differ in their initialisation only."""

    def loss(variables, images, labels):
        logits, _ = network.apply(variables, images, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(lambda *arguments: jax.grad(loss)(*arguments)["params"])


def first_gradients(network: Network, seed: int) -> tuple[Any, Any]:
    """Gradients on 32 digits, and parameters."""
    images, labels = digits()
    batch = np.random.default_rng(seed).choice(len(labels), 32, replace=False)
    variables = network.init(jax.random.key(seed), images[:2])
    gradient = gradient_function(network.clone(kernel_init="he"))
    return gradient(variables, images[batch], labels[batch]), variables["params"]


class Case(NamedTuple):
    """A network, and what its first gradients ought to be called."""

    name: str
    network: Network
    verdict: str


DEEP = (32,) * 20
CASES = [
    Case("2 layers, He", Network((128, 64), "he"), "ok"),
    Case("2 layers, N(0, 1)", Network((128, 64), "normal"), "exploding"),
    Case("20 layers, He", Network(DEEP, "he"), "ok"),
    Case("20 layers, PReLU, He", Network(DEEP, "he", "prelu"), "ok"),
    Case("20 layers, N(0, 1)", Network(DEEP, "normal"), "exploding"),
    Case("20 layers, U(-.05, .05)", Network(DEEP, "uniform"), "vanishing"),
    Case("20 layers, sigmoid", Network(DEEP, "xavier", "sigmoid"), "vanishing"),
    Case("20 tanh layers, Xavier", Network(DEEP, "xavier", "tanh"), "ok"),
    Case("BatchNorm, U(-.05, .05)", Network(DEEP, "uniform", "tanh", True), "exploding"),
    Case("BatchNorm, He", Network(DEEP, "he", "tanh", True), "ok"),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (number > 2))
        for number, case in enumerate(CASES)
    ],
)
def test_the_first_gradients_tell_good_initialisations_from_bad_ones(case):
    for seed in range(6):
        gradients, params = first_gradients(case.network, seed)
        diagnosis = og.diagnose(gradients, params)
        assert diagnosis.verdict == case.verdict, f"seed {seed}\n{diagnosis}"
        assert {row.verdict for row in diagnosis.rows} <= {"ok", case.verdict}


# From a state


def test_a_state_gives_the_rows_of_the_gradients_that_the_guard_saw():
    expected = og.diagnose(GRADIENTS, PARAMS)
    for tx in (og.guard(SGD), og.stabilize(optax.adam(0.1)), optax.chain(og.guard(SGD))):
        diagnosis = og.diagnose(state_after(tx, GRADIENTS), PARAMS)
        assert verdicts(diagnosis) == verdicts(expected)
        for row, own in zip(diagnosis.rows, expected.rows, strict=True):
            assert row.shape == own.shape
            np.testing.assert_allclose(row[2:6], own[2:6], rtol=1e-6)
        assert diagnosis.zeros == ()


def test_a_state_remembers_a_skipped_step_and_a_dead_layer():
    gradients = GRADIENTS | {"scale": jnp.array(jnp.nan)}
    gradients["dense"] = gradients["dense"] | {"kernel": jnp.zeros((3, 2))}
    diagnosis = og.diagnose(state_after(og.guard(SGD), gradients), PARAMS)
    assert list(verdicts(diagnosis).values()) == ["exploding", "dead", "nonfinite"]
    assert [line.split()[0] for line in str(diagnosis).splitlines()[2:]] == [
        "scale",
        "dense/bias",
        "dense/kernel",
    ]


def test_only_the_outermost_of_nested_guards_is_read():
    tx = og.guard(optax.chain(optax.scale(1e6), og.guard(SGD)))
    diagnosis = og.diagnose(state_after(tx, GRADIENTS), PARAMS)
    assert len(diagnosis.rows) == 3
    np.testing.assert_allclose(diagnosis.rows[1].rms, 0.5, rtol=1e-6)


def test_a_nested_guard_that_never_saw_a_step_is_no_error():
    gradients = GRADIENTS | {"scale": jnp.array(jnp.inf)}
    diagnosis = og.diagnose(state_after(og.guard(optax.chain(og.guard(SGD))), gradients), PARAMS)
    assert verdicts(diagnosis)["scale"] == "nonfinite"


def test_of_guards_in_a_row_the_first_is_read():
    tx = optax.chain(og.guard(SGD), og.guard(SGD))
    diagnosis = og.diagnose(state_after(tx, GRADIENTS), PARAMS)
    np.testing.assert_allclose([row.rms for row in diagnosis.rows][1:], [0.5, 0.5], rtol=1e-6)


def test_a_guard_inside_a_loss_scale_sees_gradients_without_it():
    tx = og.dynamic_loss_scale(og.guard(SGD), initial_scale=2.0**10)
    scaled = jax.tree.map(lambda leaf: leaf * 2.0**10, GRADIENTS)
    diagnosis = og.diagnose(state_after(tx, scaled), PARAMS)
    np.testing.assert_allclose(diagnosis.rows[1].rms, 0.5, rtol=1e-6)


def test_guards_of_partitions_are_put_together():
    labels = {"dense": {"bias": "a", "kernel": "b"}, "scale": "a"}
    guarded = og.guard(optax.sgd(0.1, momentum=0.9))
    state = state_after(optax.partition({"a": guarded, "b": guarded}, labels), GRADIENTS)
    diagnosis = og.diagnose(state, PARAMS)
    assert [row.path for row in diagnosis.rows] == ["dense/bias", "dense/kernel", "scale"]
    for row, own in zip(diagnosis.rows, og.diagnose(GRADIENTS, PARAMS).rows, strict=True):
        np.testing.assert_allclose(row[2:6], own[2:6], rtol=1e-6)


def test_a_masked_guard_that_does_not_tell_its_leaves_is_an_error_with_a_remedy():
    mask = {"dense": {"bias": False, "kernel": True}, "scale": True}
    state = state_after(optax.masked(og.guard(SGD), mask), GRADIENTS)
    with pytest.raises(ValueError, match=r"inside optax\.masked.*Pass the gradients instead\."):
        og.diagnose(state, PARAMS)


def test_a_state_without_a_step_is_an_error():
    with pytest.raises(ValueError, match="has seen no gradients yet"):
        og.diagnose(og.guard(SGD).init(PARAMS), PARAMS)


def test_a_state_of_an_ensemble_is_an_error_with_a_remedy():
    state = state_after(og.guard(SGD), GRADIENTS)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    with pytest.raises(ValueError, match=r"batch axis of shape \(2,\)\. Pick a member"):
        og.diagnose(states, PARAMS)
    member = jax.tree.map(lambda leaf: leaf[0], states)
    assert og.diagnose(member, PARAMS).verdict == "exploding"


# Containers


def test_nnx_gradients_and_optimizers_are_diagnosed_under_the_names_of_the_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, og.guard(SGD), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones(3))) * 1e4)(model)
    optimizer.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    for source in (gradients, optimizer, optimizer.opt_state):
        diagnosis = og.diagnose(source, params)
        assert verdicts(diagnosis) == {"bias": "exploding", "kernel": "exploding"}
        np.testing.assert_allclose(diagnosis.rows[1].rms, 1e4, rtol=1e-6)


def test_equinox_gradients_are_diagnosed_with_the_whole_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    gradients = eqx.filter_grad(lambda model: jnp.mean(model(jnp.ones(2)) ** 2))(model)
    diagnosis = og.diagnose(gradients, model)
    assert [row.path for row in diagnosis.rows][:2] == ["layers/0/weight", "layers/0/bias"]
    assert diagnosis.verdict == "ok"


def test_lookahead_is_diagnosed_by_its_fast_parameters():
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = state_after(og.guard(optax.lookahead(SGD, 2, 0.5)), GRADIENTS, params)
    expected = verdicts(og.diagnose(GRADIENTS, PARAMS))
    assert verdicts(og.diagnose(state, params)) == expected
    assert verdicts(og.diagnose(GRADIENTS, params)) == expected


def test_one_small_transfer_is_all(monkeypatch):
    fetched = []
    device_get = jax.device_get

    def counting(tree):
        fetched.append(sum(np.size(leaf) for leaf in jax.tree.leaves(tree)))
        return device_get(tree)

    state = state_after(og.guard(SGD), GRADIENTS)
    monkeypatch.setattr(jax, "device_get", counting)
    og.diagnose(GRADIENTS, PARAMS)
    og.diagnose(state, PARAMS)
    assert len(fetched) == 2
    assert max(fetched) <= 6 * 3  # numbers for each of three arrays


# Printing


def test_it_prints_as_a_table_with_the_worst_layers_first():
    gradients = GRADIENTS | {"scale": jnp.array(jnp.nan)}
    diagnosis = og.diagnose(gradients, PARAMS)
    assert str(diagnosis).splitlines() == [
        "nonfinite: 1 nonfinite, 1 exploding, 1 ok of 3 arrays, norm 30",
        "array          shape  norm   rms    share  ratio  zeros    verdict",
        "scale         scalar   nan   nan      nan    nan     0%  nonfinite",
        "dense/bias         2    30  21.2    0.998   21.2    50%  exploding",
        "dense/kernel     3x2  1.22   0.5  0.00166   0.25     0%         ok",
    ]
    assert repr(diagnosis) == str(diagnosis)
    state = og.diagnose(state_after(og.guard(SGD), GRADIENTS), PARAMS)
    assert str(state).splitlines()[2].split()[-2:] == ["-", "exploding"]


def test_equal_verdicts_are_ordered_by_ratio():
    params = weights(a=1.0, b=1.0, c=1.0, d=1.0) | {"z": {"bias": jnp.zeros(2)}}
    gradients = weights(a=1e-9, b=1e-8, c=0.1, d=0.2) | {"z": {"bias": jnp.full(2, 1e-10)}}
    lines = str(og.diagnose(gradients, params)).splitlines()[2:]
    assert [line[0] for line in lines] == ["a", "b", "z", "d", "c"]


def test_long_tables_end_with_a_count_of_what_is_left_out():
    params = {f"w{place:02}": jnp.ones((2, 2)) for place in range(43)}
    gradients = params | {"w42": 100 * params["w42"]}
    lines = str(og.diagnose(gradients, params)).splitlines()
    assert lines[2].startswith("w42")
    assert len(lines) == 2 + 40 + 1
    assert lines[-1] == "... and 3 more, none of them worse; .rows has all"


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exploding_ratio": 0.0}, ValueError, r"exploding_ratio must be .*\(0, inf\]"),
        ({"exploding_ratio": "2"}, TypeError, "exploding_ratio must be a real scalar"),
        ({"vanishing_ratio": -1.0}, ValueError, r"vanishing_ratio must be .* in \[0, 2\), got -1"),
        ({"vanishing_ratio": 3.0}, ValueError, r"vanishing_ratio must be .* in \[0, 2\), got 3"),
        ({"dead_fraction": 0.0}, ValueError, r"dead_fraction must be .* in \(0, 1\]"),
        ({"dead_fraction": 1.5}, ValueError, r"dead_fraction must be .* in \(0, 1\]"),
    ],
)
def test_bad_limits_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        og.diagnose(GRADIENTS, PARAMS, **options)


def test_gradients_of_other_parameters_are_errors():
    with pytest.raises(ValueError, match=r"kernel of shape \(2, 2\) is not there\. Pass the"):
        og.diagnose({"kernel": jnp.ones((2, 2))}, PARAMS)
    other = PARAMS | {"scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"scale of shape \(\) is of shape \(4,\) there"):
        og.diagnose(GRADIENTS, other)
    with pytest.raises(ValueError, match="params has 1 float leaves, but the guard watches 3"):
        og.diagnose(state_after(og.guard(SGD), GRADIENTS), {"scale": jnp.ones(())})


def test_a_state_without_a_guard_is_an_error():
    with pytest.raises(ValueError, match="or a state that holds a guard; but 0/mu/dense/bias"):
        og.diagnose(optax.adam(0.1).init(PARAMS), PARAMS)


def test_inside_jit_the_error_names_the_remedy():
    with pytest.raises(TypeError, match=r"og\.diagnose runs on the host.*Call it outside of jit"):
        jax.jit(og.diagnose)(GRADIENTS, PARAMS)


def test_a_state_beside_a_clip_by_units_calls_nothing_dead_that_may_be_tiny():
    params = {"first": jnp.ones((30, 20)), "last": jnp.ones((2, 2))}
    gradients = {"first": jnp.full((30, 20), 1e-27), "last": jnp.full((2, 2), 0.01)}
    for scope in ("global", "leaf", "unit"):
        tx = og.guard(optax.chain(og.clip_by_norm(1.0, scope=scope), optax.sgd(0.1)))
        _, state = tx.update(gradients, tx.init(params), params)
        first, last = og.diagnose(state, params).rows
        assert (first.verdict, last.verdict) == ("vanishing", "ok"), scope
        dead = gradients | {"first": jnp.zeros((30, 20))}
        _, state = tx.update(dead, tx.init(params), params)
        expected = "vanishing" if scope == "unit" else "dead"
        assert og.diagnose(state, params).rows[0].verdict == expected
    assert og.diagnose(dead, params).rows[0].verdict == "dead"  # the gradients tell
