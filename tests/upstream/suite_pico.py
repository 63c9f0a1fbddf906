"""
PICO as transformers' own model tests see it.

Copied by `test_transformers_suite.py` into the unpacked tests of transformers, where the relative imports resolve.
"""

from __future__ import annotations

import unittest

from transformers import BertConfig, CLIPTextConfig, CLIPVisionConfig, ViTConfig

from modeling_pico import PicoConfig, PicoModel

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask


# What does not apply to PICO, and why.
SKIPS: dict[str, str] = {
    "test_attention_outputs": "two towers: their attentions stand in vision_model_output and text_model_output",
    "test_hidden_states_output": "two towers: their states stand in vision_model_output and text_model_output",
    "test_retain_grad_hidden_states_attentions": "reads states and attentions off the output itself, as those above",
    "test_eager_matches_sdpa_inference": "gives the model one modality only; test_conformance_pico.py gives both",
    "test_model_outputs_equivalence": "its message subtracts masks, which are boolean; see test_conformance_pico.py",
    "test_model_weights_reload_no_missing_tied_weights": "loads a file that holds no weight, which PICO refuses",
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


class PicoModelTester:
    """Tiny configuration and inputs."""

    batch_size = 5
    seq_length = 7
    is_training = True
    num_hidden_layers = SIZES["num_hidden_layers"]

    def __init__(self, parent: unittest.TestCase, clip: bool):
        self.parent, self.clip = parent, clip

    def get_config(self) -> PicoConfig:
        """Two layers a tower."""
        vision = {**SIZES, "image_size": 16, "patch_size": 8}
        text = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64}
        return PicoConfig(
            vision_config=CLIPVisionConfig(**vision) if self.clip else ViTConfig(**vision),
            text_config=CLIPTextConfig(**text, eos_token_id=98) if self.clip else BertConfig(**text),
            embedding_dim=16,
            num_style_prototypes=3,
            uncertainty_config={"num_prototypes": 2},
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PicoConfig, dict]:
        """Images and texts of a batch."""
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], 98),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
            "pixel_values": floats_tensor([self.batch_size, 3, 16, 16]),
            "return_loss": True,
        }
        return self.get_config(), inputs


class _Common(ModelTesterMixin):
    all_model_classes = (PicoModel,)
    test_resize_embeddings = True
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    clip = False

    def setUp(self) -> None:
        self.model_tester = PicoModelTester(self, self.clip)
        self.config_tester = ConfigTester(
            self, config_class=PicoConfig, has_text_modality=False, common_properties=["embedding_dim"]
        )
        name = self._testMethodName
        for prefix, reason in SKIPS.items():
            if name.startswith(prefix):
                self.skipTest(f"PICO: {reason}")

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class PicoViTBertTest(_Common, unittest.TestCase):
    """ViT and BERT."""


class PicoClipTest(_Common, unittest.TestCase):
    """The towers of CLIP."""

    clip = True


del _Common
