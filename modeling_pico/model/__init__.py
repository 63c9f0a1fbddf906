"""What is saved beside the weights: `save_pretrained` copies files of this folder, which import nothing outside it."""
