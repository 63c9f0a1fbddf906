from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig, ViTConfig

import modeling_pico
from modeling_pico import CddsConfig, PicoConfig, PicoModel
from modeling_pico.training.model_card import create_model_card


METRICS = {
    "image_to_text_recall_at_1": 12.34,
    "image_to_text_recall_at_5": 40.0,
    "image_to_text_recall_at_10": 55.06,
    "text_to_image_recall_at_1": 11.0,
    "text_to_image_recall_at_5": 33.33,
    "text_to_image_recall_at_10": 44.0,
    "rsum": 195.73,
    "image_to_text_median_rank": 8.0,
    "loss": 1.5,
}
CONFIG = PicoConfig(vision_config=ViTConfig(), text_config=BertConfig())
HEADINGS = ["How to use it", "Results", "Data", "Model", "Training", "Limits", "Citation"]


def _full_card(**changes):
    options = {
        "model_id": "someone/pico-flickr",
        "config": CONFIG,
        "base_models": ["google/vit-base-patch16-224-in21k", "bert-base-uncased"],
        "dataset_name": "someone/flickr30k",
        "splits": {
            "train": {"images": 29000, "texts": 145000},
            "validation": {"images": 1014},
            "test": {"images": 1000},
        },
        "training": {"learning_rate": 2e-4, "warmup_steps": None, "seed": 0},
        "stage_log": [
            {"loss": 3.0, "epoch": 1.0},
            {"prototype_stage": 1.0, "prototype_feedback_gain": None, "image_prototype_movement": 0.5, "epoch": 2.0},
            {
                "prototype_stage": 2.0,
                "prototype_feedback_gain": -0.04,
                "prototype_feedback_weight": 0.779,
                "image_prototype_movement": 0.01234,
                "epoch": 3.0,
            },
        ],
        "metrics": {"validation": METRICS, "test": METRICS},
        "style_metrics": {
            "noto": {**METRICS, "images": 1200, "texts": 2400, "chance_rsum": 4.21, "equal_rsum": 201.0},
            "unseen": {"loss": 2.0},
        },
        "command": "python train_pico.py recipe.yaml",
        "framework_versions": {"torch": "2.6.0", "transformers": "5.20.0"},
        "language": "en",
        "license": "apache-2.0",
    }
    return create_model_card(**{**options, **changes})


def _headings(card):
    return re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)


