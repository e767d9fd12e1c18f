"""Short trainings on small noisy images, for tests of what happens to images."""

import json

import numpy
from clips import random_clip
from PIL import Image

from clip_finetune.engine import TrainConfig, train
from clip_finetune.engine.clip.tensor_files import same_bits

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


RANDOM = dict(resize_mode="random_crop", horizontal_flip=True, color_jitter=0.3)


def blocks(width, height, seed=0):
    """A picture of coloured blocks: nothing in it is equal to its mirror image or its neighbour."""
    blocks = numpy.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=numpy.uint8)
    return Image.fromarray(blocks.repeat(5, 0).repeat(5, 1)[:height, :width])


def blocks_folder(folder, count=12, size=(70, 50)):
    """A labelled folder of JPEGs that are all different."""
    folder.mkdir(parents=True)
    for index in range(count):
        blocks(*size, seed=index).save(folder / f"{index:03}.jpg", quality=95)
    (folder / "labels.json").write_text(json.dumps({f"{i:03}.jpg": [f"one {i}", f"two {i}"] for i in range(count)}))
    return folder


def run(data, folder, validation=None, progress=None, cache=None, **changes):
    hooks = {"on_progress": progress} if progress else {}
    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(random_clip(), data, validation, config, run_folder=folder, device="cpu", cache_folder=cache, **hooks)


def identical(one, other):
    one, other = one.full_clip.state_dict, other.full_clip.state_dict
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


class Stop(BaseException):
    pass


def stop_after(step):
    def progress(progress):
        if progress.step == step:
            raise Stop

    return progress


def damage(folder, names, how="cut"):
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello " * 9}[how])
