"""Jaxprs without what their outputs do not depend on, and their evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr


class Program(NamedTuple):
    """A jaxpr without what its outputs do not depend on.

    Attributes:
      jaxpr: of some inputs of the call.
      is_input: which of them.
    """

    jaxpr: core.Jaxpr
    is_input: tuple[bool, ...]

    def evaluate(
        self,
        values: Sequence[Any],
        old_values: dict[core.Var, Any] | None = None,
        select: Callable[[Any, Any], Any] = lambda new, old: new,
    ) -> list[Any]:
        """Its outputs for all inputs of the call; see ``_evaluate``."""
        inputs = [value for value, wanted in zip(values, self.is_input, strict=True) if wanted]
        return _evaluate(self.jaxpr, inputs, old_values or {}, select)


def make_program(
    jaxpr: core.Jaxpr, inputs: list[Any], outputs: list[Any], equations: list[Any]
) -> Program:
    """What these outputs of a jaxpr take, of its equations or some of them.

    ``inputs`` are its own, and whatever else the equations do not make.
    """
    debug_info = jaxpr.debug_info._replace(
        arg_names=("",) * len(inputs), result_paths=("",) * len(outputs)
    )
    whole = core.Jaxpr([], inputs, outputs, equations, jaxpr.effects, debug_info)
    jaxpr, is_input = dce_jaxpr(whole, [True] * len(outputs))
    return Program(jaxpr, tuple(is_input))


# Zero wherever all operands are.
_KEEP_ZERO = frozenset(
    {
        *("add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy"),
        *("copy_p", "neg", "optimization_barrier", "pcast", "pvary", "reduce_sum", "reshape"),
        *("reshard", "sharding_constraint", "sign", "slice", "squeeze", "stop_gradient", "sub"),
        "transpose",
    }
)
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def always_zero(jaxpr: core.Jaxpr, num_updates: int) -> frozenset[int]:
    """Which updates are zero whatever the arguments, as ``optax.set_to_zero`` makes them.

    A zero stays one times a number that is known and finite; times an unknown one it may be NaN.
    """
    is_zero = _zeros(jaxpr, [False] * len(jaxpr.invars))
    return frozenset(place for place, flag in enumerate(is_zero[:num_updates]) if flag)


def _zeros(jaxpr: core.Jaxpr, is_input_zero: Sequence[bool]) -> list[bool]:
    """Which outputs are always zero if these inputs are."""
    pairs = zip(jaxpr.invars, is_input_zero, strict=True)
    zeros: set[Any] = {var for var, flag in pairs if flag}

    def is_zero(atom):
        if isinstance(atom, core.Literal):
            return np.ndim(atom.val) == 0 and bool(atom.val == 0)
        return atom in zeros

    for equation in jaxpr.eqns:
        operands = equation.invars
        name, flags = equation.primitive.name, [is_zero(atom) for atom in operands]
        if not any(flags):
            continue
        body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if name in _CALLS and isinstance(body, core.ClosedJaxpr):
            found = _zeros(body.jaxpr, flags)
        elif name in ("mul", "div"):
            is_product = name == "mul" and flags[-1] and _is_finite_literal(operands[0])
            is_quotient = flags[0] and not flags[-1] and _is_finite_literal(operands[-1])
            found = [is_product or is_quotient or (name == "mul" and all(flags))]
        else:  # which of its cases a select takes does not matter
            found = [all(flags[1:] if name == "select_n" else flags)] * len(equation.outvars)
            found = found if name in _KEEP_ZERO or name == "select_n" else [False] * len(found)
        zeros.update(var for var, flag in zip(equation.outvars, found, strict=True) if flag)
    return list(map(is_zero, jaxpr.outvars))


def _is_finite_literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal) and bool(np.all(np.isfinite(atom.val)))


def _read(known: dict[core.Var, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else known[atom]


def _evaluate_equation(equation: core.JaxprEqn, known: dict[core.Var, Any]) -> dict[core.Var, Any]:
    values = [_read(known, atom) for atom in equation.invars]
    parameters = equation.primitive.get_bind_params(equation.params)
    if isinstance(parameters, tuple):  # JAX before 0.9 gives the functions apart
        functions, parameters = parameters
        values = [*functions, *values]
    with equation.ctx.manager:
        results = equation.primitive.bind(*values, **parameters)
    results = results if equation.primitive.multiple_results else [results]
    return dict(zip(equation.outvars, results, strict=True))


def _evaluate(
    jaxpr: core.Jaxpr,
    inputs: Sequence[Any],
    old_values: dict[core.Var, Any],
    select: Callable[[Any, Any], Any],
) -> list[Any]:
    """Evaluates a jaxpr, passing each value named in ``old_values`` through ``select``."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        for var, value in _evaluate_equation(equation, values).items():
            values[var] = select(value, old_values[var]) if var in old_values else value
    return [_as_output(atom, _read(values, atom)) for atom in jaxpr.outvars]


def _as_output(atom: Any, value: Any) -> Any:
    # A literal may be a Python number, such as the False of a flag that update() always clears.
    if not isinstance(atom, core.Literal):
        return value
    return jnp.asarray(value, getattr(atom.aval, "dtype", None))
