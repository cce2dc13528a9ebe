"""Self-supervised pretraining of a 3D ViT on unlabelled CT with Ray, and the measured answer whether it helps."""
