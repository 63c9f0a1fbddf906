from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

import modeling_pico
from modeling_pico import RetrievalEvaluator, StyleStress, measure_style_stress, pair_scores
from modeling_pico.data import CaptionedImageDataset, PicoDataCollator, as_captioned, render
from modeling_pico.evaluation import EncodedRetrieval, style_stress
from modeling_pico.evaluation.embedding_cache import cache_key
from modeling_pico.evaluation.style_stress import draw_looks


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(style_stress.logger, "warning", seen.append)
    return seen


# By hand


def weight(tokens, mask, modality):
    return tokens, None


MODEL = SimpleNamespace(alignment_head=SimpleNamespace(weight=weight), score=pair_scores)
# One token a sample: image `i` looks along axis `i`.
IMAGES = torch.eye(4)[:, None]
MASK = torch.ones(4, 1, dtype=torch.bool)
# Plain captions (one, two, three and one of the four images) find their image; those of the style find the next one.
TOLD = [["x"], ["y", "z", "w"], [], ["u"]]


def encode(data) -> EncodedRetrieval:
    tokens, ids = [], []
    for row in range(len(data)):
        for text in data[row]["captions"]:
            tokens.append(torch.eye(4)[(row + (text in "xyzwu")) % 4])
            ids.append(row)
    texts = torch.stack(tokens)[:, None]
    return EncodedRetrieval(
        IMAGES, MASK, texts, torch.ones(len(ids), 1, dtype=torch.bool), torch.arange(4), torch.tensor(ids)
    )


def encode_look(data) -> tuple[torch.Tensor, torch.Tensor]:
    return {None: IMAGES, "gray": IMAGES, "neon": IMAGES.roll(1, dims=0)}[data.look], MASK


def measure(looks=(), captions=None, **options) -> StyleStress:
    dataset = CaptionedImageDataset(tiny.rows(4))
    return StyleStress.measure(MODEL, dataset, looks, captions, encode=encode, encode_images=encode_look, **options)


def test_looks_by_hand():
    stress = measure(["neon", "gray", "neon"])
    assert list(stress.looks) == ["neon", "gray"] and stress.captions == {}
    assert (stress.plain.images, stress.plain.texts, stress.plain.rsum) == (4, 7, 600)
    assert stress.plain.drop is None
    gray, neon = stress.looks["gray"], stress.looks["neon"]
    assert (gray.rsum, gray.drop, gray.plain_rsum, gray.texts) == (600, 0, 600, 7)
    # Every first answer is wrong, and with four images all are among five.
    assert neon.retrieval["image_to_text_recall_at_1"] == neon.retrieval["text_to_image_recall_at_1"] == 0
    assert neon.drop == 600 - neon.rsum >= 200
    assert neon.chance_rsum == stress.plain.chance_rsum
    assert stress.metrics() == {
        "plain_rsum": 600,
        "neon_rsum": neon.rsum,
        "neon_drop": neon.drop,
        "gray_rsum": 600,
        "gray_drop": 0,
    }


def test_captions_are_compared_with_as_many_plain_ones_of_the_same_images(warnings):
    stress = measure(captions={"told": TOLD})
    told = stress.captions["told"]
    # Of three captions in the style two have plain ones to compare with; the image without any is left out.
    assert (told.images, told.texts) == (3, 1 + 2 + 1)
    assert told.plain_rsum == 600 and told.drop == 600 - told.rsum
    assert told.retrieval["text_to_image_recall_at_1"] == 0
    # The plain set is all of it, without the captions in the style.
    assert (stress.plain.images, stress.plain.texts, stress.plain.rsum) == (4, 7, 600)
    assert len(warnings) == 1 and "1 of 4 images have no captions 'told'" in warnings[0]
    assert set(stress.metrics()) == {"plain_rsum", "captions_told_rsum", "captions_told_drop"}
    # As good as the plain ones, nothing drops.
    same = measure(captions={"same": [["right"]] * 4}).captions["same"]
    assert (same.rsum, same.drop, same.texts) == (600, 0, 4)
    assert len(warnings) == 1


