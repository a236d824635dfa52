"""What is compared: parameter trees, optimizers, and the pipelines built around an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_guard as og

Optimizer = optax.GradientTransformation
BARE = "bare"


class Tree(NamedTuple):
    """Abstract parameters and gradients."""

    params: Any
    gradients: Any

    @property
    def gradient_bytes(self) -> int:
        return num_bytes(self.gradients)

    @property
    def params_bytes(self) -> int:
        return num_bytes(self.params)

    @property
    def large(self) -> int:
        """Elements of the smallest matrix, or of the smallest array if there is no matrix."""
        leaves = jax.tree.leaves(self.params)
        matrices = [leaf.size for leaf in leaves if leaf.ndim > 1]
        return min(matrices or [leaf.size for leaf in leaves])


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_tree(shapes: Any, *, gradient_dtype: Any = jnp.float32) -> Tree:
    def of_dtype(dtype):
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    return Tree(of_dtype(jnp.float32), of_dtype(gradient_dtype))


def transformer_shapes(
    *, width: int, depth: int, vocabulary: int, context: int
) -> dict[str, tuple[int, ...]]:
    """Twelve arrays a layer and four more, named as in GPT-2."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (vocabulary, width),
        "positions": (context, width),
        "norm/scale": (width,),
        "norm/bias": (width,),
    }
    for layer in range(depth):
        of_layer = {
            **{f"attention/{name}": (width, width) for name in ("query", "key", "value", "out")},
            "mlp/up": (width, 4 * width),
            "mlp/up_bias": (4 * width,),
            "mlp/down": (4 * width, width),
            "mlp/down_bias": (width,),
            **{f"norm{i}/{name}": (width,) for i in (1, 2) for name in ("scale", "bias")},
        }
        shapes |= {f"layer{layer:02d}/{name}": shape for name, shape in of_layer.items()}
    return shapes


def language_model_shapes(
    *, depth: int, width: int, hidden: int, grouped: int, vocabulary: int
) -> dict[str, tuple[int, ...]]:
    """Nine arrays a layer and three more, as in Llama 3."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (vocabulary, width),
        "unembedding": (width, vocabulary),
        "norm": (width,),
    }
    for layer in range(depth):
        of_layer = {
            "attention/query": (width, width),
            "attention/key": (width, grouped),
            "attention/value": (width, grouped),
            "attention/out": (width, width),
            "mlp/gate": (width, hidden),
            "mlp/up": (width, hidden),
            "mlp/down": (hidden, width),
            "norm1": (width,),
            "norm2": (width,),
        }
        shapes |= {f"layer{layer:02d}/{name}": shape for name, shape in of_layer.items()}
    return shapes


def mlp_shapes(*sizes: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        shapes |= {f"layer{i}/kernel": (fan_in, fan_out), f"layer{i}/bias": (fan_out,)}
    return shapes


_GPT2_SMALL = transformer_shapes(width=768, depth=12, vocabulary=20_000, context=1024)
_GPT2_TOY = transformer_shapes(width=128, depth=3, vocabulary=8_000, context=256)

TREES: dict[str, Callable[[], Tree]] = {
    "transformer": lambda: make_tree(_GPT2_SMALL),
    "one array": lambda: make_tree({"kernel": (8192, 8192)}),
    "1000 arrays": lambda: make_tree({f"array{i:04d}": (1024,) for i in range(1000)}),
    "tiny": lambda: make_tree(mlp_shapes(64, 32, 10)),
    "bf16 gradients": lambda: make_tree(_GPT2_SMALL, gradient_dtype=jnp.bfloat16),
    "toy transformer": lambda: make_tree(_GPT2_TOY),
}

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "sgd": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-4),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "lamb": lambda: optax.lamb(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
}


class Variant(NamedTuple):
    """A pipeline around an optimizer.

    Attributes:
      make: from the bare optimizer to the pipeline.
      is_ours: whether it is one of this library.
      judges_update: whether a healthy step takes dear branches, too, as it does in plain Optax.
    """

    make: Callable[[Optimizer], Optimizer]
    is_ours: bool
    judges_update: bool = False

    @property
    def is_hot(self) -> bool:
        """Whether a healthy step takes the cheap branch of every conditional."""
        return self.is_ours and not self.judges_update


def _skip_in_multi_steps(optimizer: Optimizer) -> Optimizer:
    return optax.MultiSteps(
        optimizer, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()


OURS = {
    "og.guard": Variant(og.guard, True),
    "og.stabilize": Variant(og.stabilize, True),
    "og.stabilize, norm": Variant(lambda tx: og.stabilize(tx, clip=og.clip_by_norm(1.0)), True),
    "og.guard, zscore": Variant(lambda tx: og.guard(optax.chain(og.clip_by_zscore(), tx)), True),
    "og.guard, zscore by leaf": Variant(
        lambda tx: og.guard(optax.chain(og.clip_by_zscore(scope="leaf"), tx)), True
    ),
    "og.guard, zscore by unit": Variant(
        lambda tx: og.guard(optax.chain(og.clip_by_zscore(scope="unit"), tx)), True
    ),
    "og.guard, norm by unit": Variant(
        lambda tx: og.guard(optax.chain(og.clip_by_norm(1.0, scope="unit"), tx)), True
    ),
    "og.guard, zscore, check_update": Variant(
        lambda tx: og.guard(optax.chain(og.clip_by_zscore(), tx), check_update=True),
        is_ours=True,
        judges_update=True,
    ),
    "og.clip_by_zscore": Variant(lambda tx: optax.chain(og.clip_by_zscore(), tx), True),
}
REFERENCES = {
    BARE: Variant(lambda tx: tx, False),
    "clip_by_global_norm": Variant(
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx), False
    ),
}
PEERS = {
    "apply_if_finite(clip)": Variant(
        lambda tx: optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), tx), 5), False
    ),
    "clip, apply_if_finite": Variant(
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(tx, 5)), False
    ),
    "MultiSteps(skip_not_finite)": Variant(_skip_in_multi_steps, False),
    "adaptive_grad_clip": Variant(
        lambda tx: optax.chain(optax.adaptive_grad_clip(0.01), tx), False
    ),
}
VARIANTS = REFERENCES | PEERS | OURS
