"""Libraries that take an Optax optimizer, used as their own users do; each where it is installed.

Their loops box parameters, hide the state, pass a loss or none, scan, vmap and shard. Every client
below trains on one small problem and returns what its user gets: parameters, the loss at the end,
and the optimizer's state where it gives that out. In a bad run one batch holds a NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import assert_close

import optax_guard as og

pytestmark = pytest.mark.clients

STEPS, BAD_STEP = 24, 7
X = np.random.default_rng(0).normal(size=(STEPS, 16, 3)).astype(np.float32)
Y = X @ np.float32([1.0, -2.0, 0.5]) + 0.3
BAD_X = X.copy()
BAD_X[BAD_STEP, 2, 1] = np.nan


class Trained(NamedTuple):
    """What a client gives out; no state where it keeps that to itself."""

    params: Any
    loss: Any
    state: Any = None


Train = Callable[[bool], Trained]  # with a bad batch or without; compiled once where the client can
CLIENTS: list[Callable[[optax.GradientTransformationExtraArgs], Train]] = []


def client(function: Any) -> Any:
    CLIENTS.append(function)
    return function


def batches(is_bad: bool) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(BAD_X if is_bad else X), jnp.asarray(Y)


def in_one(is_bad: bool) -> tuple[jax.Array, jax.Array]:
    """The same in one piece, for clients that draw batches themselves."""
    x, y = batches(is_bad)
    return x.reshape(-1, 3), y.reshape(-1)


def squared_error(predict: Callable[[jax.Array], jax.Array]) -> jax.Array:
    x, y = in_one(is_bad=False)
    return jnp.mean((predict(x) - y) ** 2)


def start() -> dict[str, jax.Array]:
    return {"weights": jnp.zeros(3), "bias": jnp.zeros(())}


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["weights"] + params["bias"]


def linear_loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((linear(params, x) - y) ** 2)


@client
def numpyro(optimizer):
    """NumPyro hands the loss over; a scan over its steps, as in its own ``SVI.run``."""
    numpyro = pytest.importorskip("numpyro")
    normal = numpyro.distributions.Normal

    def model(x, y):
        params = {
            "weights": numpyro.sample("weights", normal(0, 1).expand([3]).to_event(1)),
            "bias": numpyro.sample("bias", normal(0, 1)),
        }
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", normal(linear(params, x), 0.5), obs=y)

    guide = numpyro.infer.autoguide.AutoDelta(model)
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())

    @jax.jit
    def run(xs, ys):
        state = svi.init(jax.random.key(0), xs[0], ys[0])
        return jax.lax.scan(lambda state, batch: svi.update(state, *batch), state, (xs, ys))[0]

    def train(is_bad):
        state = run(*batches(is_bad))
        found = svi.get_params(state)
        params = {name.removesuffix("_auto_loc"): leaf for name, leaf in found.items()}
        return Trained(found, squared_error(partial(linear, params)), state)

    return train


@client
def blackjax(optimizer):
    """BlackJAX's mean-field approximation, scanned over: parameters are a tuple of two trees."""
    vi = pytest.importorskip("blackjax").vi.meanfield_vi

    def step(state, key_and_batch):
        key, x, y = key_and_batch

        def log_density(params):
            return jax.scipy.stats.norm.logpdf(y, linear(params, x), 0.5).sum()

        return vi.step(key, state, log_density, optimizer)

    run = jax.jit(partial(jax.lax.scan, step))

    def train(is_bad):
        keys = jax.random.split(jax.random.key(1), STEPS)
        state, _ = run(vi.init(start(), optimizer), (keys, *batches(is_bad)))
        loss = squared_error(partial(linear, state.mu))
        return Trained((state.mu, state.rho), loss, state.opt_state)

    return train


@client
def flowjax(optimizer):
    """The loop is Flowjax's; it wraps parameters and hides the state."""
    pytest.importorskip("flowjax")
    import equinox as eqx
    from flowjax.distributions import Normal
    from flowjax.train import fit_to_data
    from flowjax.train.losses import MaximumLikelihoodLoss

    flow, loss_fn = Normal(jnp.zeros(3)), MaximumLikelihoodLoss()
    options = {"max_epochs": 3, "batch_size": 32, "return_best": False, "show_progress": False}

    def train(is_bad):
        data = 2 + 3 * in_one(is_bad)[0]
        trained, _ = fit_to_data(
            jax.random.key(1), flow, data, loss_fn=loss_fn, optimizer=optimizer, **options
        )
        loss = -trained.log_prob(2 + 3 * in_one(False)[0]).mean()
        return Trained(eqx.filter(trained, eqx.is_inexact_array), loss)

    return train


