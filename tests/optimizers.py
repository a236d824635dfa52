"""Every optimizer of Optax, and the contexts in which people use one.

Optimizers are found by looking into ``optax`` and ``optax.contrib``, so that a new one is seen as
soon as it is installed. Everything else here is data.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

LEARNING_RATE = 0.05


# Optimizers

# Arguments other than the learning rate: those that have no default, and sizes that fit PARAMS.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adafactor": {"min_dim_size_to_factor": 2, "momentum": 0.9},
    "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0, "momentum": 0.9},
    "galore": {"rank": 2, "update_proj_gap": 3},
    "lbfgs": {"memory_size": 3},
    "noisy_sgd": {"key": 0},
    "schedule_free": {"base_optimizer": optax.sgd(LEARNING_RATE, momentum=0.9)},
    "sgd": {"momentum": 0.9},
    "sophia": {"update_interval": 3},
}
# What an optimizer wants from ``update`` besides gradients and parameters.
EXTRA_ARGS: dict[str, tuple[str, ...]] = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "sophia": ("obj_fn",),
}
PER_EXAMPLE = ("dpsgd",)  # takes gradients with a leading batch axis


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One of Optax's, ready to be called with a learning rate.

    Attributes:
      name: of the function in ``optax`` or ``optax.contrib``.
      make: ``learning_rate -> transformation``; a schedule is a learning rate, too.
      extra_args: names of the extra arguments that ``update`` gets.
      is_per_example: whether gradients have a leading batch axis.
    """

    name: str
    make: Callable[[Any], Any]
    extra_args: tuple[str, ...]
    is_per_example: bool


def _rate_argument(function: Any) -> str | None:
    names = inspect.signature(function).parameters
    return next((name for name in names if name.endswith("learning_rate")), None)


