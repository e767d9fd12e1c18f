"""Several datasets as one, and datasets of images in memory."""

import numpy
import pytest
from caption_folders import write_folder
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import UserError, combine_datasets, load_dataset, split_dataset
from clip_finetune.engine.data.from_images import dataset_from_images


def test_datasets_are_combined_by_weights(tmp_path):
    labels = load_dataset(labels_folder(tmp_path / "labels", 4))
    classes = load_dataset(class_folder(tmp_path / "classes", 2))
    both = combine_datasets([labels, classes, labels.subset([0])], [3, 1.5, 0])
    assert len(both) == 12 and list(both.repeats) == [2] * 4 + [1] * 8
    assert [both.path(index) for index in range(12)] == [*map(labels.path, range(4)), *map(classes.path, range(8))]
    assert both.captions[0] == labels.captions[0] and both.training_captions(4) == ("a photo of a blue.",)
    assert both.labels[:4] == [None] * 4 and both.class_names == classes.class_names and both.missing() == []
    assert list(combine_datasets([labels, classes]).repeats) == []
    twice = combine_datasets([both, classes], [1, 2])
    assert list(twice.repeats) == [2] * 4 + [1] * 8 + [2] * 8
    assert both.fingerprint() != combine_datasets([labels, classes], [1, 1]).fingerprint()


def test_classes_with_the_same_name_become_one(tmp_path):
    one = load_dataset(write_folder(tmp_path / "1", {"l.csv": "image,label\na.png,cat\nb.png,dog\n"}))
    two = load_dataset(write_folder(tmp_path / "2", {"l.csv": "image,label\na.png,cat\nb.png,ant\n"}))
    both = combine_datasets([one, two])
    assert [both.class_names[label] for label in both.labels] == ["cat", "dog", "cat", "ant"]


def test_a_copy_stays_on_the_side_of_its_original_in_another_dataset(tmp_path):
    old = load_dataset(labels_folder(tmp_path / "old", 12))
    lines = "picture\toriginal\n" + "".join(f"{name}\t../old/{name}\n" for name in old.names)
    new = load_dataset(labels_folder(write_folder(tmp_path / "new", {"originals.tsv": lines}, ""), 12))
    both = combine_datasets([old, new])
    assert [both.original(index) for index in range(12)] == [both.original(index) for index in range(12, 24)]
    for seed in range(5):
        sides = [sorted(part.names) for part in split_dataset(both, 0.4, seed)]
        assert all(names[::2] == names[1::2] for names in sides)
        # Joining moves no image of the first set to the other side.
        assert sides[0][::2] == sorted(split_dataset(old, 0.4, seed)[0].names)


@pytest.mark.parametrize(
    "weights, words",
    [([1], "1 weights for 2"), ([0, 0], "above 0"), ([-1, 1], "from 0"), ([float("nan"), 1], "from 0")],
)
def test_weights_that_make_no_sense_are_errors(tmp_path, weights, words):
    data = load_dataset(labels_folder(tmp_path / "a", 2))
    with pytest.raises(UserError, match=words):
        combine_datasets([data, data], weights)


def test_a_name_in_one_dataset_never_leads_to_an_image_of_another(tmp_path):
    one = load_dataset(write_folder(tmp_path / "x/one", {"l.json": {"only_in_two.png": "out"}}, ""))
    two = load_dataset(write_folder(tmp_path / "x/two", {"l.json": {"only_in_two.png": "in"}}, "only_in_two.png"))
    assert combine_datasets([one, two]).missing() == [0]


def test_the_same_images_become_the_same_files_again_after_deletion(tmp_path):
    images = [numpy.full((6, 5, channels), 40 * channels, numpy.uint8) for channels in (1, 3, 4)]
    data = dataset_from_images(iter(images), ["grey", "red\nof three", "clear"], tmp_path / "t")
    assert list(data.captions) == [("grey",), ("red", "of three"), ("clear",)] and data.missing() == []
    for index, image in enumerate(images):
        assert numpy.array_equal(numpy.asarray(Image.open(data.path(index))).reshape(image.shape), image)
    before = data.fingerprint()
    for file in (tmp_path / "t").iterdir():
        file.unlink()
    again = dataset_from_images(images, ["grey", "red\nof three", "clear"], tmp_path / "t")
    assert again.fingerprint() == before and again.names == data.names


def test_an_image_that_comes_twice_is_one_sample(tmp_path):
    image = numpy.zeros((4, 4, 3), numpy.uint8)
    data = dataset_from_images([image, image + 1, image], ["one", "", "two"], tmp_path)
    assert list(data.captions) == [("one", "two")] and "1 images have no caption" in data.notes[0]
    with pytest.raises(UserError, match="2 images and 1 captions"):
        dataset_from_images([image, image], ["one"], tmp_path)
    with pytest.raises(UserError, match="None of the images has a caption"):
        dataset_from_images([image], [" "], tmp_path)
