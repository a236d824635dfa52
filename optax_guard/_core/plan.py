"""What a wrapped optimizer would do, as a jaxpr that can be evaluated piece by piece.

The jaxpr tells which gradients reach an output at all. What a clip inside measures of the very
gradients that the guard measures is cut out of it, to be answered with the guard's own
measurement; what nothing depends on then is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from optax_guard._core.calls import ToldError
from optax_guard._core.listening import Heard, Listener, Masks, listen_for
from optax_guard._core.program import Program, always_zero, make_program
from optax_guard._core.sums import MeasureCall
from optax_guard._core.trees import FloatLeaves, is_inexact, strong


class Plan(NamedTuple):
    """What ``inner.update`` would do, without any array: JAX keeps hold of it for derivatives.

    Attributes:
      program: gives the leaves of the updates, then of the new state, from the arguments and
        then the results of the measurement inside.
      question: gives that measurement's operands besides the gradients, from the arguments.
      question_treedef: structure of these.
      heard: the measurement inside; None if there is none.
      is_used: for each leaf of the gradients whether an output depends on it.
      gradients: for each of these its place among the arguments; None if it is missing.
      sanitized: which of the arguments may be non-finite on a skipped step.
      old_state: leaves of the current state among the arguments.
      zero_updates: leaves of the updates that are always zero, as those of frozen parameters.
      update_treedef: structure of the updates.
      state_treedef: structure of the state.
    """

    program: Program
    question: Program | None
    question_treedef: Any
    heard: MeasureCall | None
    is_used: tuple[bool, ...]
    gradients: tuple[int | None, ...]
    sanitized: frozenset[int]
    old_state: range
    zero_updates: frozenset[int]
    update_treedef: Any
    state_treedef: Any


class Proposal(NamedTuple):
    """A plan and what it is for.

    Attributes:
      plan: what would be done.
      arguments: consts, then leaves of gradients, state, params and extra arguments.
    """

    plan: Plan
    arguments: tuple[Any, ...]


def propose(
    update: Callable[..., tuple[Any, Any]],
    gradients: FloatLeaves,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> Proposal:
    """Traces ``update(gradients, state, params, **extra_args)`` to a jaxpr."""
    static = {name: value for name, value in extra_args.items() if not _is_tree_of_arrays(value)}
    dynamic = {name: value for name, value in extra_args.items() if name not in static}
    inputs = (list(gradients.nodes), state, params, dynamic)

    def trace(masks: Masks) -> _Traced:
        heard: list[Heard] = []
        noted: list[_Noted] = []

        def call(nodes, state, params, dynamic):
            tree = jax.tree.unflatten(gradients.treedef, nodes)
            arrays = _same_arrays(gradients, nodes)
            with listen_for(arrays, masks) as listener:
                updates, new_state = update(tree, state, params, **dynamic, **static)
            found = listener.heard
            heard.extend([] if found is None else [found._replace(operands=((), ()), result=())])
            question, answers = ((), ()) if found is None else (found.operands, found.result)
            notes, outputs = _notes(listener)
            noted.extend(notes)
            return updates, new_state, question, answers, outputs

        closed, shapes = jax.make_jaxpr(call, return_shape=True)(*inputs)
        return _Traced(closed, shapes, heard[0].call if heard else None, noted)

    traced = trace({})
    _check_state(state, traced.shapes[1])
    start = len(traced.closed.consts)
    masks = _masks(traced, range(start, start + len(jax.tree.leaves(inputs[0]))))
    closed, shapes, heard, _ = trace(masks) if masks else traced

    counts = [len(closed.consts), *(len(jax.tree.leaves(part)) for part in inputs)]
    starts = np.cumsum([0, *counts]).tolist()
    sections = [range(a, b) for a, b in itertools.pairwise(starts)]
    arguments = (*closed.consts, *map(_as_argument, jax.tree.leaves(inputs)))
    faulty = [*sections[1], *sections[4]]
    places = _places(gradients, sections[1].start)
    num_main = len(jax.tree.leaves(shapes[:2]))
    question_treedef = jax.tree.structure(shapes[2])
    num_answers = len(jax.tree.leaves(shapes[3]))
    programs = _split(closed.jaxpr, num_main, question_treedef.num_leaves, num_answers)
    is_used = tuple(place is not None and programs[0].is_input[place] for place in places)
    plan = Plan(
        program=programs[0],
        question=programs[1],
        question_treedef=question_treedef,
        heard=heard,
        is_used=is_used,
        gradients=places,
        sanitized=frozenset(i for i in faulty if is_inexact(arguments[i])),
        old_state=sections[2],
        zero_updates=always_zero(programs[0].jaxpr, len(jax.tree.leaves(shapes[0]))),
        update_treedef=jax.tree.structure(shapes[0]),
        state_treedef=jax.tree.structure(state),
    )
    return Proposal(plan, arguments)


def _same_arrays(gradients: FloatLeaves, nodes: Sequence[Any]) -> list[Any]:
    """The nodes that stand for ``gradients.arrays``, in their order."""
    pairs = zip(nodes, gradients.slots, strict=True)
    return [node for node, count in pairs for _ in range(count)]


def _places(gradients: FloatLeaves, start: int) -> tuple[int | None, ...]:
    """For each gradient its place among the arguments, which have no place for ``None``."""
    places: list[int | None] = []
    next_place = start
    for node, count in zip(gradients.nodes, gradients.slots, strict=True):
        places += [None if node is None else next_place] * count
        next_place += node is not None
    return tuple(places)


class _Noted(NamedTuple):
    """A measurement inside: its rule, which arrays it looked at, which of these are traced."""

    number: int
    is_used: tuple[bool, ...]
    traced: tuple[int, ...]
    num_results: int


class _Traced(NamedTuple):
    closed: core.ClosedJaxpr
    shapes: Any
    heard: MeasureCall | None
    noted: list[_Noted]


def _notes(listener: Listener) -> tuple[list[_Noted], list[Any]]:
    """What is known of the measurements inside, and their traced arrays and results, in a row."""
    notes, outputs = [], []
    for number, arrays, is_used, results in listener.measured:
        pairs = enumerate(zip(arrays, is_used, strict=True))
        traced = tuple(i for i, (array, used) in pairs if used and listener.is_own(array))
        notes.append(_Noted(number, is_used, traced, len(results)))
        outputs += [*(arrays[i] for i in traced), *results]
    return notes, outputs


def _masks(traced: _Traced, gradients: range) -> Masks:
    """What each rule is to leave out: gradients that reach no output but through measurements.

    Args:
      traced: the first trace.
      gradients: their places among the inputs.
    """
    jaxpr = traced.closed.jaxpr
    num_main = len(jax.tree.leaves(traced.shapes[:2]))
    rest = iter(jaxpr.outvars[len(jax.tree.leaves(traced.shapes[:4])) :])
    arrays, results = [], []
    for note in traced.noted:
        arrays.append(list(itertools.islice(rest, len(note.traced))))
        results += itertools.islice(rest, note.num_results)
    main = jaxpr.outvars[:num_main]
    produced = {atom for atom in results if isinstance(atom, core.Var)}
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    equations = [e for e in jaxpr.eqns if produced.isdisjoint(e.outvars)]
    program = make_program(jaxpr, [*inputs, *(produced - set(inputs))], main, equations).jaxpr
    atoms = itertools.chain(program.outvars, *(equation.invars for equation in program.eqns))
    live = {atom for atom in atoms if isinstance(atom, core.Var)}
    moved = {inputs[place] for place in gradients}
    for equation in equations:
        if any(isinstance(atom, core.Var) and atom in moved for atom in equation.invars):
            moved.update(equation.outvars)
    masks: dict[int, tuple[bool, ...]] = {}
    for note, own in zip(traced.noted, arrays, strict=True):
        dead = {i for i, atom in zip(note.traced, own, strict=True) if atom in moved - live}
        if dead:
            pairs = enumerate(masks.get(note.number, note.is_used))
            masks[note.number] = tuple(is_used and i not in dead for i, is_used in pairs)
    return masks


def _split(
    jaxpr: core.Jaxpr, num_main: int, num_operands: int, num_answers: int
) -> tuple[Program, Program | None]:
    """The program without the measurement inside, and that which its operands take."""
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    main, rest = jaxpr.outvars[:num_main], jaxpr.outvars[num_main:]
    question, answers = rest[:num_operands], rest[num_operands : num_operands + num_answers]
    produced = set(answers)
    equations = [e for e in jaxpr.eqns if produced.isdisjoint(e.outvars)]
    program = make_program(jaxpr, [*inputs, *answers], main, equations)
    if not question:
        return program, None
    return program, make_program(jaxpr, inputs, question, jaxpr.eqns)


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
        raise ToldError(
            "The wrapped optimizer changes the structure of its state in update(), so a skipped "
            "step could not restore it. Give it a state whose structure is fixed by init(). "
            f"From init(): {old_treedef}. From update(): {new_treedef}."
        )
    for (path, before), after in zip(old_leaves, new_leaves, strict=True):
        if np.shape(before) != after.shape:
            raise ToldError(
                f"The wrapped optimizer changes the shape of its state at "
                f"{jax.tree_util.keystr(path)} from {np.shape(before)} to {after.shape}. Call "
                "init() with parameters of the shapes that update() receives."
            )
