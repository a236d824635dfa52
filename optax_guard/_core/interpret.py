"""Evaluates a wrapped optimizer so that a skipped step costs no copy of its state.

The plain form, ``where(ok, new_state, old_state)`` after ``inner.update``, is slow: the update
depends on the *unselected* new moments, so XLA keeps both versions of every moment alive and
copies them. Here the jaxpr of ``inner.update`` is evaluated equation by equation (the custom
interpreter pattern of the JAX documentation), and each value that becomes new state is replaced
by ``where(ok, value, old)`` as soon as it appears. On an accepted step that is the identity; on a
skipped one everything computed from it is discarded anyway. XLA then fuses the select into the
loop that writes the moment, in place.

Derivatives are those of the plain form with sanitised inputs, see ``_run_jvp``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from optax_guard._core.groups import make_groups
from optax_guard._core.measure import AxisName, MeasureCall, Watch, find_call, measure_and_watch
from optax_guard._core.trees import is_inexact, strong


class Proposal(NamedTuple):
    """What ``inner.update`` would do, traced but not yet evaluated.

    Attributes:
      jaxpr: of the call; its outputs are the leaves of the updates, then of the new state.
      arguments: its inputs: consts, then leaves of gradients, state, params and extra arguments.
      gradients: which of ``arguments`` are gradients.
      sanitized: which of ``arguments`` may be non-finite on a skipped step.
      old_state: leaves of the current state.
      update_treedef: structure of the updates.
      state_treedef: structure of the state.
    """

    jaxpr: core.Jaxpr
    arguments: tuple[Any, ...]
    gradients: range
    sanitized: frozenset[int]
    old_state: range
    update_treedef: Any
    state_treedef: Any


def propose(
    update: Callable[..., tuple[Any, Any]],
    gradients: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> Proposal:
    """Traces ``update(gradients, state, params, **extra_args)`` to a jaxpr."""
    static = {name: value for name, value in extra_args.items() if not _is_tree_of_arrays(value)}
    dynamic = {name: value for name, value in extra_args.items() if name not in static}

    def call(gradients, state, params, dynamic):
        return update(gradients, state, params, **dynamic, **static)

    inputs = (gradients, state, params, dynamic)
    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*inputs)
    _check_state(state, shapes[1])

    counts = [len(closed.consts), *(len(jax.tree.leaves(part)) for part in inputs)]
    starts = np.cumsum([0, *counts]).tolist()
    sections = [range(a, b) for a, b in itertools.pairwise(starts)]
    arguments = (*closed.consts, *map(_as_argument, jax.tree.leaves(inputs)))
    faulty = [*sections[1], *sections[4]]
    return Proposal(
        jaxpr=closed.jaxpr,
        arguments=arguments,
        gradients=sections[1],
        sanitized=frozenset(i for i in faulty if is_inexact(arguments[i])),
        old_state=sections[2],
        update_treedef=jax.tree.structure(shapes[0]),
        state_treedef=jax.tree.structure(state),
    )


def _as_argument(leaf: Any) -> Any:
    return strong(leaf) if isinstance(leaf, (bool, int, float, complex)) else leaf


def _is_tree_of_arrays(value: Any) -> bool:
    return all(
        isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))
        for leaf in jax.tree.leaves(value)
    )


def _check_state(old: Any, new: Any) -> None:
    """The state must keep its structure and shapes, or no skip could restore it."""
    old_leaves, old_treedef = jax.tree_util.tree_flatten_with_path(old)
    new_leaves, new_treedef = jax.tree.flatten(new)
    if old_treedef != new_treedef:
        raise TypeError(
            "The wrapped optimizer changes the structure of its state in update(), so a skipped "
            "step could not restore it. Give it a state whose structure is fixed by init(). "
            f"From init(): {old_treedef}. From update(): {new_treedef}."
        )
    for (path, before), after in zip(old_leaves, new_leaves, strict=True):
        if np.shape(before) != after.shape:
            raise TypeError(
                f"The wrapped optimizer changes the shape of its state at "
                f"{jax.tree_util.keystr(path)} from {np.shape(before)} to {after.shape}. Call "
                "init() with parameters of the shapes that update() receives."
            )


class GradientNorms(NamedTuple):
    """What is known of the gradients before the update.

    Attributes:
      norm: of all leaves together.
      leaf_norms: float32 ``[leaves]``.
      leaf_finite: bool ``[leaves]``.
      alarm: with ``axis_name``, whether ``watch`` gave it on any device; else None.
      known: what is known of the variables of the proposal's jaxpr.
    """

    norm: jax.Array
    leaf_norms: jax.Array
    leaf_finite: jax.Array
    alarm: jax.Array | None
    known: dict[core.Var, Any]


def measure_gradients(
    proposal: Proposal, axis_name: AxisName, watch: Watch | None = None, watched: Any = ()
) -> GradientNorms:
    """Norms and finiteness of the gradients, in one read that a clip inside shares.

    A clip of this library inside the optimizer measures the very gradients that the guard must
    measure. What its equation is given is then evaluated here, ahead of the others, and one
    measurement serves both. So it does for a guard inside, which watches by itself.
    """
    gradients = [proposal.arguments[i] for i in proposal.gradients]
    leaves = [jnp.asarray(leaf) for leaf in gradients if is_inexact(leaf)]
    measure = functools.partial(
        measure_and_watch, leaves, axis_name=axis_name, watch=watch, watched=watched
    )
    equation, call = _find_measurement(proposal, axis_name)
    if equation is None or call is None:
        measured, alarm = measure(make_groups("global", [], leaves))
        return GradientNorms(*measured[-3:], alarm, {})
    given = _inputs(proposal.jaxpr, proposal.arguments)
    for each in _equations_for(proposal.jaxpr, equation):
        given.update(_evaluate_equation(each, given))
    if call.watch is not None:
        known = _evaluate_equation(equation, given)
        *_, norm, leaf_norms, leaf_finite, alarm = known.values()
        return GradientNorms(norm, leaf_norms, leaf_finite, alarm, known)
    small_norms_matter = _read(given, equation.invars[len(leaves)])
    measured, alarm = measure(call.groups, small_norms_matter=small_norms_matter)
    known = dict(zip(equation.outvars, jax.tree.leaves(measured), strict=True))
    return GradientNorms(*measured[-3:], alarm, known)


def _find_measurement(
    proposal: Proposal, axis_name: AxisName
) -> tuple[core.JaxprEqn | None, MeasureCall | None]:
    variables = _input_variables(proposal.jaxpr)
    gradients = [variables[i] for i in proposal.gradients if is_inexact(proposal.arguments[i])]
    for equation in proposal.jaxpr.eqns:
        call = find_call(equation.params.get("name"))
        is_measurement = call is not None and call.axis_name == axis_name
        if is_measurement and list(equation.invars[: len(gradients)]) == gradients:
            return equation, call
    return None, None


def _equations_for(jaxpr: core.Jaxpr, last: core.JaxprEqn) -> list[core.JaxprEqn]:
    """The equations that ``last`` depends on, in order."""
    wanted = {atom for atom in last.invars if isinstance(atom, core.Var)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(equation.outvars):
            needed.append(equation)
            wanted.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return needed[::-1]


def run(proposal: Proposal, ok: jax.Array, known: dict[core.Var, Any]) -> tuple[Any, Any]:
    """Updates and new state if ``ok``, else updates of -0.0 and the old state, bit for bit."""
    variables, values = tuple(known), tuple(known.values())

    @jax.custom_jvp
    def select(ok, values, arguments):
        return _select_where_produced(
            proposal, ok, dict(zip(variables, values, strict=True)), arguments
        )

    @functools.partial(select.defjvp)
    def _select_jvp(primals, tangents):
        # Adam's sqrt at a second moment of zero, or a norm computed from NaN, would turn the
        # zero cotangent of a skipped step into NaN. Ones in place of the faulty gradients do not.
        ok, _, arguments = primals
        plain = functools.partial(_select_at_the_end, proposal, ok)
        return jax.jvp(plain, (arguments,), (tangents[2],))

    leaves = select(ok, values, proposal.arguments)
    num_updates = proposal.update_treedef.num_leaves
    return (
        jax.tree.unflatten(proposal.update_treedef, leaves[:num_updates]),
        jax.tree.unflatten(proposal.state_treedef, leaves[num_updates:]),
    )


def evaluate(proposal: Proposal) -> tuple[list[Any], list[Any]]:
    """Leaves of the proposed updates and of the proposed state."""
    leaves = _evaluate(proposal.jaxpr, proposal.arguments, {}, {}, lambda value, old: value)
    num_updates = proposal.update_treedef.num_leaves
    return leaves[:num_updates], leaves[num_updates:]


def _select_where_produced(
    proposal: Proposal, ok: jax.Array, known: dict[core.Var, Any], arguments: Sequence[Any]
) -> list[Any]:
    outputs = proposal.jaxpr.outvars[proposal.update_treedef.num_leaves :]
    inputs = set(_input_variables(proposal.jaxpr))
    old_values = {}
    for index, atom in zip(proposal.old_state, outputs, strict=True):
        # What is known already is not produced below: a guard inside keeps the norm as its state.
        is_produced = isinstance(atom, core.Var) and atom not in inputs and atom not in known
        if is_produced and getattr(atom.aval, "dtype", None) == arguments[index].dtype:
            old_values.setdefault(atom, arguments[index])
    leaves = _evaluate(
        proposal.jaxpr, arguments, known, old_values, lambda new, old: lax.select_n(ok, old, new)
    )
    done = {
        i for i, atom in enumerate(outputs) if _is_done(atom, i, proposal, old_values, arguments)
    }
    return _select_leaves(proposal, ok, leaves, arguments, done)


def _select_at_the_end(proposal: Proposal, ok: jax.Array, arguments: Sequence[Any]) -> list[Any]:
    # Nothing flows back into a skipped step, and what might be NaN is not even evaluated there.
    stand_ins = [
        jnp.ones_like(value) if i in proposal.sanitized else lax.stop_gradient(value)
        for i, value in enumerate(arguments)
    ]
    sane = [
        jnp.where(ok, value, stand_in) if is_inexact(value) else value
        for value, stand_in in zip(arguments, stand_ins, strict=True)
    ]
    leaves = _evaluate(proposal.jaxpr, sane, {}, {}, lambda new, old: new)
    return _select_leaves(proposal, ok, leaves, arguments, set())


def _is_done(atom, position, proposal, old_values, arguments) -> bool:
    """Whether an output of the state was selected where it was produced, or never changes."""
    index = proposal.old_state[position]
    if isinstance(atom, core.Literal):
        return False
    if atom in old_values:
        return old_values[atom] is arguments[index]
    return atom is _input_variables(proposal.jaxpr)[index]


def _select_leaves(
    proposal: Proposal,
    ok: jax.Array,
    leaves: Sequence[Any],
    arguments: Sequence[Any],
    done: set[int],
) -> list[Any]:
    num_updates = proposal.update_treedef.num_leaves
    updates = [_nothing_unless(ok, leaf) for leaf in leaves[:num_updates]]
    state = []
    for position, (leaf, index) in enumerate(
        zip(leaves[num_updates:], proposal.old_state, strict=True)
    ):
        old = arguments[index]
        state.append(leaf if position in done else _keep_unless(ok, leaf, old))
    return updates + state


def _keep_unless(ok: jax.Array, new: Any, old: Any) -> Any:
    if _is_float0(old):
        return old
    if new.dtype != old.dtype:
        new = new.astype(old.dtype)
    return lax.select_n(ok, old, new)


def _nothing_unless(ok: jax.Array, update: Any) -> Any:
    """-0.0 on a skip: adding it keeps every bit of a parameter, the sign of zero included."""
    if _is_float0(update):
        return update
    nothing = lax.full_like(update, -0.0 if is_inexact(update) else 0)
    return lax.select_n(ok, nothing, update)


def _is_float0(leaf: Any) -> bool:
    return leaf.dtype == jax.dtypes.float0


def _input_variables(jaxpr: core.Jaxpr) -> list[core.Var]:
    return [*jaxpr.constvars, *jaxpr.invars]


def _inputs(jaxpr: core.Jaxpr, arguments: Sequence[Any]) -> dict[core.Var, Any]:
    return dict(zip(_input_variables(jaxpr), arguments, strict=True))


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
    arguments: Sequence[Any],
    known: dict[core.Var, Any],
    old_values: dict[core.Var, Any],
    select: Callable[[Any, Any], Any],
) -> list[Any]:
    """Evaluates a jaxpr, passing each value named in ``old_values`` through ``select``."""
    # A guard inside keeps the norms that were measured ahead: they are new state, too.
    known = {v: select(x, old_values[v]) if v in old_values else x for v, x in known.items()}
    values = _inputs(jaxpr, arguments) | known
    for equation in jaxpr.eqns:
        if all(var in known for var in equation.outvars) and equation.outvars:
            continue
        for var, value in _evaluate_equation(equation, values).items():
            values[var] = select(value, old_values[var]) if var in old_values else value
    return [_as_output(atom, _read(values, atom)) for atom in jaxpr.outvars]


def _as_output(atom: Any, value: Any) -> Any:
    # A literal may be a Python number, such as the False of a flag that update() always clears.
    if not isinstance(atom, core.Literal):
        return value
    return jnp.asarray(value, getattr(atom.aval, "dtype", None))
