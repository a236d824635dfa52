"""A small decoder on characters, its layers as separate arrays or stacked, and its training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks._rules import _demo  # noqa: F401 - puts the examples on the path

import char_rnn  # isort: skip

NUM_HEADS = 4
NUM_WINDOWS = 64  # of validation


class Sizes(NamedTuple):
    num_layers: int = 3
    width: int = 64
    context: int = 48
    batch_size: int = 16


SIZES = Sizes()


class Text(NamedTuple):
    """Characters as int32; ``validation`` is ``[windows, context + 1]``."""

    train: jax.Array
    validation: jax.Array
    num_characters: int


def load_text(sizes: Sizes = SIZES) -> Text:
    """What scikit-learn says of its data sets, as in `examples/char_rnn.py`."""
    corpus = char_rnn.make_corpus(char_rnn.load_text(None))
    windows = corpus.validation[:NUM_WINDOWS, : sizes.context + 1]
    return Text(jnp.asarray(corpus.train), jnp.asarray(windows), len(corpus.alphabet))


def init(
    key: jax.Array, num_characters: int, sizes: Sizes = SIZES, *, stacked: bool = False
) -> dict[str, Any]:
    """Weights of a variance of 1 / inputs; ``layers`` is a list, or stacked arrays."""
    keys, width = iter(jax.random.split(key, 3 + 4 * sizes.num_layers)), sizes.width

    def normal(rows, columns, scale=None):
        scale = rows**-0.5 if scale is None else scale
        return scale * jax.random.normal(next(keys), (rows, columns))

    def layer():
        return {
            "norm_1": jnp.ones(width),
            "qkv": normal(width, 3 * width),
            "out": normal(width, width),
            "norm_2": jnp.ones(width),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width),
        }

    layers = [layer() for _ in range(sizes.num_layers)]
    return {
        "embed": normal(num_characters, width, 0.5),
        "position": normal(sizes.context, width, 0.1),
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if stacked else layers,
        "norm": jnp.ones(width),
        "head": normal(width, num_characters),
    }


def _normalize(x: jax.Array, gain: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return gain * x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def _apply_layer(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    heads = (*x.shape[:2], NUM_HEADS, x.shape[-1] // NUM_HEADS)
    parts = jnp.split(_normalize(x, layer["norm_1"]) @ layer["qkv"], 3, axis=-1)
    mixed = jax.nn.dot_product_attention(*(part.reshape(heads) for part in parts), is_causal=True)
    x = x + mixed.reshape(x.shape) @ layer["out"]
    hidden = jax.nn.gelu(_normalize(x, layer["norm_2"]) @ layer["up"])
    return x + hidden @ layer["down"]


def mean_loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Nats per character of ``tokens [batch, context + 1]``."""
    x = params["embed"][tokens[:, :-1]] + params["position"]
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            x = _apply_layer(layer, x)
    else:
        x, _ = jax.lax.scan(lambda x, layer: (_apply_layer(layer, x), None), x, params["layers"])
    logits = _normalize(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Burst(NamedTuple):
    """Batches of random characters: ``length`` in a row, every ``every`` steps from ``first``.

    Their loss counts ``loss_scale`` times; 0 for no burst.
    """

    loss_scale: Any
    first: int = 200
    every: int = 60
    length: int = 3


NO_BURST = Burst(0.0)


def sample(key: jax.Array, text: Text, sizes: Sizes = SIZES) -> jax.Array:
    starts = jax.random.randint(key, (sizes.batch_size, 1), 0, len(text.train) - sizes.context)
    return text.train[starts + np.arange(sizes.context + 1)]


class Trained(NamedTuple):
    params: Any
    state: Any  # of the optimizer
    loss: jax.Array  # of validation


def train(
    optimizer: optax.GradientTransformation,
    text: Text,
    num_steps: int,
    seed: jax.Array,
    *,
    burst: Burst = NO_BURST,
    stacked: bool = False,
    sizes: Sizes = SIZES,
) -> Trained:
    """Parameters, state and validation loss at the end."""
    optimizer = optax.with_extra_args_support(optimizer)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, text.num_characters, sizes, stacked=stacked)

    def step(carry, index):
        params, state = carry
        key, noise_key = jax.random.split(jax.random.fold_in(data_key, index))
        since = index - burst.first
        is_bad = (since >= 0) & (since % burst.every < burst.length) & (burst.loss_scale > 0)
        tokens = sample(key, text, sizes)
        noise = jax.random.randint(noise_key, tokens.shape, 0, text.num_characters)
        tokens = jnp.where(is_bad, noise, tokens)
        factor = jnp.where(is_bad, burst.loss_scale, 1.0)
        loss, grads = jax.value_and_grad(lambda p: factor * mean_loss(p, tokens))(params)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    (params, state), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))
    return Trained(params, state, mean_loss(_evaluated(state, params), text.validation))


def _evaluated(state: Any, params: Any) -> Any:
    """The averaged parameters of a schedule-free optimizer, which are those to judge."""

    def is_schedule_free(node):
        return isinstance(node, optax.contrib.ScheduleFreeState)

    state = state if _is_plain(state) else og.unwrap(state)
    nodes = filter(is_schedule_free, jax.tree.leaves(state, is_leaf=is_schedule_free))
    for node in nodes:
        return optax.contrib.schedule_free_eval_params(node, params)
    return params


def _is_plain(state: Any) -> bool:
    try:
        og.metrics(state)
    except ValueError:
        return True
    return False
