"""What `train_pico.py` consists of: its options, the data and the model of a run, what it prints and records."""
