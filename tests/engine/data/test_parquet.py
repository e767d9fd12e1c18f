"""Images inside Parquet files, as in Hugging Face's datasets."""

import io
import json
import os
import random
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from clips import random_clip
from image_folders import load_image
from PIL import Image

from clip_finetune.engine import UserError, eval_retrieval, eval_zero_shot, load_dataset, split_dataset
from clip_finetune.engine.data import fingerprint
from clip_finetune.engine.data.decoded_images import DecodedImages, image_batches
from clip_finetune.engine.data.images import image_files
from clip_finetune.engine.data.images.decoding import BrokenImage, MissingImage, decode
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.threads import in_threads
from clip_finetune.engine.data.tools.convert import convert_captions
from clip_finetune.engine.data.tools.inspect import inspect_dataset
from clip_finetune.engine.data.tools.prepare import Preparation, prepare_images

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(image_files, "_chunks", image_files._Chunks())


def encoded(number, form="PNG", side=40):
    pixels = numpy.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), dtype=numpy.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def held(*contents):
    """A column as Hugging Face's library writes it."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": content, "path": None} for content in contents], kind)


def written(file, columns, *, group=10, features=None):
    """A Parquet file of these columns; `features` are what Hugging Face's library notes of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file, row_group_size=group)
    return file


def captioned(file, count=24, start=0, **options):
    numbers = range(start, start + count)
    texts = [[f"picture {number}", f"number {number}"] for number in numbers]
    return written(file, {"image": held(*map(encoded, numbers)), "caption": texts}, **options)


def pixels_of(content):
    return numpy.asarray(Image.open(io.BytesIO(content)))


def test_images_and_captions_are_read(tmp_path):
    captioned(tmp_path / "data/train-00000-of-00002.parquet")
    captioned(tmp_path / "data/train-00001-of-00002.parquet", start=24)
    data = load_dataset(tmp_path)
    assert data.format == "parquet" and len(data) == 48 and data.missing() == [] and data.notes == ()
    assert data.names[30] == "train-00001-of-00002.parquet#6" and data.captions[30] == ("picture 30", "number 30")
    for index in range(48):
        assert numpy.array_equal(numpy.asarray(decode(data.path(index))), pixels_of(encoded(index)))
    alone = load_dataset(tmp_path / "data/train-00001-of-00002.parquet")
    assert len(alone) == 24 and alone.missing() == []
    train, validation = split_dataset(data, 0.25)
    assert len(train) + len(validation) == 48 and 4 <= len(validation) <= 20
    os.remove(tmp_path / "data/train-00000-of-00002.parquet")
    assert data.missing() == list(range(24))
    with pytest.raises(MissingImage):
        decode(data.path(0))


