"""
Faults that a test must notice: each is a small change of the sources that gives wrong results without an error, or
takes a safeguard away. `tests/benchmarks/plant_faults.py` plants them.

A fault whose text is no longer found, once and only once, is an error: whoever changes that line says here what the
fault looks like now.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


REPOSITORY = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """
    A change of the sources that a test must notice.

    Attributes:
        name (`str`): By which `--only` knows it.
        what (`str`): What goes wrong.
        file (`str`): The changed file, from the root of the repository.
        old (`str`): Text that is there once.
        new (`str`): Text in its place.
        tests (`tuple[str, ...]`): Files, or tests in them, that are run.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # The score
    Fault(
        "score_mask",
        "padding of a sample counts as tokens",
        "modeling_pico/model/scoring_tiled_pico.py",
        "counts, order = mask.sum(dim=1).sort(stable=True)",
        "mask = torch.ones_like(mask); counts, order = mask.sum(dim=1).sort(stable=True)",
        ("tests/test_scoring_pico.py::test_padding_has_no_influence",),
    ),
    Fault(
        "score_direction",
        "only words look for patches, and no patch for a word",
        "modeling_pico/model/scoring_tiled_pico.py",
        "scores[:, samples] += patch_best",
        "scores[:, samples] += 0 * patch_best",
        ("tests/test_scoring_pico.py::test_scores_match_hand_computation",),
    ),
    Fault(
        "score_mean_over_padding",
        "the definition averages over padding",
        "modeling_pico/model/scoring_pico.py",
        "word_best.sum(dim=2) / text_mask.sum(dim=1)[None, :].clamp(min=1)",
        "word_best.mean(dim=2)",
        ("tests/test_scoring_pico.py::test_tiled_scores_equal_reference",),
    ),
    Fault(
        "score_gradient",
        "the gradient of a long text is as large as if it were one word",
        "modeling_pico/model/scoring_tiled_pico.py",
        "part / texts.counts[text.samples, None]",
        "part",
        ("tests/test_scoring_pico.py::test_tiled_gradients_equal_reference",),
    ),
    # Alignment heads and uncertainty
    Fault(
        "pooled_scale",
        "scores of the pooled baseline are twice the cosine",
        "modeling_pico/model/alignment_heads_pico.py",
        "modality) * 0.5**0.5",
        "modality)",
        ("tests/test_modeling_pico.py::test_the_pooled_baseline_on_clip_is_clip",),
    ),
    Fault(
        "uncertainty_sign",
        "more evidence makes a sample less uncertain",
        "modeling_pico/model/uncertainty_pico.py",
        "torch.sigmoid(torch.logsumexp(",
        "torch.sigmoid(-torch.logsumexp(",
        ("tests/test_uncertainty_pico.py::test_uncertainty_by_hand",),
    ),
    Fault(
        "uncertainty_side",
        "a modality is compared with prototypes of its own",
        "modeling_pico/model/uncertainty_pico.py",
        'others = self.text if modality == "image" else self.image',
        'others = self.image if modality == "image" else self.text',
        ("tests/test_uncertainty_pico.py::test_a_modality_is_compared_with_the_prototypes_of_the_other",),
    ),
    Fault(
        "reranking_sign",
        "uncertain answers move up",
        "modeling_pico/evaluation/uncertainty_reranking.py",
        "of_side = torch.exp(-weight *",
        "of_side = torch.exp(weight *",
        ("tests/evaluation/test_uncertainty_reranking.py::test_factors_by_hand",),
    ),
    # The loss
    Fault(
        "loss_ids",
        "pairs of one meaning are each other's negatives",
        "modeling_pico/model/loss_pico.py",
        '(("image_ids", image_ids), ("caption_codes", caption_codes))',
        '(("image_ids", None), ("caption_codes", caption_codes))',
        ("tests/test_loss_pico.py::test_repeated_ids_are_never_negatives",),
    ),
    Fault(
        "loss_captions",
        "images with the same caption are each other's negatives",
        "modeling_pico/model/loss_pico.py",
        '(("image_ids", image_ids), ("caption_codes", caption_codes))',
        '(("image_ids", image_ids), ("caption_codes", None))',
        ("tests/test_loss_pico.py::test_equal_captions_are_no_negatives_of_each_other",),
    ),
    Fault(
        "loss_margin",
        "the margin of the hinge is subtracted",
        "modeling_pico/model/loss_pico.py",
        "F.relu(margin + negatives",
        "F.relu(negatives - margin",
        ("tests/test_loss_pico.py::test_hinge_by_hand",),
    ),
    Fault(
        "loss_direction",
        "only images look for texts",
        "modeling_pico/model/loss_pico.py",
        "return (per_image + per_text) / 2",
        "return per_image",
        ("tests/test_loss_pico.py::test_directions_are_averaged_for_infonce_and_summed_for_hinge",),
    ),
    Fault(
        "loss_offset",
        "every process takes the pairs of the first one for its own",
        "modeling_pico/model/modeling_pico.py",
        "offset=own.start",
        "offset=0",
        ("tests/distributed/test_processes.py::test_gradient_and_loss_are_those_of_the_whole_batch",),
    ),
    Fault(
        "loss_share",
        "a process with fewer pairs counts as much as the others",
        "modeling_pico/training/trainer.py",
        "return loss * batch.loss_share",
        "return loss",
        ("tests/distributed/test_processes.py::test_one_two_and_four_processes_train_and_measure_alike",),
    ),
    Fault(
        "gathered_gradient",
        "the loss of a process does not reach the embeddings of the others",
        "modeling_pico/distributed.py",
        "        distributed.all_reduce(gradient)\n",
        "",
        ("tests/distributed/test_processes.py::test_gradient_and_loss_are_those_of_the_whole_batch",),
    ),
    # Ranks
    Fault(
        "rank_ties",
        "ties speak for the right answer",
        "modeling_pico/evaluation/retrieval_metrics.py",
        "reaches_image = tile >= ",
        "reaches_image = tile > ",
        ("tests/evaluation/test_retrieval_metrics.py::test_ties_speak_against_the_right_answer",),
    ),
    Fault(
        "rank_first_caption",
        "only the first caption of an image is a right answer",
        "modeling_pico/evaluation/retrieval_metrics.py",
        "right_scores.amax(dim=1)",
        "right_scores.gather(1, self._right(rows, columns, tile).int().argmax(1, keepdim=True))[:, 0]",
        ("tests/evaluation/test_retrieval_metrics.py::test_ranks_equal_brute_force",),
    ),
    Fault(
        "rank_fold_end",
        "the last image of each fold is left out",
        "modeling_pico/evaluation/retrieval_metrics.py",
        "slice(start, start + size) for",
        "slice(start, start + size - 1) for",
        ("tests/evaluation/test_retrieval_metrics.py::test_folds_cover_the_last_image_of_each",),
    ),
    Fault(
        "recall_level",
        "recall at k counts k + 1 answers",
        "modeling_pico/evaluation/retrieval_metrics.py",
        "int((ranks < k).sum())",
        "int((ranks <= k).sum())",
        ("tests/evaluation/test_retrieval_metrics.py::test_metrics_by_hand",),
    ),
    # Data
    Fault(
        "sampler_epoch",
        "every epoch draws the batches and captions of the first",
        "modeling_pico/data/sampler.py",
        "        self.epoch = int(epoch)\n",
        "",
        ("tests/training/test_workers.py::test_every_epoch_has_batches_of_its_own_also_after_a_resume",),
    ),
    Fault(
        "sampler_view",
        "workers that are not forked leave the sampler memory that is used for other things",
        "modeling_pico/data/sampler.py",
        "(np.asarray(values).astype(np.int64) for values in (ids, num_captions))",
        "(np.asarray(values, dtype=np.int64) for values in (ids, num_captions))",
        ("tests/data/test_sampler.py::test_the_memory_of_what_was_given_is_not_read_again",),
    ),
    Fault(
        "sampler_ids",
        "a meaning may be twice in a batch",
        "modeling_pico/data/sampler.py",
        "        _separate_ids(table, self._codes, rng)\n",
        "",
        ("tests/data/test_sampler.py::test_properties",),
    ),
    Fault(
        "sampler_captions",
        "always the first caption is drawn",
        "modeling_pico/data/sampler.py",
        "caption = (share * self._num_captions)",
        "caption = (0 * share)",
        ("tests/data/test_sampler.py",),
    ),
    Fault(
        "collator_order",
        "captions of a batch are those of other images",
        "modeling_pico/data/collator.py",
        '[sample["caption"] for sample in samples]',
        '[sample["caption"] for sample in samples[::-1]]',
        ("tests/data/test_collator.py::test_any_training_pair_stays_together",),
    ),
    Fault(
        "collator_text_ids",
        "captions of an evaluation belong to other images",
        "modeling_pico/data/collator.py",
        "torch.repeat_interleave(image_ids, num_captions)",
        "torch.repeat_interleave(image_ids, num_captions.flip(0))",
        ("tests/data/test_collator.py::test_any_evaluation_caption_keeps_the_id_of_its_image",),
    ),
    Fault(
        "collator_truncation",
        "texts that are too long are not cut",
        "modeling_pico/data/collator.py",
        "truncation=self.max_length is not None",
        "truncation=False",
        ("tests/data/test_collator.py::test_texts_are_cut_at_the_length_of_the_tokenizer",),
    ),
    Fault(
        "source_captions",
        "captions of two rows are swapped in sets of more than 52 rows",
        "modeling_pico/data/sources.py",
        "    used = [(rows[0], group)",
        "    captions[51:53] = captions[51:53][::-1]\n    used = [(rows[0], group)",
        ("tests/data/test_sources.py::test_every_caption_stays_with_its_image",),
    ),
    Fault(
        "source_lines",
        "the five captions of a WebDataset's text are one",
        "modeling_pico/data/sources.py",
        "texts = _LINE_BREAKS.split(texts[0].strip())",
        'texts = [_LINE_BREAKS.sub(" ", texts[0])]',
        ("tests/data/test_layouts.py::test_a_webdataset_has_a_caption_a_line",),
    ),
    Fault(
        "source_columns",
        "of several columns of captions the first is read",
        "modeling_pico/data/sources.py",
        "texts = [list(itertools.chain(*lists)) for lists in zip(*columns, strict=True)]",
        "texts = columns[0]",
        ("tests/data/test_layouts.py::test_a_caption_a_column",),
    ),
    Fault(
        "source_ids",
        "images of two sources without ids are one meaning",
        "modeling_pico/data/sources.py",
        "return [hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest() for key in keys]",
        "return [str(number) for number in range(len(keys))]",
        ("tests/data/test_splits.py::test_ids_that_were_made_are_unique_across_sources",),
    ),
    Fault(
        "image_orientation",
        "pictures lie on their side",
        "modeling_pico/model/image_decoding_pico.py",
        "upright = _upright(image)",
        "upright = image",
        ("tests/data/test_images.py::test_exif_orientation",),
    ),
    Fault(
        "image_transparency",
        "what is transparent is black",
        "modeling_pico/model/image_decoding_pico.py",
        'image.size, "white")',
        'image.size, "black")',
        ("tests/data/test_images.py::test_transparency_is_laid_on_white",),
    ),
    Fault(
        "fence_off",
        "data may name files anywhere",
        "modeling_pico/data/paths.py",
        "        parent, name = os.path.split(path)\n",
        "        return path\n        parent, name = os.path.split(path)\n",
        ("tests/data/test_dirty_data.py::test_the_judge_sees_that_the_fence_is_off",),
    ),
    Fault(
        "fence_links",
        "a link leads out of the folder of the data",
        "modeling_pico/data/paths.py",
        "and not os.path.islink(path)",
        "",
        ("tests/data/test_dirty_data.py::test_the_fence",),
    ),
    # Caches
    Fault(
        "checked_images",
        "a picture is not checked again when its file has changed",
        "modeling_pico/data/images.py",
        "return (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino) if state",
        "return (0,) if state",
        ("tests/data/test_images.py::test_second_check_reads_nothing_unless_a_file_changed",),
    ),
    Fault(
        "cache_images",
        "kept embeddings are used although pictures changed",
        "modeling_pico/evaluation/embedding_cache.py",
        "    yield from _images(dataset.dataset)\n",
        "",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_captions",
        "kept embeddings are used although captions changed",
        "modeling_pico/evaluation/embedding_cache.py",
        'yield tokenizer(captions, **limit, verbose=False)["input_ids"]',
        "yield len(captions)",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_ids",
        "kept embeddings are used although ids changed",
        "modeling_pico/evaluation/embedding_cache.py",
        "        dataset.ids.tolist(),\n",
        "",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_text_tower",
        "kept embeddings are used although the text tower was trained",
        "modeling_pico/fingerprint.py",
        '_EMBEDDING_WEIGHTS = ("vision_model.", "text_model.", "alignment_head.")',
        '_EMBEDDING_WEIGHTS = ("vision_model.", "alignment_head.")',
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_moments",
        "kept embeddings of aligned images are used although the moments of training changed",
        "modeling_pico/evaluation/embedding_cache.py",
        'model.image_moments.state_dict(prefix="image_moments.") if aligned else {}',
        "{}",
        ("tests/training/test_alignment.py::test_kept_embeddings_are_plain_or_aligned",),
    ),
    Fault(
        "cache_preprocessing",
        "kept embeddings are used although images are preprocessed otherwise",
        "modeling_pico/evaluation/embedding_cache.py",
        "sorted_options(image_processor.to_dict())",
        "None",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_precision",
        "embeddings of bfloat16 are used for those of float32",
        "modeling_pico/evaluation/embedding_cache.py",
        "yield precision, device.type",
        "yield model.device.type",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "cache_damaged",
        "a damaged cache ends the evaluation",
        "modeling_pico/evaluation/embedding_cache.py",
        "except (OSError, SafetensorError, TypeError) as error:",
        "except TypeError as error:",
        ("tests/evaluation/test_embedding_cache.py",),
    ),
    Fault(
        "search_sheet",
        "contact sheets of earlier searches are found as pictures",
        "modeling_pico/search/contact_sheet.py",
        "if software == _MARK:",
        "if software == image:",
        ("tests/search/test_search_command.py::test_a_sheet_in_the_gallery_is_not_found",),
    ),
    Fault(
        "search_page_upload",
        "the page tells where uploads lie on its disk",
        "modeling_pico/search/page.py",
        'raise ValueError(str(error).replace(repr(path), "that was uploaded")) from error',
        "raise ValueError(str(error)) from error",
        ("tests/search/test_page.py::test_uploads_are_limited",),
    ),
    Fault(
        "search_page_message",
        "what a visitor typed is markup in the message that it is wrong",
        "modeling_pico/search/page.py",
        "raise gradio.Error(html.escape(str(error))",
        "raise gradio.Error(str(error)",
        ("tests/search/test_page.py::test_a_mistake_is_told_as_text",),
    ),
    # The index
    Fault(
        "index_stale",
        "a picture stays in the index after another has taken its place",
        "modeling_pico/search/index.py",
        "        known.displaced |= others\n",
        "",
        ("tests/search/test_index.py::test_folder_is_followed",),
    ),
    Fault(
        "index_half",
        "embeddings in half precision are read at half their size",
        "modeling_pico/search/embeddings.py",
        "np.float32(2.0**112)",
        "np.float32(2.0**111)",
        ("tests/search/test_index.py::test_every_float16_is_read_back",),
    ),
    Fault(
        "index_one_way",
        "the first stage estimates one direction of the score alone",
        "modeling_pico/search/first_stage.py",
        "np.concatenate([similarity.max(axis=1), met, shares])",
        "np.concatenate([similarity.max(axis=1), met, 0 * shares])",
        ("tests/search/test_index.py::test_first_stage_is_exact_where_tokens_are_centroids",),
    ),
    Fault(
        "index_first_stage",
        "images of before the first stage was fitted have no vector",
        "modeling_pico/search/index.py",
        "            self._add(self._store.read(ids[start : start + COMMIT_IMAGES]), fitted)\n",
        "            pass\n",
        ("tests/search/test_index.py::test_first_stage_of_a_gallery_that_grows_sees_what_was_there_before",),
    ),
    Fault(
        "index_two_writers",
        "two processes write to one index",
        "modeling_pico/search/index.py",
        "        processes.on_main(acquire)\n",
        "",
        ("tests/search/test_index.py::test_second_writer_is_refused_and_readers_are_not",),
    ),
    # Style stress test and style augmentation
    Fault(
        "stress_fair",
        "captions in a style are compared with all plain captions of an image",
        "modeling_pico/evaluation/style_stress.py",
        "for place in row[:count]",
        "for place in row",
        ("tests/evaluation/test_style_stress.py",),
    ),
    Fault(
        "stress_drop",
        "what a look costs is counted as a gain",
        "modeling_pico/evaluation/style_stress.py",
        "result.drop = plain_rsum - result.rsum",
        "result.drop = result.rsum - plain_rsum",
        ("tests/evaluation/test_style_stress.py",),
    ),
    Fault(
        "cache_look",
        "kept embeddings of the plain images pass for those of a look",
        "modeling_pico/evaluation/embedding_cache.py",
        "yield dataset.look",
        "yield None",
        ("tests/evaluation/test_style_stress.py",),
    ),
    Fault(
        "style_share",
        "all training images are drawn again",
        "modeling_pico/data/looks.py",
        "if rng.random() >= self.probability:",
        "if self.probability == 0:",
        ("tests/data/test_looks.py",),
    ),
    Fault(
        "style_inverts",
        "random styles of training are negatives, which the stress test measures",
        "modeling_pico/data/looks.py",
        "< 0, -1, 1)",
        "< 0, 1, 1)",
        ("tests/data/test_looks.py::test_no_random_style_is_a_look_of_the_stress_test",),
    ),
    Fault(
        "style_seed",
        "random convolution is another one at every resume",
        "modeling_pico/data/looks.py",
        "np.random.default_rng(rng.getrandbits(64))",
        "np.random.default_rng()",
        ("tests/data/test_looks.py",),
    ),
    Fault(
        "neon_small",
        "small pictures turn black",
        "modeling_pico/data/looks.py",
        "max(3, 2 * round(",
        "max(1, 2 * round(",
        ("tests/data/test_looks.py",),
    ),
    # Prototypes
    Fault(
        "update_before_checkpoint",
        "new prototypes are in use before the checkpoint of their evaluation is saved",
        "modeling_pico/training/construction.py",
        "        return report\n",
        "        self.apply_pending()\n        return report\n",
        ("tests/training/test_construction.py::test_a_proposal_waits_until_it_is_applied",),
    ),
    Fault(
        "feedback_weight",
        "new prototypes get the weight of the old ones",
        "modeling_pico/training/construction.py",
        "return math.exp(term - new_log_sum), new_log_sum",
        "return 1 - math.exp(term - new_log_sum), new_log_sum",
        ("tests/training/test_construction.py::test_feedback_weight_by_hand",),
    ),
    Fault(
        "feedback_sign",
        "prototypes that lose count more than those that gain",
        "modeling_pico/training/construction.py",
        "return score() - rsum",
        "return rsum - score()",
        (
            "tests/training/test_construction.py"
            "::test_counterfactual_feedback_scores_the_new_prototypes_and_weighs_by_the_gain",
        ),
    ),
    Fault(
        "reservoir",
        "the first pairs stay in the reservoir and not the last ones",
        "modeling_pico/training/construction.py",
        "columns[-self.args.reservoir_pairs :]",
        "columns[: self.args.reservoir_pairs]",
        ("tests/training/test_construction.py::test_the_reservoir_keeps_the_last_pairs",),
    ),
    Fault(
        "statistics",
        "statistics of earlier constructions are counted again",
        "modeling_pico/training/construction.py",
        "        self._start_collection()\n\n        report",
        "        self.columns = {}\n\n        report",
        ("tests/training/test_construction.py",),
    ),
    Fault(
        "kmeans_start",
        "of several starts the worst is taken",
        "modeling_pico/training/construction.py",
        "return min(runs",
        "return max(runs",
        ("tests/training/test_construction.py::test_the_best_of_several_starts_is_less_a_matter_of_chance",),
    ),
    Fault(
        "style_for_semantics",
        "columns of style weigh most",
        "modeling_pico/model/prototypes_pico.py",
        "probability = 1 - style",
        "probability = style",
        ("tests/test_prototypes_pico.py::test_the_probability_is_the_written_formula",),
    ),
    # Training
    Fault(
        "backbone_rate",
        "backbones learn at the rate of new layers",
        "modeling_pico/training/trainer.py",
        'rate = backbone_rate if is_backbone else group["lr"]',
        'rate = group["lr"]',
        ("tests/training/test_trainer.py::test_learning_rate_and_decay_of_each_group",),
    ),
    Fault(
        "chunk_temperature",
        "the temperature learns as often as there are chunks",
        "modeling_pico/training/gradient_cache.py",
        "(scale_gradient if last else 0.0)",
        "scale_gradient",
        ("tests/training/test_gradient_cache.py::test_chunks_give_the_loss_and_gradient_of_the_whole_batch",),
    ),
    Fault(
        "chunk_share",
        "auxiliary losses count as often as there are chunks",
        "modeling_pico/training/gradient_cache.py",
        "auxiliary_gradient * shares[index]",
        "auxiliary_gradient",
        ("tests/training/test_auxiliary_losses.py::test_chunks_weigh_them_by_their_pairs",),
    ),
    Fault(
        "non_finite_alone",
        "a loss that is NaN on one process alone is not noticed on the others",
        "modeling_pico/durable/finite.py",
        "return loss * torch.where(loss.isfinite(), 1.0, torch.nan)",
        "return loss",
        ("tests/durable/test_non_finite.py::test_a_loss_that_is_not_finite_leaves_no_gradient_finite",),
    ),
    Fault(
        "evaluation_generator",
        "evaluating changes what training draws next",
        "modeling_pico/training/trainer.py",
        "            generator=torch.Generator(),\n",
        "",
        ("tests/training/test_workers.py::test_an_evaluation_draws_nothing_from_the_global_generator",),
    ),
    Fault(
        "resume_generators",
        "a resumed run draws other dropout than the whole one",
        "modeling_pico/durable/trainer.py",
        "    def _load_progress(self)",
        "    def _load_rng_state(self, checkpoint):\n        pass\n\n    def _load_progress(self)",
        ("tests/durable/test_durable_trainer.py::test_a_run_resumed_from_any_checkpoint_is_the_uninterrupted_one",),
    ),
    Fault(
        "resume_construction",
        "a resumed run has forgotten what its construction collected",
        "modeling_pico/training/trainer.py",
        "            self.construction.load(folder)\n",
        "            pass\n",
        ("tests/training/test_resume.py::test_resume_from_any_checkpoint_equals_the_whole_run",),
    ),
    # Gallery alignment
    Fault(
        "moments_merge",
        "the moments of several batches leave out how far their means are apart",
        "modeling_pico/model/gallery_alignment_pico.py",
        "squares = self.squares + other.squares + apart.square() * self.count * share",
        "squares = self.squares + other.squares",
        ("tests/test_gallery_alignment_pico.py::test_moments_do_not_depend_on_batches",),
    ),
    Fault(
        "alignment_class_state",
        "the class token is moved by the moments of the patches",
        "modeling_pico/model/gallery_alignment_pico.py",
        "of_class = _map(moments.class_state, self.class_mean, self.class_std, stays)",
        "of_class = _map(moments.tokens, self.mean, self.std, stays)",
        ("tests/test_gallery_alignment_pico.py::test_moving_is_that_of_the_definition",),
    ),
    Fault(
        "alignment_styles",
        "in the evaluation every batch is moved by the styles of the first one",
        "modeling_pico/evaluation/style_alignment.py",
        "own[start : start + size]",
        "own[:size]",
        ("tests/evaluation/test_style_alignment.py",),
    ),
    Fault(
        "moments_of_before",
        "a model that is trained again keeps the moments of the training before",
        "modeling_pico/training/trainer.py",
        "        model.image_moments.reset()\n",
        "",
        ("tests/training/test_alignment.py::test_training_forgets_them_and_is_the_same_without",),
    ),
    # What leaves the house
    Fault(
        "export_mask",
        "the exported text encoder calls padding words",
        "modeling_pico/export.py",
        "features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)\n"
        "        return features.embeds, features.mask",
        "features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)\n"
        "        return features.embeds, torch.ones_like(features.mask)",
        ("tests/test_export.py::test_learned_weights_of_vit_and_bert_from_the_command_line",),
    ),
    Fault(
        "card_directions",
        "the card gives recalls of one direction for the other",
        "modeling_pico/training/model_card.py",
        '(("image_to_text", "Image→text"), ("text_to_image", "Text→image"))',
        '(("image_to_text", "Text→image"), ("text_to_image", "Image→text"))',
        ("tests/test_model_card.py::test_full_card",),
    ),
    Fault(
        "retrieve_ties",
        "of equally good items the later one comes first",
        "modeling_pico/model/processing_pico.py",
        "scores, order = torch.cat([scores, new_scores], dim=1).sort(dim=1, descending=True, stable=True)",
        "scores = torch.cat([scores, new_scores], dim=1)\n"
        "        order = scores.shape[1] - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)\n"
        "        scores = scores.gather(1, order)",
        ("tests/test_processing_pico.py::test_retrieve_by_hand",),
    ),
    # Elsewhere
    Fault(
        "mteb_pooled",
        "mteb ranks by pooled vectors where late interaction was asked for",
        "modeling_pico/evaluation/mteb_encoder.py",
        "encoded.extend(embeds[mask].cpu() for embeds, mask in pairs)",
        "encoded.extend(embeds[mask].mean(dim=0, keepdim=True).cpu() for embeds, mask in pairs)",
        ("tests/evaluation/test_mteb_encoder.py::test_late_interaction_equals_the_evaluator",),
    ),
    Fault(
        "onnx_padding",
        "padding of texts counts as words where ONNX encoders encode them",
        "modeling_pico/search/encoder_onnx.py",
        "return [tokens[real] for tokens, real in zip(embeds, mask, strict=True)]",
        "return list(embeds)",
        ("tests/search/test_encoder_onnx.py::test_encodes_as_the_model_does",),
    ),
    Fault(
        "handler_scale",
        "an endpoint's shares of labels are flatter than the model's",
        "modeling_pico/model/handler.py",
        "(scores * self.model.logit_scale.float().exp().cpu()).softmax(dim=1)",
        "scores.softmax(dim=1)",
        ("tests/test_handler.py::test_labels",),
    ),
)


def planted(fault: Fault, tree: Path) -> str:
    """The file with the fault in it; ValueError if its text is not there once."""
    source = (tree / fault.file).read_text(encoding="utf-8")
    if (found := source.count(fault.old)) != 1:
        raise ValueError(
            f"The fault {fault.name!r} replaces a text that is {found} times in {fault.file}, not once: {fault.old!r}"
        )
    return source.replace(fault.old, fault.new)
