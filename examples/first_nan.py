"""The first NaN, found: python examples/first_nan.py says "step 20: ... (blocks/kernel[3])"."""

from pathlib import Path

import jax.numpy as jnp
import optax
from _demo import load_digits
from flax import nnx
from tensorboardX import SummaryWriter

import optax_guard as og


class CNN(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs))
        self.stem, self.head = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.Linear(256, 10, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=6)(make)(rngs)  # six layers, stacked

    def __call__(self, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = scan(lambda block, x: x + nnx.relu(block(x)))(self.blocks, self.stem(x))
        return self.head(x.reshape(len(x), -1))


@nnx.jit
def train_step(model, optimizer, x, y, fault):
    loss_of = optax.softmax_cross_entropy_with_integer_labels
    loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x), y).mean())(model)
    grads["blocks"]["kernel"][...] *= jnp.ones(6).at[3].set(fault)[:, None, None, None, None]
    optimizer.update(model, grads, value=loss)
    return loss


def main(folder=Path(__file__).parent / "outputs" / "first_nan"):
    data, model = load_digits(), CNN(nnx.Rngs(0))
    tx = og.stabilize(optax.adam(1e-3), stacked=lambda path, leaf: path.startswith("blocks"))
    optimizer, params = nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.state(model, nnx.Param)
    with SummaryWriter(folder) as board, og.History(sinks=board, params=params) as history:
        for step in range(60):
            rows = slice(20 * step, 20 * step + 20)
            x, y = data.train_images[rows].reshape(-1, 8, 8, 1), data.train_labels[rows]
            loss = train_step(model, optimizer, x, y, jnp.nan if step == 20 else 1.0)
            history.append(step, optimizer, loss=loss)
    print(history.summary(), og.explain(optimizer, params), sep="\n")
    return history.report(Path(folder) / "report.html")


if __name__ == "__main__":
    main()