def _tables(card):
    """Tables as lists of rows of cells; fails on a table without rows or with rows of different length."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n)+", card.text, flags=re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
        assert len(lines) > 2 and len({len(line) for line in lines}) == 1, block
        tables.append([[cell.strip() for cell in line] for line in lines])
    return tables


def test_full_card():
    card = _full_card()
    assert _headings(card) == HEADINGS
    assert "None" not in str(card) and "nan" not in str(card) and "\n\n\n" not in card.text
    tables = {table[0][0]: table for table in _tables(card)}
    row = ["12.3", "40.0", "55.1", "11.0", "33.3", "44.0", "195.7"]
    assert tables["Split"][2:] == [
        ["train", "29,000", "145,000"],
        ["validation", "1,014", "–"],
        ["test", "1,000", "–"],
    ]
    assert tables["Style"][0][1:4] == ["Images", "Texts", "Image→text R@1"]
    assert tables["Style"][0][-3:] == ["rSum", "Chance", "rSum, equal galleries"]
    assert tables["Style"][2:] == [["noto", "1,200", "2,400", *row, "4.2", "201.0"]]
    assert ["validation", *row] in _tables(card)[0] and ["test", *row] in _tables(card)[0]
    assert tables["Epoch"][0] == ["Epoch", "Stage", "Δ rSum", "Feedback weight", "Movement, image side"]
    assert tables["Epoch"][2:] == [["2", "1", "–", "–", "0.5"], ["3", "2", "+0.0", "0.78", "0.0123"]]
    assert tables["Hyper-parameter"][2:] == [["learning_rate", "0.0002"], ["seed", "0"]]
    assert ["style_probability", "style_rates"] in tables["Option"] and ["vision_config.model_type", "vit"] in tables[
        "Option"
    ]
    assert "Prototype stage: 2, prototypes updated." in card.text
    assert "arXiv:2510.11175" in card.text and "Linguistic-Aware Patch Slimming Framework" in card.text
    assert "```shell\npython train_pico.py recipe.yaml\n```" in card.text


def test_metadata_parses_again_without_loss():
    card = _full_card()
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict() and str(ModelCard(str(card))) == str(card)
    assert data.library_name == "transformers" and data.pipeline_tag == "zero-shot-image-classification"
    assert data.base_model == ["google/vit-base-patch16-224-in21k", "bert-base-uncased"]
    assert data.datasets == ["someone/flickr30k"] and data.license == "apache-2.0" and data.language == "en"
    assert {"pico", "image-text-retrieval"} <= set(data.tags)
    assert data.model_name == "pico-flickr" and len(data.eval_results) == 14
    results = {(result.dataset_split, result.metric_type): result for result in data.eval_results}
    result = results["test", "text_to_image_recall_at_5"]
    assert (result.task_type, result.dataset_type, result.metric_value) == (
        "text-to-image-retrieval",
        "someone/flickr30k",
        33.3,
    )
    assert results["validation", "rsum"].task_type == "image-text-retrieval"


def test_minimal_card():
    card = create_model_card(model_id="pico", config={})
    assert _headings(card) == ["How to use it", "Limits", "Citation"]
    assert "None" not in str(card) and not _tables(card) and "\n\n\n" not in card.text
    assert set(ModelCard(str(card)).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("option", "empty", "tables"),
    [
        ("training", {}, 1),
        ("stage_log", [], 1),
        ("splits", {}, 1),
        ("metrics", {}, 1),
        ("style_metrics", {}, 1),
        ("command", " ", 0),
        ("base_models", [], 0),
        ("framework_versions", {}, 0),
    ],
)
def test_any_one_part_may_be_missing(option, empty, tables):
    full, card = _full_card(), _full_card(**{option: empty})
    assert _headings(card) == HEADINGS and len(_tables(card)) == len(_tables(full)) - tables
    assert "None" not in str(card) and "\n\n\n" not in card.text and len(card.text) < len(full.text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_numbers_say_how_large_the_gallery_was():
    card = _full_card(metrics={"test": {**METRICS, "images": 1000, "texts": 5000}, "other": METRICS}, num_folds=5)
    assert "Numbers of a split are means over 5 folds, each a gallery of consecutive images." in card.text
    (row,) = [line for line in card.text.splitlines() if line.startswith("| test | 1,000 | 5,000 |")]
    assert " 12.3 |" in row
    found = {result.dataset_split: result.dataset_args for result in ModelCard(str(card)).data.eval_results}
    assert found == {"test": {"images": 1000, "texts": 5000, "folds": 5}, "other": {"folds": 5}}
    assert "folds" not in _full_card().text
    assert all(result.dataset_args is None for result in _full_card().data.eval_results)


def test_results_without_a_data_set_stay_out_of_the_metadata():
    card = _full_card(dataset_name=None)
    assert "model-index" not in card.data.to_dict() and "12.3" in card.text


def test_a_plain_data_set_name_is_no_hub_id():
    card = _full_card(dataset_name="Emoji styles (2026)")
    assert "datasets" not in card.data.to_dict()
    assert card.data.eval_results[0].dataset_type == "emoji-styles-2026"
    assert "Trained on Emoji styles (2026)." in card.text


def test_metrics_that_are_not_finite_are_left_out():
    card = _full_card(metrics={"test": {**METRICS, "rsum": float("nan")}, "other": {"rsum": float("inf")}})
    assert len(card.data.eval_results) == 6
    assert _tables(card)[0][2:] == [["test", "12.3", "40.0", "55.1", "11.0", "33.3", "44.0"]]


def test_local_paths_stay_private(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = _full_card(
        model_id=str(tmp_path / "my run"),
        base_models=[str(tmp_path / "absent"), "outputs/vit", "./text", "someone/bert"],
        dataset_name=str(tmp_path / "pictures"),
    )
    assert card.data.base_model == ["someone/bert"] and card.data.model_name == "my run"
    assert "datasets" not in card.data.to_dict() and card.data.eval_results[0].dataset_name == "pictures"
    assert card.text.startswith("\n# my run\n")
    # But for the model itself, which the snippets load, and which a card that is published calls by its name.
    assert set(re.findall(rf"{tmp_path}[^\"\n]*", str(card))) == {str(tmp_path / "my run")}
    assert "outputs/vit" not in str(card)
    assert "a local checkpoint, a local checkpoint, a local checkpoint, [someone/bert]" in card.text
    assert "base_model" not in _full_card(base_models=["outputs/vit"]).data.to_dict()


def test_odd_names_neither_break_nor_inject():
    odd = 'a "b" | <i>`c` {{ x }}\n---\n# [d](e): ü'
    card = _full_card(model_id=odd, style_metrics={"x|y": METRICS}, command="echo '```'", training={"note": "a|b\nc"})
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and _headings(again) == HEADINGS
    assert _tables(card)[1][2][0] == r"`x`\|`y`"
    assert "````shell\necho '```'\n````" in card.text
    assert r"| note | `a`\|`b c` |" in card.text
    assert card.text.strip().split("\n")[0] == r'# `a "b" `\|`` <i>`c` {{ x }} --- # [d](e): ü``'


@pytest.mark.parametrize("model_id", ["someone/pico", 'odd "name"\\'])
def test_snippets_are_python_and_name_what_exists(model_id):
    text = create_model_card(model_id=model_id, config=CONFIG).text
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "snippet", "exec")
    for name in re.findall(r"from modeling_pico import (.+)", snippets[0])[0].split(", "):
        assert getattr(modeling_pico, name).from_pretrained
    assert modeling_pico.PicoProcessor.encode_images and modeling_pico.PicoProcessor.retrieve


@pytest.mark.parametrize("head", PicoModel.head_classes)
def test_says_which_head_it_is(head):
    card = _full_card(config=PicoConfig(vision_config=ViTConfig(), text_config=BertConfig(), method=head))
    is_pico = head == "pico"
    assert ("has no style prototypes" in card.text) != is_pico
    assert ("instance normalisation" in card.text) == (head == "instance_norm")
    assert ("Prototype stage" in card.text) == is_pico and ("| num_style_prototypes |" in card.text) == is_pico


@pytest.mark.parametrize("semantic_probability", [False, True])
def test_says_that_it_is_cdds(semantic_probability):
    card = _full_card(config=CddsConfig(semantic_probability=semantic_probability))
    assert _headings(card) == HEADINGS
    assert "\n\n\n" not in card.text and "None" not in str(card)
    assert card.text.count("2603.05566") == 3 and "from modeling_pico import CddsModel" in card.text
    assert ("2510.11175" in card.text) == semantic_probability == ("ma2025reliable" in card.text)
    assert card.data.tags[:2] == (["cdds", "pico"] if semantic_probability else ["cdds", "image-text-retrieval"])
    options = [row[0] for row in next(table for table in _tables(card) if table[0][0] == "Option")]
    assert "integrity_weight" in options and ("num_style_prototypes" in options) == semantic_probability
    assert ("Prototype stage" in card.text) == ("Prototype feedback" in card.text) == semantic_probability


def test_says_that_it_is_uncertain():
    config = CddsConfig(uncertainty_config={"num_prototypes": 8, "reranking": {"text_weight": 2.0}})
    card, plain = (_full_card(config=of).text for of in (config, CddsConfig()))
    assert card.count("2309.17093") == 3 and "`image_uncertainty`" in card and "li2023prototype" in card
    assert "images 0, texts 2 (learned on validation)" in card and "\n\n\n" not in card
    assert "2309.17093" not in plain and "li2023prototype" not in plain


def test_an_option_of_cdds_says_nothing_of_another_head():
    card = _full_card(config={**CONFIG.to_dict(), "method": "fine_grained", "semantic_probability": True})
    assert "num_style_prototypes" not in card.text and "Prototype feedback" not in card.text


def test_options_follow_the_configuration():
    config = {**CONFIG.to_dict(), "loss_type": "hinge", "column_mode": "quantile", "style_probability": "purity"}
    options = next(table for table in _tables(_full_card(config=config)) if table[0][0] == "Option")
    names = [row[0] for row in options]
    assert {"margin", "column_length"} <= set(names)


@pytest.mark.parametrize("model_id", ["", " \n"])
def test_an_empty_model_id_is_refused(model_id):
    with pytest.raises(ValueError, match="model_id must not be empty"):
        create_model_card(model_id=model_id, config={})


def test_cards_in_the_repository_are_those_that_its_list_names():
    folder = Path(__file__).resolve().parents[1] / "model_cards"
    about = (folder / "README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in folder.glob("*.md") if path.name != "README.md")
    # A report on many models is no card: it says nothing about itself in a header.
    cards = [name for name in pages if (folder / name).read_text(encoding="utf-8").startswith("---\n")]
    assert all(f"[{name}]({name})" in about for name in pages)
    assert cards and sorted(re.findall(r"^\| \[(\S+)\]\((\S+)\)", about, flags=re.MULTILINE)) == [
        (n, n) for n in cards
    ]
    for name in cards:
        card = ModelCard((folder / name).read_text(encoding="utf-8"))
        # Rendered, by the template of today, and reproduced by a command that the list shows as well.
        assert _headings(card) == HEADINGS
        assert card.data.library_name == "transformers" and card.data.eval_results
        (command,) = re.findall(r"^accelerate launch train_pico\.py .*$", card.text, flags=re.MULTILINE)
        assert command in about
