"""GPT-2 small trained for a few hundred steps, with `optax.adamw` and with `stquant.adamw`.

The model is that of examples/train_gpt.py with GPT-2's sizes and its tied head, 124M parameters in
float32, computed in bfloat16; the text is the standard library's, byte by byte.
"""

import functools
import importlib.util
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stquant_jax as stquant
from benchmarks.gpu.setting import Setting, nbytes
from benchmarks.shapes import CONTEXT, LAYERS, VOCABULARY, WIDTH

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt.py"
STEPS, BLOCK = 200, 10  # steps of a run, and between two looks at the loss and at the clock
PEAK, DECAY = 6e-4, 0.1


def _example() -> Any:
    """examples/train_gpt.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    # Angles are float32; what they turn goes on in the precision that it came in.
    rotate = module.rotate
    module.rotate = lambda x: rotate(x).astype(x.dtype)
    return module


def _model(example: Any, cfg: Any, words: int) -> tuple[Any, Any]:
    """The graph and its parameters."""
    from flax import nnx

    class Tied(example.GPT):
        """The head is the embedding."""

        def __init__(self, rngs: nnx.Rngs):
            super().__init__(cfg, rngs)
            del self.head
            small = nnx.initializers.normal(0.02)
            self.tokens = nnx.Embed(words, cfg.features, embedding_init=small, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = self.tokens(tokens)
            for block in self.blocks:
                x = block(x)
            return self.tokens.attend(self.norm(x))

    return nnx.split(Tied(nnx.Rngs(cfg.seed)))


def _loss(merge: Callable, graph: Any, params: Any, text: jax.Array) -> jax.Array:
    """Nats per byte, computed in bfloat16 up to the logits; gradients are the parameters'."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = merge(graph, half)(text[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def _text(example: Any) -> tuple[str, jax.Array]:
    """What it is, and bytes to train on."""
    try:
        corpus, _ = example.load_corpus(Path(sysconfig.get_path("stdlib")))
        return "standard library", jnp.asarray(corpus)
    except SystemExit:  # a Python without sources
        random = np.random.default_rng(0)
        return "random letters", jnp.asarray(random.integers(97, 123, 10**7, np.uint8))


def gpt2(setting: Setting) -> Iterator[dict[str, Any]]:
    """A row per run, all from the same weights over the same bytes."""
    from flax import nnx

    example = _example()
    if setting.interpret:
        words, steps = 256, 2
        sizes = {"layers": 1, "features": 16, "heads": 2, "length": 16, "batch": 2}
    else:
        words, steps = VOCABULARY, STEPS
        sizes = {"layers": LAYERS, "features": WIDTH, "heads": 12, "length": CONTEXT, "batch": 8}
    cfg = example.Config(steps=steps, lr=PEAK, weight_decay=DECAY, **sizes)
    source, text = _text(example)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, max(1, steps // 10), steps)
    runs: dict[str, Any] = {"optax.adamw": optax.adamw(schedule, weight_decay=DECAY)}
    # Of so small a model, most elements are exact.
    for bits in (16.0,) if setting.interpret else (5.0, 3.0):
        precision = stquant.Budget(bits, interval=None if setting.interpret else 50)
        runs[f"stquant.adamw {bits:g} bits"] = stquant.adamw(
            schedule, weight_decay=DECAY, precision=precision, storage=setting.storage()
        )
    for i, (name, tx) in enumerate(runs.items()):
        # An equal part of what is left, the compilation included.
        deadline = time.monotonic() + setting.left / (len(runs) - i)
        row = _train(cfg, tx, _model(example, cfg, words), nnx.merge, text, deadline)
        yield {"run": name, "text": source, **row}


def _train(
    cfg: Any, tx: Any, model: Any, merge: Callable, text: jax.Array, deadline: float
) -> dict[str, Any]:
    graph, params = model
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key, text):
        starts = jax.random.randint(key, (cfg.batch,), 0, text.size - cfg.length)
        batch = text[starts[:, None] + jnp.arange(cfg.length + 1)]
        loss, grads = jax.value_and_grad(functools.partial(_loss, merge, graph))(params, batch)
        grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
        if getattr(tx, "fused", None):
            return *stquant.fused_update(tx, grads, state, params), loss
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    keys = jax.random.split(jax.random.key(cfg.seed), cfg.steps)
    losses, seconds = [], []
    block = min(BLOCK, cfg.steps)
    for first in range(0, cfg.steps, block):
        begin, found = time.perf_counter(), []
        for key in keys[first : first + block]:
            params, state, loss = step(params, state, key, text)
            found.append(loss)
        losses += np.asarray(jax.device_get(found)).round(5).tolist()  # waits for the device
        seconds.append((time.perf_counter() - begin) / block)
        if time.monotonic() > deadline:
            break
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "state_bytes": nbytes(state),
        "steps": len(losses),
        "of_steps": cfg.steps,
        "tokens_per_step": cfg.batch * cfg.length,
        "first_block_seconds": round(seconds[0] * block, 3),  # it compiles
        "seconds_per_step": round(float(np.median(seconds[1:] or seconds)), 6),
        "loss": losses,
    }
