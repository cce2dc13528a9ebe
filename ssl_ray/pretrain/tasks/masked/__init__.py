"""The masked autoencoder: most tokens are dropped before the encoder, and predicted from the others.

He et al., CVPR 2022 (arXiv:2111.06377); in 3D Chen et al., WACV 2023 (arXiv:2204.11716).
"""