def test_aligned_galleries_stand_beside_the_others():
    def align(data, encoded):
        # Of a look the gallery in that look, with all plain captions.
        assert torch.equal(encoded.image_tokens, encode_look(data)[0]) and len(encoded.text_ids) == 7
        return replace(encoded, image_tokens=IMAGES)

    stress = measure(["neon"], {"told": TOLD}, align=align)
    assert stress.plain.aligned_rsum == stress.looks["neon"].aligned_rsum == 600
    metrics = stress.metrics()
    assert metrics["neon_aligned_rsum"] == metrics["plain_aligned_rsum"] == 600 > metrics["neon_rsum"]
    assert "| rSum, aligned |" in stress.to_markdown()
    assert "ligned" not in measure(["neon"]).to_markdown()
    assert measure([], {"told": TOLD}, align=align).plain.aligned_rsum is None


def test_report_as_table_and_numbers():
    stress = measure(["gray", "neon"], {"a|b": TOLD})
    lines = stress.to_markdown().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        *("Look", "---", "plain", "gray", "neon"),
        *("Captions", "---", "`a`\\"),
    ]
    [gray] = [line for line in lines if line.startswith("| gray")]
    assert gray.endswith("| 600.0 | +0.0 |")
    neon = json.loads(json.dumps(stress.to_dict()))["looks"]["neon"]
    assert neon["drop"] == stress.looks["neon"].drop and neon["retrieval"]["rsum"] == stress.looks["neon"].rsum


