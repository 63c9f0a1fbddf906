from __future__ import annotations

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Subset

from modeling_pico.data import (
    BadImageError,
    CaptionedImageDataset,
    RandomCropFlip,
    SampleKey,
    UniqueIdBatchSampler,
    as_captioned,
    styled_shapes,
)


@pytest.fixture
def rows(make_images):
    paths = make_images("a.png", "b.png", "c.png")
    return datasets.Dataset.from_dict(
        {
            "image": [str(path) for path in paths],
            "captions": [["a1", "a2"], ["b1"], ["c1", "c2", "c3"]],
            "image_id": ["z", "y", "z"],
            "style": ["ink", "oil", "oil"],
        }
    )


def test_attributes_and_items(rows):
    dataset = CaptionedImageDataset(rows)
    assert len(dataset) == 3
    assert dataset.ids.tolist() == [0, 1, 0]
    assert dataset.ids.dtype == dataset.num_captions.dtype == torch.int64
    assert dataset.num_captions.tolist() == [2, 1, 3]
    assert dataset.styles == ["ink", "oil", "oil"]
    whole = dataset[2]
    image = whole.pop("image")
    assert whole == {"captions": ["c1", "c2", "c3"], "image_id": 0, "row": 2}
    assert image.getpixel((0, 0)) == (80, 100, 200)
    sample = dataset[SampleKey(row=2, caption=1, seed=5)]
    assert (sample["caption"], sample["image_id"], set(sample)) == ("c2", 0, {"image", "caption", "image_id"})


def test_missing_columns_and_images(rows):
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['image_id'\]"):
        CaptionedImageDataset(rows.remove_columns("image_id"))
    assert CaptionedImageDataset(rows.remove_columns("style")).styles is None
    empty = datasets.Dataset.from_dict({"image": [None], "captions": [["a"]], "image_id": ["0"]})
    with pytest.raises(BadImageError, match="There is no image"):
        CaptionedImageDataset(empty.cast_column("image", datasets.Image()))[0]


def test_captions_that_stand_under_several_ids_are_counted(rows):
    table = rows.remove_columns("captions").add_column("captions", [["A dog", "b"], ["a  dog"], ["b", "b", "c"]])
    # "a dog" stands under the ids z and y; "b" three times under z.
    assert CaptionedImageDataset(table).count_shared_captions() == 2
    assert CaptionedImageDataset(rows).count_shared_captions() == 0


def read(dataset, rows) -> list:
    samples = [dataset[row] for row in rows] + [dataset[SampleKey(row, 0, seed=row)] for row in rows]
    return [{**sample, "image": np.asarray(sample["image"]).tobytes()} for sample in samples]


def test_parts_of_data_sets_are_data_sets(rows):
    def turn(image, rng):
        return image.rotate(90, expand=True)

    first, second = CaptionedImageDataset(rows, turn), CaptionedImageDataset(rows.select([2, 1]))
    # The codes of both start at 0; the strings z, y, z, z, y say what is the same.
    joined = as_captioned(ConcatDataset([first, second]))
    assert joined.ids.tolist() == [0, 1, 0, 0, 1] and joined.image_names([1, 0]) == ["y", "z"]
    assert joined.num_captions.tolist() == [2, 1, 3, 3, 1] and joined.styles == ["ink", "oil", "oil", "oil", "oil"]
    assert joined[SampleKey(3, 1, 0)]["caption"] == "c2" and joined[4]["captions"] == ["b1"]
    # Of the same image, the first part's is turned and the second's is not.
    assert joined[SampleKey(2, 0, 0)]["image"].size != joined[SampleKey(3, 0, 0)]["image"].size == (6, 4)

    subset = as_captioned(Subset(ConcatDataset([first, Subset(second, [1])]), [3, 0, 2]))
    assert subset.ids.tolist() == [0, 1, 1] and subset.image_names([0]) == ["y"]
    assert [subset[row]["captions"] for row in range(3)] == [["b1"], ["a1", "a2"], ["c1", "c2", "c3"]]
    sizes = [subset[SampleKey(row, 0, 0)]["image"].size for row in range(3)]
    assert sizes[0] != sizes[1] == sizes[2]
    # The whole in its order is the data set itself.
    assert read(as_captioned(Subset(first, range(3))), range(3)) == read(first, range(3))
    assert read(as_captioned(Subset(rows, [2, 1])), range(2)) == read(second, range(2))
    assert as_captioned(ConcatDataset([first, rows.remove_columns("style")])).styles is None


