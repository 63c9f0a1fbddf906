#!/usr/bin/env python
"""
Makes a PICO retriever of a CLIP checkpoint, on your captioned images.

    python examples/finetune_clip.py openai/clip-vit-base-patch32 user/my_captions --output_dir outputs/my_clip

The data set has the splits `train` and `validation`, an image column, and a column with a caption or several. On more
than one GPU: `accelerate launch examples/finetune_clip.py ...`. With all options: `train_pico.py`.
"""

import argparse

from modeling_pico import (
    CaptionedImageDataset,
    PicoModel,
    PicoProcessor,
    PicoTrainer,
    PicoTrainingArguments,
    load_captioned_images,
)


parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
parser.add_argument("checkpoint", help="CLIP-like checkpoint, folder or Hub id")
parser.add_argument("dataset", help="data set, folder or Hub id")
parser.add_argument("--output_dir", default="outputs/my_clip")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--batch_size", type=int, default=64, help="pairs a step and device; more means more negatives")
parser.add_argument("--push_to_hub", metavar="USER/NAME", help="publish the model under this name")
args = parser.parse_args()

# Images are decoded when they are used; captions become lists.
train = CaptionedImageDataset(load_captioned_images(args.dataset, split="train"))
validation = CaptionedImageDataset(load_captioned_images(args.dataset, split="validation"))

# Towers, projections and temperature are CLIP's. The column weights start at 1, so training starts at the plain
# patch-by-word score.
model = PicoModel.from_backbones(args.checkpoint)
processor = PicoProcessor.from_backbones(args.checkpoint)

training_args = PicoTrainingArguments(
    output_dir=args.output_dir,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    per_device_eval_batch_size=args.batch_size,
    learning_rate=1e-4,
    backbone_learning_rate=1e-5,
    weight_decay=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    # Style prototypes: first ones after two epochs, updated each epoch from the fourth on.
    prototype_start=2,
    prototype_update_start=4,
    # Recall on the validation split chooses the checkpoint and tells how much new prototypes are worth.
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=1,
    load_best_model_at_end=True,
    metric_for_best_model="rsum",
    push_to_hub=args.push_to_hub is not None,
    hub_model_id=args.push_to_hub,
)
trainer = PicoTrainer(
    model=model,
    args=training_args,
    train_dataset=train,
    eval_dataset=validation,
    processing_class=processor,
)
# For the model card.
trainer.card_info = {"base_models": [args.checkpoint], "dataset_name": args.dataset}
trainer.train()
trainer.fit_alignment()

metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)

# Model, processor, model card, and the code that loads them without this package.
trainer.save_model()
trainer.create_model_card()
if args.push_to_hub:
    trainer.push_to_hub()