def test_classes_have_the_names_in_the_schema(tmp_path):
    columns = {"img": held(*map(encoded, range(6))), "label": [1, 0, 1, -1, 1, None]}
    names = {"label": {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"}}
    written(tmp_path / "named/test.parquet", columns, features=names)
    data = load_dataset(tmp_path / "named")
    assert data.format == "labels" and data.class_names == ("dog", "tabby cat") and not data.has_captions
    assert [data.class_names[label] for label in data.labels] == ["dog", "tabby cat", "dog", "dog"]
    assert [name.partition("#")[2] for name in data.names] == ["0", "1", "2", "4"] and data.missing() == []
    written(tmp_path / "plain/test.parquet", columns | {"label": [1, 0, 1, 2, 1, None]}, features={"label": 3})
    assert load_dataset(tmp_path / "plain").class_names == ("0", "1", "2")


def test_a_column_of_plain_bytes_and_one_that_is_named(tmp_path):
    columns = {
        "mask": pyarrow.array([encoded(9)] * 3, pyarrow.large_binary()),
        "image": held(*map(encoded, range(3))),
        "text": ["a", "b", "c"],
    }
    file = written(tmp_path / "a.parquet", columns)
    data, masks = load_dataset(tmp_path), load_dataset(tmp_path, image_column="mask")
    assert data.names == [f"a.parquet#{row}#image" for row in range(3)] and masks.names[1] == "a.parquet#1"
    assert data.missing() == masks.missing() == []
    assert numpy.array_equal(numpy.asarray(decode(data.path(1))), pixels_of(encoded(1)))
    assert numpy.array_equal(numpy.asarray(decode(masks.path(1))), pixels_of(encoded(9)))
    assert data.fingerprint() != masks.fingerprint()
    with pytest.raises(BrokenImage, match="a.parquet has no column other"):
        decode(f"{file}#1#other")


def test_notes_name_the_parts_read_together_and_large_row_groups(tmp_path, monkeypatch):
    for part in ("train-0", "test-0", "validation-0"):
        captioned(tmp_path / f"{part}.parquet", 3)
    (note,) = load_dataset(tmp_path).notes
    assert "of the parts test, train, validation, which are all read" in note
    monkeypatch.setattr("clip_finetune.engine.data.readers.parquet._LARGE_GROUP", 10_000)
    captioned(tmp_path / "large/x.parquet", 10)
    captioned(tmp_path / "small/x.parquet", 10, group=1)
    assert "x.parquet holds 0.0 GB of images in one row group" in load_dataset(tmp_path / "large").notes[0]
    assert load_dataset(tmp_path / "small").notes == ()


@pytest.fixture
def stretches_read(monkeypatch):
    """What was read, with stretches of some pictures of which a few are kept."""
    read, read_one, lock = [], image_files._read_chunk, threading.Lock()

    def noted(key, layout):
        with lock:
            read.append(key[-2:])
        return read_one(key, layout)

    monkeypatch.setattr(image_files, "_read_chunk", noted)
    monkeypatch.setattr(image_files, "_CHUNK_BYTES", 4 * len(encoded(0)))
    monkeypatch.setattr(image_files, "_CACHE_BYTES", 12 * len(encoded(0)))
    image_files._layout.cache_clear()
    yield read
    image_files._layout.cache_clear()


def test_every_row_is_its_own_image_in_any_order_and_in_threads(tmp_path, stretches_read):
    data = load_dataset(captioned(tmp_path / "a.parquet", 90, group=25))
    order = random.Random(1).choices(range(90), k=300)
    for index, picture in zip(order, in_threads(lambda index: decode(data.path(index)), order), strict=True):
        assert numpy.array_equal(numpy.asarray(picture), pixels_of(encoded(index)))
    kept = image_files._chunks._chunks.values()
    assert 1 < len(kept) < 6 and not image_files._chunks._pending


def test_in_file_order_each_stretch_is_read_once(tmp_path, stretches_read):
    data = load_dataset(captioned(tmp_path / "a.parquet", 90, group=25))
    for index in range(90):
        decode(data.path(index))
    assert len(stretches_read) == len(set(stretches_read)) and 4 * 6 <= len(stretches_read) <= 4 * 9
    stretches_read.clear()
    start = threading.Barrier(8)

    def together(number):
        start.wait()
        return decode(data.path(0)).size

    threads = [threading.Thread(target=together, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stretches_read == [(0, 0)]


def test_the_image_cache_knows_an_image_by_file_time_and_row(tmp_path):
    data = load_dataset(captioned(tmp_path / "a.parquet"))
    cache, transform = ImageCache(tmp_path / "cache"), Transform(image_size=32)
    keys = [cache.key(data.path(index), transform) for index in range(24)]
    assert None not in keys and len(set(keys)) == 24
    pictures = DecodedImages(data, transform, cache)
    first = [image.clone() for _, images in image_batches(pictures, range(24), 7) for image in images]
    assert cache.entries == 24 and not pictures.broken
    assert all(torch.equal(image, load_image(data.path(index), 32)) for index, image in enumerate(first))
    time = os.stat(tmp_path / "a.parquet").st_mtime_ns
    captioned(tmp_path / "a.parquet", start=50)
    os.utime(tmp_path / "a.parquet", ns=(time + 10**9, time + 10**9))
    assert not {cache.key(data.path(index), transform) for index in range(24)} & set(keys)
    assert torch.equal(DecodedImages(data, transform, cache).base(3), transform.base(data.path(3)))
    assert numpy.array_equal(numpy.asarray(decode(data.path(3))), pixels_of(encoded(53)))


@pytest.mark.parametrize("most", [50_000, 5])
def test_the_fingerprint_notices_a_rewritten_file(tmp_path, monkeypatch, most):
    monkeypatch.setattr(fingerprint, "MOST_STATTED", most)
    file = captioned(tmp_path / "a.parquet")
    before = load_dataset(tmp_path).fingerprint()
    folder_time = os.stat(tmp_path).st_mtime_ns
    assert load_dataset(tmp_path).fingerprint() == before
    content = file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(10**18, 10**18))
    assert os.stat(tmp_path).st_mtime_ns == folder_time
    assert load_dataset(tmp_path).fingerprint() != before


def test_rows_without_a_valid_image_are_reported_one_by_one(tmp_path, monkeypatch):
    contents = [encoded(0), None, b"no picture", encoded(3)[:200], b""]
    file = written(tmp_path / "a.parquet", {"image": held(*contents), "text": list("abcde")})
    found = inspect_dataset(load_dataset(tmp_path))
    reasons = {broken.file.partition("#")[2]: broken.reason for broken in found.broken}
    assert reasons.keys() == {"1", "2", "3", "4"} and len(found.sizes) == 1 and found.unnamed == ()
    assert reasons["1"] == "a.parquet has no image in this row"
    assert reasons["2"] == reasons["4"] == "it is not an image that Pillow can open"
    assert "it cannot be decoded" in reasons["3"]
    with pytest.raises(BrokenImage, match="a.parquet has only 5 rows"):
        decode(f"{file}#5")
    monkeypatch.setattr(image_files, "_MAX_IMAGE_BYTES", 100)
    with pytest.raises(BrokenImage, match="far too large"):
        decode(f"{file}#0")


def test_a_damaged_file_gives_one_sentence(tmp_path):
    file = captioned(tmp_path / "a.parquet", 40)
    data, content = load_dataset(tmp_path), bytearray(file.read_bytes())
    length = len(content) // 2
    content[100:length] = os.urandom(length - 100)
    file.write_bytes(content)
    reasons = set()
    for index in range(40):
        try:
            found = numpy.asarray(decode(data.path(index)))
            assert index < 40 and found.shape[2] == 3
        except BrokenImage as error:
            reasons.add(str(error))
    assert any(reason.startswith("a.parquet is damaged (") for reason in reasons), reasons
    assert not any("\n" in reason for reason in reasons)
    file.write_bytes(b"PAR1" + bytes(50))
    image_files._chunks._chunks.clear()
    with pytest.raises(BrokenImage, match="a.parquet is damaged"):
        decode(data.path(0))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_dataset(tmp_path)


def test_captions_that_are_not_texts_are_an_error(tmp_path):
    written(tmp_path / "a.parquet", {"image": held(encoded(0)), "text": [5]})
    with pytest.raises(UserError, match="a.parquet: the captions of a.parquet#0 are not texts, but .5.; name another"):
        load_dataset(tmp_path)


def test_embedded_images_are_converted_and_prepared(tmp_path):
    contents = [encoded(0), encoded(1, "JPEG"), None, encoded(3, "WEBP")]
    file = written(tmp_path / "set/a.parquet", {"image": held(*contents), "text": list("abcd")})
    data = load_dataset(file.parent)
    said = convert_captions(data, "sidecar", tmp_path / "out")
    assert "1 images are missing and are left out." in said and "3 images were copied." in said
    converted = load_dataset(tmp_path / "out")
    assert converted.names == ["a_000000.png", "a_000001.jpg", "a_000003.webp"]
    assert [text for (text,) in converted.captions] == ["a", "b", "d"]
    assert converted.path(1).read_bytes() == contents[1]
    with pytest.raises(UserError, match="images inside Parquet files, where other programs do not find them"):
        convert_captions(data, "csv", tmp_path / "out.csv")
    prepared = prepare_images(data, tmp_path / "mirrored", Preparation(flip="all"))
    assert (prepared.images, prepared.originals, len(prepared.left_out)) == (6, 3, 1)
    names = sorted(path.name for path in (tmp_path / "mirrored").rglob("a_*"))
    assert names[:2] == ["a_000000.png", "a_000000_mirrored.png"] and "a_000001.jpg" in names
    assert (tmp_path / "mirrored/a_000001.jpg").read_bytes() == contents[1]
    copies = load_dataset(tmp_path / "mirrored")
    assert len({copies.original(index) for index in range(6)}) == 3


def test_embedded_images_give_the_same_metrics_as_image_files(tmp_path):
    model = random_clip()
    captioned(tmp_path / "captions/a.parquet")
    data = load_dataset(tmp_path / "captions")
    convert_captions(data, "json", tmp_path / "files")
    assert eval_retrieval(model, data).as_dict() == eval_retrieval(model, load_dataset(tmp_path / "files")).as_dict()
    columns = {"image": held(*map(encoded, range(12))), "label": [n % 3 for n in range(12)]}
    written(tmp_path / "classes/a.parquet", columns, features={"label": {"names": ["cat", "dog", "hen"]}})
    found = eval_zero_shot(model, load_dataset(tmp_path / "classes"))
    assert found.images == 12


def test_evaluators_know_an_image_by_its_bytes(tmp_path):
    """So that one that is there twice counts once, and one that is written anew is encoded anew."""
    from clip_finetune.engine.evaluate.encoder import Encoder, EncodingCache, encode_images

    file, cache = tmp_path / "many.parquet", EncodingCache()
    first, second, third = (encoded(number) for number in (1, 2, 3))

    def features(*contents):
        written(file, {"image": held(*contents), "text": ["a"] * len(contents)})
        encoder = Encoder.of(random_clip(), device="cpu", features=cache)
        return encode_images(encoder, load_dataset(tmp_path))

    before = features(first, second, first)
    assert before.samples == [[0, 2], [1]]
    os.utime(file, (1, 1))
    after = features(third, second, first)
    assert after.samples == [[0], [1], [2]]
    assert torch.equal(after.features[2], before.features[0]) and not torch.equal(after.features[0], before.features[0])


def test_a_file_without_permission_is_an_error(ordinary_user):
    place, rights = ordinary_user
    file = captioned(place / "mine/a.parquet")
    data = load_dataset(place / "mine")
    decode(data.path(0))
    image_files._chunks._chunks.clear()
    image_files._layout.cache_clear()
    file.chmod(0)
    with rights(), pytest.raises(BrokenImage, match="Permission denied"):
        decode(data.path(0))
    with rights(), pytest.raises(UserError, match="a.parquet cannot be read as Parquet .*Permission denied"):
        load_dataset(place / "mine")


MEMORY = """
import sys
from clip_finetune.engine.data.images import image_files
from clip_finetune.engine.data.images.image_files import open_bytes
image_files._CHUNK_BYTES, image_files._CACHE_BYTES = 2**24, 2**26
def peak():  # not getrusage's, which begins with that of the process that started this one
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
with open_bytes(sys.argv[2] + "#0") as file:  # what is imported counts before
    file.read()
before = peak()
for row in range(159, 0, -8):
    with open_bytes(sys.argv[1] + f"#{row}") as file:
        assert file.read()[:4] == row.to_bytes(4, "big")
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it measures memory as Linux tells it")
def test_a_large_group_of_rows_is_not_held_in_memory(tmp_path):
    """One group of 320 MB; what is kept may take 64 MB, and what is being read 16."""
    noise = os.urandom(2 * 2**20)
    contents = [row.to_bytes(4, "big") + noise for row in range(160)]
    parquet.write_table(
        pyarrow.table({"image": contents}),
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        write_batch_size=2,
    )
    del contents
    small = written(tmp_path / "small.parquet", {"image": [b"small"]})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.parquet"), str(small)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300
