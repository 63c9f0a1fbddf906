"""What is uploaded to the Hub, when, and by whom; uploads are intercepted and kept as folders."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from transformers import TrainerCallback

import modeling_pico
from modeling_pico import CddsModel, PicoModel
from modeling_pico.training.construction import STATE_FILE


MODEL = Path(modeling_pico.__file__).parent / "model"
CODE = (
    "alignment_heads",
    "configuration",
    "image_decoding",
    "modeling",
    "processing",
    "prototypes",
    "scoring",
)
NEEDED = {"model.safetensors", "config.json", "README.md", "processor_config.json", "tokenizer.json", "handler.py"} | {
    f"{name}_pico.py" for name in CODE
}


# What a checkpoint's code may import beside its neighbours.
ALLOWED = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted(MODEL.glob("*.py")), ids=lambda file: file.stem)
def test_what_ships_imports_only_what_ships(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {name.name.partition(".")[0] for name in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in ALLOWED
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and (MODEL / f"{node.module}.py").is_file(), ast.unparse(node)


@pytest.mark.parametrize("model_class", [PicoModel, CddsModel])
def test_all_code_that_is_saved_is_that_of_the_model_folder(model_class, tmp_path):
    tiny.model(model_class=model_class).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    saved = {file.name: file.read_text() for file in tmp_path.glob("*.py")}
    assert len(saved) > 8
    assert saved == {name: (MODEL / name).read_text() for name in saved}


class Hub:
    """Takes the place of `HfApi`; keeps what an upload would send at that moment."""

    def __init__(self, folder: Path):
        self.folder, self.repositories, self.uploads = folder, [], []
        self.jobs, self.slow = [], False

    def create_repo(self, name, **kwargs):
        self.repositories.append(name)
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(
        self,
        *,
        repo_id,
        folder_path,
        commit_message,
        path_in_repo="",
        ignore_patterns=(),
        run_as_future=False,
        **kwargs,
    ):
        assert repo_id == "someone/pico"
        kept = self.folder / str(len(self.uploads))
        shutil.copytree(folder_path, kept, ignore=shutil.ignore_patterns(*ignore_patterns))
        self.uploads.append(SimpleNamespace(message=commit_message, path=path_in_repo, folder=kept))
        job: Future = Future()
        self.jobs.append(job)
        if not self.slow:
            job.set_result(None)
        return job if run_as_future else None


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "uploads")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: made)
    return made


def publisher(folder, **options):
    return tiny.trainer(folder, num_train_epochs=2, push_to_hub=True, hub_model_id="pico", **options)


def test_every_checkpoint_is_uploaded_whole_and_loads_without_the_package(hub, tmp_path, run_without_package):
    made = publisher(tmp_path / "run")
    made.train()
    made.push_to_hub()
    assert hub.repositories == ["pico"]
    messages = [upload.message for upload in hub.uploads]
    assert messages == ["Training in progress, epoch 1", "Training in progress, epoch 2", "End of training"]
    for upload in hub.uploads:
        assert set(os.listdir(upload.folder)) >= NEEDED
        assert not list(upload.folder.glob("checkpoint-*"))
    cards = [(upload.folder / "README.md").read_text() for upload in hub.uploads]
    assert cards[0] != cards[1] and all("rsum" in card.lower() for card in cards)
    # As the Hub calls it, with the user's name, which was not given.
    assert all('PicoModel.from_pretrained("someone/pico")' in card for card in cards)
    first = hub.uploads[0].folder
    tiny.assert_same_state(
        PicoModel.from_pretrained(first), PicoModel.from_pretrained(tmp_path / "run" / "checkpoint-3")
    )
    assert_loads_alone(first, tmp_path, run_without_package)


def assert_loads_alone(folder: Path, tmp_path: Path, run_without_package: Callable[..., str]) -> None:
    torch.save(PicoModel.from_pretrained(folder).state_dict(), tmp_path / "state.pt")
    run_without_package(
        """
        import torch
        from PIL import Image
        from transformers import AutoModel, AutoProcessor

        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules")
        state, expected = model.state_dict(), torch.load(sys.argv[2])
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
        processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        Image.new("RGBA", (9, 9)).save("clear.png")
        embeds = processor.encode_images(model, ["clear.png"]), processor.encode_texts(model, ["red"])
        assert processor.score_retrieval(*embeds).isfinite().all()
        """,
        folder,
        tmp_path / "state.pt",
    )


def test_last_checkpoint_is_uploaded_with_the_state_of_the_construction(hub, tmp_path):
    publisher(tmp_path / "run", hub_strategy="checkpoint").train()
    assert [upload.path for upload in hub.uploads] == ["", "last-checkpoint"] * 2
    assert {STATE_FILE, "trainer_state.json", "optimizer.pt"} <= set(os.listdir(hub.uploads[-1].folder))


def test_nothing_is_uploaded_before_the_end_where_that_is_asked(hub, tmp_path):
    made = publisher(tmp_path / "run", hub_strategy="end")
    made.train()
    assert not hub.uploads
    made.push_to_hub(commit_message="all of it")
    assert [upload.message for upload in hub.uploads] == ["all of it"]
    assert set(os.listdir(hub.uploads[0].folder)) >= NEEDED


def test_a_running_upload_is_left_alone(hub, tmp_path):
    class Finish(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            hub.jobs[0].set_result(None)

    hub.slow = True
    publisher(tmp_path / "run", callbacks=[Finish()]).train()
    assert [upload.message for upload in hub.uploads] == ["Training in progress, epoch 1"]
    assert (tmp_path / "run" / "README.md").read_bytes() == (hub.uploads[0].folder / "README.md").read_bytes()


def test_only_the_main_process_uploads(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.is_world_process_zero", lambda self: False)
    made = publisher(tmp_path / "run", save_strategy="no")
    made.train()
    made._push_from_checkpoint(str(tmp_path))
    made.push_to_hub()
    made.save_model()
    assert not hub.repositories and not hub.uploads and not (tmp_path / "run" / "README.md").exists()


def test_model_and_processor_are_pushed_by_hand_with_their_code(tmp_path, monkeypatch):
    folder = tmp_path / "repository"

    def commit(repo_id, operations, **kwargs):
        assert repo_id == "someone/pico"
        for operation in operations:
            (folder / operation.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                (folder / operation.path_in_repo).write_bytes(file.read())

    fake = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=name), create_commit=commit)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: fake)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("pico"))
    net = tiny.model()
    net.push_to_hub("someone/pico")
    tiny.processor().push_to_hub("someone/pico")
    assert set(os.listdir(folder)) >= NEEDED
    tiny.assert_same_state(PicoModel.from_pretrained(folder), net)
    # Thereby it loads alone as every saved model does.
    net.save_pretrained(tmp_path / "saved")
    tiny.processor().save_pretrained(tmp_path / "saved")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert {name: (folder / name).read_bytes() for name in saved} == saved
