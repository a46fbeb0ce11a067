"""Write the checkpoints of this directory with TensorFlow, in a separate environment:

    pip install tensorflow-cpu==2.21.0
    python write.py .

The variables are those of OpenAI's src/model.py with random values, saved by tf.compat.v1.train.Saver. `plain` has only
weights; `adam` also has Adam's slots and a step, like the checkpoints of fine-tuning scripts; `sharded` has two data
files. The weights are the same in all, and `plain/weights.npz` has them too, saved by numpy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

V, P, D, L, H = 11, 5, 8, 2, 2

tf1 = tf.compat.v1
tf1.disable_eager_execution()


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model/wte": (V, D), "model/wpe": (P, D)}
    for i in range(L):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"model/h{i}/{norm}/{kind}": (D,) for kind in ("g", "b")}
        for name, inputs, outputs in (
            ("attn/c_attn", D, 3 * D),
            ("attn/c_proj", D, D),
            ("mlp/c_fc", D, 4 * D),
            ("mlp/c_proj", 4 * D, D),
        ):
            shapes |= {f"model/h{i}/{name}/w": (1, inputs, outputs), f"model/h{i}/{name}/b": (outputs,)}
    shapes |= {f"model/ln_f/{kind}": (D,) for kind in ("g", "b")}
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def save(folder: Path, arrays: dict[str, np.ndarray], sharded: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tf1.Graph().as_default(), tf1.Session(config=tf1.ConfigProto(device_count={"CPU": 2})) as session:
        variables = []
        for number, (name, array) in enumerate(arrays.items()):
            with tf1.device(f"/cpu:{number % 2 if sharded else 0}"):
                variables.append(tf1.Variable(array, name=name, use_resource=False))
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(variables, sharded=sharded)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    sizes = {"n_vocab": V, "n_ctx": P, "n_embd": D, "n_head": H, "n_layer": L}
    (folder / "hparams.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    out, plain = Path(sys.argv[1]), weights()
    save(out / "plain", plain)
    np.savez(out / "plain" / "weights.npz", **plain)
    slots = {f"{name}/{slot}": 0 * array for name, array in plain.items() for slot in ("Adam", "Adam_1")}
    powers = {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999), "global_step": np.int64(3)}
    save(out / "adam", {**plain, **slots, **powers})
    save(out / "sharded", plain, sharded=True)
