"""The self-supervised task: a corrupted view of every patch, which the network learns to restore.

In- or out-painting (Pathak et al. 2016, arXiv:1604.07379), then the shuffling of small boxes (Chen et al. 2019,
doi:10.1016/j.media.2019.101539), with the numbers and the order of MONAI's self-supervised tutorial
(Project-MONAI/tutorials, `self_supervised_pretraining/vit_unetr_ssl`) and the meaning of MONAI's `RandCoarseDropout`
and `RandCoarseShuffle`.
"""
