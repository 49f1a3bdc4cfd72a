"""The aggregators written out: NumPy in float64, one tile, one head, one pixel at a time.

Written from the papers' equations; shares no code with xmag. Each takes the weights by their names
in the module's state dict, the tiles (N, D) of one bag, and gives (logits (C,), attention (N,)).
"""

import math

import numpy as np


def relu(x):
    return np.where(x > 0, x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def linear(w, name, x):
    out = w[f"{name}.weight"] @ x
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def cross_entropy(logits, label):
    return -math.log(softmax(logits)[label])


def embedded(w, tiles):
    return [relu(linear(w, "embed.0", x)) for x in tiles]


def gated(w, h):
    scores = []
    for tile in h:
        content = np.tanh(linear(w, "attention.content", tile))
        gate = sigmoid(linear(w, "attention.gate", tile))
        scores.append(linear(w, "attention.score", content * gate)[0])
    attention = softmax(np.array(scores))
    pooled = sum(a * tile for a, tile in zip(attention, h, strict=True))
    return linear(w, "head", pooled), attention


def abmil(w, tiles):
    return gated(w, embedded(w, tiles))


def mean(w, tiles):
    h = embedded(w, tiles)
    return linear(w, "head", sum(h) / len(h)), None


def maximum(w, tiles):
    h = embedded(w, tiles)
    largest = np.array([max(tile[channel] for tile in h) for channel in range(len(h[0]))])
    return linear(w, "head", largest), None


def smooth_svm(scores, label):
    """Berrada et al. 2018: log of the sum over classes of exp(margin + s_j - s_y)."""
    return math.log(sum(math.exp((j != label) + s - scores[label]) for j, s in enumerate(scores)))


def clam_loss(w, tiles, label, *, k, bag_weight, subtyping, instance_loss):
    h = embedded(w, tiles)
    logits, attention = gated(w, h)
    order = sorted(range(len(h)), key=lambda i: attention[i])
    loss_of = smooth_svm if instance_loss == "svm" else cross_entropy
    pairs = [(h[i], 1) for i in order[-k:]] + [(h[i], 0) for i in order[:k]]
    losses = [loss_of(linear(w, f"instance_heads.{label}", t), target) for t, target in pairs]
    instance = sum(losses) / len(losses)
    if subtyping:
        for other in range(len(logits)):
            if other != label:
                losses = [
                    loss_of(linear(w, f"instance_heads.{other}", h[i]), 0) for i in order[-k:]
                ]
                instance += sum(losses) / k
        instance /= len(logits)
    return bag_weight * cross_entropy(logits, label) + (1 - bag_weight) * instance


def layer_norm(w, name, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def nystrom(w, name, tokens, *, heads, landmarks):
    """Nystromformer with heads one by one: new tokens, attention of the first one (heads, T)."""
    dim, length = len(tokens[0]), len(tokens)
    front = (landmarks - length % landmarks) % landmarks
    padded = [np.zeros(dim)] * front + list(tokens)
    total, size = len(padded), dim // heads
    stretch = total // landmarks
    qkv = [w[f"{name}.qkv.weight"] @ x for x in padded]
    kernels, values = [], []
    for head in range(heads):
        at = [slice(part * dim + head * size, part * dim + (head + 1) * size) for part in range(3)]
        q = np.array([x[at[0]] for x in qkv]) / math.sqrt(size)
        k, v = (np.array([x[at[part]] for x in qkv]) for part in (1, 2))
        cut = [slice(m * stretch, (m + 1) * stretch) for m in range(landmarks)]
        ql, kl = (np.array([x[c].mean(axis=0) for c in cut]) for x in (q, k))
        f = np.array([softmax(row) for row in q @ kl.T])
        a = np.array([softmax(row) for row in ql @ kl.T])
        b = np.array([softmax(row) for row in ql @ k.T])
        kernels.append((f, a, b))
        values.append(v)
    # The scale to start from is shared by the heads, as in the published code.
    columns = max(a.sum(axis=1).max() for _, a, _ in kernels)
    rows = max(a.sum(axis=0).max() for _, a, _ in kernels)
    out, first = np.zeros((total, dim)), []
    for head, ((f, a, b), v) in enumerate(zip(kernels, values, strict=True)):
        z, one = a.T / (columns * rows), np.eye(landmarks)
        for _ in range(6):
            z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
        mixed = f @ z @ b @ v
        kernel = w[f"{name}.residual.weight"][head, 0, :, 0]
        for t in range(total):
            for offset in range(len(kernel)):
                if 0 <= t + offset - len(kernel) // 2 < total:
                    mixed[t] = mixed[t] + kernel[offset] * v[t + offset - len(kernel) // 2]
        out[:, head * size : (head + 1) * size] = mixed
        first.append((f @ z @ b)[front, front:])
    return [linear(w, f"{name}.out.0", x) for x in out[front:]], np.array(first)


def ppeg(w, tiles, side):
    out = [tile.copy() for tile in tiles]
    for index, size in enumerate((7, 5, 3)):
        kernel = w[f"positions.convolutions.{index}.weight"]
        for row in range(side):
            for column in range(side):
                value = w[f"positions.convolutions.{index}.bias"].copy()
                for i in range(size):
                    for j in range(size):
                        y, x = row + i - size // 2, column + j - size // 2
                        if 0 <= y < side and 0 <= x < side:
                            value += kernel[:, 0, i, j] * tiles[y * side + x]
                out[row * side + column] += value
    return out


def transmil(w, tiles, *, heads, landmarks):
    h = embedded(w, tiles)
    side = math.ceil(math.sqrt(len(h)))
    square = h + h[: side * side - len(h)]
    tokens = [w["class_token"][0, 0], *square]
    change, _ = nystrom(
        w, "layers.0", [layer_norm(w, "norms.0", t) for t in tokens], heads=heads,
        landmarks=landmarks,
    )  # fmt: skip
    tokens = [t + c for t, c in zip(tokens, change, strict=True)]
    tokens = [tokens[0], *ppeg(w, tokens[1:], side)]
    change, first = nystrom(
        w, "layers.1", [layer_norm(w, "norms.1", t) for t in tokens], heads=heads,
        landmarks=landmarks,
    )  # fmt: skip
    logits = linear(w, "head", layer_norm(w, "final_norm", tokens[0] + change[0]))
    attended = np.maximum(first.mean(axis=0)[1:], 0)
    weights = np.zeros(len(h))
    for place, value in enumerate(attended):
        weights[place if place < len(h) else place - len(h)] += value
    return logits, weights / weights.sum()
