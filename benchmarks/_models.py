"""Small models in plain JAX, each with its loss and a batch of random data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks._setups import mlp_shapes, transformer_shapes

Params = dict[str, jax.Array]


class Model(NamedTuple):
    """Shapes of the parameters, the loss of ``(params, inputs, labels)``, and a batch."""

    shapes: dict[str, tuple[int, ...]]
    loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
    batch: Callable[[], tuple[jax.Array, jax.Array]]

    def init(self) -> Params:
        """Normal numbers of variance 1 / fan-in for matrices, zeros for biases, ones for scales."""
        keys = jax.random.split(jax.random.key(0), len(self.shapes))

        def draw(key, name, shape):
            if len(shape) > 1:
                return jax.random.normal(key, shape) * shape[0] ** -0.5
            return jnp.ones(shape) if name.endswith("scale") else jnp.zeros(shape)

        pairs = zip(keys, self.shapes.items(), strict=True)
        return {name: draw(key, name, shape) for key, (name, shape) in pairs}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _random_batch(
    shape: tuple[int, ...], num_classes: int, labels_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    inputs = jax.random.normal(jax.random.key(1), shape)
    return inputs, jax.random.randint(jax.random.key(2), labels_shape, 0, num_classes)


def mlp(*sizes: int, batch_size: int) -> Model:
    """Dense layers with ReLU between them."""
    depth = len(sizes) - 1

    def loss(params, inputs, labels):
        hidden = inputs
        for i in range(depth):
            hidden = hidden @ params[f"layer{i}/kernel"] + params[f"layer{i}/bias"]
            hidden = jax.nn.relu(hidden) if i < depth - 1 else hidden
        return _cross_entropy(hidden, labels)

    return Model(
        mlp_shapes(*sizes),
        loss,
        lambda: _random_batch((batch_size, sizes[0]), sizes[-1], (batch_size,)),
    )


def _rnn_cell(gates, carry):
    (hidden,) = carry
    x, h = gates(hidden)
    return (jnp.tanh(x + h),)


def _gru_cell(gates, carry):
    (hidden,) = carry
    x, h = gates(hidden)
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = (jnp.split(z, 3, -1) for z in (x, h))
    update = jax.nn.sigmoid(x_update + h_update)
    new = jnp.tanh(x_new + jax.nn.sigmoid(x_reset + h_reset) * h_new)
    return (update * hidden + (1 - update) * new,)


def _lstm_cell(gates, carry):
    hidden, cell = carry
    x, h = gates(hidden)
    in_gate, forget_gate, new, out_gate = jnp.split(x + h, 4, axis=-1)
    cell = jax.nn.sigmoid(forget_gate + 1) * cell + jax.nn.sigmoid(in_gate) * jnp.tanh(new)
    return jax.nn.sigmoid(out_gate) * jnp.tanh(cell), cell


_CELLS = {"rnn": (_rnn_cell, 1, 1), "gru": (_gru_cell, 3, 1), "lstm": (_lstm_cell, 4, 2)}


def recurrent(kind: str, *, width: int, length: int, batch_size: int) -> Model:
    """One recurrent layer, then a class for the whole sequence."""
    cell, num_gates, num_carried = _CELLS[kind]
    num_features, num_classes = 32, 10
    shapes = {
        "input/kernel": (num_features, num_gates * width),
        "input/bias": (num_gates * width,),
        "recurrent/kernel": (width, num_gates * width),
        "output/kernel": (width, num_classes),
        "output/bias": (num_classes,),
    }

    def loss(params, inputs, labels):
        def step(carry, x):
            def gates(hidden):
                return x, hidden @ params["recurrent/kernel"]

            return cell(gates, carry), None

        projected = inputs @ params["input/kernel"] + params["input/bias"]
        start = tuple(jnp.zeros((inputs.shape[1], width)) for _ in range(num_carried))
        carry, _ = jax.lax.scan(step, start, projected)
        return _cross_entropy(carry[0] @ params["output/kernel"] + params["output/bias"], labels)

    return Model(
        shapes,
        loss,
        lambda: _random_batch((length, batch_size, num_features), num_classes, (batch_size,)),
    )


def _normalize(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def transformer(
    *, width: int, depth: int, num_heads: int, vocabulary: int, context: int, batch_size: int
) -> Model:
    """A causal language model with tied embeddings and normalisation before each block."""
    shapes = transformer_shapes(width=width, depth=depth, vocabulary=vocabulary, context=context)

    def attend(params, prefix, x):
        def project(name):
            projected = x @ params[f"{prefix}/attention/{name}"]
            return projected.reshape(*x.shape[:2], num_heads, -1)

        mixed = jax.nn.dot_product_attention(
            *map(project, ("query", "key", "value")), is_causal=True
        )
        return mixed.reshape(x.shape) @ params[f"{prefix}/attention/out"]

    def loss(params, inputs, labels):
        def norm(x, prefix):
            return _normalize(x, params[f"{prefix}/scale"], params[f"{prefix}/bias"])

        x = params["tokens"][inputs] + params["positions"]
        for layer in range(depth):
            prefix = f"layer{layer:02d}"
            x = x + attend(params, prefix, norm(x, f"{prefix}/norm1"))
            hidden = norm(x, f"{prefix}/norm2") @ params[f"{prefix}/mlp/up"]
            hidden = jax.nn.gelu(hidden + params[f"{prefix}/mlp/up_bias"])
            x = x + hidden @ params[f"{prefix}/mlp/down"] + params[f"{prefix}/mlp/down_bias"]
        return _cross_entropy(norm(x, "norm") @ params["tokens"].T, labels)

    def batch():
        tokens = jax.random.randint(jax.random.key(1), (batch_size, context + 1), 0, vocabulary)
        return tokens[:, :-1], tokens[:, 1:]

    return Model(shapes, loss, batch)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp 64-64-10": lambda: mlp(64, 64, 10, batch_size=64),
    "mlp 784-128-64-10": lambda: mlp(784, 128, 64, 10, batch_size=128),
    "rnn": lambda: recurrent("rnn", width=128, length=32, batch_size=64),
    "gru": lambda: recurrent("gru", width=128, length=32, batch_size=64),
    "lstm": lambda: recurrent("lstm", width=128, length=32, batch_size=64),
    "transformer": lambda: transformer(
        width=128, depth=2, num_heads=4, vocabulary=512, context=64, batch_size=16
    ),
}
