"""How fast does DiT-S/2 train on this machine's CPU? Our train step against the PyTorch original's, in turn.

  python -m benchmarks.pytorch_speed --dit=PATH --out=docs/results/pytorch_speed.json

PATH is a checkout of github.com/facebookresearch/DiT (benchmarks/original.py). 256 pixels
(latents 32 x 32 x 4), batch 8:
  ours      training/step.py as train.py runs it: SpeeDiT, AdamW, EMA, guard against non-finite gradients, norms and quartiles
  eager     the original's loop body: GaussianDiffusion.training_losses, AdamW, update_ema
  compile   the same with the network through torch.compile
in float32 (fp32) and in bfloat16 (bf16: model.dtype; autocast). All start from the same random weights, and the loss of one
batch is compared first. Two steps of each, which compile and warm up, are not timed. About ten minutes on two cores.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.original import CLASSES, LATENTS, Original, in_turn, nchw, parse, report
from speedit_jax import sharding
from speedit_jax.config import get_config
from speedit_jax.data.description import Description
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.step import make_loss

SIDES = ("ours", "eager", "compile")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


class Ours:
    """Our side; a step of either precision goes on from the one state, which is float32."""

    def __init__(self, original: Original, batch: dict[str, np.ndarray]):
        self._mesh = sharding.make_mesh(get_config().mesh, jax.devices()[:1])
        self._key, self._batch = jax.random.key(0), batch
        parts = self._parts("fp32")
        state = parts.initial_state(self._key)
        with jax.set_mesh(self._mesh):
            weights = jax.device_put(original.parameters(state.params), parts.shardings.params)
            copies = jax.tree.map(lambda x: x.copy(), weights)
        self._state = dataclasses.replace(state, params=weights, ema=copies)

    def _parts(self, precision: str) -> Assembly:
        config = get_config("DiT-S/2")
        config.model.dtype = PRECISIONS[precision]
        config.training.batch_size = len(self._batch["label"])
        config.optim.clip_norm = 0.0  # as published
        return assemble(config, Description(LATENTS, tuple(map(str, range(CLASSES)))), self._mesh)

    def loss(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Of each example, [B], in float32."""
        parts = self._parts("fp32")
        loss = jax.jit(make_loss(parts.model, parts.diffusion))
        with jax.set_mesh(self._mesh):
            _, terms = loss(self._state.params, inputs)
        return np.asarray(terms["loss"])

    def step(self, precision: str) -> Callable[[], None]:
        parts = self._parts(precision)
        step = parts.jit_step()
        batch = {name: jax.device_put(values, parts.rows) for name, values in self._batch.items()}

        def run():
            with jax.set_mesh(self._mesh):
                self._state, metrics = step(self._state, batch, self._key)
            jax.block_until_ready((self._state, metrics))

        return run


class Theirs:
    """The original's side; eager and compiled steps of either precision go on from the one network, which is float32."""

    def __init__(self, original: Original, batch: dict[str, np.ndarray]):
        self._network, self._update_ema = original.network, original.update_ema
        self._process = original.diffusion.create_diffusion("")
        self._x, self._y = nchw(batch["image"]), torch.from_numpy(batch["label"]).long()
        self._ema = copy.deepcopy(self._network).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=1e-4, weight_decay=0)

    def loss(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Of each example, [B]; labels are not dropped."""
        t, y = (torch.from_numpy(inputs[name]).long() for name in ("t", "y"))
        with torch.no_grad():
            terms = self._process.training_losses(
                self._network.eval(), nchw(inputs["x0"]), t, {"y": y}, noise=nchw(inputs["noise"])
            )
        return terms["loss"].numpy()

    def step(self, precision: str, compiled: bool) -> Callable[[], None]:
        network = torch.compile(self._network) if compiled else self._network

        def run():
            self._network.train()
            t = torch.randint(0, self._process.num_timesteps, (len(self._y),))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = self._process.training_losses(network, self._x, t, {"y": self._y})["loss"].mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._update_ema(self._ema, self._network)
            loss.item()

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="one step of every side each")
    args = parse(parser)

    rng, n = np.random.default_rng(0), args.batch_size
    batch = {
        "image": rng.standard_normal((n, *LATENTS), dtype=np.float32),
        "label": rng.integers(0, CLASSES, n, dtype=np.int32),
    }
    original = Original(args.dit)
    ours, theirs = Ours(original, batch), Theirs(original, batch)
    inputs = {
        "x0": batch["image"],
        "noise": rng.standard_normal(batch["image"].shape, dtype=np.float32),
        # Not 0, where the likelihood of a pixel is a small difference of two numbers, and of latents means nothing.
        "t": np.linspace(1, 999, n).astype(np.int32),
        "y": batch["label"],
        "weight": np.ones(n, np.float32),
        "importance": np.ones(n, np.float32),
    }
    mine, wanted = ours.loss(inputs), theirs.loss(inputs)
    checks = {"largest_relative_difference_of_a_loss": float(np.max(np.abs(mine - wanted) / np.abs(wanted)))}
    print(checks, flush=True)

    sides = {}
    for precision in args.precisions:
        for side in args.sides:
            sides[f"{side}, {precision}"] = ours.step(precision) if side == "ours" else theirs.step(precision, side == "compile")
    for run in tqdm(sides.values(), "compiling and warming up"):
        run()
        run()
    report(in_turn(sides, args.rounds), n, checks, args)


if __name__ == "__main__":
    main()