@client
def gpjax(optimizer):
    """GPJax scans over steps in float64, draws the batches and hides the state."""
    gpx = pytest.importorskip("gpjax")
    import equinox as eqx

    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF())

    def objective(model, batch):
        return -gpx.objectives.conjugate_mll(model, batch)

    @eqx.filter_jit
    def fit(x, y):
        options = {"num_iters": 2 * STEPS, "batch_size": 16, "verbose": False}
        data = gpx.Dataset(x, y[:, None])
        model = prior * gpx.likelihoods.Gaussian()
        return gpx.fit(
            model=model, objective=objective, train_data=data, optim=optimizer, **options
        )

    def train(is_bad):
        with jax.enable_x64(True):
            model, losses = fit(*map(jnp.float64, in_one(is_bad)))
        return Trained(eqx.filter(model, eqx.is_inexact_array), losses[-1])

    return train


@client
def jaxopt(optimizer):
    jaxopt = pytest.importorskip("jaxopt")
    solver = jaxopt.OptaxSolver(linear_loss, optimizer)
    update = jax.jit(solver.update)

    def train(is_bad):
        params, state = start(), solver.init_state(start(), X[0], Y[0])
        for x, y in zip(*batches(is_bad), strict=True):
            params, state = update(params, state, x, y)
        return Trained(params, squared_error(partial(linear, params)), state)

    return train


@client
def haiku(optimizer):
    """The loop of Haiku's examples: no parameters are given to ``update``."""
    hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 1])(x)[..., 0]))

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda params: jnp.mean((network.apply(params, x) - y) ** 2))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    def train(is_bad):
        params = network.init(jax.random.key(0), X[0])
        state = optimizer.init(params)
        for x, y in zip(*batches(is_bad), strict=True):
            params, state = step(params, state, x, y)
        return Trained(params, squared_error(partial(network.apply, params)), state)

    return train


@client
def equinox(optimizer):
    """Equinox's ensembles: models and states are made and trained under ``filter_vmap``."""
    eqx = pytest.importorskip("equinox")

    @eqx.filter_jit
    @eqx.filter_vmap
    def make(key):
        model = eqx.nn.MLP(3, "scalar", 8, 1, key=key)
        return model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    @partial(eqx.filter_vmap, in_axes=(eqx.if_array(0), eqx.if_array(0), None, None))
    def step(model, state, x, y):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    def train(is_bad):
        model, state = make(jax.random.split(jax.random.key(0), 2))
        for x, y in zip(*batches(is_bad), strict=True):
            model, state = step(model, state, x, y)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        first, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        loss = squared_error(jax.vmap(eqx.combine(first, static)))
        return Trained(first, loss, state)

    return train