def discover() -> dict[str, Optimizer]:
    """The optimizers of Optax: public functions of a learning rate that make a transformation."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in sorted(vars(module).items()):
            is_candidate = inspect.isfunction(function) and not name.startswith(("_", "scale_by_"))
            rate = _rate_argument(function) if is_candidate else None
            if rate is None:
                continue
            arguments = dict(ARGUMENTS.get(name, {}))
            if "key" in arguments:
                arguments["key"] = jax.random.key(arguments["key"])
            make = functools.partial(_make, function, rate, arguments)
            if isinstance(make(LEARNING_RATE), optax.GradientTransformation):
                found[name] = Optimizer(
                    name, make, EXTRA_ARGS.get(name, ()), is_per_example=name in PER_EXAMPLE
                )
    return found


def _make(function: Any, rate: str, arguments: dict[str, Any], learning_rate: Any) -> Any:
    return function(**{rate: learning_rate}, **arguments)


# Contexts


@dataclasses.dataclass(frozen=True)
class Protection:
    """What a library has against bad steps.

    Attributes:
      name: for the tables.
      wrap: ``(transformation, check_update) -> transformation``.
      skip_fn: its ``should_skip_update_fn`` for ``optax.MultiSteps``.
    """

    name: str
    wrap: Callable[[Any, bool], Any]
    skip_fn: Callable[..., Any] | None

    def __call__(self, tx: Any, *, check_update: bool = False) -> Any:
        """Protects a transformation."""
        return self.wrap(tx, check_update)


@dataclasses.dataclass(frozen=True)
class Context:
    """How an optimizer is embedded.

    Attributes:
      name: for the tables.
      build: ``(protect, optimizer) -> transformation``, protected somewhere.
      extra_args: names of extra arguments that the context itself needs.
      has_lookahead: whether the parameters are ``optax.LookaheadParams``.
      hides_loss: whether the loss does not reach what decides about the step.
    """

    name: str
    build: Callable[[Protection, Optimizer], Any]
    extra_args: tuple[str, ...] = ()
    has_lookahead: bool = False
    hides_loss: bool = False


def _around(embed: Callable[[Any], Any]) -> Callable[[Protection, Optimizer], Any]:
    return lambda protect, optimizer: protect(embed(optimizer.make(LEARNING_RATE)))


def _injected(protect: Protection, optimizer: Optimizer) -> Any:
    factory = lambda learning_rate: optimizer.make(learning_rate)  # noqa: E731
    schedule = optax.linear_schedule(LEARNING_RATE, 0.01, 6)
    return protect(optax.inject_hyperparams(factory)(learning_rate=schedule))


def _inside_multi_steps(protect: Protection, optimizer: Optimizer) -> Any:
    inner = protect(optimizer.make(LEARNING_RATE))
    return optax.MultiSteps(inner, 2, should_skip_update_fn=protect.skip_fn)


def _checked(protect: Protection, optimizer: Optimizer) -> Any:
    return protect(optimizer.make(LEARNING_RATE), check_update=True)


def _masked(tx: Any) -> Any:
    return optax.masked(tx, {"b": False, "w": True}, mask_compatible_extra_args=True)


def _partitioned(tx: Any) -> Any:
    transforms = {"tried": tx, "other": optax.sgd(LEARNING_RATE, momentum=0.5)}
    labels = {"b": "other", "w": "tried"}
    return optax.partition(transforms, labels, mask_compatible_extra_args=True)


def _raw_key_noise() -> Any:
    """Like ``optax.add_noise``, but its key is an old-style array of two uint32."""

    def update(updates, key, params=None):
        key, subkey = jax.random.split(key)
        noise = 0.1 * jax.random.normal(subkey, ())
        return jax.tree.map(lambda leaf: leaf + noise, updates), key

    return optax.GradientTransformation(lambda params: jax.random.PRNGKey(1), update)


def _sam(tx: Any, **options: Any) -> Any:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    return optax.contrib.sam(tx, adversary, **options)


CONTEXTS = {
    context.name: context
    for context in (
        Context("plain", _around(lambda tx: tx)),
        Context("inject_hyperparams", _injected),
        Context("checked update", _checked),
        Context("masked", _around(_masked)),
        Context("partition", _around(_partitioned)),
        Context(
            "noise (typed key)",
            _around(lambda tx: optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(1)), tx)),
        ),
        Context("noise (raw key)", _around(lambda tx: optax.chain(_raw_key_noise(), tx))),
        Context("around MultiSteps", _around(lambda tx: optax.MultiSteps(tx, 2))),
        Context("inside MultiSteps", _inside_multi_steps, hides_loss=True),
        Context(
            "reduce_on_plateau",
            _around(lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=2))),
            extra_args=("value",),
        ),
        Context("lookahead", _around(lambda tx: optax.lookahead(tx, 3, 0.5)), has_lookahead=True),
        Context(
            "schedule_free", _around(lambda tx: optax.contrib.schedule_free(tx, LEARNING_RATE))
        ),
        Context("mechanize", _around(lambda tx: optax.contrib.mechanize(tx))),
        Context("SAM", _around(_sam)),
        Context(
            "SAM (opaque)",
            _around(lambda tx: _sam(tx, opaque_mode=True)),
            extra_args=("grad_fn",),
        ),
    )
}
# In the quick matrix, those tried in every context, among them one that reads the loss.
FEW = ("adamw", "sgd", "momo")

# What Optax itself cannot combine, so that the cell fails without any guard, too.
_NO_EXTRA_ARGS = "the wrapper takes no extra arguments, which the optimizer needs"
_PER_EXAMPLE = "the wrapper expects gradients of the shape of the parameters"
UNSUPPORTED: dict[tuple[str, str], str] = {
    **{
        (name, context): _NO_EXTRA_ARGS
        for name in EXTRA_ARGS
        for context in ("lookahead", "SAM", "SAM (opaque)")
    },
    **{
        ("dpsgd", context): _PER_EXAMPLE
        for context in ("masked", "partition", "around MultiSteps", "inside MultiSteps")
    },
    ("dpsgd", "mechanize"): _PER_EXAMPLE,
    ("dpsgd", "SAM"): "the wrapper multiplies the state by a bool, which a PRNG key does not allow",
    ("noisy_sgd", "SAM"): "likewise",
}
