"""A U-Net of convolutions alone, as nnU-Net plans it: the baseline without pretraining."""