@client
def linen_partitioning(optimizer):
    """Linen's boxes, with mesh axes, around parameters, and so in the state; made sharded."""
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    split = partial(linen.with_partitioning, linen.initializers.lecun_normal())
    hidden = linen.Dense(8, kernel_init=split((None, "model")))
    output = linen.Dense(1, kernel_init=split(("model", None)))
    network = linen.Sequential([hidden, linen.relu, output, partial(jnp.squeeze, axis=-1)])
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def make(key):
        return TrainState.create(
            apply_fn=network.apply, params=network.init(key, X[0]), tx=optimizer
        )

    shardings = linen.get_sharding(jax.eval_shape(make, jax.random.key(0)), mesh)
    make = jax.jit(make, out_shardings=shardings)

    @partial(jax.jit, out_shardings=shardings, donate_argnums=0)
    def step(state, x, y):
        grads = jax.grad(lambda params: jnp.mean((network.apply(params, x) - y) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    def train(is_bad):
        state = make(jax.random.key(0))
        for x, y in zip(*batches(is_bad), strict=True):
            state = step(state, x, y)
        loss = squared_error(partial(network.apply, state.params))
        return Trained(state.params, loss, state)

    return train


@client
def nnx_partitioning(optimizer):
    """NNX's variables carry their mesh axes, which the optimizer's state takes over."""
    nnx = pytest.importorskip("flax.nnx")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = partial(nnx.with_partitioning, nnx.initializers.lecun_normal())

    @nnx.jit
    def make():
        rngs = nnx.Rngs(0)
        hidden = nnx.Linear(3, 8, kernel_init=split((None, "model")), rngs=rngs)
        output = nnx.Linear(8, 1, kernel_init=split(("model", None)), rngs=rngs)
        model = nnx.Sequential(hidden, nnx.relu, output, partial(jnp.squeeze, axis=-1))
        made = model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        state = nnx.state(made)
        nnx.update(made, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return made

    @nnx.jit
    def step(model, optimizer, x, y):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    def train(is_bad):
        with jax.set_mesh(mesh):
            model, made = make()
            for x, y in zip(*batches(is_bad), strict=True):
                step(model, made, x, y)
            return Trained(nnx.state(model, nnx.Param), squared_error(model), made)

    return train


@client
def penzai(optimizer):
    """A trainer that owns its step; parameters have labels and named axes."""
    pytest.importorskip("penzai")
    from penzai import pz
    from penzai.models.simple_mlp import MLP
    from penzai.toolshed.basic_training import StatefulTrainer

    def predict(model, x):
        named = pz.nx.wrap(x).tag("batch", "features")
        return model(named).unwrap("batch", "features")[..., 0]

    def loss_fn(model, state, rng, x, y):
        del rng
        return jnp.mean((predict(model, x) - y) ** 2), state, {}

    def train(is_bad):
        model = MLP.from_config(jax.random.key(0), [3, 8, 1])
        trainer = StatefulTrainer.build(jax.random.key(1), model, optimizer, loss_fn)
        for x, y in zip(*batches(is_bad), strict=True):
            trainer.step(x=x, y=y)
        _, params = pz.unbind_params(model, freeze=True)
        loss = squared_error(partial(predict, model))
        return Trained(params, loss, trainer.state.value.opt_state)

    return train


@client
def ppo(optimizer):
    """All of a run in one ``jit`` and ``vmap`` over seeds: made, rolled out and scanned inside."""
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    actor, critic = linen.Dense(1), linen.Dense(1)

    def log_prob(params, x, action):
        return -2 * (action - actor.apply(params["actor"], x)[..., 0]) ** 2

    def loss_fn(params, x, action, old, reward):
        value = critic.apply(params["critic"], x)[..., 0]
        gain = jax.lax.stop_gradient(reward - value)
        ratio = jnp.exp(log_prob(params, x, action) - old)
        surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain)
        return jnp.mean(0.5 * (value - reward) ** 2 - surrogate)

    def epoch(state, key_and_batch):
        key, x, y = key_and_batch
        mean = actor.apply(state.params["actor"], x)[..., 0]
        action = mean + 0.5 * jax.random.normal(key, mean.shape)
        data = x, action, log_prob(state.params, x, action), -((action - y) ** 2)
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), data)

        def step(state, half):
            return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, *half)), None

        return jax.lax.scan(step, state, halves)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, None))
    def run(key, xs, ys):
        params = {"actor": actor.init(key, xs[0]), "critic": critic.init(key, xs[0])}
        state = TrainState.create(apply_fn=None, params=params, tx=optimizer)
        return jax.lax.scan(epoch, state, (jax.random.split(key, STEPS), xs, ys))[0]

    def train(is_bad):
        states = run(jax.random.split(jax.random.key(0), 2), *batches(is_bad))
        state = jax.tree.map(lambda leaf: leaf[0], states)
        loss = squared_error(lambda x: actor.apply(state.params["actor"], x)[..., 0])
        return Trained(state.params, loss, state)

    return train


@client
def brax(optimizer):
    """Brax's step: in ``pmap``, on averaged gradients, without parameters."""
    gradients = pytest.importorskip("brax.training.gradients")
    update = gradients.gradient_update_fn(linear_loss, optimizer, pmap_axis_name="i")
    step = jax.pmap(lambda params, state, x, y: update(params, x, y, optimizer_state=state), "i")

    def train(is_bad):
        made = start(), optimizer.init(start())
        params, state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), made)
        for x, y in zip(*batches(is_bad), strict=True):
            _, params, state = step(params, state, x.reshape(2, 8, 3), y.reshape(2, 8))
        params, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        return Trained(params, squared_error(partial(linear, params)), state)

    return train