@pytest.mark.parametrize(
    ("looks", "captions", "said"),
    [
        ([], None, "needs looks, or captions in another style"),
        (["grey"], None, "There is no look 'grey'; choose from 'gray'"),
        ([], {"told": TOLD[:3]}, "one list for each of the 4 rows, but there are 3"),
        ([], {"told": [[]] * 4}, "None of the 4 images has captions 'told'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_encoded(looks, captions, said, monkeypatch):
    monkeypatch.setitem(globals(), "encode", lambda data: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=said):
        measure(looks, captions)


# Models


def plainly(model, data: CaptionedImageDataset) -> float:
    loader = DataLoader(data, batch_size=4, collate_fn=PicoDataCollator(tiny.processor()))
    return RetrievalEvaluator()(model, loader)["rsum"]


def with_captions(data: CaptionedImageDataset, rows: list[int], captions: list[list[str]]) -> CaptionedImageDataset:
    table = data.dataset.select(rows).remove_columns("captions")
    feature = data.dataset.features["captions"]
    return CaptionedImageDataset(table.add_column("captions", captions, feature=feature))


@pytest.mark.parametrize("method", ["fine_grained", "clip_style"])
def test_a_stress_test_is_an_evaluation_of_each_set_of_its_own(method, warnings):
    model, data = tiny.model(method=method), CaptionedImageDataset(tiny.rows(9, seed=1))
    told = [[f"{row} in the middle", "green left"][: row % 3] for row in range(9)]
    calls = {"vision_model": 0, "text_model": 0}
    for name in calls:

        def count(module, *args, name=name):
            calls[name] += 1

        getattr(model, name).register_forward_hook(count)
    stress = measure_style_stress(model, tiny.processor(), data, ["gray", "negative"], {"told": told}, batch_size=4)
    # Texts once, images once and once again for each look, in three batches.
    assert calls == {"vision_model": 9, "text_model": 3}
    assert stress.plain.rsum == pytest.approx(plainly(model, data), abs=1e-4)
    for look in ("gray", "negative"):
        assert stress.looks[look].rsum == pytest.approx(plainly(model, data.in_look(look)), abs=1e-4)
    assert stress.plain.rsum != stress.looks["negative"].rsum
    rows = [row for row in range(9) if told[row]]
    both = [(data[row]["captions"], told[row]) for row in rows]
    counts = [min(map(len, pair)) for pair in both]
    plain, other = ([pair[side][:count] for pair, count in zip(both, counts, strict=True)] for side in (0, 1))
    assert stress.captions["told"].rsum == pytest.approx(plainly(model, with_captions(data, rows, other)), abs=1e-4)
    plain_rsum = plainly(model, with_captions(data, rows, plain))
    assert stress.captions["told"].plain_rsum == pytest.approx(plain_rsum, abs=1e-4)


def test_the_trainer_measures_the_same_and_caches_no_look_as_the_plain_set(tmp_path):
    data = CaptionedImageDataset(tiny.rows(9, seed=1))
    made = tiny.trainer(tmp_path / "a", eval_data=data, per_device_eval_batch_size=4)
    told = {"told": [["green left"]] * 9}
    stress = made.measure_style_stress(data, ["gray", "negative"], told)
    expected = measure_style_stress(made.model, tiny.processor(), data, ["gray", "negative"], told, batch_size=4)
    assert stress.metrics() == pytest.approx(expected.metrics(), abs=1e-4)

    kept = tiny.trainer(tmp_path / "b", eval_data=data, eval_cache_dir=str(tmp_path / "cache"))
    plain = kept.evaluate(data)["eval_rsum"]
    negative = kept.evaluate(data.in_look("negative"))["eval_rsum"]
    assert plain != negative == kept.evaluate(data.in_look("negative"))["eval_rsum"]
    assert plain == kept.evaluate(data)["eval_rsum"]
    keys = {cache_key(kept.model, kept.get_eval_dataloader(one)) for one in (data, data.in_look("gray"))}
    assert len(keys) == 2
    # From the cache or not, in half precision both times.
    first, second = (kept.measure_style_stress(data, ["negative"]).metrics() for _ in range(2))
    assert first == second and first["negative_rsum"] == negative and first["plain_rsum"] == plain


def test_folds_are_those_of_the_evaluation(tmp_path):
    data = CaptionedImageDataset(tiny.rows(8))
    made = tiny.trainer(tmp_path, eval_data=data, eval_num_folds=2)
    stress = made.measure_style_stress(data, ["gray"], {"told": [[]] + [["green"]] * 7})
    assert stress.plain.rsum == pytest.approx(made.evaluate(data)["eval_rsum"])
    assert stress.looks["gray"].rsum == pytest.approx(made.evaluate(data.in_look("gray"))["eval_rsum"])
    assert stress.captions["told"].images == 7


# Data


def test_a_data_set_in_a_look():
    data = CaptionedImageDataset(tiny.rows(3))
    drawn = data.in_look("negative")
    assert drawn[1]["image"].tobytes() == render(data[1]["image"], "negative").tobytes() != data[1]["image"].tobytes()
    assert drawn[1]["captions"] == data[1]["captions"] and torch.equal(drawn.ids, data.ids)
    assert (data.look, drawn.look) == (None, "negative")
    with pytest.raises(ValueError, match="There is no look 'grey'"):
        data.in_look("grey")
    with pytest.raises(ValueError, match=r"drawn in the look 'negative'.*as_captioned\(...\).in_look\('negative'\)"):
        as_captioned(Subset(drawn, [0]))
    assert as_captioned(Subset(data, [0])).in_look("negative")[0]["image"].tobytes() == drawn[0]["image"].tobytes()


class Own:
    ids = num_captions = torch.ones(3, dtype=torch.int64)

    def __len__(self) -> int:
        return 3


def test_data_sets_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="images of a CaptionedImageDataset again, but got a Own"):
        measure_style_stress(tiny.model(), tiny.processor(), Own(), ["gray"])


def test_images_that_are_drawn_already_are_refused():
    drawn = CaptionedImageDataset(tiny.rows(5)).in_look("gray")
    with pytest.raises(ValueError, match="in the look 'gray' already"):
        measure_style_stress(tiny.model(), tiny.processor(), drawn, ["negative"])


def test_contact_sheet_has_a_line_for_each_image_and_a_column_for_each_look():
    data = CaptionedImageDataset(tiny.rows(5))
    sheet = draw_looks(data, ["negative", "gray"], num_images=2, side=16)
    assert sheet.size == (6 + 3 * 22, 20 + 2 * 22)
    for line, row in enumerate((0, 2)):
        for column, look in enumerate((None, "negative", "gray")):
            corner = 6 + 22 * column, 20 + 22 * line
            picture = data[row]["image"] if look is None else render(data[row]["image"], look)
            shown = sheet.crop((*corner, corner[0] + 16, corner[1] + 16))
            assert shown.tobytes() == picture.tobytes()
    # Pictures of other shapes keep them.
    wide = style_stress._fitted(Image.new("RGB", (400, 100)), 160)
    assert wide == (160, 40)
    assert draw_looks(data, ["gray"]).size[1] == 20 + 5 * 166


def test_it_is_part_of_the_package():
    assert {"StyleStress", "measure_style_stress"} <= set(modeling_pico.__all__)