class Own(CaptionedImageDataset):
    pass


def test_what_columns_hold_is_checked(rows):
    def with_column(name, values):
        return rows.remove_columns(name).add_column(name, values)

    with pytest.raises(ValueError, match=r"`captions` must hold lists of strings, but holds Value\('string'\)"):
        CaptionedImageDataset(with_column("captions", ["a dog", "a cat", "two"]))
    with pytest.raises(ValueError, match=r"`image_id` must hold strings or integers, but holds Value\('float64'\)"):
        CaptionedImageDataset(with_column("image_id", [1.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="`image_id` is missing in 2 rows, which would all mean the same"):
        CaptionedImageDataset(with_column("image_id", ["z", None, None]))
    for texts in (["a", None], ["", "b"], None):
        wrong = rows.select([0, 1]).to_dict() | {"captions": [["a"], texts]}
        with pytest.raises(ValueError, match="`captions` is missing in 1 rows, or holds a caption without text"):
            CaptionedImageDataset(datasets.Dataset.from_dict(wrong, features=rows.features))
    # Tensors are no keys: of the three rows each would have had an id of its own.
    dataset = CaptionedImageDataset(with_column("image_id", [4, 9, 4]).with_format("torch"))
    assert dataset.ids.tolist() == [0, 1, 0] and dataset[0]["captions"] == ["a1", "a2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: rows.to_iterable_dataset(), "IterableDataset is a stream.*streaming"),
        (lambda rows: ChainDataset([]), "ChainDataset is a stream"),
        (lambda rows: datasets.DatasetDict(train=rows), "DatasetDict holds no captioned images. Give a Captioned"),
        (lambda rows: [rows[0]], "list holds no captioned images"),
        (lambda rows: ConcatDataset([rows, [rows[0]]]), "list holds no captioned images"),
        (lambda rows: Subset(Own(rows), [0]), "must be of CaptionedImageDataset or datasets.Dataset, not of Own"),
        (lambda rows: rows.remove_columns("captions"), r"lacks the column\(s\) \['captions'\]"),
    ],
)
def test_what_holds_no_rows_of_captioned_images_is_refused_by_name(rows, make, message):
    with pytest.raises(ValueError, match=message):
        as_captioned(make(rows))


def test_transform_is_seeded_by_the_sample_and_spares_evaluation(rows):
    seen = []

    def transform(image, rng):
        seen.append(rng.random())
        return image

    dataset = CaptionedImageDataset(rows, transform)
    for seed in (1, 2, 1):
        dataset[SampleKey(0, 0, seed)]
    dataset[0]
    assert seen == [random.Random(1).random(), random.Random(2).random(), random.Random(1).random()]


def test_random_crop_flip():
    ramp = np.stack([np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))] * 3, axis=-1)
    image = Image.fromarray(ramp)
    crop = RandomCropFlip(min_scale=0.3)
    flipped = 0
    for seed in range(50):
        result = crop(image, random.Random(seed))
        assert result.size == (60, 40)
        row = np.asarray(result)[20, :, 0].astype(int)
        flipped += row[0] > row[-1]
        # Shares of the area from 0.3 on with ratios up to 4/3 keep at least sqrt(0.3 * 3/4) of the width.
        assert abs(row[0] - row[-1]) >= 0.45 * 236
    assert 10 < flipped < 40
    same = RandomCropFlip(min_scale=1.0, flip=False)(image, random.Random(0))
    np.testing.assert_array_equal(np.asarray(same), ramp)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        RandomCropFlip(min_scale=0)


def first(samples):
    return samples


def test_an_epoch_does_not_depend_on_workers_or_on_a_resume():
    data = styled_shapes("train", num_scenes=8)
    dataset = CaptionedImageDataset(data, RandomCropFlip())
    sampler = UniqueIdBatchSampler(dataset.ids, dataset.num_captions, 4, seed=3)

    def epoch(num_workers, skip=0):
        sampler.set_epoch(1)
        batches = list(sampler)[skip:]
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=first, num_workers=num_workers)
        return [[(np.asarray(s["image"]).tobytes(), s["caption"], s["image_id"]) for s in batch] for batch in loader]

    alone = epoch(0)
    assert len(alone) == 4
    assert epoch(2) == alone
    assert epoch(0, skip=2) == alone[2:]