@client
def tunix(optimizer):
    """A trainer that owns the loop; it keeps an ``nnx.Optimizer`` and shows it."""
    peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")
    from flax import nnx

    def loss_fn(model, x, y):
        return jnp.mean((model(x)[..., 0] - y) ** 2)

    def train(is_bad):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
        trainer = peft_trainer.PeftTrainer(model, optimizer, config).with_loss_fn(loss_fn)
        trainer.train([{"x": x, "y": y} for x, y in zip(*batches(is_bad), strict=True)], None)
        loss = squared_error(lambda x: model(x)[..., 0])
        return Trained(nnx.state(model, nnx.Param), loss, trainer.optimizer)

    return train


LEARNING_RATE = 0.03
LAG = 0.05 * float(np.mean(Y**2))  # a twentieth of what most losses start from
each_protection = pytest.mark.parametrize(
    "protect", [og.guard, og.stabilize], ids=["guard", "stabilize"]
)


@functools.cache
def trained_bare(client: Any) -> Trained:
    return client(optax.adam(LEARNING_RATE))(False)


def inexact_leaves(tree: Any) -> list[np.ndarray]:
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return [leaf for leaf in leaves if np.issubdtype(leaf.dtype, np.inexact)]


@each_protection
@pytest.mark.parametrize("client", CLIENTS, ids=[each.__name__ for each in CLIENTS])
def test_a_client_trains_through_a_bad_batch(client, protect):
    calls: list[tuple[int, og.SkipReason, tuple[str, ...]]] = []
    train = client(protect(optax.adam(LEARNING_RATE), notify=lambda *call: calls.append(call)))
    bare, healthy = trained_bare(client), train(False)
    jax.effects_barrier()
    assert not calls
    if protect is og.guard:  # XLA may fuse in another way, and so round
        pairs = zip(inexact_leaves(healthy.params), inexact_leaves(bare.params), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(healthy.loss, bare.loss, rtol=0.02, atol=LAG)

    trained = train(True)
    jax.effects_barrier()
    assert all(np.isfinite(leaf).all() for leaf in inexact_leaves(trained.params))
    np.testing.assert_allclose(trained.loss, bare.loss, rtol=0.04, atol=2 * LAG)
    assert calls and all(reason & og.SkipReason.GRADIENT and names for _, reason, names in calls)
    if trained.state is not None:
        step, _, names = calls[-1]
        assert og.metrics(trained.state)["guard/skipped_total"] == len({call[0] for call in calls})
        assert og.explain(trained.state, trained.params).startswith(f"Step {step} was skipped")
        assert set(names) <= set(og.layer_norms(trained.state, trained.params))


@each_protection
def test_optimistix_stops_where_a_function_is_undefined(protect):
    """Optimistix makes a pytree of the optimizer's closures, and passes the function on."""
    optx = pytest.importorskip("optimistix")
    import equinox as eqx

    calls: list[tuple[Any, ...]] = []

    @eqx.filter_jit
    def minimise(optimizer, lowest):
        def function(params, lowest):
            distance = linear_loss(params, X[0], Y[0])
            return distance + 0 * jnp.sqrt(params["weights"][1] - lowest)  # NaN below the lowest

        solver = optx.OptaxMinimiser(optimizer, rtol=1e-4, atol=1e-4)
        found = optx.minimise(function, solver, start(), lowest, max_steps=300, throw=False)
        return found.value, found.state

    optimizer = optax.adam(0.1)
    tx = protect(optimizer, notify=lambda *call: calls.append(call))
    low, high = jnp.float32(-10), jnp.float32(-1)
    bare, _ = minimise(optimizer, low)
    healthy, _ = minimise(tx, low)
    jax.effects_barrier()
    assert not calls
    assert_close(healthy, bare, rtol=1e-2, atol=1e-2)

    stopped, state = minimise(tx, high)
    jax.effects_barrier()
    assert -1.2 < stopped["weights"][1] < -1 and np.isfinite(stopped["bias"])
    assert og.metrics(state)["guard/gave_up"] and calls[0][2] == ("weights",)
    assert "weights" in og.explain(state, stopped)
