"""Parameter shapes to measure with: leaf path -> shape, of GPT-2 small and of parts of it.

GPT-2 small (Radford et al., 2019): 12 blocks of width 768, a vocabulary of 50257, a context of
1024, the head tied to the token embedding: 148 leaves, 124,439,808 parameters. Kernels are
[in, out], as in Flax.
"""

import math

Shapes = dict[str, tuple[int, ...]]

WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024


def block(name: str) -> Shapes:
    """One pre-norm transformer block: 12 leaves, 7.1M parameters."""
    return {
        f"{name}.ln_1.scale": (WIDTH,),
        f"{name}.ln_1.bias": (WIDTH,),
        f"{name}.attn.c_attn.kernel": (WIDTH, 3 * WIDTH),
        f"{name}.attn.c_attn.bias": (3 * WIDTH,),
        f"{name}.attn.c_proj.kernel": (WIDTH, WIDTH),
        f"{name}.attn.c_proj.bias": (WIDTH,),
        f"{name}.ln_2.scale": (WIDTH,),
        f"{name}.ln_2.bias": (WIDTH,),
        f"{name}.mlp.c_fc.kernel": (WIDTH, 4 * WIDTH),
        f"{name}.mlp.c_fc.bias": (4 * WIDTH,),
        f"{name}.mlp.c_proj.kernel": (4 * WIDTH, WIDTH),
        f"{name}.mlp.c_proj.bias": (WIDTH,),
    }


def blocks(n: int) -> Shapes:
    return {path: shape for i in range(n) for path, shape in block(f"h.{i}").items()}


def gpt2() -> Shapes:
    """GPT-2 small."""
    return {
        "wte.embedding": (VOCABULARY, WIDTH),
        "wpe.embedding": (CONTEXT, WIDTH),
        **blocks(LAYERS),
        "ln_f.scale": (WIDTH,),
        "ln_f.bias": (WIDTH,),
    }


SETS: dict[str, Shapes] = {
    "gpt2": gpt2(),
    "gpt2-2blocks": blocks(2),
    "gpt2-block": blocks(1),
}


def size(shapes: Shapes) -> int:
    """Parameters in all."""
    return sum(map(math.prod, shapes.values()))
