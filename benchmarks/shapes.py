"""Parameter shapes to measure with: leaf path -> shape.

GPT-2 small (Radford et al., 2019): 12 blocks of width 768, a vocabulary of 50257, a context of
1024, the head tied to the token embedding: 148 leaves, 124,439,808 parameters.
ViT-B/16 (Dosovitskiy et al., 2021): 12 blocks of width 768, patches of 16 x 16 of an image of
224 x 224, 1000 classes: 152 leaves, 86,567,656 parameters.
Llama 7B (Touvron et al., 2023): 32 blocks of width 4096 without biases, gated layers of 11008, a
vocabulary of 32000: 291 leaves, 6,738,415,616 parameters.
Kernels are [in, out], as in Flax.
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


def vit(patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """ViT-B/16; its blocks are of the shapes of GPT-2 small's."""
    return {
        "cls": (1, 1, WIDTH),
        "position": (1, (image // patch) ** 2 + 1, WIDTH),
        "patch.kernel": (patch, patch, 3, WIDTH),
        "patch.bias": (WIDTH,),
        **blocks(LAYERS),
        "ln_f.scale": (WIDTH,),
        "ln_f.bias": (WIDTH,),
        "head.kernel": (WIDTH, classes),
        "head.bias": (classes,),
    }


def llama(width: int = 4096, hidden: int = 11008, layers: int = 32, words: int = 32000) -> Shapes:
    """Llama 7B."""
    shapes: Shapes = {"embedding": (words, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.attn.{name}.kernel": (width, width) for name in "qkvo"}
        shapes |= {f"layers.{i}.mlp.{name}.kernel": (width, hidden) for name in ("gate", "up")}
        shapes[f"layers.{i}.mlp.down.kernel"] = (hidden, width)
        shapes |= {f"layers.{i}.norm_{n}.scale": (width,) for n in (1, 2)}
    return shapes | {"norm.scale": (width,), "head.kernel": (width, words)}


def gpt2() -> Shapes:
    """GPT-2 small."""
    return {
        "wte.embedding": (VOCABULARY, WIDTH),
        "wpe.embedding": (CONTEXT, WIDTH),
        **blocks(LAYERS),
        "ln_f.scale": (WIDTH,),
        "ln_f.bias": (WIDTH,),
    }


def stacked() -> Shapes:
    """GPT-2 small's blocks as a scan over layers has them: each leaf of all blocks is one array."""
    first = block("h")
    return {path: (LAYERS, *shape) for path, shape in first.items()}


SETS: dict[str, Shapes] = {
    "gpt2": gpt2(),
    "gpt2-stacked": stacked(),
    "gpt2-2blocks": blocks(2),
    "gpt2-block": blocks(1),
    "vit-b16": vit(),
    "llama-7b": llama(),
}


def size(shapes: Shapes) -> int:
    """Parameters in all."""
    return sum(map(math.prod, shapes.values()))
