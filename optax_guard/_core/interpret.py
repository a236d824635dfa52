"""Evaluates a wrapped optimizer so that a skipped step costs no copy of its state.

The plain form, ``where(ok, new_state, old_state)`` after ``inner.update``, is slow: the update
depends on the *unselected* new moments, so XLA keeps both versions of every moment alive and
copies them. Here the jaxpr of ``inner.update`` is evaluated equation by equation (the custom
interpreter pattern of the JAX documentation), and each value that becomes new state is replaced
by ``where(ok, value, old)`` as soon as it appears. On an accepted step that is the identity; on a
skipped one everything computed from it is discarded anyway. XLA then fuses the select into the
loop that writes the moment, in place.

Derivatives are those of the plain form with sanitised inputs, see ``run``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from optax_guard._core.plan import Plan, Proposal
from optax_guard._core.reader import Reader, Reading
from optax_guard._core.trees import is_inexact


def run(proposal: Proposal, ok: jax.Array, reader: Reader, reading: Reading) -> tuple[Any, Any]:
    """Updates and new state if ``ok``, else updates of -0.0 and the old state, bit for bit."""
    plan = proposal.plan
    unwatched = reader._replace(call=reader.call._replace(watch=None))

    @jax.custom_jvp
    def select(ok, answers, arguments):
        return _select_where_produced(plan, ok, answers, arguments)

    @functools.partial(select.defjvp)
    def _select_jvp(primals, tangents):
        # Adam's sqrt at a second moment of zero, or a norm computed from NaN, would turn the
        # zero cotangent of a skipped step into NaN. Ones in place of the faulty gradients do not.
        ok, _, arguments = primals
        plain = functools.partial(_select_at_the_end, unwatched, ok)
        return jax.jvp(plain, (arguments,), (tangents[2],))

    return _unflatten(plan, select(ok, reading.answers, _needed(proposal)))


def _needed(proposal: Proposal) -> tuple[Any, ...]:
    """The arguments, zeros in place of those that matter to nothing.

    The call has a derivative rule, and JAX takes all operands of such a call as used: a guard
    around this one would watch over the gradients that this one leaves out.
    """
    plan = proposal.plan
    needed = set(plan.old_state)
    for program in filter(None, (plan.program, plan.question)):
        needed.update(place for place, wanted in enumerate(program.is_input) if wanted)
    pairs = zip(plan.gradients, plan.is_used, strict=True)
    needed.update(place for place, is_used in pairs if is_used and place is not None)
    return tuple(
        value if place in needed or not is_inexact(value) else jnp.zeros((), jnp.result_type(value))
        for place, value in enumerate(proposal.arguments)
    )


def evaluate(proposal: Proposal, arguments: Sequence[Any], reading: Reading) -> tuple[Any, Any]:
    """The proposed updates and the proposed state."""
    leaves = proposal.plan.program.evaluate([*arguments, *reading.answers])
    return _unflatten(proposal.plan, leaves)


def _unflatten(plan: Plan, leaves: Sequence[Any]) -> tuple[Any, Any]:
    num_updates = plan.update_treedef.num_leaves
    return (
        jax.tree.unflatten(plan.update_treedef, leaves[:num_updates]),
        jax.tree.unflatten(plan.state_treedef, leaves[num_updates:]),
    )


def _select_where_produced(
    plan: Plan, ok: jax.Array, answers: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    program = plan.program
    outputs = program.jaxpr.outvars[plan.update_treedef.num_leaves :]
    places = [place for place, wanted in enumerate(program.is_input) if wanted]
    inputs = dict(zip(program.jaxpr.invars, places, strict=True))
    old_values = {}
    for index, atom in zip(plan.old_state, outputs, strict=True):
        # An input is not produced below: a guard inside keeps the norm as its state.
        is_produced = isinstance(atom, core.Var) and atom not in inputs
        if is_produced and getattr(atom.aval, "dtype", None) == arguments[index].dtype:
            old_values.setdefault(atom, arguments[index])
    leaves = program.evaluate(
        [*arguments, *answers], old_values, lambda new, old: lax.select_n(ok, old, new)
    )

    def is_done(position, atom):
        """Whether it was selected where it was produced, or never changes."""
        index = plan.old_state[position]
        if isinstance(atom, core.Literal):
            return False
        if atom in old_values:
            return old_values[atom] is arguments[index]
        return inputs.get(atom) == index

    done = {position for position, atom in enumerate(outputs) if is_done(position, atom)}
    return _select_leaves(plan, ok, leaves, arguments, done)


def _select_at_the_end(reader: Reader, ok: jax.Array, arguments: Sequence[Any]) -> list[Any]:
    # Nothing flows back into a skipped step, and what might be NaN is not even evaluated there.
    plan = reader.plan
    stand_ins = [
        jnp.ones_like(value) if i in plan.sanitized else lax.stop_gradient(value)
        for i, value in enumerate(arguments)
    ]
    sane = [
        jnp.where(ok, value, stand_in) if is_inexact(value) else value
        for value, stand_in in zip(arguments, stand_ins, strict=True)
    ]
    answers = reader.read(sane).answers if plan.heard is not None else ()
    leaves = plan.program.evaluate([*sane, *answers])
    return _select_leaves(plan, ok, leaves, arguments, set())


def _select_leaves(
    plan: Plan,
    ok: jax.Array,
    leaves: Sequence[Any],
    arguments: Sequence[Any],
    done: set[int],
) -> list[Any]:
    num_updates = plan.update_treedef.num_leaves
    updates = [
        # A choice between two zeros would have XLA read and write frozen parameters.
        _nothing(leaf) if place in plan.zero_updates else _nothing_unless(ok, leaf)
        for place, leaf in enumerate(leaves[:num_updates])
    ]
    state = []
    for position, (leaf, index) in enumerate(
        zip(leaves[num_updates:], plan.old_state, strict=True)
    ):
        old = arguments[index]
        state.append(leaf if position in done else keep_unless(ok, leaf, old))
    return updates + state


def keep_unless(ok: jax.Array, new: Any, old: Any) -> Any:
    """``where(ok, new, old)`` for arrays of any kind, in the dtype of ``old``."""
    if _is_float0(old):
        return old
    if new.dtype != old.dtype:
        new = new.astype(old.dtype)
    return lax.select_n(ok, old, new)


def _nothing_unless(ok: jax.Array, update: Any) -> Any:
    return update if _is_float0(update) else lax.select_n(ok, _nothing(update), update)


def _nothing(update: Any) -> Any:
    """-0.0: adding it keeps every bit of a parameter, the sign of zero included."""
    if _is_float0(update):
        return update
    return lax.full_like(update, -0.0 if is_inexact(update) else 0)


def _is_float0(leaf: Any) -> bool:
    return leaf.dtype == jax.dtypes.float0
